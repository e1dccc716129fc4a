"""What the kernels' modules raise."""


class KernelError(Exception):
    """Why there is no kernel on this machine, in a few words."""
