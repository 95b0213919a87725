"""Results: from an experiment's folder to the numbers of its report, each computed from rows, with n."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd import location
from raykd.attention_results import AttentionResults, read_attention
from raykd.comparison import BASELINE, Answers, Baseline, Comparison, Setting, baselines, compare_arms
from raykd.config import UNTOUCHED, shown
from raykd.faults import UserError
from raykd.finalists import ranked
from raykd.job import COMPLETE, FAILED
from raykd.measured import Measured, Row, measure
from raykd.mistakes import from_yaml, validated
from raykd.protocols import described
from raykd.run_file import RunRecord, read_run
from raykd.sections import Evaluate
from raykd.space import point_key
from raykd.storage import MANIFEST
from raykd.strategies import BUILT_IN, Strategy
from raykd.trial import Trial, read_predictions, read_trials

NUM_EXAMPLES = 10


@dataclass(frozen=True)
class Arm:
    """An arm, its seeds pooled, at its best point where there was a sweep.

    An interval's n is the number of problems: seeds only repeat them.
    """

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
class Sweep:
    """What a search found. The arms of the results are at their best points by validation, the trials are all."""

    metric: str
    """`accuracy` or `loss`."""
    validations: int
    """How often a trial is measured that goes to its end."""
    paths: list[str]
    """The searched fields that bear on some trial."""
    equal: list[Comparison]
    """Every arm against its baseline by strict match, at equal values of what was searched."""


@dataclass(frozen=True)
class Results:
    """All that a report shows."""

    folder: Path
    run: RunRecord
    config: str
    """`experiment.yaml` as it stands."""
    tree: Mapping[str, Any]
    """The same as a tree."""
    trials: list[Trial]
    arms: list[Arm]
    strict: list[Comparison]
    """Every arm against its baseline by strict match; arms without one are left out."""
    flexible: list[Comparison]
    examples: list[Example]
    answers: Mapping[str, Answers]
    """By trial."""
    notes: list[str]
    """What is missing or failed."""
    sweep: "Sweep | None" = None
    attention: AttentionResults | None = None
    """None where it was not measured."""

    @property
    def asked(self) -> str:
        """How the students were asked, in words."""
        where = f"{self.folder / 'experiment.yaml'}: evaluate"
        return described(validated(Evaluate, self.tree.get("evaluate") or {}, where))

    @property
    def also_asked(self) -> list[str]:
        """The folders of complete answers to other ways of asking."""
        found = [each.parent.name for each in location.in_each(self.folder / "predictions", MANIFEST)]
        return [name for name in found if f"predictions/{name}" != self.run.predictions]

    @property
    def name(self) -> str:
        """What the experiment is called."""
        return self.run.name or self.folder.name

    def arm(self, name: str) -> Arm | None:
        """The arm of that name, where it has predictions."""
        return next((arm for arm in self.arms if arm.name == name and arm.measured.n), None)


def read_results(folder: Path, with_attention: bool = True) -> Results:
    """Computes an experiment's numbers from its folder (layout: `raykd.records`).

    Args:
        folder: the experiment's.
        with_attention: whether the numbers of the attention heads are wanted, which take seconds to minutes.

    Raises:
        UserError: the folder is not an experiment's, or holds neither trials nor predictions.
    """
    run = read_run(folder)
    try:
        config = (folder / "experiment.yaml").read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no experiment.yaml: give an experiment's folder, as `raykd run` makes it"
        ) from None
    rows = read_predictions(folder / run.predictions)
    trials = read_trials(folder / "trials", rows)
    # What an earlier configuration of the experiment made, or an arm that was taken out, is none of its results.
    current = {UNTOUCHED, *run.trials} if run.trials is not None else {trial.trial_id for trial in trials}
    earlier = [trial.trial_id for trial in trials if trial.trial_id not in current]
    trials = [trial for trial in trials if trial.trial_id in current]
    if not trials:
        raise UserError(f"{folder} holds neither trials nor predictions: there is nothing to report yet")
    tree = _tree(config)
    # As their author thinks of them.
    order = [UNTOUCHED, *(str(name) for name in tree.get("arms") or ())]
    trials.sort(key=lambda t: (_rank(t.arm, order), t.arm, t.seed, t.trial_id))
    told = tree.get("sweep")
    best = _best(trials, told["metric"]) if told else trials
    trained = {trial.arm: trial for trial in trials if trial.arm != UNTOUCHED}
    overrides = {name: trial.overrides for name, trial in trained.items()}
    # Where the prime is searched too, an arm is not one that has it or has it not.
    is_searched = bool(told) and "prompt.strategy" in (told.get("space") or {})
    against = baselines(overrides, {name: "" if is_searched else trial.strategy for name, trial in trained.items()})
    names = dict.fromkeys(trial.arm for trial in trials)
    compared = {baseline.arm for baseline in against.values()}
    controls = _controls(tree, folder)
    arms = [_arm(name, name in compared, controls, best, rows) for name in names]
    attention = _attention(folder, run, arms, rows) if with_attention else None
    notes = _notes(folder, run, trials, best, earlier) + (attention.notes if attention else [])
    if with_attention and run.attention and not attention:
        notes.append("Attention: not measured yet; `raykd run` and `raykd attention` do it")
    by_seed = {arm.name: [(Setting(t.seed), rows.get(t.trial_id, {})) for t in arm.trials] for arm in arms}
    return Results(
        folder=folder,
        run=run,
        config=config,
        tree=tree,
        trials=trials,
        arms=arms,
        strict=compare_arms(by_seed, against, "is_correct_strict"),
        flexible=compare_arms(by_seed, against, "is_correct_flexible"),
        examples=_examples(arms, rows),
        answers=rows,
        notes=notes,
        attention=attention,
        sweep=_sweep(told, trials, against, rows) if told else None,
    )


def _best(trials: list[Trial], metric: str) -> list[Trial]:
    """The trials of each arm at its best point; all of an arm that has none which was trained to its end."""
    found = []
    for arm in dict.fromkeys(trial.arm for trial in trials):
        own = [trial for trial in trials if trial.arm == arm]
        reached: dict[str, list[float]] = {}
        for trial in own:
            if trial.status == COMPLETE and trial.validation:
                reached.setdefault(point_key(trial.values), []).append(trial.validation[metric])
        points = ranked(reached, metric)[:1]
        found += [trial for trial in own if not points or point_key(trial.values) == points[0]]
    return found


def _sweep(
    told: Mapping[str, Any],
    trials: list[Trial],
    against: Mapping[str, Baseline],
    rows: Mapping[str, Answers],
) -> Sweep:
    everywhere: dict[str, list[tuple[Setting, Answers]]] = {}
    for trial in trials:
        if trial.arm == UNTOUCHED:
            continue
        setting = Setting(trial.seed, trial.values)
        everywhere.setdefault(trial.arm, []).append((setting, rows.get(trial.trial_id, {})))
    return Sweep(
        metric=told["metric"],
        validations=told["validations"],
        paths=list(dict.fromkeys(path for trial in trials for path in trial.values)),
        equal=compare_arms(everywhere, against, "is_correct_strict"),
    )


def _arm(name: str, is_baseline: bool, controls: set[str], trials: list[Trial], rows: Mapping[str, Answers]) -> Arm:
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


def _attention(folder: Path, run: RunRecord, arms: list[Arm], rows: Mapping[str, Answers]) -> AttentionResults | None:
    measured = folder / run.attention if run.attention else None
    if measured is None or not (measured / MANIFEST).is_file():
        return None
    trained = {arm.name: [trial.trial_id for trial in arm.trials if trial.status == COMPLETE] for arm in arms}
    return read_attention(measured, trained, rows)


def _examples(arms: list[Arm], rows: Mapping[str, Answers]) -> list[Example]:
    """Problems on which the arms disagree most, taken from each arm's first trial with predictions."""
    shown: dict[str, Answers] = {}
    for arm in arms:
        first = next((trial for trial in arm.trials if trial.measured.n), None)
        if first:
            shown[arm.name] = rows[first.trial_id]
    by_problem: dict[str, dict[str, Row]] = {}
    for name, of_trial in shown.items():
        for (problem_id, sample), row in of_trial.items():
            if not row["error"] and not sample:
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


def _notes(folder: Path, run: RunRecord, trials: list[Trial], best: list[Trial], earlier: list[str]) -> list[str]:
    notes = []
    if earlier:
        notes.append(f"Left out: {len(earlier)} of an earlier configuration of this experiment ({_some(earlier)})")
    expected = run.problems.num_test
    samples = max((trial.measured.samples for trial in trials), default=1)
    for trial in trials:
        name = f"Arm {trial.arm}, seed {trial.seed}" + (f", {shown(trial.values)}" if trial.values else "")
        total = trial.measured.n + trial.measured.errors
        if trial.status == FAILED:
            notes.append(f"{name} failed: {trial.error or 'no reason was recorded'}")
        elif not total and trial.status == COMPLETE and trial in best:
            notes.append(f"{name} has no predictions: it was trained and not evaluated")
        elif total and expected and total != expected * samples:
            notes.append(f"{name} has {total} of {expected * samples} predictions: its evaluation is not complete")
        if trial.measured.errors:
            notes.append(f"{name}: {trial.measured.errors} of {total} problems got no answer and are left out of n")
    begun = [path.name for path in location.folders(folder / "trials") if not (path / "trial.json").is_file()]
    unfinished = [name for name in begun if name in (run.trials or begun)]
    if unfinished:
        what = f"Trial {unfinished[0]}" if len(unfinished) == 1 else f"{len(unfinished)} trials ({_some(unfinished)})"
        notes.append(f"Begun and not finished, so in no table: {what}")
    return notes


def _tree(config: str) -> Mapping[str, Any]:
    try:
        tree = from_yaml(config)
    except UserError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _controls(config: Mapping[str, Any], folder: Path) -> set[str]:
    """The strategies that tell the teacher another problem's answer."""
    own = (config.get("prompt") or {}).get("strategies") or {}
    where = f"{folder / 'experiment.yaml'}: prompt.strategies"
    known = BUILT_IN | {name: validated(Strategy, each, f"{where}.{name}") for name, each in own.items()}
    return {name for name, strategy in known.items() if strategy.is_control}


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _rank(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)
