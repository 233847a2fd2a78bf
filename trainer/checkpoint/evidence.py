"""Whether a run without a generation ever had one: then it does not start from scratch."""

from __future__ import annotations

import logging

from trainer.checkpoint.chain import Traces, read_traces
from trainer.checkpoint.errors import CheckpointError, NewerFormatError
from trainer.checkpoint.format import ObjectEntry, SegmentEntry, lease_url
from trainer.checkpoint.lease import parse_lease, read_lease

log = logging.getLogger("lxscale")


def check_never_committed(run_url: str) -> None:
    """Raise CheckpointError when a run in which no generation can be found had one.

    A first save that was never committed leaves objects, too: then the run may start from scratch,
    and the log says so.
    """
    traces = read_traces(run_url)
    if found := _commit(traces):
        raise CheckpointError(
            f"{run_url} has no manifest of a checkpoint, but {found}: its manifests (a….json or "
            "step-….json under checkpoints) are missing; restore them, or give the run another "
            "run.name to start from scratch"
        )
    if traces.objects:
        log.warning(
            "%s has %d objects of a first save that was never committed: it starts from scratch",
            run_url,
            len(traces.objects),
        )


def _commit(traces: Traces) -> str | None:
    """What shows that something was committed."""
    for name in traces.segments:
        m = SegmentEntry.pattern.fullmatch(name)
        # A segment begins after the last committed one.
        if m and int(m["first"]) > 1:
            return f"record/{name} goes on from one"
    for link in traces.links:
        # Without generations it is a claim.
        if link.index > 1:
            return f"the claim {link.name} follows on one"
    # Those that have a claim; one of lxscale 0.1.0 does not say whether it committed.
    uncommitted = {link.attempt + 1 for link in traces.links}
    for name in reversed(traces.leases):
        url = lease_url(traces.run_url, name)
        try:
            lease = parse_lease(read_lease(url), url)
        except NewerFormatError:
            raise
        except CheckpointError:
            lease = None
        if lease and lease.committed is not None:
            return f"attempts/{name} says that step {lease.committed} was committed"
        if lease:
            uncommitted.add(lease.attempt)
    for pattern, names in (
        (ObjectEntry.pattern, traces.objects),
        (SegmentEntry.pattern, traces.segments),
    ):
        for m in filter(None, map(pattern.fullmatch, names)):
            if int(m["attempt"]) not in uncommitted:
                return f"{m[0]}, and no lease or claim says that it was not committed"
    return None
