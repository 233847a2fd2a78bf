"""Attempts of a run: each job that works on it claims a number; a higher one makes it stale."""

from __future__ import annotations

import re
import secrets

from shards.store import objects
from trainer.checkpoint.errors import CheckpointError, StaleAttemptError

_CLAIM = re.compile(r"(?P<attempt>\d+)-(?P<token>[0-9a-f]+)\.json")


def claim_attempt(run_url: str) -> int:
    """Number this attempt: one above every earlier one. Two at once: one gets the number, the
    other a CheckpointError."""
    number = 1 + max((n for n, _ in _claims(run_url)), default=0)
    token = secrets.token_hex(8)
    objects.write_bytes(objects.join(_folder(run_url), f"{number:06d}-{token}.json"), b"{}")
    if min(t for n, t in _claims(run_url) if n == number) != token:
        raise CheckpointError(
            f"another job has just started the run {run_url}: give this one another run.name"
        )
    return number


def check_not_stale(run_url: str, attempt: int) -> None:
    """Raise StaleAttemptError when a later attempt has been claimed."""
    newest = max((n for n, _ in _claims(run_url)), default=attempt)
    if newest > attempt:
        raise StaleAttemptError(
            f"attempt {attempt} of {run_url} is stale: attempt {newest} has started since; "
            "this one stops and commits nothing"
        )


def _folder(run_url: str) -> str:
    return objects.join(run_url, "attempts")


def _claims(run_url: str) -> list[tuple[int, str]]:
    """(attempt, token) of every claim."""
    found = map(_CLAIM.fullmatch, objects.list_names(_folder(run_url)))
    return [(int(m["attempt"]), m["token"]) for m in found if m]
