"""The small files in a run's folder that say what its numbers mean: vocabulary and answer table."""

from __future__ import annotations

import hashlib
import json

from shards.errors import NotFoundError
from shards.format.build import ANSWERS, VOCAB
from shards.store import objects
from trainer.checkpoint.errors import CheckpointError
from trainer.checkpoint.generations import Generation


def run_vocab(generation: Generation) -> bytes:
    """The vocab.txt of a checkpoint's run. CheckpointError where it is another one."""
    sha256 = generation.manifest.vocab_sha256
    return _verified(generation, VOCAB, "the vocabulary", sha256)


def run_answers(generation: Generation) -> list[str]:
    """The answer table of a checkpoint's run. CheckpointError where it is another one."""
    sha256 = generation.manifest.answers_sha256
    return list(json.loads(_verified(generation, ANSWERS, "the answer table", sha256)))


def _verified(generation: Generation, name: str, what: str, sha256: str) -> bytes:
    url = objects.join(generation.run_url, name)
    try:
        data = objects.read_bytes(url)
    except NotFoundError:
        raise CheckpointError(
            f"{url} does not exist, which {generation.url} was trained with: copy the training "
            f"set's {name} there"
        ) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(
            f"{url} is not {what} that {generation.url} was trained with (their sha256 differ): "
            f"copy the training set's {name} there"
        )
    return data
