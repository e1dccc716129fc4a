"""The exception that the kernels' modules raise."""


class KernelError(Exception):
    """The kernels cannot be used on this machine; the message says why."""
