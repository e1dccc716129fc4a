"""A server that speaks OpenAI's HTTP API; see docs/serving.md.

engine.py drives the model in its own thread. fields.py reads the body of a request, answers.py and
chat.py write that of an answer, and app.py connects them. It needs requirements-serve.txt.
"""
