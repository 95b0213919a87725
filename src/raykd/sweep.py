"""Sweep: arms x seeds as trials of Ray Tune, each of which trains one student."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from raykd import completions, placement, storage
from raykd.completions import Request
from raykd.config import Experiment
from raykd.progress import Meter
from raykd.train import Job, describe, fit, is_complete


def jobs(
    experiment: Experiment,
    problems: Path,
    asked: Mapping[str, Request | None],
    student: Mapping[str, str],
    same_tokens: bool,
    folder: Path,
) -> list[Job]:
    """The trials of an experiment: every arm with every seed.

    A trial's id ends in a hash of all that determines its adapter, so a changed setting is another trial.

    Args:
        experiment: the experiment.
        problems: the folder of the splits.
        asked: for each of `experiment.lessons` the completions it is about; None where the teacher is not asked.
        student: what identifies the student's weights.
        same_tokens: whether the teacher's token ids are the student's.
        folder: the experiment's folder.
    """
    made = []
    for arm_name, overrides in experiment.arms.items():
        arm, request = experiment.arm(arm_name), asked[arm_name]
        # The teacher and how it was primed are in what identifies the rows.
        bearing = {name: value for name, value in arm.bearing().items() if name in ("student", "targets", "loss")}
        # A student's own answers are not there yet: what is given is what it begins with.
        given = asked.get(f"{arm_name}/warmup") if arm.targets.sequence == "student" else request
        for seed in experiment.seeds:
            identity = {
                **bearing,
                "weights": dict(student),
                # How a trial is carried out changes nothing of what it is.
                "train": arm.train.model_dump(exclude={"accelerator", "checkpoint_every_steps", "max_failures"}),
                "instruction": arm.prompt.instruction,
                "rows": completions.identity(request, arm) if request else problems.name,
                "problems": problems.name,
                "seed": seed,
            }
            trial_id = f"{arm_name}-s{seed}-{storage.content_key(identity)[:8]}"
            made.append(
                Job(
                    trial_id=trial_id,
                    arm_name=arm_name,
                    arm=arm,
                    seed=seed,
                    overrides=dict(overrides),
                    problems=problems,
                    completions=given.folder if given else None,
                    same_tokens=same_tokens,
                    folder=folder / "trials" / trial_id,
                )
            )
    return made


def run(pending: list[Job], max_concurrent: int | None, folder: Path, cluster: Mapping[str, float]) -> None:
    """Trains the students of the given trials under Ray Tune; those that fail are recorded as failed.

    Args:
        pending: trials that are not complete.
        max_concurrent: trials at a time; None for as many as the cluster holds.
        folder: the experiment's folder.
        cluster: the cluster's resources, from which the number of trials at a time is computed: Tune sees only
            a trial's driver, and more trials than there are workers for would wait on each other for ever.
    """
    by_id = {job.trial_id: job for job in pending}
    kinds: dict[str, placement.Accelerator] = {
        job.trial_id: placement.accelerator(job.arm.train.accelerator, cluster) for job in pending
    }
    fitting = min(placement.concurrent_trials(job.arm.train, kinds[job.trial_id], cluster) for job in pending)
    # Tune's older reporter is the one that can be told to say nothing; the trials' progress is shown below.
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    # Else Tune takes Ctrl-C for a wish to end early with what there is, and the run goes on to the next stage.
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"

    def trainable(config: dict[str, Any]) -> None:
        trial_id = config["trial_id"]
        fit(by_id[trial_id], kinds[trial_id], [TuneReportCallback()], folder / "checkpoints")

    progress = _Progress(len(pending))
    tuner = tune.Tuner(
        # The driver of a trial waits for its workers and needs no core itself, but Tune wants it to need something.
        tune.with_resources(trainable, {"CPU": 0, "memory": 1 << 20}),
        param_space={"trial_id": tune.grid_search(list(by_id))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=min(fitting, max_concurrent or fitting),
            trial_name_creator=lambda trial: trial.config["trial_id"],
            trial_dirname_creator=lambda trial: trial.config["trial_id"],
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[progress],
        ),
    )
    try:
        results = tuner.fit()
    finally:
        # Tune tells nobody of an end by Ctrl-C.
        progress.close()
    for result in results:
        trial_id = (result.config or {})["trial_id"]
        job = by_id[trial_id]
        if is_complete(job):
            # The adapter is there; the optimizer's state has served its purpose, but for a round to come.
            if job.part == job.folder:
                shutil.rmtree(folder / "checkpoints" / trial_id, ignore_errors=True)
        else:
            error = str(result.error or "ended without an adapter").strip().splitlines()
            storage.write_json(
                job.folder / "trial.json",
                {**describe(job), "status": "failed", "error": error[-1] if error else "", "adapter": None},
            )


class _Progress(tune.Callback):
    """Shows all trials' steps on one line."""

    def __init__(self, trials: int) -> None:
        self._trials = trials
        self._seen: dict[str, tuple[int, int]] = {}
        self._steps: dict[str, int] = {}
        self._meter: Meter | None = None

    def setup(self, stop: Any = None, num_samples: Any = None, total_num_samples: Any = None, **info: Any) -> None:
        # Not before Tune has pickled what it was given.
        self._meter = Meter("training", None, unit="steps").__enter__()

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if self._meter is None or "step" not in result:
            return
        # Until a trial reports, it is taken to have as many steps as those that did.
        self._steps[trial.trial_id] = result["steps"]
        self._meter.total = round(sum(self._steps.values()) / len(self._steps) * self._trials)
        step, tokens = self._seen.get(trial.trial_id, (0, 0))
        self._meter.add(max(result["step"] - step, 0), max(result["target_tokens"] - tokens, 0))
        self._seen[trial.trial_id] = (result["step"], result["target_tokens"])

    def close(self) -> None:
        if self._meter is not None:
            self._meter.__exit__()
