"""Run a trial under Ray Train."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from raykd.cluster import resources
from raykd.cluster.resources import Accelerator
from raykd.storage import filesystem
from raykd.training import checkpoints
from raykd.training.loop import train_loop
from raykd.training.trial import TrialSpec


def worker_env(kind: Accelerator) -> dict[str, str]:
    """Environment of a training worker.

    For each shape of a matrix product, PyTorch and oneDNN keep what they prepared on a CPU, of the last 1,024 shapes
    each. Batches seldom have the same length twice, so that would grow to gigabytes and save nothing; a step has some
    thirty shapes.
    """
    if kind == "gpu":
        return {}
    return {"DS_ACCELERATOR": "cpu", "LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


CONTROLLER_POLL_S = 0.25


def train_trial(job: TrialSpec, kind: resources.Accelerator, callbacks: list[Any], storage_path: Path) -> None:
    """Runs a trial's workers under Ray Train, from their last checkpoint where there is one.

    Args:
        job: the trial.
        kind: what its workers run on.
        callbacks: Ray Train callbacks, such as the one that reports to Ray Tune.
        storage_path: where Ray Train keeps checkpoints, below the trial's id.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu, train = kind == "gpu", job.arm.train
    path, system = filesystem.for_arrow(storage_path)
    mended = checkpoints.repair(storage_path / job.trial_id)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(CONTROLLER_POLL_S))
    TorchTrainer(
        _train_worker,
        train_loop_config={"job": job, "resume": mended},
        torch_config=TorchConfig(backend=None if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.num_workers) if train.min_workers else train.num_workers,
            use_gpu=gpu,
            resources_per_worker=resources.process_bundle(kind, train.accelerator_type),
        ),
        run_config=RunConfig(
            name=job.trial_id,
            storage_path=path,
            storage_filesystem=system,
            # Nodes that are missing are waited for.
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": worker_env(kind)},
        ),
    ).fit()


def _train_worker(config: dict[str, Any]) -> None:
    import ray.train

    # DeepSpeed reads its ranks here; Ray Train knows them.
    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None)

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        with filesystem.local_dir(config["resume"]) if config["resume"] else nullcontext() as mended:
            train_loop(config["job"], report, mended)
    else:
        with checkpoint.as_directory() as folder:
            train_loop(config["job"], report, Path(folder))
