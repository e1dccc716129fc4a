"""What a request can ask for at most, and what its defaults are.

Known without jax, which takes seconds to import.
"""

DEFAULT_TEMPERATURE = 0.7  # in API and command
DEFAULT_SEED = 42

CHUNKS = (16, 128, 1024)  # the lengths in which prompts are read
MOST_LOGPROBS = 20  # the most log-probabilities that can be asked for beside each token
MOST_SAMPLES = 1024  # answers to one prompt
LARGEST_BIAS = 1e9  # and the largest presence penalty: logits stay finite
LARGEST_PENALTY = 1e6  # of repetition, and one over the smallest
