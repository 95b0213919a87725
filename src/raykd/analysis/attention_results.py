"""Attention results: the statistics of attention heads by arm, computed from the rows of each student.

P problems, S statistics, L layers, H heads of a layer, F = L x H.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
    """The same for the mean over all heads: 1."""


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
    right: dict[str, Effect]
    """By statistic, F: correlation with correctness (flexible extract) across problems, within students."""
    accurate: dict[str, Effect]
    """By statistic, F: correlation with accuracy across arms."""
    notes: list[str]
    """What could not be measured."""


@dataclass(frozen=True)
class _Student:
    """One student, on the problems that all students have read."""

    arm: str
    values_PSF: np.ndarray
    right_P: np.ndarray
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
    names, num_heads, measured = manifest["statistics"], manifest["layers"] * manifest["heads"], set(manifest["trials"])
    missing = [trial for trials in arms.values() for trial in trials if trial not in measured]
    # A student that was begun after the folder was complete has read only some of the texts.
    known_trials = {arm: [trial for trial in trials if trial in measured] for arm, trials in arms.items()}
    students, common, errors = _students(folder, known_trials, answers, (len(names), num_heads))
    notes = []
    if errors:
        notes.append(f"Attention: {len(errors)} of {manifest['rows']} texts could not be measured ({errors[0]})")
    if missing:
        more = ", …" if len(missing) > 3 else ""
        notes.append(f"Attention: not measured yet for {', '.join(missing[:3])}{more}")
    if not common:
        students = []
    by_arm = {arm: own for arm in arms if (own := [each for each in students if each.arm == arm])}
    means = {arm: np.mean([each.values_PSF for each in own], axis=0) for arm, own in by_arm.items()}
    answered = [each for each in students if np.isfinite(each.accuracy)]
    answered_by_arm = {arm: own for arm in arms if (own := [each for each in answered if each.arm == arm])}
    right, accurate = {}, {}
    if answered:
        accuracy_A = np.array([np.mean([each.accuracy for each in own]) for own in answered_by_arm.values()])
        for number, name in enumerate(names):
            values = [each.values_PSF[:, number].astype(np.float64) for each in answered]
            right[name] = correlation(values, [each.right_P for each in answered])
            means_AF = [
                np.mean([_mean(each.values_PSF[:, number]) for each in own], axis=0) for own in answered_by_arm.values()
            ]
            accurate[name] = across_arms(np.stack(means_AF), accuracy_A)
    base_PSF = means.get(BASE)
    return AttentionResults(
        statistics=list(names),
        num_layers=manifest["layers"],
        num_heads=manifest["heads"],
        num_problems=len(common),
        num_students=len(answered),
        num_arms=len(answered_by_arm),
        arms=[
            _arm(arm, values_PSF, None if arm == BASE else base_PSF, names, manifest["layers"])
            for arm, values_PSF in means.items()
        ],
        right=right,
        accurate=accurate,
        notes=notes,
    )


def _students(
    folder: Path, arms: Mapping[str, Sequence[str]], answers: Mapping[str, Answers], shape: tuple[int, int]
) -> tuple[list[_Student], list[str], list[str]]:
    """All students, the problems that each of them has read, and the errors of the texts that one could not read."""
    errors: list[str] = []
    by_trial: dict[str, dict[str, np.ndarray]] = {}
    for part in row_store.stream_rows(folder, schemas.ATTENTION, ["trial_id", "problem_id", "values", "error"]):
        names = (part[name].to_pylist() for name in ("trial_id", "problem_id", "error"))
        for trial, problem_id, error, values in zip(*names, part["values"], strict=True):
            if error:
                errors.append(error)
            else:
                by_trial.setdefault(trial, {})[problem_id] = values.values.to_numpy().reshape(shape)
    measured = [(arm, trial, by_trial[trial]) for arm, trials in arms.items() for trial in trials if trial in by_trial]
    read = [set(values) for _, _, values in measured]
    common = sorted(set.intersection(*read)) if read else []
    students = []
    for arm, trial, values in measured:
        right: dict[str, list[bool]] = {}
        for (problem_id, _), row in answers.get(trial, {}).items():
            if not row["error"]:
                right.setdefault(problem_id, []).append(row["is_correct_flexible"])
        shares = {problem_id: float(np.mean(each)) for problem_id, each in right.items()}
        right_P = np.array([shares.get(problem_id, np.nan) for problem_id in common])
        accuracy = float(np.mean(list(shares.values()))) if shares else float("nan")
        values_PSF = np.array([values[problem_id] for problem_id in common], dtype=np.float32).reshape(-1, *shape)
        students.append(_Student(arm, values_PSF, right_P, accuracy))
    return students, common, errors


def _arm(
    name: str,
    values_PSF: np.ndarray,
    base_PSF: np.ndarray | None,
    statistics: Sequence[str],
    num_layers: int,
) -> ArmAttention:
    means, heads, overall = {}, {}, {}
    for number, statistic in enumerate(statistics):
        own_PF = values_PSF[:, number].astype(np.float64)
        means[statistic] = _mean(own_PF).reshape(num_layers, -1)
        if base_PSF is not None:
            base_PF = base_PSF[:, number].astype(np.float64)
            heads[statistic] = difference(own_PF, base_PF)
            overall[statistic] = difference(_mean(own_PF, axis=1)[:, None], _mean(base_PF, axis=1)[:, None])
    return ArmAttention(name, means, heads, overall)


def _mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """The mean of defined values; NaN where there are none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=axis)
