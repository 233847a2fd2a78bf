"""Parts of a build as tasks of a Ray cluster.

Ray runs a part again where its node is lost; it finds by its receipt what was whole. The inputs and
a folder as --out must be there on every node under the same path, as on a shared file system.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import Future

import ray

from cluster.errors import LaunchError
from shards.convert.part import Part, PartSettings, Receipt, make_part
from shards.convert.pool import RunParts, Workers, in_order

_RETRIES = 10  # nodes that one part may lose


def on_ray(address: str, workers: int | None = None) -> Workers:
    """The cluster at `address`, so many parts at a time (default: two a core)."""

    @contextlib.contextmanager
    def start() -> Iterator[RunParts]:
        with _joined(address):
            yield run

    def run(settings: PartSettings, parts: Iterable[Part]) -> Iterator[Receipt]:
        cores = int(ray.cluster_resources().get("CPU", 1))
        shared = ray.put(settings)
        task = ray.remote(make_part).options(
            num_cpus=1, max_retries=_RETRIES, retry_exceptions=False
        )

        def submit(part: Part) -> Future[Receipt]:
            return task.remote(shared, part).future()

        try:
            yield from in_order(parts, submit, workers or 2 * max(cores, 1))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None

    return start


@contextlib.contextmanager
def _joined(address: str) -> Iterator[None]:
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise LaunchError(f"cannot join the Ray cluster at {address}: {error}") from None
    try:
        yield
    finally:
        ray.shutdown()
