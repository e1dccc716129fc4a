"""What the modules of model.py compute, as pure functions in plain JAX."""
