"""Autoscaling cluster on this machine: Ray's real autoscaler with Ray's fake node provider."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from runs import free_port, head_ports, kill_family

RAY = str(Path(sys.executable).parent / "ray")
HEAD = "ray.head.default"
# Required fields of the autoscaler's configuration; a fake node runs no commands.
LISTS = (
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
    "cluster_synced_files",
)


@contextmanager
def autoscaling_head(folder: Path, types: dict[str, Any], idle_timeout_minutes: float) -> Iterator[tuple[str, Path]]:
    """Start a head of one core with an autoscaler; stop it and all its nodes afterwards.

    Args:
        folder: folder for the configuration and the log.
        types: `available_node_types` of a `ray up` file, without the head's.
        idle_timeout_minutes: time after which the autoscaler removes an idle node.

    Yields:
        The head's address, and the file that `ray up` would copy to it.
    """
    port = free_port()
    config = {
        "cluster_name": "autoscaling",
        "max_workers": sum(each["max_workers"] for each in types.values()),
        "idle_timeout_minutes": idle_timeout_minutes,
        "provider": {
            # As an external module, because Ray's wheel lacks the defaults of the provider `fake_multinode`.
            "type": "external",
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": f"127.0.0.1:{port}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
        },
        "available_node_types": {HEAD: {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0}, **types},
        "head_node_type": HEAD,
        "upscaling_speed": 1.0,
        # The autoscaler cannot remove nodes without a user.
        "auth": {"ssh_user": "nobody"},
        "file_mounts": {},
        **{key: [] for key in LISTS},
    }
    file, log = folder / "cluster.json", folder / "head.log"
    file.write_text(json.dumps(config))
    environment = {
        **os.environ,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_AUTH_MODE": "disabled",
    }
    command = [RAY, "start", "--head", "--block", "--num-cpus=1", f"--port={port}", "--include-dashboard=false"]
    with log.open("w") as stream:
        head = subprocess.Popen(
            [*command, *head_ports(), "--node-ip-address=127.0.0.1", f"--autoscaling-config={file}"],
            env=environment,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        yield f"127.0.0.1:{port}", file
    finally:
        # On SIGTERM the head waits for its processes for 30 s, and its autoscaler leaves the fake nodes behind.
        kill_family(head)
