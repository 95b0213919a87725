"""Results: from an experiment's folder to the numbers of its report, each computed from rows, with n."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from raykd.comparison import BASELINE, Comparison, Row, baselines, compare_arms
from raykd.config import UNTOUCHED
from raykd.records import PREDICTION
from raykd.statistics import wilson_interval
from raykd.storage import open_rows, read_json
from raykd.strategies import BUILT_IN, Strategy

NUM_EXAMPLES = 5


@dataclass(frozen=True)
class Share:
    """A share of rows and its 95 % Wilson interval, as fractions; None where nothing was counted."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Measured:
    """What a set of predictions says. Rows with an error are in `errors` and nowhere else."""

    strict: Share
    flexible: Share
    n: int
    errors: int
    num_problems: int
    answer_in_form: float | None
    """Share with an answer after `####`."""
    right_in_form: float | None
    """Share that is right (strict) among those with an answer after `####`."""
    truncated: float | None
    """Share cut at the token limit."""
    mean_tokens: float | None


@dataclass(frozen=True)
class Trial:
    """A trial, or the untouched student: what trial.json says, and what its predictions do."""

    trial_id: str
    arm: str
    seed: int
    status: str
    error: str
    strategy: str
    overrides: Mapping[str, Any]
    dropped: Mapping[str, int]
    measured: Measured
    train_rows: int | None = None
    train_steps: int | None = None
    target_tokens: int | None = None
    train_seconds: float | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    losses: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Arm:
    """An arm, its seeds pooled. An interval's n is the number of problems: seeds only repeat them."""

    name: str
    kind: str
    """`untouched`, `baseline` (others are compared with it), `primed`, `control` (its teacher was told another
    problem's answer) or `unprimed`."""
    strategy: str
    trials: list[Trial]
    measured: Measured


@dataclass(frozen=True)
class Example:
    """A test problem and what one trial of each arm said, as prediction rows by arm."""

    question: str
    reference_answer: str
    predictions: dict[str, Row]


@dataclass(frozen=True)
class Results:
    """All that a report shows."""

    folder: Path
    run: Mapping[str, Any]
    config: str
    trials: list[Trial]
    arms: list[Arm]
    strict: list[Comparison]
    """Every arm against its baseline by strict match; arms without one are left out."""
    flexible: list[Comparison]
    examples: list[Example]
    notes: list[str]
    """What is missing or failed."""

    @property
    def name(self) -> str:
        """What the experiment is called."""
        return str(self.run.get("name") or self.folder.name)

    def arm(self, name: str) -> Arm | None:
        """The arm of that name, where it has predictions."""
        return next((arm for arm in self.arms if arm.name == name and arm.measured.n), None)


def read_results(folder: Path) -> Results:
    """Computes an experiment's numbers from its folder (layout: `raykd.records`).

    Raises:
        ValueError: the folder is not an experiment's, or holds neither trials nor predictions.
    """
    for name in ("experiment.yaml", "run.json"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} has no {name}: give the folder of an experiment, as `raykd run` makes it")
    run = read_json(folder / "run.json")
    config = (folder / "experiment.yaml").read_text(encoding="utf-8")
    rows = _predictions(folder / "predictions")
    trials = _trials(folder / "trials", rows)
    # What an earlier configuration of the experiment made, or an arm that was taken out, is none of its results.
    current = {UNTOUCHED, *run["trials"]} if run.get("trials") else {trial.trial_id for trial in trials}
    earlier = [trial.trial_id for trial in trials if trial.trial_id not in current]
    trials = [trial for trial in trials if trial.trial_id in current]
    if not trials:
        raise ValueError(f"{folder} holds neither trials nor predictions: there is nothing to report yet")
    tree = _tree(config)
    # As their author thinks of them.
    order = [UNTOUCHED, *(str(name) for name in tree.get("arms") or ())]
    trials.sort(key=lambda t: (_rank(t.arm, order), t.arm, t.seed, t.trial_id))
    trained = {trial.arm: trial for trial in trials if trial.arm != UNTOUCHED}
    overrides = {name: trial.overrides for name, trial in trained.items()}
    against = baselines(overrides, {name: trial.strategy for name, trial in trained.items()})
    names = dict.fromkeys(trial.arm for trial in trials)
    compared = {baseline.arm for baseline in against.values()}
    controls = _controls(tree)
    arms = [_arm(name, name in compared, controls, trials, rows) for name in names]
    by_seed = {arm.name: [(t.seed, rows.get(t.trial_id, {})) for t in arm.trials] for arm in arms}
    return Results(
        folder=folder,
        run=run,
        config=config,
        trials=trials,
        arms=arms,
        strict=compare_arms(by_seed, against, "is_correct_strict"),
        flexible=compare_arms(by_seed, against, "is_correct_flexible"),
        examples=_examples(arms, rows),
        notes=_notes(folder, run, trials, earlier),
    )


def finite(value: Any) -> float | None:
    """The number, or None where there is none or it is not finite."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and math.isfinite(value) else None


def measure(rows: Iterable[Row]) -> Measured:
    """Accuracy and form of prediction rows. Rows of several seeds may be passed together."""
    rows = list(rows)
    answered = [row for row in rows if not row["error"]]
    n, num_problems = len(answered), len({row["problem_id"] for row in answered})

    def share(column: str) -> Share:
        if not n:
            return Share()
        value = sum(row[column] for row in answered) / n
        return Share(value, *wilson_interval(value * num_problems, num_problems))

    in_form = [row for row in answered if row["answer_strict"] is not None]
    return Measured(
        strict=share("is_correct_strict"),
        flexible=share("is_correct_flexible"),
        n=n,
        errors=len(rows) - n,
        num_problems=num_problems,
        answer_in_form=_mean(row["answer_strict"] is not None for row in answered),
        right_in_form=_mean(row["is_correct_strict"] for row in in_form),
        truncated=_mean(row["finish_reason"] == "length" for row in answered),
        mean_tokens=_mean(row["num_tokens"] for row in answered),
    )


def _predictions(folder: Path) -> dict[str, dict[str, Row]]:
    """Prediction rows by trial and problem; an answer replaces the error that an earlier attempt left."""
    rows: dict[str, dict[str, Row]] = {}
    if not folder.is_dir():
        return rows
    for row in open_rows(folder, PREDICTION).to_table().to_pylist():
        of_trial = rows.setdefault(row["trial_id"], {})
        earlier = of_trial.get(row["problem_id"])
        if earlier is None or (earlier["error"] and not row["error"]):
            of_trial[row["problem_id"]] = row
    return rows


def _trials(folder: Path, rows: Mapping[str, Mapping[str, Row]]) -> list[Trial]:
    trials = [_trial(file.parent, rows) for file in sorted(folder.glob("*/trial.json"))]
    with_folder = {trial.trial_id for trial in trials}
    for trial_id, of_trial in rows.items():
        if trial_id not in with_folder:
            first = next(iter(of_trial.values()))
            trials.append(
                Trial(
                    trial_id=trial_id,
                    arm=first["arm"],
                    seed=first["seed"],
                    status="complete",
                    error="",
                    strategy="",
                    overrides={},
                    dropped={},
                    measured=measure(of_trial.values()),
                )
            )
    return trials


def _trial(folder: Path, rows: Mapping[str, Mapping[str, Row]]) -> Trial:
    told = read_json(folder / "trial.json")
    return Trial(
        trial_id=told["trial_id"],
        arm=told["arm"],
        seed=told["seed"],
        status=told["status"],
        error=told.get("error") or "",
        strategy=told.get("strategy") or "",
        overrides=told.get("overrides") or {},
        dropped=told.get("dropped") or {},
        measured=measure(rows.get(told["trial_id"], {}).values()),
        train_rows=told.get("rows"),
        train_steps=told.get("steps"),
        target_tokens=told.get("target_tokens"),
        train_seconds=finite(told.get("seconds")),
        loss_first=finite(told.get("loss_first")),
        loss_last=finite(told.get("loss_last")),
        losses=_losses(folder / "metrics.jsonl"),
    )


def _losses(file: Path) -> list[tuple[int, float]]:
    """Loss by step. A trial that resumed wrote some steps twice: the later ones count."""
    by_step: dict[int, float] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    for number, line in enumerate(lines, start=1):
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                break  # A trial that was killed may leave its last line half written.
            raise ValueError(f"{file}, line {number} is not JSON: {line[:80]!r}") from None
        if finite(point.get("loss")) is not None:
            by_step[point["step"]] = point["loss"]
    return sorted(by_step.items())


def _arm(
    name: str, is_baseline: bool, controls: set[str], trials: list[Trial], rows: Mapping[str, Mapping[str, Row]]
) -> Arm:
    own = [trial for trial in trials if trial.arm == name]
    strategy = own[0].strategy
    if name == UNTOUCHED or is_baseline:
        kind = "untouched" if name == UNTOUCHED else "baseline"
    elif strategy in ("", BASELINE):
        kind = "unprimed"
    else:
        kind = "control" if strategy in controls else "primed"
    pooled = [row for trial in own for row in rows.get(trial.trial_id, {}).values()]
    return Arm(name, kind, strategy, own, measure(pooled))


def _examples(arms: list[Arm], rows: Mapping[str, Mapping[str, Row]]) -> list[Example]:
    """Problems on which the arms disagree most, taken from each arm's first trial with predictions."""
    shown: dict[str, Mapping[str, Row]] = {}
    for arm in arms:
        first = next((trial for trial in arm.trials if trial.measured.n), None)
        if first:
            shown[arm.name] = rows[first.trial_id]
    by_problem: dict[str, dict[str, Row]] = {}
    for name, of_trial in shown.items():
        for problem_id, row in of_trial.items():
            if not row["error"]:
                by_problem.setdefault(problem_id, {})[name] = row

    def agreement(problem_id: str) -> tuple[int, int, str]:
        right = [row["is_correct_strict"] for row in by_problem[problem_id].values()]
        return -min(right.count(True), right.count(False)), -len(right), problem_id

    examples = []
    for problem_id in sorted(by_problem, key=agreement)[:NUM_EXAMPLES]:
        predictions = by_problem[problem_id]
        first_row = next(iter(predictions.values()))
        examples.append(Example(first_row["question"], first_row["reference_answer"], predictions))
    return examples


def _notes(folder: Path, run: Mapping[str, Any], trials: list[Trial], earlier: list[str]) -> list[str]:
    notes = []
    if earlier:
        notes.append(f"Left out: {len(earlier)} of an earlier configuration of this experiment ({_some(earlier)})")
    expected = (run.get("problems") or {}).get("num_test")
    for trial in trials:
        name = f"Arm {trial.arm}, seed {trial.seed}"
        total = trial.measured.n + trial.measured.errors
        if trial.status == "failed":
            notes.append(f"{name} failed: {trial.error or 'no reason was recorded'}")
        elif not total:
            notes.append(f"{name} has no predictions: it was trained and not evaluated")
        elif expected and total != expected:
            notes.append(f"{name} has {total} of {expected} predictions: its evaluation is not complete")
        if trial.measured.errors:
            notes.append(f"{name}: {trial.measured.errors} of {total} problems got no answer and are left out of n")
    begun = [path.name for path in sorted(folder.glob("trials/*/")) if not (path / "trial.json").is_file()]
    unfinished = [name for name in begun if name in (run.get("trials") or begun)]
    if unfinished:
        what = f"Trial {unfinished[0]}" if len(unfinished) == 1 else f"{len(unfinished)} trials ({_some(unfinished)})"
        notes.append(f"Begun and not finished, so in no table: {what}")
    return notes


def _tree(config: str) -> Mapping[str, Any]:
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _controls(config: Mapping[str, Any]) -> set[str]:
    """The strategies that tell the teacher another problem's answer."""
    own = (config.get("prompt") or {}).get("strategies") or {}
    known = BUILT_IN | {name: Strategy.model_validate(each) for name, each in own.items()}
    return {name for name, strategy in known.items() if strategy.is_control}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _rank(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None
