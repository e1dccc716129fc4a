"""Products written for one kind of device. Each has a plain form in JAX, which it must equal."""
