"""The errors of checkpoints."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, read or used for this run."""


class StaleAttemptError(CheckpointError):
    """A later attempt of the run has started: this one may commit nothing more."""
