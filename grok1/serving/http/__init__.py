"""A server that speaks OpenAI's HTTP API; see docs/serving.md.

engine.py drives the model in its own thread. fields.py and chat.py read the body of a request,
answers.py writes that of an answer, and app.py connects them. serve.py starts and ends the server,
connection.py limits its connections, and metrics.py counts. It needs requirements-serve.txt.
"""
