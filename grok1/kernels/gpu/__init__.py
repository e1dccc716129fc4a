"""Kernels for NVIDIA GPUs, in Pallas with its Triton backend. Nothing else knows of Pallas."""
