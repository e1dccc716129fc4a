"""Grok-1 inference: everything that model.py, runner.py, checkpoint.py and run.py are built on."""

__version__ = "0.1.0"
