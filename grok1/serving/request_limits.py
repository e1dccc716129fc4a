"""What a request can ask for at most; known without jax, which takes seconds to import."""

MOST_SAMPLES = 1024  # answers to one prompt
LARGEST_BIAS = 1e9  # and the largest presence penalty: logits stay finite
LARGEST_PENALTY = 1e6  # of repetition, and one over the smallest
