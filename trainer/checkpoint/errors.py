"""The errors of checkpoints."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used for this run."""


class NewerFormatError(CheckpointError):
    """Something was written by a later version: nothing behind it may be taken for the newest."""


class OwnedError(CheckpointError):
    """Another job, which is alive, owns the run."""


class StaleAttemptError(CheckpointError):
    """A later attempt of the run has started: this one may commit nothing more."""


class UnsavedError(CheckpointError):
    """The store took no checkpoint for too long, or not the last one of a run that was told to
    stop: worth starting again once the store answers."""
