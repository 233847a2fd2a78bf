"""Errors that end a command with one line for the user instead of a traceback."""

from __future__ import annotations

from model.errors import ModelError
from shards.errors import DataError
from trainer.checkpoint.errors import CheckpointError
from trainer.config import ConfigError
from trainer.errors import DivergedError


class LaunchError(RuntimeError):
    """The workers could not be placed, or failed more often than cluster.max_failures."""


# What a worker may raise that no new attempt can mend.
FINAL_ERRORS = (ConfigError, DataError, ModelError, CheckpointError, DivergedError)
USER_ERRORS = (*FINAL_ERRORS, LaunchError)
