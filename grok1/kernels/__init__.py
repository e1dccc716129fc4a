"""Kernels that are faster than what XLA compiles, and their selection; see dispatch.py."""
