"""The errors of the data side."""

from shards.urls import shown


class DataError(ValueError):
    """Input data, a data set or an object store is not as it must be; the message names the thing
    (file, line, key) and the remedy. URLs in it are shown without passwords."""

    def __init__(self, message: object = "") -> None:
        super().__init__(shown(message))


class NotFoundError(DataError):
    """The object is not there."""


class StoreError(DataError):
    """The object store was away, or failed, for longer than its deadline: later it may not."""
