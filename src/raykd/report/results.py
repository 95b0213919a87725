"""Results: the numbers of an experiment's report, each computed from the rows in its folder, with n."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd.analysis.attention_results import AttentionResults, read_attention
from raykd.analysis.comparison import BASELINE, Answers, Baseline, Comparison, Setting, baselines, compare_arms
from raykd.analysis.scores import Row, Scores, compute_scores
from raykd.config.errors import parse_yaml, validated
from raykd.config.experiment import BASE
from raykd.config.overrides import format_hparams
from raykd.config.run_file import RunRecord, read_run
from raykd.config.search_space import hparams_key
from raykd.config.sections import Evaluate
from raykd.config.strategies import BUILT_IN, Strategy
from raykd.data.prompts import protocol_description
from raykd.errors import UserError
from raykd.report.trials import TrialResult, read_predictions, read_trials
from raykd.storage import filesystem
from raykd.storage.paths import ExperimentPaths, TrialPaths
from raykd.storage.row_store import MANIFEST
from raykd.storage.schemas import COMPLETE, FAILED
from raykd.training.trial import rank_by_validation

NUM_EXAMPLES = 10


@dataclass(frozen=True)
class Arm:
    """An arm, its seeds pooled, at its best point where there was a sweep.

    An interval's n is the number of problems, because every seed answers the same ones.
    """

    name: str
    kind: str
    """`base` (the base student), `baseline` (others are compared with it), `primed`, `control` (its teacher received
    another problem's answer) or `unprimed`."""
    strategy: str
    trials: list[TrialResult]
    measured: Scores


@dataclass(frozen=True)
class Example:
    """A test problem and the answer of one trial of each arm, as prediction rows by arm."""

    question: str
    reference_answer: str
    predictions: dict[str, Row]


@dataclass(frozen=True)
class Sweep:
    """The results of a sweep. `Results.arms` are at their best points by validation, `Results.trials` are all."""

    metric: str
    """`accuracy` or `loss`."""
    num_validations: int
    """Number of validations of a trial that completes."""
    paths: list[str]
    """The searched fields that affect some trial."""
    equal: list[Comparison]
    """Every arm against its baseline by strict match, at equal values of the searched fields."""


@dataclass(frozen=True)
class Results:
    """The contents of a report."""

    folder: Path
    run: RunRecord
    config: str
    """The text of `experiment.yaml`."""
    tree: Mapping[str, Any]
    """The same, parsed."""
    trials: list[TrialResult]
    arms: list[Arm]
    strict: list[Comparison]
    """Every arm against its baseline by strict match; arms without one are left out."""
    flexible: list[Comparison]
    examples: list[Example]
    answers: Mapping[str, Answers]
    """By trial."""
    notes: list[str]
    """What is missing or failed."""
    sweep: Sweep | None = None
    attention: AttentionResults | None = None
    """None where it was not measured."""

    @property
    def evaluation(self) -> str:
        """The evaluation settings of the students, in words."""
        where = f"{ExperimentPaths(self.folder).config}: evaluate"
        return protocol_description(validated(Evaluate, self.tree.get("evaluate") or {}, where))

    @property
    def other_predictions(self) -> list[str]:
        """The folders of complete predictions with other evaluation settings."""
        complete = [
            each.parent.name for each in filesystem.find_in_subdirs(ExperimentPaths(self.folder).predictions, MANIFEST)
        ]
        return [name for name in complete if f"predictions/{name}" != self.run.predictions]

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.run.name or self.folder.name

    def arm(self, name: str) -> Arm | None:
        """The arm of that name; None where it has no predictions."""
        return next((arm for arm in self.arms if arm.name == name and arm.measured.n), None)


def read_results(folder: Path, with_attention: bool = True) -> Results:
    """Compute an experiment's numbers from its folder (layout: `raykd.storage.paths`).

    Args:
        folder: the experiment's.
        with_attention: whether to compute the statistics of attention heads, which takes seconds to minutes.

    Raises:
        UserError: the folder is not an experiment's, or holds neither trials nor predictions.
    """
    run = read_run(folder)
    try:
        config = ExperimentPaths(folder).config.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no experiment.yaml: give the folder of an experiment that `raykd run` made"
        ) from None
    rows = read_predictions(folder / run.predictions)
    trials = read_trials(ExperimentPaths(folder).trials, rows)
    # Trials of an earlier configuration, or of an arm that was removed, are not results of this experiment.
    current = {BASE, *run.trials} if run.trials is not None else {trial.trial_id for trial in trials}
    earlier = [trial.trial_id for trial in trials if trial.trial_id not in current]
    trials = [trial for trial in trials if trial.trial_id in current]
    if not trials:
        raise UserError(f"{folder} has no trials and no predictions: there is nothing to report yet")
    tree = _tree(config)
    # The order of the configuration.
    order = [BASE, *(str(name) for name in tree.get("arms") or ())]
    trials.sort(key=lambda t: (_rank(t.arm, order), t.arm, t.seed, t.trial_id))
    sweep = tree.get("sweep")
    best = _best(trials, sweep["metric"]) if sweep else trials
    trained = {trial.arm: trial for trial in trials if trial.arm != BASE}
    overrides = {name: trial.overrides for name, trial in trained.items()}
    # Where the strategy is searched too, an arm is neither primed nor unprimed.
    is_searched = bool(sweep) and "prompt.strategy" in (sweep.get("space") or {})
    against = baselines(overrides, {name: "" if is_searched else trial.strategy for name, trial in trained.items()})
    names = dict.fromkeys(trial.arm for trial in trials)
    compared = {baseline.arm for baseline in against.values()}
    controls = _controls(tree, folder)
    arms = [_arm(name, name in compared, controls, best, rows) for name in names]
    attention = _attention(folder, run, arms, rows) if with_attention else None
    notes = _notes(folder, run, trials, best, earlier) + (attention.notes if attention else [])
    if with_attention and run.attention and not attention:
        notes.append("Attention: not measured yet; run `raykd attention`")
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
        sweep=_sweep(sweep, trials, against, rows) if sweep else None,
    )


def _best(trials: list[TrialResult], metric: str) -> list[TrialResult]:
    """The trials of each arm at its best point; all of an arm without a complete trial."""
    best = []
    for arm in dict.fromkeys(trial.arm for trial in trials):
        own = [trial for trial in trials if trial.arm == arm]
        reached: dict[str, list[float]] = {}
        for trial in own:
            if trial.status == COMPLETE and trial.validation:
                reached.setdefault(hparams_key(trial.values), []).append(trial.validation[metric])
        points = rank_by_validation(reached, metric)[:1]
        best += [trial for trial in own if not points or hparams_key(trial.values) == points[0]]
    return best


def _sweep(
    section: Mapping[str, Any],
    trials: list[TrialResult],
    against: Mapping[str, Baseline],
    rows: Mapping[str, Answers],
) -> Sweep:
    by_arm: dict[str, list[tuple[Setting, Answers]]] = {}
    for trial in trials:
        if trial.arm == BASE:
            continue
        setting = Setting(trial.seed, trial.values)
        by_arm.setdefault(trial.arm, []).append((setting, rows.get(trial.trial_id, {})))
    return Sweep(
        metric=section["metric"],
        num_validations=section["num_validations"],
        paths=list(dict.fromkeys(path for trial in trials for path in trial.values)),
        equal=compare_arms(by_arm, against, "is_correct_strict"),
    )


def _arm(
    name: str, is_baseline: bool, controls: set[str], trials: list[TrialResult], rows: Mapping[str, Answers]
) -> Arm:
    own = [trial for trial in trials if trial.arm == name]
    strategy = own[0].strategy
    if name == BASE:
        kind = "base"
    elif is_baseline:
        kind = "baseline"
    elif strategy in ("", BASELINE):
        kind = "unprimed"
    else:
        kind = "control" if strategy in controls else "primed"
    pooled = [row for trial in own for row in rows.get(trial.trial_id, {}).values()]
    return Arm(name, kind, strategy, own, compute_scores(pooled))


def _attention(folder: Path, run: RunRecord, arms: list[Arm], rows: Mapping[str, Answers]) -> AttentionResults | None:
    measured = folder / run.attention if run.attention else None
    if measured is None or not (measured / MANIFEST).is_file():
        return None
    trained = {arm.name: [trial.trial_id for trial in arm.trials if trial.status == COMPLETE] for arm in arms}
    return read_attention(measured, trained, rows)


def _examples(arms: list[Arm], rows: Mapping[str, Answers]) -> list[Example]:
    """The problems on which the arms disagree most, by each arm's first trial with predictions."""
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


def _notes(
    folder: Path, run: RunRecord, trials: list[TrialResult], best: list[TrialResult], earlier: list[str]
) -> list[str]:
    notes = []
    if earlier:
        notes.append(f"Excluded, of an earlier configuration of this experiment: {_counted(earlier)}")
    expected = run.problems.num_test
    samples = max((trial.measured.num_samples for trial in trials), default=1)
    for trial in trials:
        name = f"Arm {trial.arm}, seed {trial.seed}" + (f", {format_hparams(trial.values)}" if trial.values else "")
        total = trial.measured.n + trial.measured.errors
        if trial.status == FAILED:
            notes.append(f"{name} failed: {trial.error or 'no reason was recorded'}")
        elif not total and trial.status == COMPLETE and trial in best:
            notes.append(f"{name} has no predictions: it was trained but not evaluated")
        elif total and expected and total != expected * samples:
            notes.append(f"{name} has {total} of {expected * samples} predictions: its evaluation is incomplete")
        if trial.measured.errors:
            notes.append(f"{name}: {trial.measured.errors} of {total} predictions are errors and are excluded from n")
    begun = [
        path.name
        for path in filesystem.list_dirs(ExperimentPaths(folder).trials)
        if not TrialPaths(path).record.is_file()
    ]
    unfinished = [name for name in begun if name in (run.trials or begun)]
    if unfinished:
        notes.append(f"Unfinished and therefore in no table: {_counted(unfinished)}")
    return notes


def _tree(config: str) -> Mapping[str, Any]:
    try:
        tree = parse_yaml(config)
    except UserError:
        return {}
    return tree if isinstance(tree, dict) else {}


def _controls(config: Mapping[str, Any], folder: Path) -> set[str]:
    """The strategies that give the teacher another problem's answer."""
    own = (config.get("prompt") or {}).get("strategies") or {}
    where = f"{ExperimentPaths(folder).config}: prompt.strategies"
    known = BUILT_IN | {name: validated(Strategy, each, f"{where}.{name}") for name, each in own.items()}
    return {name for name, strategy in known.items() if strategy.is_control}


def _counted(trials: list[str]) -> str:
    """How many trials, and the names of the first three."""
    more = ", …" if len(trials) > 3 else ""
    return f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'} ({', '.join(trials[:3])}{more})"


def _rank(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)
