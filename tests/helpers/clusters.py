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
    # These are not the cluster's: multiprocessing's resource tracker, for example.
    before = set(_children())
    ray_cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for cores in nodes:
            ray_cluster.add_node(num_cpus=cores)
        yield ray_cluster
    finally:
        family = [each for each in _children() if each not in before]
        ray_cluster.shutdown()
        wait_for_end(family)


def _children() -> list[psutil.Process]:
    return psutil.Process(os.getpid()).children(recursive=True)


def cluster_env(ray_cluster: Cluster) -> dict[str, str]:
    """Return the environment variables of commands that connect to a cluster."""
    return {**os.environ, "RAY_ADDRESS": ray_cluster.address}


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


def nodes_with_engines(ray_cluster: Cluster) -> list[Any]:
    """Return the worker nodes on which an engine runs."""
    engines = {parent.pid for engine in processes("EngineCore") for parent in engine.parents()}
    return [
        node
        for node in ray_cluster.worker_nodes
        if any(each.process.pid in engines for infos in node.all_processes.values() for each in infos)
    ]
