"""Processes and nodes of a real Ray cluster are killed and stopped; the engines on it are without a model."""

import asyncio
import os
import signal
import time

import numpy as np
import psutil
import pytest
import torch
from ray.cluster_utils import Cluster
from safetensors.numpy import save_file

from rollouts.actor import EngineActor
from rollouts.cluster import Engines, cluster
from rollouts.host import ClusterError, Deadlines, Refused
from rollouts.request import Placement
from rollouts.scripted_engine import SCRIPTED
from search.base import Sampling, Trajectory, derive

QUICK = Deadlines(room=2.0, start=60, sync=10, beat=1.5, reply=10, every=0.2, retry=1.0)

ONE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


@pytest.fixture(scope="module")
def nodes():
    """Two nodes with room for an engine each; the first is the driver's."""
    nodes = Cluster(initialize_head=True, head_node_args=ONE)
    nodes.add_node(**ONE)
    nodes.wait_for_nodes()
    with cluster(nodes.address):
        yield nodes
    nodes.shutdown()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    save_file({"w": np.zeros(1000, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def engines(nodes, checkpoint):
    engines = Engines.start(
        checkpoint, Placement(count=2), Sampling(max_tokens=40), 0, engine=SCRIPTED, deadlines=QUICK
    )
    yield engines
    engines.stop()


def push(engines, version):
    engines.load([("w", torch.full((1000,), float(version)))], version)


async def sample(engines, step, tasks=8):
    roots = [Trajectory((1, 2, i), seed=derive(step, i)) for i in range(tasks)]
    groups = await asyncio.gather(*(engines.extend(root, n=4) for root in roots))
    return [path for group in groups for path in group]


def check(paths, versions):
    """Each token is from one of the versions, and was written by the weights that it names."""
    for path in paths:
        (step,) = path.steps
        named = [version for version, start, end in step.versions for _ in range(start, end)]
        assert set(named) <= versions and named == [-lp for lp in step.logprobs]


def settled(engines, version, within=60.0):
    """Waits until all serve `version`; returns the seconds that it took."""
    start = time.monotonic()
    while not all((s.state, s.version) == ("serving", version) for s in engines.states()):
        assert time.monotonic() - start < within, engines.states()
        time.sleep(0.02)
    return time.monotonic() - start


def undisturbed(engines, step):
    return [path.ids for path in asyncio.run(sample(engines, step))]


def test_engines_spread_over_the_nodes_and_weights_reach_them(engines):
    assert len({s.node for s in engines.states()}) == 2
    push(engines, 1)
    settled(engines, 1)
    check(asyncio.run(sample(engines, 0)), {1})
    assert len(set(engines.checksums())) == 1


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_engine_is_lost_while_it_samples_and_nobody_notices(engines, how):
    push(engines, 1)
    settled(engines, 1)
    expected = undisturbed(engines, 1)
    victim = engines.pids()[0][0]
    restarts = sum(s.restarts for s in engines.states())

    async def kill_under_way():
        answers = asyncio.ensure_future(sample(engines, 1))
        await asyncio.sleep(0.02)
        os.kill(victim, how)
        return await answers

    paths = asyncio.run(kill_under_way())
    assert [path.ids for path in paths] == expected
    check(paths, {1})
    settled(engines, 1)
    assert sum(s.restarts for s in engines.states()) == restarts + 1
    end = time.monotonic() + 10  # the process must not go on holding its node's memory
    while psutil.pid_exists(victim) and psutil.Process(victim).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_engine_killed_during_a_push_comes_back_with_the_new_weights(engines):
    push(engines, 1)
    settled(engines, 1)
    victim = engines.pids()[1][0]

    async def kill_while_pushing():
        pushing = asyncio.ensure_future(asyncio.to_thread(push, engines, 2))
        os.kill(victim, signal.SIGKILL)
        await pushing
        return await sample(engines, 2)

    check(asyncio.run(kill_while_pushing()), {2})
    assert settled(engines, 2) < 60


@pytest.mark.slow
def test_engine_of_a_killed_node_moves_or_leaves_its_work_to_the_rest(engines, nodes):
    push(engines, 2)
    settled(engines, 2)
    (first,) = nodes.worker_nodes
    spare = nodes.add_node(**ONE)
    nodes.wait_for_nodes()

    nodes.remove_node(first, allow_graceful=False)
    check(asyncio.run(sample(engines, 3)), {2})
    push(engines, 3)
    settled(engines, 3)
    assert {s.node.split("/")[1] for s in engines.states()} == {n.node_id[:6] for n in (nodes.head_node, spare)}

    nodes.remove_node(spare, allow_graceful=False)
    check(asyncio.run(sample(engines, 4)), {3})
    push(engines, 4)
    check(asyncio.run(sample(engines, 5)), {4})
    end = time.monotonic() + 60
    while not any("room for 1" in s.why for s in engines.states()):
        assert time.monotonic() < end, engines.states()
        time.sleep(0.02)

    nodes.add_node(**ONE)
    settled(engines, 4)


def test_a_cluster_with_too_few_resources_says_at_once_what_is_missing(nodes, checkpoint):
    start = time.monotonic()
    with pytest.raises(ClusterError, match="engine.count = 9 with 1 CPU each, but the Ray cluster has room for 2"):
        Engines.start(checkpoint, Placement(count=9), Sampling(), 0, engine=SCRIPTED)
    with pytest.raises(ClusterError, match="1 CPU and 0.5 GPU each, but the Ray cluster has room for 0"):
        Engines.start(checkpoint, Placement(count=2, gpus=0.5), Sampling(), 0, engine=SCRIPTED)
    assert time.monotonic() - start < 2


def test_a_checkpoint_that_a_node_does_not_see_is_told_by_that_node(tmp_path):
    with pytest.raises(Refused, match="missing is not on node .* file system that all nodes see"):
        asyncio.run(EngineActor(SCRIPTED, str(tmp_path / "missing"), Placement(), 0).ready())


def test_resources_that_others_hold_are_named(engines, checkpoint):
    with pytest.raises(ClusterError, match="no node has room"):
        Engines.start(checkpoint, Placement(count=1), Sampling(), 0, engine=SCRIPTED, deadlines=QUICK)
