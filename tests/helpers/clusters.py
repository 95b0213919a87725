"""Multi-node Ray clusters on this machine, and the processes on their nodes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from runs import free_port, wait_for_end


@contextmanager
def cluster(*nodes: int) -> Iterator[Cluster]:
    """Start a cluster with a head of one core, and a worker node for each number of cores; stop it afterwards."""
    head = {"num_cpus": 1, "include_dashboard": True, "dashboard_port": free_port()}
    # Processes that are not the cluster's, such as multiprocessing's resource tracker.
    before = set(_children())
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        for cores in nodes:
            made.add_node(num_cpus=cores)
        yield made
    finally:
        family = [each for each in _children() if each not in before]
        made.shutdown()
        wait_for_end(family)


def _children() -> list[psutil.Process]:
    return psutil.Process(os.getpid()).children(recursive=True)


def joining(made: Cluster) -> dict[str, str]:
    """Return the environment for commands that connect to a cluster."""
    return {**os.environ, "RAY_ADDRESS": made.address}


def processes(name: str) -> list[psutil.Process]:
    """Return the descendants of this process whose command line contains a name."""
    found = []
    for process in _children():
        try:
            if name in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def holders(made: Cluster) -> list[Any]:
    """Return the worker nodes that run an engine's process."""
    engines = {parent.pid for engine in processes("EngineCore") for parent in engine.parents()}
    return [
        node
        for node in made.worker_nodes
        if any(each.process.pid in engines for infos in node.all_processes.values() for each in infos)
    ]
