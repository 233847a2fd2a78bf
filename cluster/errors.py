"""Errors that end a command with one line for the user instead of a traceback."""

from __future__ import annotations

from model.errors import ModelError
from shards.errors import DataError
from trainer.checkpoint.errors import CheckpointError, OwnedError, StaleAttemptError
from trainer.config import ConfigError


class LaunchError(RuntimeError):
    """The workers could not be placed, or failed more often than cluster.max_failures."""


# The run is another job's, or has become it.
OWNER_ERRORS = (OwnedError, StaleAttemptError)
# What a worker may raise that no new attempt can mend.
FINAL_ERRORS = (ConfigError, DataError, ModelError, CheckpointError, *OWNER_ERRORS)
USER_ERRORS = (*FINAL_ERRORS, LaunchError)
