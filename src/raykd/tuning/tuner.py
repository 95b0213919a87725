"""Run trials under Ray Tune, as many at a time as the cluster holds."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from raykd import compat
from raykd.cluster import resources
from raykd.cluster.autoscaler import node_requests
from raykd.cluster.capacity import current_resources, num_placeable
from raykd.cluster.nodes import Bundle
from raykd.config.experiment import Experiment
from raykd.config.sections import Teacher, Train
from raykd.storage import filesystem
from raykd.storage.paths import ExperimentPaths, TrialPaths
from raykd.storage.schemas import FAILED
from raykd.training.trainer import train_trial
from raykd.training.trial import TrialSpec, read_loss_curve, trial_status, validations
from raykd.tuning import trackers
from raykd.tuning.callbacks import RecordTrialStatus, remove_checkpoints
from raykd.tuning.progress_table import TrialProgressTable
from raykd.tuning.schedulers import PerArmScheduler
from raykd.tuning.searcher import ArmSearch, MakeTrials, PendingSearch, TrialSearcher

CLOUD_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
REQUEST_INTERVAL_S = 60

WorkerGroup = tuple[Train, resources.Accelerator]
"""What a cluster must hold for a trial: its workers, on this kind of accelerator."""


def run_trials(
    pending: Sequence[TrialSpec],
    experiment: Experiment,
    folder: Path,
    cluster: Mapping[str, float],
    earlier: Sequence[TrialSpec] = (),
    pending_search: PendingSearch | None = None,
    beside: Teacher | None = None,
) -> None:
    """Trains the students of the given trials under Ray Tune; how each of them ends is recorded as it ends.

    Args:
        pending: trials that have not come to their end.
        experiment: the experiment.
        folder: its folder.
        cluster: the cluster's resources, with what its autoscaler may bring. From what is there, as nodes come and go,
            the number of trials at a time is computed: Tune sees only a trial's driver, and more of them than there is
            room for would wait on each other. The autoscaler is asked for room for all of them, as far as it goes, or
            for `max_concurrent_trials`.
        earlier: trials of the same sweep that have come to their end; they tell again what they reached.
        pending_search: the points that will be chosen by what others reached; None where all are known.
        beside: the teacher that stays up meanwhile.
    """
    sweep = experiment.sweep
    again = [job for job in earlier if trial_status(job) != FAILED] if sweep and sweep.scheduler != "none" else []
    known = {job.trial_id: job for job in [*again, *pending]}
    jobs = {job.trial_id: job for job in pending}
    replayed = {job.trial_id for job in again}
    trains = [job.arm.train for job in pending] + [
        each.arm.train for each in (pending_search.corners if pending_search else [])
    ]
    make = pending_search.make if pending_search else None
    studies = [ArmSearch(name, sweep, folder, make, jobs) for name in experiment.arms] if sweep and make else []
    num_trials = len(jobs) + (pending_search.num_trials if pending_search else 0)
    at_a_time = min(num_trials, experiment.max_concurrent_trials or num_trials)
    scoreboard = TrialProgressTable(jobs, num_trials)
    held: list[WorkerGroup] = [(train, resources.resolve_accelerator(train.accelerator, cluster)) for train in trains]
    room = free_trial_slots(
        held, resources.teacher_resources(beside, cluster) if beside else {}, experiment.max_concurrent_trials
    )
    largest, on = max(held, key=lambda each: each[0].num_workers)
    group, least = resources.trial_bundles(largest, on), largest.min_workers or largest.num_workers
    others = resources.teacher_placement_groups(beside, cluster) if beside else []
    _configure_tune()

    # Ray's dashboard shows the function's name.
    def train_student(config: dict[str, Any]) -> None:
        job = known.get(config["trial_id"]) or _find_suggested(config, make)
        # So that others are compared with it, and it with them, as if nothing had been broken off.
        for measured in validations(read_loss_curve(TrialPaths(job.folder).metrics)) if sweep else []:
            tune.report({"validation": measured})
        if job.trial_id not in replayed:
            kind = resources.resolve_accelerator(job.arm.train.accelerator, cluster)
            train_trial(job, kind, [TuneReportCallback()], ExperimentPaths(folder).checkpoints)

    def room_as_asked(left: float) -> int:
        there = room()
        ask_for(there, left)
        return there

    path, system = filesystem.for_arrow(folder)
    tuner = tune.Tuner(
        # The driver of a trial waits for its workers and needs no core itself, but Tune wants it to need something. On
        # the head it is not lost with a node that its workers are on.
        tune.with_resources(train_student, {"CPU": 0, "memory": 1 << 20, compat.HEAD_RESOURCE: 0.0001}),
        tune_config=tune.TuneConfig(
            search_alg=TrialSearcher(list(known.values()), jobs, room_as_asked, studies),
            # Until the search says that there is nothing more.
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
            callbacks=[
                RecordTrialStatus(jobs, folder),
                scoreboard,
                *trackers.tracker_callbacks(experiment.tracking, folder, jobs),
            ],
        ),
    )
    for job in pending:
        if trial_status(job):
            # It is under way again; should it be broken off, it goes on.
            TrialPaths(job.folder).record.unlink()
    try:
        with node_requests() as ask:
            ask_for = request_trial_nodes(ask, group, least, others, at_a_time)
            tuner.fit()
    finally:
        # Tune tells nobody of an end by Ctrl-C.
        scoreboard.close()
    for job in {**known, **jobs}.values():
        # A worker may have been writing one when its trial was stopped.
        remove_checkpoints(job, folder)


def free_trial_slots(held: Sequence[WorkerGroup], taken: Mapping[str, float], at_most: int | None) -> Callable[[], int]:
    """How many trials there is room for at a time, whatever they need, as nodes come and go."""

    def room() -> int:
        there = {name: amount - taken.get(name, 0) for name, amount in current_resources().items()}
        fitting = min(resources.max_concurrent_trials(train, kind, there) for train, kind in held)
        return min(fitting, at_most or fitting)

    return room


def request_trial_nodes(
    ask: Callable[[Sequence[Bundle]], None],
    group: Sequence[Bundle],
    least: int,
    beside: Sequence[Sequence[Bundle]],
    at_a_time: int,
) -> Callable[[int, float], None]:
    """What asks the autoscaler for room for trials, given for how many there is some, and how many are not over.

    It brings nothing where it cannot bring all, so no more is asked for than may come; where that is not known, for one
    more than there are. It is asked again now and then: another experiment's request, and its end, take this one away.
    """
    held = [bundle for each in beside for bundle in each]
    may_be = num_placeable([*beside, *[group] * at_a_time])
    if may_be is not None and may_be <= len(beside):
        # Not one trial has room with all of its workers: with as many as have, if it may do with them.
        fewer = (group[:size] for size in range(len(group) - 1, least - 1, -1))
        group = next((each for each in fewer if (num_placeable([*beside, each]) or 0) > len(beside)), group)
    last = (0, 0.0)

    def ask_for(room: int, left: float) -> None:
        nonlocal last
        number = int(min(at_a_time, left, max(1, room + 1 if may_be is None else may_be - len(beside))))
        if number != last[0] or time.monotonic() > last[1] + REQUEST_INTERVAL_S:
            ask([*held, *list(group) * number])
            last = (number, time.monotonic())

    return ask_for


def _find_suggested(config: Mapping[str, Any], make: MakeTrials | None) -> TrialSpec:
    """The trial of a point that was drawn while others were trained."""
    assert make, "what is not known was drawn"
    values = {name: value for name, value in config.items() if name not in ("trial_id", "arm", "seed")}
    return next(job for job in make(config["arm"], values) if job.trial_id == config["trial_id"])


def _configure_tune() -> None:
    # Tune's older reporter is the one that can be told to say nothing; the trials' progress is shown otherwise.
    os.environ[compat.OLD_TUNE_OUTPUT_ENV] = "0"
    # Else Tune takes Ctrl-C for a wish to end early with what there is, and the run goes on to the next stage.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Who is told of the trials is said.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # A trial tells its steps more often than it is measured.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    compat.keep_out_of_trials(CLOUD_KEYS)
