"""The error of this package."""


class ModelError(ValueError):
    """Weights or sizes do not fit; the message names the file and the key, and what to do."""
