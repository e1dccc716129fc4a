"""Limits and defaults of the fields of a request.

Does not import jax, which takes seconds.
"""

DEFAULT_TEMPERATURE = 0.7  # in the API and the command
DEFAULT_SEED = 42

CHUNKS = (16, 128, 1024)  # lengths of the chunks in which prompts are read
SERVED_CHUNK = 128  # the longest one of a server on a CPU
MOST_LOGPROBS = 20  # the most log-probabilities reported with each token
MOST_SAMPLES = 1024  # answers to one prompt
LARGEST_BIAS = 1e9  # and the largest presence penalty: logits stay finite
LARGEST_PENALTY = 1e6  # the largest repetition penalty; its inverse is the smallest
