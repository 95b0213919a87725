"""Run a trial's workers under Ray Train."""

import os
from pathlib import Path
from typing import Any

from raykd import compat, errors
from raykd.cluster.resources import Accelerator, process_bundle
from raykd.storage import filesystem
from raykd.training import checkpoints
from raykd.training.trial import TrialSpec

# How often Ray Train's controller polls its workers, whose reports wait for it; 2 seconds by default.
CONTROLLER_POLL_S = 0.25


def worker_env(accelerator: Accelerator) -> dict[str, str]:
    """Return the environment variables of a training worker.

    On a CPU, PyTorch and oneDNN each cache the prepared kernels of the last 1,024 shapes of a matrix product. Batches
    rarely have the same length twice, so that these caches would grow to gigabytes without use. A step has about
    thirty shapes.

    Args:
        accelerator: the device of the worker.
    """
    if accelerator == "gpu":
        return {}
    return {"DS_ACCELERATOR": "cpu", "LRU_CACHE_CAPACITY": "32", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}


def train_trial(trial: TrialSpec, accelerator: Accelerator, callbacks: list[Any], storage_path: Path) -> None:
    """Run a trial's workers under Ray Train, from their last checkpoint if there is one.

    Args:
        trial: the trial.
        accelerator: the device of its workers.
        callbacks: Ray Train callbacks, such as the one that reports to Ray Tune.
        storage_path: the folder in which Ray Train keeps checkpoints, by trial id.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    is_gpu, train = accelerator == "gpu", trial.arm.train
    path, system = filesystem.for_arrow(storage_path)
    checkpoint = checkpoints.repair(storage_path / trial.trial_id)
    # A StageError or UserError of a worker has its cause in the data or the configuration.
    compat.do_not_retry(lambda error: errors.reported_error(error) is not None)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", str(CONTROLLER_POLL_S))
    TorchTrainer(
        _train_worker,
        train_loop_config={"trial": trial, "checkpoint": checkpoint},
        torch_config=TorchConfig(backend=None if is_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.num_workers) if train.min_workers else train.num_workers,
            use_gpu=is_gpu,
            resources_per_worker=process_bundle(accelerator, train.accelerator_type),
        ),
        run_config=RunConfig(
            name=trial.trial_id,
            storage_path=path,
            storage_filesystem=system,
            failure_config=FailureConfig(max_failures=train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            callbacks=callbacks,
            worker_runtime_env={"env_vars": worker_env(accelerator)},
        ),
    ).fit()


def _train_worker(config: dict[str, Any]) -> None:
    import ray.train

    # Imports torch and DeepSpeed's integrations, which only the workers need.
    from raykd.training.loop import train_loop

    # DeepSpeed reads the local rank from the environment.
    context = ray.train.get_context()
    os.environ["LOCAL_RANK"] = str(context.get_local_rank())

    def report(metrics: dict[str, Any], folder: Path | None) -> None:
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(str(folder)) if folder else None)

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            train_loop(config["trial"], report, Path(folder))
    elif config["checkpoint"] is not None:
        # Ray Train's list of checkpoints was lost, but not this checkpoint (`checkpoints.repair`).
        with filesystem.local_dir(config["checkpoint"]) as folder:
            train_loop(config["trial"], report, folder)
    else:
        train_loop(config["trial"], report, None)
