"""What the modules of model.py compute, as pure functions of JAX."""
