"""Sweep: arms x points x seeds as trials of Ray Tune, each of which trains one student."""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ray import cloudpickle, tune
from ray.exceptions import RayActorError
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule

from raykd import compat, faults, identity, location, placement, storage, tracking
from raykd.cluster import live, may_hold, requested
from raykd.completions import Request
from raykd.config import Experiment
from raykd.faults import StageError
from raykd.job import Job, is_complete, outcome, reached, read_curve, record, those, validations
from raykd.nodes import Bundle
from raykd.problems import Splits
from raykd.progress import say
from raykd.records import COMPLETE, FAILED, STOPPED
from raykd.scoreboard import Scoreboard
from raykd.search import Search
from raykd.sections import Sweep, Teacher, Train
from raykd.study import Make, Study, Undrawn
from raykd.train import fit
from raykd.variants import Variant

CLOUD_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
# What a scheduler takes for time, as Tune flattens what a trial reports: how often it was measured.
TIME = "validation/number"
ASKED_AGAIN_EVERY_S = 60

Held = tuple[Train, placement.Accelerator]
"""What a cluster must hold for a trial: its workers, on this kind of accelerator."""


def jobs(
    experiment: Experiment,
    variants: Sequence[Variant],
    splits: Splits,
    asked: Mapping[str, Request | None],
    student: Mapping[str, str],
    same_tokens: bool,
    folder: Path,
) -> list[Job]:
    """The trials of an experiment: every arm at every point with every seed.

    A trial's id ends in a hash of all that determines its adapter, so a changed setting is another trial.

    Args:
        experiment: the experiment.
        variants: what is trained on.
        splits: the problems.
        asked: for each of `variants.lessons` the completions it is about; None where the teacher is not asked.
        student: what identifies the student's weights.
        same_tokens: whether the teacher's token ids are the student's.
        folder: the experiment's folder.
    """
    made = []
    for variant in variants:
        arm, request = variant.arm, asked[variant.lesson]
        # A student's own answers are not there yet: what is given is what it begins with.
        given = asked.get(f"{variant.lesson}/warmup") if arm.targets.sequence == "student" else request
        for seed in experiment.seeds:
            completion_content = request.content if request else None
            content = identity.trial(experiment, arm, seed, splits.content, completion_content, student)
            trial_id = f"{variant.arm_name}-s{seed}-{storage.content_key(content)[:8]}"
            made.append(
                Job(
                    trial_id=trial_id,
                    arm_name=variant.arm_name,
                    arm=arm,
                    seed=seed,
                    overrides=dict(experiment.arms[variant.arm_name]),
                    problems=splits.folder,
                    completions=given.folder if given else None,
                    same_tokens=same_tokens,
                    experiment=experiment.name,
                    folder=folder / "trials" / trial_id,
                    lesson=variant.lesson,
                    values=variant.values,
                    sweep=experiment.sweep,
                    max_tokens=experiment.evaluate.sampling.max_tokens,
                )
            )
    return made


def pending(jobs: Sequence[Job], retry_failed: bool = False) -> list[Job]:
    """The trials that have not come to their end.

    Args:
        jobs: trials.
        retry_failed: whether those that failed are tried again; outside a sweep they always are.
    """

    def is_over(job: Job) -> bool:
        if job.sweep is None:
            return is_complete(job)
        # What an earlier scheduler stopped goes to its end where there is none now.
        stopped = {STOPPED} if job.sweep.scheduler != "none" else set()
        return outcome(job) in {COMPLETE} | stopped | (set() if retry_failed else {FAILED})

    return those(jobs, lambda job: not is_over(job))


def run(
    pending: Sequence[Job],
    experiment: Experiment,
    folder: Path,
    cluster: Mapping[str, float],
    earlier: Sequence[Job] = (),
    undrawn: Undrawn | None = None,
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
        undrawn: the points that will be chosen by what others reached; None where all are known.
        beside: the teacher that stays up meanwhile.
    """
    sweep = experiment.sweep
    again = [job for job in earlier if outcome(job) != FAILED] if sweep and sweep.scheduler != "none" else []
    known = {job.trial_id: job for job in [*again, *pending]}
    jobs = {job.trial_id: job for job in pending}
    replayed = {job.trial_id for job in again}
    trains = [job.arm.train for job in pending] + [each.arm.train for each in (undrawn.corners if undrawn else [])]
    make = undrawn.make if undrawn else None
    studies = [Study(name, sweep, folder, make, jobs) for name in experiment.arms] if sweep and make else []
    num_trials = len(jobs) + (undrawn.num_trials if undrawn else 0)
    at_a_time = min(num_trials, experiment.max_concurrent_trials or num_trials)
    scoreboard = Scoreboard(jobs, num_trials)
    held: list[Held] = [(train, placement.accelerator(train.accelerator, cluster)) for train in trains]
    room = _room(
        held, placement.taken_by_the_teacher(beside, cluster) if beside else {}, experiment.max_concurrent_trials
    )
    largest, on = max(held, key=lambda each: each[0].num_workers)
    group, least = placement.trial_bundles(largest, on), largest.min_workers or largest.num_workers
    others = placement.teacher_groups(beside, cluster) if beside else []
    _quiet()

    # Ray's dashboard shows the function's name.
    def train_student(config: dict[str, Any]) -> None:
        job = known.get(config["trial_id"]) or _drawn(config, make)
        # So that others are compared with it, and it with them, as if nothing had been broken off.
        for measured in validations(read_curve(job.folder / "metrics.jsonl")) if sweep else []:
            tune.report({"validation": measured})
        if job.trial_id not in replayed:
            kind = placement.accelerator(job.arm.train.accelerator, cluster)
            fit(job, kind, [TuneReportCallback()], folder / "checkpoints")

    def room_as_asked(left: float) -> int:
        there = room()
        ask_for(there, left)
        return there

    path, system = location.for_arrow(folder)
    tuner = tune.Tuner(
        # The driver of a trial waits for its workers and needs no core itself, but Tune wants it to need something. On
        # the head it is not lost with a node that its workers are on.
        tune.with_resources(train_student, {"CPU": 0, "memory": 1 << 20, compat.HEAD_RESOURCE: 0.0001}),
        tune_config=tune.TuneConfig(
            search_alg=Search(list(known.values()), jobs, room_as_asked, studies),
            # Until the search says that there is nothing more.
            num_samples=-1,
            scheduler=_OfEachArm(sweep) if sweep else None,
            trial_name_creator=lambda trial: trial.config["trial_id"],
            trial_dirname_creator=lambda trial: trial.config["trial_id"],
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=path,
            storage_filesystem=system,
            verbose=0,
            callbacks=[_Records(jobs, folder), scoreboard, *tracking.callbacks(experiment.tracking, folder, jobs)],
        ),
    )
    for job in pending:
        if outcome(job):
            # It is under way again; should it be broken off, it goes on.
            (job.folder / "trial.json").unlink()
    try:
        with requested() as ask:
            ask_for = _asking(ask, group, least, others, at_a_time)
            tuner.fit()
    finally:
        # Tune tells nobody of an end by Ctrl-C.
        scoreboard.close()
    for job in {**known, **jobs}.values():
        # A worker may have been writing one when its trial was stopped.
        _clear(job, folder)


def _room(held: Sequence[Held], taken: Mapping[str, float], at_most: int | None) -> Callable[[], int]:
    """How many trials there is room for at a time, whatever they need, as nodes come and go."""

    def room() -> int:
        there = {name: amount - taken.get(name, 0) for name, amount in live().items()}
        fitting = min(placement.room(train, kind, there) for train, kind in held)
        return min(fitting, at_most or fitting)

    return room


def _asking(
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
    may_be = may_hold([*beside, *[group] * at_a_time])
    if may_be is not None and may_be <= len(beside):
        # Not one trial has room with all of its workers: with as many as have, if it may do with them.
        fewer = (group[:size] for size in range(len(group) - 1, least - 1, -1))
        group = next((each for each in fewer if (may_hold([*beside, each]) or 0) > len(beside)), group)
    last = (0, 0.0)

    def ask_for(room: int, left: float) -> None:
        nonlocal last
        number = int(min(at_a_time, left, max(1, room + 1 if may_be is None else may_be - len(beside))))
        if number != last[0] or time.monotonic() > last[1] + ASKED_AGAIN_EVERY_S:
            ask([*held, *list(group) * number])
            last = (number, time.monotonic())

    return ask_for


def _drawn(config: Mapping[str, Any], make: Make | None) -> Job:
    """The trial of a point that was drawn while others were trained."""
    assert make, "what is not known was drawn"
    values = {name: value for name, value in config.items() if name not in ("trial_id", "arm", "seed")}
    return next(job for job in make(config["arm"], values) if job.trial_id == config["trial_id"])


def _quiet() -> None:
    # Tune's older reporter is the one that can be told to say nothing; the trials' progress is shown otherwise.
    os.environ[compat.OLD_TUNE_OUTPUT_ENV] = "0"
    # Else Tune takes Ctrl-C for a wish to end early with what there is, and the run goes on to the next stage.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"
    # Who is told of the trials is said.
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1"
    # A trial tells its steps more often than it is measured.
    os.environ["TUNE_DISABLE_STRICT_METRIC_CHECKING"] = "1"
    compat.keep_out_of_trials(CLOUD_KEYS)


class _OfEachArm(FIFOScheduler):
    """Stops trials early by comparing each with those of its own arm.

    One scheduler for all would stop the arms that are worse, the one without a prime above all, and leave nothing to
    compare the others with.
    """

    def __init__(self, sweep: Sweep) -> None:
        super().__init__()
        self._sweep = sweep
        self._by_arm: dict[str, FIFOScheduler] = {}

    def _of(self, trial: Any) -> Any:
        arm = trial.config["arm"]
        if arm not in self._by_arm:
            self._by_arm[arm] = _scheduler(self._sweep)
        return self._by_arm[arm]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_error(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if math.isnan(result.get(f"validation/{self._sweep.metric}", 0)):
            # It compares with nothing, and does not come back.
            return self.STOP
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._of(trial).on_trial_remove(tune_controller, trial)


def _scheduler(sweep: Sweep) -> FIFOScheduler:
    told: dict[str, Any] = {
        "time_attr": TIME,
        "metric": f"validation/{sweep.metric}",
        "mode": sweep.mode,
    }
    if sweep.scheduler == "asha":
        # What is measured at its end needs no stopping any more.
        max_t = sweep.validations - 1
        return ASHAScheduler(**told, max_t=max_t, reduction_factor=sweep.reduction_factor, stop_last_trials=False)
    if sweep.scheduler == "median":
        # It would rather pause a trial than judge it by too few, and what is paused loses its workers.
        told["min_time_slice"] = math.inf
        return MedianStoppingRule(**told, grace_period=1, min_samples_required=2)
    return FIFOScheduler()


class _Records(tune.Callback):
    """Records how a trial ends, as it ends."""

    def __init__(self, jobs: Mapping[str, Job], folder: Path) -> None:
        self._jobs, self._folder = jobs, folder

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        job = self._jobs.get(trial.config["trial_id"])
        if job is None:
            return
        last = reached(job)
        if is_complete(job):
            pass
        elif last is not None and math.isnan(last):
            record(job, FAILED, "it diverged: its validation loss is not a number")
        elif job.sweep is not None and job.sweep.scheduler != "none":
            record(job, STOPPED)
        else:
            # It should not.
            record(job, FAILED, "ended without an adapter")
        _clear(job, self._folder)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        job = self._jobs.get(trial.config["trial_id"])
        if job is None or is_complete(job):
            return
        if isinstance(_error(trial), RayActorError):
            # Its node is gone, with the process that watched over it: the same command goes on with it.
            say(f"lost {job.trial_id} with its node; the same command goes on with it")
        else:
            # Tune has not brought it to the storage yet, where `trial.get_error` looks for it.
            text = Path(trial.error_file).read_text().strip()
            if faults.refusal(text):
                # The next would fail as well, and this one has done no wrong.
                raise StageError(f"{job.trial_id}: {faults.refusal(text)}")
            record(job, FAILED, str(faults.stated_in(text) or text.splitlines()[-1]))


def _error(trial: Any) -> Exception | None:
    """What ended a trial, as Tune was told."""
    file = Path(trial.pickled_error_file or "")
    return cloudpickle.loads(file.read_bytes()) if file.is_file() else None


def _clear(job: Job, folder: Path) -> None:
    """Removes the optimizer's state of a trial that has come to its end, but for a round to come."""
    if job.part == job.folder and outcome(job) in (COMPLETE, STOPPED):
        location.remove(folder / "checkpoints" / job.trial_id, ignore_errors=True)
