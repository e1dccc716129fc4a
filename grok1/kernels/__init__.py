"""What a device computes faster by its own means than as XLA compiles it; see dispatch.py."""
