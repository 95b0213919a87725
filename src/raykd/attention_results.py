"""Attention results: from the rows of what heads did to what the report says of them.

P problems, S statistics, L layers, H heads of a layer, F = L x H.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from raykd import records, storage
from raykd.comparison import Answers
from raykd.config import UNTOUCHED
from raykd.effects import Effect, across_arms, correlation, difference


@dataclass(frozen=True)
class ArmAttention:
    """What the heads of an arm do, its seeds averaged, and what they do more than those of the untouched student."""

    name: str
    means: dict[str, np.ndarray]
    """By statistic, (L, H): in the mean over problems."""
    heads: dict[str, Effect]
    """By statistic, F: difference to the untouched student; none for the untouched student itself."""
    overall: dict[str, Effect]
    """The same averaged over all heads: 1."""


@dataclass(frozen=True)
class AttentionResults:
    """What training changed in the heads, and what that has to do with being right."""

    statistics: list[str]
    num_layers: int
    num_heads: int
    num_problems: int
    num_students: int
    num_arms: int
    """Those whose students and answers are known, the untouched one among them."""
    arms: list[ArmAttention]
    """The untouched student first, where it was measured."""
    right: dict[str, Effect]
    """By statistic, F: how it goes with being right (flexible extract) from problem to problem, within students."""
    accurate: dict[str, Effect]
    """By statistic, F: how it goes with accuracy from arm to arm."""
    notes: list[str]
    """What could not be measured."""


@dataclass(frozen=True)
class _Student:
    """One student, on the problems that all have read."""

    arm: str
    values_PSF: np.ndarray
    right_P: np.ndarray
    """How often it had each problem right, by flexible extract; NaN where it has no answer."""
    accuracy: float
    """Over all problems that it answered; NaN where that is none."""


def read_attention(folder: Path, arms: Mapping[str, Sequence[str]], answers: Mapping[str, Answers]) -> AttentionResults:
    """The numbers of a folder that was measured to its end.

    Args:
        folder: of `records.ATTENTION` rows, with its manifest.
        arms: the trials of each arm.
        answers: prediction rows by trial.
    """
    told = storage.read_manifest(folder)
    assert told, "only what is complete is read"
    names, num_heads, whole = told["statistics"], told["layers"] * told["heads"], set(told["trials"])
    missing = [trial for trials in arms.values() for trial in trials if trial not in whole]
    # What was begun after the folder was complete has read some of the texts only.
    known_trials = {arm: [trial for trial in trials if trial in whole] for arm, trials in arms.items()}
    students, common, failed = _students(folder, known_trials, answers, (len(names), num_heads))
    notes = [f"Attention: {len(failed)} of {told['rows']} texts could not be read ({failed[0]})"] if failed else []
    if missing:
        notes.append(f"Attention: not measured yet of {', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}")
    by_arm = {arm: [each for each in students if each.arm == arm] for arm in arms}
    by_arm = {arm: found for arm, found in by_arm.items() if found and common}
    means = {arm: np.mean([each.values_PSF for each in found], axis=0) for arm, found in by_arm.items()}
    answered = [each for each in students if np.isfinite(each.accuracy)] if common else []
    of_arm = {arm: [each for each in found if np.isfinite(each.accuracy)] for arm, found in by_arm.items()}
    of_arm = {arm: found for arm, found in of_arm.items() if found}
    right, accurate = {}, {}
    for number, name in enumerate(names) if answered else ():
        values = [each.values_PSF[:, number].astype(np.float64) for each in answered]
        right[name] = correlation(values, [each.right_P for each in answered])
        means_AF = np.stack([np.mean([_mean(s.values_PSF[:, number]) for s in found], 0) for found in of_arm.values()])
        accuracy_A = np.array([np.mean([each.accuracy for each in found]) for found in of_arm.values()])
        accurate[name] = across_arms(means_AF, accuracy_A)
    untouched_PSF = means.get(UNTOUCHED)
    return AttentionResults(
        statistics=list(names),
        num_layers=told["layers"],
        num_heads=told["heads"],
        num_problems=len(common),
        num_students=len(answered),
        num_arms=len(of_arm),
        arms=[
            _arm(arm, values_PSF, None if arm == UNTOUCHED else untouched_PSF, names, told["layers"])
            for arm, values_PSF in means.items()
        ],
        right=right,
        accurate=accurate,
        notes=notes,
    )


def _students(
    folder: Path, arms: Mapping[str, Sequence[str]], answers: Mapping[str, Answers], shape: tuple[int, int]
) -> tuple[list[_Student], list[str], list[str]]:
    """All students, the problems that each of them has read, and what was said of those that one could not read."""
    failed: list[str] = []
    by_trial: dict[str, dict[str, np.ndarray]] = {}
    for part in storage.stream_rows(folder, records.ATTENTION, ["trial_id", "problem_id", "values", "error"]):
        names = (part[name].to_pylist() for name in ("trial_id", "problem_id", "error"))
        for trial, problem_id, error, values in zip(*names, part["values"], strict=True):
            if error:
                failed.append(error)
            else:
                by_trial.setdefault(trial, {})[problem_id] = values.values.to_numpy().reshape(shape)
    found = [(arm, trial, by_trial[trial]) for arm, trials in arms.items() for trial in trials if trial in by_trial]
    common = sorted(set.intersection(*(set(values) for *_, values in found))) if found else []
    students = []
    for arm, trial, values in found:
        right: dict[str, list[bool]] = {}
        for (problem_id, _), row in answers.get(trial, {}).items():
            if not row["error"]:
                right.setdefault(problem_id, []).append(row["is_correct_flexible"])
        shares = {problem_id: float(np.mean(each)) for problem_id, each in right.items()}
        right_P = np.array([shares.get(problem_id, np.nan) for problem_id in common])
        accuracy = float(np.mean(list(shares.values()))) if shares else float("nan")
        values_PSF = np.array([values[problem_id] for problem_id in common], dtype=np.float32).reshape(-1, *shape)
        students.append(_Student(arm, values_PSF, right_P, accuracy))
    return students, common, failed


def _arm(
    name: str,
    values_PSF: np.ndarray,
    untouched_PSF: np.ndarray | None,
    statistics: Sequence[str],
    num_layers: int,
) -> ArmAttention:
    means, heads, overall = {}, {}, {}
    for number, statistic in enumerate(statistics):
        own_PF = values_PSF[:, number].astype(np.float64)
        means[statistic] = _mean(own_PF).reshape(num_layers, -1)
        if untouched_PSF is not None:
            theirs_PF = untouched_PSF[:, number].astype(np.float64)
            heads[statistic] = difference(own_PF, theirs_PF)
            overall[statistic] = difference(_mean(own_PF, axis=1)[:, None], _mean(theirs_PF, axis=1)[:, None])
    return ArmAttention(name, means, heads, overall)


def _mean(values: np.ndarray, axis: int = 0) -> np.ndarray:
    """The mean of what is defined; NaN where nothing is."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice", RuntimeWarning)
        return np.nanmean(values, axis=axis)
