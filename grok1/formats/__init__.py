"""Checkpoints on disk: the released form, the safetensors form, and loading onto devices."""
