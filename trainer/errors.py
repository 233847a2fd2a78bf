"""The errors of a configuration and of training itself."""


class ConfigError(ValueError):
    """The configuration, or what it asks of this data set or checkpoint, is wrong."""


class DivergedError(RuntimeError):
    """Losses, gradients, weights or moments are not finite, and training cannot go on by itself."""
