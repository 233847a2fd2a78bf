"""The error of training itself."""


class DivergedError(RuntimeError):
    """Losses, gradients, weights or moments are not finite, and training cannot go on by itself."""
