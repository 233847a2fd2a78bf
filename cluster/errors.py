"""Errors that end a command with one line for the user instead of a traceback."""

from __future__ import annotations

from model.errors import ModelError
from shards.errors import DataError, NodeError, StoreError
from trainer.checkpoint.errors import (
    CheckpointError,
    OwnedError,
    StaleAttemptError,
    UnsavedError,
)
from trainer.errors import ConfigError, DivergedError


class LaunchError(RuntimeError):
    """The workers cannot be placed, or fail by an error that no one has foreseen."""


class AwayError(LaunchError):
    """The job server of a Ray cluster cannot be reached."""


class AgainError(RuntimeError):
    """The run ended early by no fault of its own: the same command goes on."""


class LostError(AgainError):
    """Workers, nodes or Ray were lost, more often than the run puts up with."""


# The run is another job's, or has become it.
OWNER_ERRORS = (OwnedError, StaleAttemptError)
# What a worker may raise that no new attempt can mend.
FINAL_ERRORS = (
    ConfigError,
    DataError,
    StoreError,
    NodeError,
    ModelError,
    CheckpointError,
    UnsavedError,
    DivergedError,
    *OWNER_ERRORS,
)
# Of these, what another command may find mended.
AGAIN_ERRORS = (StoreError, NodeError, UnsavedError)
USER_ERRORS = (*FINAL_ERRORS, LaunchError, AgainError)


def exit_status(error: BaseException) -> int:
    """What a command ends with: 75 where it should be run again (EX_TEMPFAIL of sysexits.h), 3
    where another job does its work, 2 where all that would change nothing."""
    if isinstance(error, OWNER_ERRORS):
        return 3
    return 75 if isinstance(error, (*AGAIN_ERRORS, AgainError)) else 2
