"""The training loop without Ray: how it is carried out changes nothing of what it computes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

pytestmark = pytest.mark.timeout(900)
SCRIPT = Path(__file__).parent / "plain_loop.py"


VARIANTS = {
    1: ["zero0-micro8", "zero0-micro1", "zero0-micro8-packed", "zero0-micro4-killed"],
    2: ["zero0-micro4", "zero1-micro2", "zero2-micro4-packed", "zero3-micro2", "zero3-micro2-checkpointed"],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    for workers, variants in VARIANTS.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [*command, str(SCRIPT), str(folder), *variants],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    return folder


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")


@pytest.mark.parametrize("name", [f"workers{n}-{variant}" for n, each in VARIANTS.items() for variant in each][1:])
def test_how_it_is_carried_out_changes_nothing_but_rounding(trained: Path, name: str):
    """Workers, micro-batches, ZeRO stage, packing, checkpointed activations, and being broken off."""
    expected = trained / "workers1-zero0-micro8"
    assert len(losses(expected)) == 6
    assert losses(trained / name) == pytest.approx(losses(expected), rel=1e-4)
    ours, theirs = weights(trained / name), weights(expected)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        # Adam divides by small second moments, which makes much of little rounding.
        assert torch.allclose(ours[key], tensor, atol=2e-3), key


def test_the_loss_falls(trained: Path):
    curve = losses(trained / "workers1-zero0-micro8")
    assert curve[-1] < curve[0]
