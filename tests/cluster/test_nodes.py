"""Faults of nodes, links and of Ray's head, on a cluster that a run has joined.

Each notes what it cost: seconds from the fault to the next step's line, or to the run's end.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from tests.cluster.joined import MANY, STEPS, Runs, assert_ended, begun, drain, raylet
from tests.cluster.namespaces import Network
from tests.cluster.test_fault_table import Watched
from tests.conftest import note_cost
from trainer.checkpoint.generations import find_generation

pytestmark = pytest.mark.faults


# --- lost nodes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["rank 0", "the other"])
def test_a_lost_node_of_two_costs_seconds_and_no_step(
    victim: str, runs: Runs, cluster: Cluster, name: str
) -> None:
    job, nodes = begun(runs, cluster, name, 1, 1)
    cluster.add_node(num_cpus=1)
    moment = time.time()
    cluster.remove_node(nodes[victim != "rank 0"], allow_graceful=False)
    assert job.finish() == 0, job.text()
    note_cost(f"a lost node, of {victim}", job.next_step_after(moment))
    assert job.text().count("lost worker") == 1, job.text()
    runs.check(name)


def test_a_lost_node_of_all_workers_costs_seconds_and_no_step(
    runs: Runs, cluster: Cluster, name: str
) -> None:
    job, (node,) = begun(runs, cluster, name, 2)
    cluster.add_node(num_cpus=2)
    moment = time.time()
    cluster.remove_node(node, allow_graceful=False)
    assert job.finish() == 0, job.text()
    note_cost("a lost node, of all workers", job.next_step_after(moment))
    runs.check(name)


@pytest.mark.parametrize("stopped", ["the raylet", "all"])
def test_a_node_that_is_stopped_costs_seconds_and_no_step(
    stopped: str, runs: Runs, cluster: Cluster, name: str
) -> None:
    """It still takes connections."""
    job, nodes = begun(runs, cluster, name, 1, 1)
    cluster.add_node(num_cpus=1)
    moment = time.time()
    victims = [psutil.Process(raylet(nodes[0]))]
    victims += victims[0].children(recursive=True) if stopped == "all" else []
    for victim in victims:
        victim.suspend()
    try:
        status = job.finish()
    finally:
        for victim in victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.resume()
    assert status == 0, job.text()
    note_cost(f"a node of which {stopped} is stopped", job.next_step_after(moment))
    runs.check(name)


# --- drained nodes ------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["rank 0", "the other"])
def test_a_drained_node_is_left_without_a_lost_step(
    victim: str, runs: Runs, cluster: Cluster, name: str
) -> None:
    job, nodes = begun(runs, cluster, name, 1, 1)
    cluster.add_node(num_cpus=1)
    moment = time.time()
    drain(cluster, nodes[victim != "rank 0"])
    assert job.finish() == 0, job.text()
    note_cost(f"a drained node, of {victim}", job.next_step_after(moment))
    assert "starting again elsewhere" in job.text() and "attempt 2 |" in job.text()
    assert [step for _, step in job.steps()] == list(range(1, STEPS + 1))
    runs.check(name)


def test_a_drained_node_without_room_elsewhere_ends_the_run(
    runs: Runs, cluster: Cluster, name: str
) -> None:
    job, nodes = begun(runs, cluster, name, 1, 1, steps=MANY, start_timeout_s=20)
    moment = time.time()
    drain(cluster, nodes[0])
    job.finish()
    note_cost("a drained node without room elsewhere, to the end", time.time() - moment)
    assert_ended(job, 75, "no room for 2 workers within cluster.start_timeout_s=20")
    assert find_generation(str(runs.folder / name)).step == job.step()


# --- the head -----------------------------------------------------------------------------------


def _kill_gcs(cluster: Cluster) -> None:
    cluster.head_node.kill_gcs_server()  # type: ignore[attr-defined]


def _lose_head(cluster: Cluster) -> None:
    cluster.remove_node(cluster.head_node, allow_graceful=False)


def test_a_run_whose_worker_was_on_the_lost_head_ends(runs: Runs, name: str) -> None:
    """Nothing can be placed any more, and nothing of Ray's answers."""
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        job, _ = begun(runs, cluster, name, 1, steps=MANY)
        moment = time.time()
        _lose_head(cluster)
        job.finish()
    finally:
        cluster.shutdown()
    note_cost("the head is gone with a worker, to the end", time.time() - moment)
    assert_ended(job, 75, "head")


@pytest.mark.parametrize("lose", [_kill_gcs, _lose_head])
def test_a_run_whose_cluster_lost_its_head_saves_and_ends(
    lose: Callable[[Cluster], None], runs: Runs, cluster: Cluster, name: str
) -> None:
    job, _ = begun(runs, cluster, name, 2, steps=MANY)
    moment = time.time()
    lose(cluster)
    job.finish()
    note_cost(f"the head is gone ({lose.__name__}), to the end", time.time() - moment)
    assert_ended(job, 75, "head has not answered")
    assert find_generation(str(runs.folder / name)).step == job.step()


def test_no_room_and_no_cluster_are_one_line(runs: Runs, cluster: Cluster, name: str) -> None:
    began = time.time()
    job = runs.start(name, "--ray-address", cluster.address, start_timeout_s=5)
    job.finish()
    note_cost("no room, to the end", time.time() - began)
    assert_ended(job, 75, "no room for 2 workers within cluster.start_timeout_s=5")
    web = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    for port in (1, web.server_port):
        began = time.time()
        job = runs.start(name, "--ray-address", f"127.0.0.1:{port}")
        job.finish()
        note_cost("no cluster at the address, to the end", time.time() - began)
        assert_ended(job, 2, f"cannot join Ray at 127.0.0.1:{port}")
    web.shutdown()
    web.server_close()


# --- links --------------------------------------------------------------------------------------


def on(network: Network, runs: Runs, name: str, **settings: Any) -> Watched:
    """A job, on the head's machine."""
    address = ("--ray-address", network.address)
    return runs.start(name, *address, within=network.on(0), **settings)


def _of_rank_0(network: Network) -> int:
    """The machine whose worker listens most: for the store, too."""

    def count(number: int) -> int:
        return sum("Worker" in process for _, process in network.listeners(number))

    return max((1, 2), key=count)


def test_workers_listen_on_the_clusters_interface_only(
    network: Network, runs: Runs, name: str
) -> None:
    """Rank 0's store and gloo; each worker has one more socket, Ray's own."""
    job = on(network, runs, name, steps=MANY)
    job.wait_for_step(3)
    found = {
        number: [address for address, process in network.listeners(number) if "Worker" in process]
        for number in (1, 2)
    }
    job.process.send_signal(signal.SIGTERM)
    assert job.finish() == 75, job.text()
    sizes = []
    for number, addresses in found.items():
        own = [a for a in addresses if a not in ("*", "0.0.0.0", "[::]")]
        assert set(own) == {network.address_of(number)} and len(addresses) - len(own) <= 1, found
        sizes.append(len(own))
    assert max(sizes) > min(sizes), found  # the store is seen


@pytest.mark.parametrize("victim", ["rank 0", "the other"])
def test_a_cut_link_costs_seconds_and_no_step(
    victim: str, network: Network, runs: Runs, name: str
) -> None:
    """For good; a third machine takes over."""
    job = on(network, runs, name)
    job.wait_for_step(50)
    network.add()
    first = _of_rank_0(network)
    moment = time.time()
    network.cut(first if victim == "rank 0" else 3 - first)
    assert job.finish() == 0, job.text()
    note_cost(f"a cut link to {victim}, with room elsewhere", job.next_step_after(moment))
    runs.check(name)


def test_a_link_cut_for_a_moment_costs_no_attempt(network: Network, runs: Runs, name: str) -> None:
    job = on(network, runs, name)
    job.wait_for_step(50)
    moment = time.time()
    network.cut(1)
    time.sleep(5)
    network.mend(1)
    assert job.finish() == 0, job.text()
    note_cost("a link cut for 5 s", next(t for t, _ in job.steps() if t > moment + 5) - moment)
    assert "attempt 2 |" not in job.text(), job.text()
    runs.check(name)


@pytest.mark.parametrize("seconds", [20, 60])
def test_a_link_cut_for_a_while_is_waited_for(
    seconds: int, network: Network, runs: Runs, name: str
) -> None:
    """Without room elsewhere. Ray ends a node that was away for long, and who keeps the machine
    starts it again; the time for which a run waits is no failure."""
    job = on(network, runs, name, start_timeout_s=180, max_failures=1)
    job.wait_for_step(50)
    moment = time.time()
    network.cut(1)
    time.sleep(seconds)
    network.mend(1)
    until = time.monotonic() + 240
    while job.process.poll() is None and time.monotonic() < until:
        network.keep(1)
        time.sleep(0.5)
    status = job.finish(5)
    note_cost(f"a link cut for {seconds} s, without room elsewhere", job.next_step_after(moment))
    assert status == 0, job.text()
    runs.check(name)


def test_a_cut_link_without_room_elsewhere_ends_the_run(
    network: Network, runs: Runs, name: str
) -> None:
    job = on(network, runs, name, start_timeout_s=20, max_failures=1)
    job.wait_for_step(50)
    moment = time.time()
    network.cut(1)
    job.finish()
    note_cost("a cut link without room elsewhere, to the end", time.time() - moment)
    assert_ended(job, 75, "no room for 2 workers within cluster.start_timeout_s=20")


def test_sigterm_ends_a_run_with_a_cut_link(network: Network, runs: Runs, name: str) -> None:
    job = on(network, runs, name, hang_timeout_s=100, stop_timeout_s=15)
    job.wait_for_step(50)
    network.cut(1)
    time.sleep(2)
    moment = time.time()
    job.process.send_signal(signal.SIGTERM)
    job.finish()
    took = time.time() - moment
    note_cost("SIGTERM with a cut link, to the end (stop_timeout_s=15)", took)
    assert_ended(job, 75, "cluster.stop_timeout_s=15")
