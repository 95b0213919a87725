"""Attention results: the statistics of attention heads by arm, computed from the rows of each student.

P problems, S statistics, A arms, L layers, H heads of a layer, F = L x H.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from raykd.analysis.comparison import Answers
from raykd.analysis.head_effects import Effect, across_arms, correlation, difference
from raykd.config.experiment import BASE
from raykd.storage import row_store, schemas


@dataclass(frozen=True)
class ArmAttention:
    """The statistics of an arm's heads, its seeds averaged, and their difference from the base student's."""

    name: str
    means: dict[str, np.ndarray]
    """By statistic, (L, H): mean over problems."""
    heads: dict[str, Effect]
    """By statistic, F: difference from the base student; empty for the base student itself."""
    overall: dict[str, Effect]
    """By statistic, 1: difference of the mean over all heads."""


@dataclass(frozen=True)
class AttentionResults:
    """The change of the heads by training, and its correlation with correct answers."""

    statistics: list[str]
    num_layers: int
    num_heads: int
    num_problems: int
    num_students: int
    num_arms: int
    """Arms with measured students and with answers, the base student among them."""
    arms: list[ArmAttention]
    """The base student first, where it was measured."""
    correctness_by_problem: dict[str, Effect]
    """By statistic, F: correlation with correctness (flexible extract) across problems, within students."""
    accuracy_by_arm: dict[str, Effect]
    """By statistic, F: correlation with accuracy across arms."""
    notes: list[str]
    """Texts and trials without statistics."""


@dataclass(frozen=True)
class _Student:
    """One student, on the problems for which every student has statistics."""

    arm: str
    values_PSF: np.ndarray
    accuracy_P: np.ndarray
    """Its accuracy on each problem, by flexible extract; NaN where it has no answer."""
    accuracy: float
    """Over all problems that it answered; NaN where there are none."""


def read_attention(folder: Path, arms: Mapping[str, Sequence[str]], answers: Mapping[str, Answers]) -> AttentionResults:
    """Return the statistics of a complete folder.

    Args:
        folder: of `schemas.ATTENTION` rows, with its manifest.
        arms: the trials of each arm.
        answers: prediction rows by trial.
    """
    manifest = row_store.read_manifest(folder)
    assert manifest, "only complete folders are read"
    statistics, num_layers, measured = manifest["statistics"], manifest["layers"], set(manifest["trials"])
    # The folder was complete before later students were added: these may have rows for some of the texts only.
    measured_trials = {arm: [trial for trial in trials if trial in measured] for arm, trials in arms.items()}
    shape = (len(statistics), num_layers * manifest["heads"])
    values, errors = _read_values(folder, shape)
    problem_ids = _common_problems(values, measured_trials)
    students = _students(values, measured_trials, answers, problem_ids)
    answered = [student for student in students if np.isfinite(student.accuracy)]
    return AttentionResults(
        statistics=list(statistics),
        num_layers=num_layers,
        num_heads=manifest["heads"],
        num_problems=len(problem_ids),
        num_students=len(answered),
        num_arms=len(_by_arm(answered)),
        arms=_arm_results(students, statistics, num_layers),
        correctness_by_problem=_correctness_by_problem(answered, statistics),
        accuracy_by_arm=_accuracy_by_arm(answered, statistics),
        notes=_notes(
            manifest, errors, [trial for trials in arms.values() for trial in trials if trial not in measured]
        ),
    )


def _notes(manifest: Mapping[str, Any], errors: Sequence[str], missing: Sequence[str]) -> list[str]:
    notes = []
    if errors:
        notes.append(f"Attention: {len(errors)} of {manifest['rows']} texts could not be measured ({errors[0]})")
    if missing:
        more = ", …" if len(missing) > 3 else ""
        notes.append(f"Attention: not measured yet for {', '.join(missing[:3])}{more}")
    return notes


def _read_values(folder: Path, shape: tuple[int, int]) -> tuple[dict[str, dict[str, np.ndarray]], list[str]]:
    """Return the statistics (S, F) by trial and problem, and the errors of the texts without statistics."""
    errors: list[str] = []
    by_trial: dict[str, dict[str, np.ndarray]] = {}
    for part in row_store.stream_rows(folder, schemas.ATTENTION, ["trial_id", "problem_id", "values", "error"]):
        columns = (part[name].to_pylist() for name in ("trial_id", "problem_id", "error"))
        for trial, problem_id, error, values in zip(*columns, part["values"], strict=True):
            if error:
                errors.append(error)
            else:
                by_trial.setdefault(trial, {})[problem_id] = values.values.to_numpy().reshape(shape)
    return by_trial, errors


def _common_problems(values: Mapping[str, Mapping[str, np.ndarray]], arms: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the ids of the problems for which every student of the arms has statistics."""
    by_student = [set(values[trial]) for trials in arms.values() for trial in trials if trial in values]
    return sorted(set.intersection(*by_student)) if by_student else []


def _students(
    values: Mapping[str, Mapping[str, np.ndarray]],
    arms: Mapping[str, Sequence[str]],
    answers: Mapping[str, Answers],
    problem_ids: Sequence[str],
) -> list[_Student]:
    if not problem_ids:
        return []
    students = []
    for arm, trials in arms.items():
        for trial in trials:
            if trial in values:
                by_problem = _accuracy_by_problem(answers.get(trial, {}))
                students.append(
                    _Student(
                        arm=arm,
                        values_PSF=np.array([values[trial][problem_id] for problem_id in problem_ids], np.float32),
                        accuracy_P=np.array([by_problem.get(problem_id, np.nan) for problem_id in problem_ids]),
                        accuracy=float(np.mean(list(by_problem.values()))) if by_problem else float("nan"),
                    )
                )
    return students


def _accuracy_by_problem(answers: Answers) -> dict[str, float]:
    """Return the share of correct samples of each answered problem."""
    is_correct: dict[str, list[bool]] = {}
    for (problem_id, _), row in answers.items():
        if not row["error"]:
            is_correct.setdefault(problem_id, []).append(row["is_correct_flexible"])
    return {problem_id: float(np.mean(samples)) for problem_id, samples in is_correct.items()}


def _by_arm(students: Sequence[_Student]) -> dict[str, list[_Student]]:
    by_arm: dict[str, list[_Student]] = {}
    for student in students:
        by_arm.setdefault(student.arm, []).append(student)
    return by_arm


def _arm_results(students: Sequence[_Student], statistics: Sequence[str], num_layers: int) -> list[ArmAttention]:
    by_arm = _by_arm(students)
    means = {arm: np.mean([seed.values_PSF for seed in seeds], axis=0) for arm, seeds in by_arm.items()}
    base_PSF = means.get(BASE)
    return [
        _arm(arm, values_PSF, None if arm == BASE else base_PSF, statistics, num_layers)
        for arm, values_PSF in means.items()
    ]


def _correctness_by_problem(students: Sequence[_Student], statistics: Sequence[str]) -> dict[str, Effect]:
    if not students:
        return {}
    accuracy_P = [student.accuracy_P for student in students]
    return {
        statistic: correlation([student.values_PSF[:, number].astype(np.float64) for student in students], accuracy_P)
        for number, statistic in enumerate(statistics)
    }


def _accuracy_by_arm(students: Sequence[_Student], statistics: Sequence[str]) -> dict[str, Effect]:
    if not students:
        return {}
    by_arm = _by_arm(students).values()
    accuracy_A = np.array([np.mean([seed.accuracy for seed in seeds]) for seeds in by_arm])
    effects = {}
    for number, statistic in enumerate(statistics):
        means_AF = [np.mean([_mean(seed.values_PSF[:, number]) for seed in seeds], axis=0) for seeds in by_arm]
        effects[statistic] = across_arms(np.stack(means_AF), accuracy_A)
    return effects


def _arm(
    name: str,
    values_PSF: np.ndarray,
    base_PSF: np.ndarray | None,
    statistics: Sequence[str],
    num_layers: int,
) -> ArmAttention:
    means, heads, overall = {}, {}, {}
    for number, statistic in enumerate(statistics):
        values_PF = values_PSF[:, number].astype(np.float64)
        means[statistic] = _mean(values_PF).reshape(num_layers, -1)
        if base_PSF is not None:
            base_PF = base_PSF[:, number].astype(np.float64)
            heads[statistic] = difference(values_PF, base_PF)
            overall[statistic] = difference(_mean(values_PF, axis=1)[:, None], _mean(base_PF, axis=1)[:, None])
    return ArmAttention(name, means, heads, overall)


def _mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """Return the mean of the defined values; NaN where there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=axis)
