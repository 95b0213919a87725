"""Run trials under Ray Tune, as many at a time as the cluster holds."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from raykd import compat
from raykd.cluster import resources
from raykd.cluster.autoscaler import node_requests
from raykd.cluster.nodes import Bundle
from raykd.config.experiment import Experiment
from raykd.config.sections import Sweep, Teacher
from raykd.storage import filesystem
from raykd.storage.paths import ExperimentPaths, TrialPaths
from raykd.storage.schemas import FAILED
from raykd.training.trainer import train_trial
from raykd.training.trial import TrialSpec, trial_status, validations
from raykd.training.trial_record import read_loss_curve
from raykd.tuning import trackers
from raykd.tuning.callbacks import RecordTrialStatus, remove_checkpoints
from raykd.tuning.progress_table import TrialProgressTable
from raykd.tuning.schedulers import PerArmScheduler
from raykd.tuning.searcher import ArmSearch, MakeTrials, PendingSearch, TrialSearcher
from raykd.tuning.slots import AutoscalerRequester, TrialSlots, WorkerGroup
from raykd.tuning.trials import TrialRegistry

CLOUD_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
TUNE_ENVIRONMENT = {
    # Only Tune's older reporter prints nothing with `verbose=0`; `TrialProgressTable` shows the progress instead.
    compat.OLD_TUNE_OUTPUT_ENV: "0",
    # By default Tune handles Ctrl-C itself and returns the results so far, and the run would go to its next stage.
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # `tracker_callbacks` adds the loggers.
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    # A trial reports its steps more often than its validation metric.
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
}
"""Environment variables that Tune reads; `run_trials` sets them for the whole driver process."""


def run_trials(
    pending: Sequence[TrialSpec],
    experiment: Experiment,
    folder: Path,
    cluster: Mapping[str, float],
    finished: Sequence[TrialSpec] = (),
    pending_search: PendingSearch | None = None,
    teacher: Teacher | None = None,
) -> None:
    """Train the students of some trials under Ray Tune, and record the status of each trial as it ends.

    Tune sees only a trial's driver process, not its workers. It would start more trials than the cluster holds, which
    then wait for each other. The number of trials at a time is therefore computed from the nodes (`TrialSlots`).

    Args:
        pending: trials that are not finished.
        experiment: the experiment.
        folder: the experiment's folder.
        cluster: the cluster's resources, including those that its autoscaler may add, by Ray's names.
        finished: finished trials of the same sweep; a scheduler compares the pending ones with them.
        pending_search: the points that depend on earlier results; None if all points are known.
        teacher: the teacher that is served while the trials run; None if none is.
    """
    sweep = experiment.sweep
    replayed: list[TrialSpec] = []
    if sweep and sweep.scheduler != "none":
        replayed = [trial for trial in finished if trial_status(trial) != FAILED]
    registry = TrialRegistry(pending, replayed)
    make_trials: MakeTrials | None = None
    searches: list[ArmSearch] = []
    num_trials = len(registry)
    if sweep and pending_search:
        make_trials = pending_search.make_trials
        searches = [ArmSearch(arm_name, sweep, folder, make_trials, registry) for arm_name in experiment.arms]
        num_trials += pending_search.num_trials
    progress_table = TrialProgressTable(registry, num_trials)
    groups = _worker_groups(pending, pending_search, cluster)
    _configure_tune()
    _remove_status(pending)
    try:
        with node_requests() as request_nodes:
            slots = _trial_slots(request_nodes, groups, experiment, cluster, num_trials, teacher)
            tuner = _build_tuner(
                _train_function(registry, make_trials, sweep, folder, cluster),
                searcher=TrialSearcher(registry.all_trials(), registry, slots.update, searches),
                callbacks=[
                    RecordTrialStatus(registry, folder),
                    progress_table,
                    *trackers.tracker_callbacks(experiment.tracking, folder, registry),
                ],
                sweep=sweep,
                folder=folder,
            )
            tuner.fit()
    finally:
        # Tune calls no callback after Ctrl-C.
        progress_table.close()
    for trial in registry.all_trials():
        # A worker may have written a checkpoint while its trial was being stopped.
        remove_checkpoints(trial, folder)


def _worker_groups(
    pending: Sequence[TrialSpec], pending_search: PendingSearch | None, cluster: Mapping[str, float]
) -> list[WorkerGroup]:
    """Return the worker groups of all trials, including those that the search may add."""
    sections = [trial.arm.train for trial in pending]
    if pending_search:
        sections += [variant.arm.train for variant in pending_search.boundary_configs]
    return [WorkerGroup(train, resources.resolve_accelerator(train.accelerator, cluster)) for train in sections]


def _trial_slots(
    request_nodes: Callable[[Sequence[Bundle]], None],
    groups: Sequence[WorkerGroup],
    experiment: Experiment,
    cluster: Mapping[str, float],
    num_trials: int,
    teacher: Teacher | None,
) -> TrialSlots:
    """Return the slots of a Tune run; nodes are requested for the largest worker group."""
    largest = max(groups, key=lambda group: group.train.num_workers)
    requester = AutoscalerRequester(
        request_nodes,
        trial_bundles=resources.trial_bundles(largest.train, largest.accelerator),
        min_workers=largest.train.min_workers or largest.train.num_workers,
        other_groups=resources.teacher_placement_groups(teacher, cluster) if teacher else [],
        max_trials=min(num_trials, experiment.max_concurrent_trials or num_trials),
    )
    reserved = resources.teacher_resources(teacher, cluster) if teacher else {}
    return TrialSlots(groups, reserved, experiment.max_concurrent_trials, requester)


def _build_tuner(
    train_function: Callable[[dict[str, Any]], None],
    *,
    searcher: TrialSearcher,
    callbacks: list[tune.Callback],
    sweep: Sweep | None,
    folder: Path,
) -> tune.Tuner:
    path, system = filesystem.for_arrow(folder)
    return tune.Tuner(
        # A trial's driver only waits for its workers, but Tune requires some resource. The head's resource keeps it on
        # the head node, where it survives the loss of a worker node.
        tune.with_resources(train_function, {"CPU": 0, "memory": 1 << 20, compat.HEAD_RESOURCE: 0.0001}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            # No limit: the searcher returns FINISHED at the end.
            num_samples=-1,
            scheduler=PerArmScheduler(sweep) if sweep else None,
            trial_name_creator=lambda trial: trial.config["trial_id"],
            trial_dirname_creator=lambda trial: trial.config["trial_id"],
        ),
        run_config=tune.RunConfig(
            name=ExperimentPaths(folder).tune.name,
            storage_path=path,
            storage_filesystem=system,
            verbose=0,
            callbacks=callbacks,
        ),
    )


def _train_function(
    registry: TrialRegistry,
    make_trials: MakeTrials | None,
    sweep: Sweep | None,
    folder: Path,
    cluster: Mapping[str, float],
) -> Callable[[dict[str, Any]], None]:
    """Return the function that Tune runs for each trial, in a process of its own."""

    # Ray's dashboard shows this name.
    def train_student(config: dict[str, Any]) -> None:
        trial = _find_trial(config, registry, make_trials)
        if sweep:
            # After a restart, the scheduler needs the earlier results to compare the trials.
            for validation in validations(read_loss_curve(TrialPaths(trial.folder).metrics)):
                tune.report({"validation": validation})
        if trial.trial_id not in registry.replayed:
            accelerator = resources.resolve_accelerator(trial.arm.train.accelerator, cluster)
            train_trial(trial, accelerator, [TuneReportCallback()], ExperimentPaths(folder).checkpoints)

    return train_student


def _find_trial(config: Mapping[str, Any], registry: TrialRegistry, make_trials: MakeTrials | None) -> TrialSpec:
    """Return the trial of a Tune configuration.

    Tune pickles the registry before the run, so that a trial which the search added later is created again.
    """
    trial_id = config["trial_id"]
    trial = registry.replayed.get(trial_id) or registry.get(trial_id)
    if trial:
        return trial
    assert make_trials, "only a search adds trials"
    point = {name: value for name, value in config.items() if name not in ("trial_id", "arm", "seed")}
    return next(trial for trial in make_trials(config["arm"], point) if trial.trial_id == trial_id)


def _remove_status(pending: Sequence[TrialSpec]) -> None:
    """Remove the status of trials that start again, so that they count as pending if the run is interrupted."""
    for trial in pending:
        if trial_status(trial):
            TrialPaths(trial.folder).record.unlink()


def _configure_tune() -> None:
    """Set what Tune reads from the environment, and keep cloud keys out of its trials.

    Both hold for the rest of the driver process: Tune has no option of a run for either.
    """
    os.environ.update(TUNE_ENVIRONMENT)
    compat.keep_out_of_trials(CLOUD_KEYS)
