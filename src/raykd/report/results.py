"""Results: the numbers of an experiment's report, computed from the rows in its folder."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raykd.analysis.attention_results import AttentionResults, read_attention
from raykd.analysis.comparison import BASELINE, Answers, Baseline, Comparison, Setting, baselines, compare_arms
from raykd.analysis.scores import Row, Scores, compute_scores
from raykd.config.errors import validated
from raykd.config.experiment import BASE
from raykd.config.overrides import format_hparams
from raykd.config.parsing import parse_yaml
from raykd.config.run_record import RunRecord, read_run
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
class ArmResult:
    """The result of an arm, its seeds pooled; of a sweep at the arm's best point."""

    name: str
    kind: str
    """`base` (the base student), `baseline` (of another arm), `primed`, `control` (the teacher received another
    problem's answer) or `unprimed`."""
    strategy: str
    trials: list[TrialResult]
    scores: Scores


@dataclass(frozen=True)
class Example:
    """A test problem and the answer of one trial of each arm, as prediction rows by arm."""

    question: str
    reference_answer: str
    predictions: dict[str, Row]


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep. `Results.arms` are at their best points by validation, `Results.trials` are all."""

    metric: str
    """`accuracy` or `loss`."""
    num_validations: int
    """Number of validations of a complete trial."""
    paths: list[str]
    """The searched fields that affect any trial."""
    comparisons: list[Comparison]
    """Every arm against its baseline by strict match, at equal values of the searched fields."""


@dataclass(frozen=True)
class Results:
    """The contents of a report."""

    folder: Path
    run: RunRecord
    config: str
    """The text of `experiment.yaml`."""
    tree: Mapping[str, Any]
    """The parsed `experiment.yaml`."""
    trials: list[TrialResult]
    arms: list[ArmResult]
    strict: list[Comparison]
    """Every arm against its baseline by strict match; arms without one are left out."""
    flexible: list[Comparison]
    examples: list[Example]
    answers: Mapping[str, Answers]
    """Prediction rows by trial."""
    notes: list[str]
    """Missing and failed trials and predictions."""
    sweep: SweepResult | None = None
    attention: AttentionResults | None = None
    """None where it was not measured."""

    @property
    def evaluation(self) -> str:
        """The evaluation settings of the students, in words."""
        path = f"{ExperimentPaths(self.folder).config}: evaluate"
        return protocol_description(validated(Evaluate, self.tree.get("evaluate") or {}, path))

    @property
    def other_predictions(self) -> list[str]:
        """The folders of complete predictions with other evaluation settings."""
        manifests = filesystem.find_in_subdirs(ExperimentPaths(self.folder).predictions, MANIFEST)
        complete = [manifest.parent.name for manifest in manifests]
        return [name for name in complete if f"predictions/{name}" != self.run.predictions]

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self.run.name or self.folder.name

    def arm(self, name: str) -> ArmResult | None:
        """Return the arm of that name; None where it has no predictions."""
        return next((arm for arm in self.arms if arm.name == name and arm.scores.n), None)


def read_results(folder: Path, with_attention: bool = True) -> Results:
    """Compute an experiment's numbers from its folder (layout: `raykd.storage.paths`).

    Args:
        folder: the experiment's.
        with_attention: whether to compute the statistics of attention heads, which takes seconds to minutes.

    Raises:
        UserError: the folder is not an experiment's, or holds neither trials nor predictions.
    """
    run = read_run(folder)
    config = _read_config(folder)
    tree = _parse(config, ExperimentPaths(folder).config)
    rows = read_predictions(folder / run.predictions)
    trials, excluded = _current_trials(folder, run, tree, rows)
    sweep = tree.get("sweep")
    best = _best_trials(trials, sweep["metric"]) if sweep else trials
    arm_baselines = _baselines(trials, sweep)
    arms = _arm_results(trials, best, arm_baselines, _controls(tree, folder), rows)
    attention = _attention(folder, run, arms, rows) if with_attention else None
    notes = _notes(folder, run, trials, best, excluded)
    if attention:
        notes += attention.notes
    elif with_attention and run.attention:
        notes.append("Attention: not measured yet; run `raykd attention`")
    paired = {arm.name: [(Setting(t.seed), rows.get(t.trial_id, {})) for t in arm.trials] for arm in arms}
    return Results(
        folder=folder,
        run=run,
        config=config,
        tree=tree,
        trials=trials,
        arms=arms,
        strict=compare_arms(paired, arm_baselines, "is_correct_strict"),
        flexible=compare_arms(paired, arm_baselines, "is_correct_flexible"),
        examples=_examples(arms, rows),
        answers=rows,
        notes=notes,
        attention=attention,
        sweep=_sweep(sweep, trials, arm_baselines, rows) if sweep else None,
    )


def _read_config(folder: Path) -> str:
    try:
        return ExperimentPaths(folder).config.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{ExperimentPaths(folder).config} is damaged: {error}") from None
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no experiment.yaml: give the folder of an experiment that `raykd run` made"
        ) from None


def _current_trials(
    folder: Path, run: RunRecord, tree: Mapping[str, Any], rows: Mapping[str, Answers]
) -> tuple[list[TrialResult], list[str]]:
    """Return the trials of the current configuration in its order, and the ids of other trials."""
    trials = read_trials(ExperimentPaths(folder).trials, rows)
    excluded: list[str] = []
    if run.trials is not None:
        # Trials of an earlier configuration, or of an arm that was removed, are not results of this experiment.
        current = {BASE, *run.trials}
        excluded = [trial.trial_id for trial in trials if trial.trial_id not in current]
        trials = [trial for trial in trials if trial.trial_id in current]
    if not trials:
        raise UserError(f"{folder} has no trials and no predictions: there is nothing to report yet")
    order = [BASE, *(str(name) for name in tree.get("arms") or ())]
    trials.sort(key=lambda trial: (_rank(trial.arm, order), trial.arm, trial.seed, trial.trial_id))
    return trials, excluded


def _baselines(trials: list[TrialResult], sweep: Mapping[str, Any] | None) -> dict[str, Baseline]:
    by_arm = {trial.arm: trial for trial in trials if trial.arm != BASE}
    overrides = {name: trial.overrides for name, trial in by_arm.items()}
    # Where the strategy is searched, an arm is neither primed nor unprimed.
    is_searched = sweep is not None and "prompt.strategy" in (sweep.get("space") or {})
    return baselines(overrides, {name: "" if is_searched else trial.strategy for name, trial in by_arm.items()})


def _best_trials(trials: list[TrialResult], metric: str) -> list[TrialResult]:
    """Return the trials of each arm at its best point, and all trials of an arm without a complete one."""
    best = []
    for arm in dict.fromkeys(trial.arm for trial in trials):
        arm_trials = [trial for trial in trials if trial.arm == arm]
        metrics: dict[str, list[float]] = {}
        for trial in arm_trials:
            if trial.status == COMPLETE and trial.validation:
                metrics.setdefault(hparams_key(trial.hparams), []).append(trial.validation[metric])
        points = rank_by_validation(metrics, metric)
        best += [trial for trial in arm_trials if not points or hparams_key(trial.hparams) == points[0]]
    return best


def _sweep(
    section: Mapping[str, Any],
    trials: list[TrialResult],
    baselines: Mapping[str, Baseline],
    rows: Mapping[str, Answers],
) -> SweepResult:
    by_arm: dict[str, list[tuple[Setting, Answers]]] = {}
    for trial in trials:
        if trial.arm == BASE:
            continue
        setting = Setting(trial.seed, trial.hparams)
        by_arm.setdefault(trial.arm, []).append((setting, rows.get(trial.trial_id, {})))
    return SweepResult(
        metric=section["metric"],
        num_validations=section["num_validations"],
        paths=list(dict.fromkeys(path for trial in trials for path in trial.hparams)),
        comparisons=compare_arms(by_arm, baselines, "is_correct_strict"),
    )


def _arm_results(
    trials: list[TrialResult],
    best: list[TrialResult],
    baselines: Mapping[str, Baseline],
    controls: set[str],
    rows: Mapping[str, Answers],
) -> list[ArmResult]:
    baseline_names = {baseline.arm for baseline in baselines.values()}
    arms = []
    for name in dict.fromkeys(trial.arm for trial in trials):
        arm_trials = [trial for trial in best if trial.arm == name]
        strategy = arm_trials[0].strategy
        if name == BASE:
            kind = "base"
        elif name in baseline_names:
            kind = "baseline"
        elif strategy in ("", BASELINE):
            kind = "unprimed"
        else:
            kind = "control" if strategy in controls else "primed"
        pooled = [row for trial in arm_trials for row in rows.get(trial.trial_id, {}).values()]
        arms.append(ArmResult(name, kind, strategy, arm_trials, compute_scores(pooled)))
    return arms


def _attention(
    folder: Path, run: RunRecord, arms: list[ArmResult], rows: Mapping[str, Answers]
) -> AttentionResults | None:
    attention = folder / run.attention if run.attention else None
    if attention is None or not (attention / MANIFEST).is_file():
        return None
    trained = {arm.name: [trial.trial_id for trial in arm.trials if trial.status == COMPLETE] for arm in arms}
    return read_attention(attention, trained, rows)


def _examples(arms: list[ArmResult], rows: Mapping[str, Answers]) -> list[Example]:
    """Return the problems on which the arms disagree most, by each arm's first trial with predictions."""
    by_problem: dict[str, dict[str, Row]] = {}
    for arm in arms:
        trial = next((trial for trial in arm.trials if trial.scores.n), None)
        if trial:
            for (problem_id, sample), row in rows[trial.trial_id].items():
                if not row["error"] and sample == 0:
                    by_problem.setdefault(problem_id, {})[arm.name] = row

    def agreement(problem_id: str) -> tuple[int, int, str]:
        correct = [row["is_correct_strict"] for row in by_problem[problem_id].values()]
        return -min(correct.count(True), correct.count(False)), -len(correct), problem_id

    examples = []
    for problem_id in sorted(by_problem, key=agreement)[:NUM_EXAMPLES]:
        predictions = by_problem[problem_id]
        first_row = next(iter(predictions.values()))
        examples.append(Example(first_row["question"], first_row["reference_answer"], predictions))
    return examples


def _notes(
    folder: Path, run: RunRecord, trials: list[TrialResult], best: list[TrialResult], excluded: list[str]
) -> list[str]:
    notes = []
    if excluded:
        notes.append(f"Excluded, of an earlier configuration of this experiment: {_count_and_names(excluded)}")
    expected = (run.problems.num_test or 0) * max((trial.scores.num_samples for trial in trials), default=1)
    for trial in trials:
        name = f"Arm {trial.arm}, seed {trial.seed}"
        if trial.hparams:
            name += f", {format_hparams(trial.hparams)}"
        total = trial.scores.n + trial.scores.errors
        if trial.status == FAILED:
            notes.append(f"{name} failed: {trial.error or 'no reason was recorded'}")
        elif not total and trial.status == COMPLETE and trial in best:
            notes.append(f"{name} has no predictions: it was trained but not evaluated")
        elif total and expected and total != expected:
            notes.append(f"{name} has {total} of {expected} predictions: its evaluation is incomplete")
        if trial.scores.errors:
            notes.append(f"{name}: {trial.scores.errors} of {total} predictions are errors and are excluded from n")
    started = [
        path.name
        for path in filesystem.list_dirs(ExperimentPaths(folder).trials)
        if not TrialPaths(path).record.is_file()
    ]
    unfinished = [name for name in started if name in (run.trials or started)]
    if unfinished:
        notes.append(f"Unfinished and therefore in no table: {_count_and_names(unfinished)}")
    return notes


def _parse(config: str, file: Path) -> Mapping[str, Any]:
    try:
        tree = parse_yaml(config)
    except UserError as error:
        raise UserError(f"{file} is damaged: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} is damaged: should be a mapping of keys, not {type(tree).__name__}")
    return tree


def _controls(config: Mapping[str, Any], folder: Path) -> set[str]:
    """Return the names of the strategies that give the teacher another problem's answer."""
    sections = (config.get("prompt") or {}).get("strategies") or {}
    path = f"{folder / 'experiment.yaml'}: prompt.strategies"
    custom = {name: validated(Strategy, section, f"{path}.{name}") for name, section in sections.items()}
    return {name for name, strategy in (BUILT_IN | custom).items() if strategy.is_control}


def _count_and_names(trials: list[str]) -> str:
    """Return the number of trials, and the names of the first three."""
    more = ", …" if len(trials) > 3 else ""
    return f"{len(trials)} {'trial' if len(trials) == 1 else 'trials'} ({', '.join(trials[:3])}{more})"


def _rank(name: str, order: list[str]) -> int:
    return order.index(name) if name in order else len(order)
