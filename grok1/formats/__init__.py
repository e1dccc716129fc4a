"""Checkpoints on disk: the released form, the safetensors form, and the way to the devices."""
