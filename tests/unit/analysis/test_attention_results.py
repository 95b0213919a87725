"""Attention results: synthetic rows, compared with numpy."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raykd.analysis.attention_results import read_attention
from raykd.config.experiment import BASE
from raykd.storage import row_store, schemas
from synthetic import prediction

STATISTICS, LAYERS, HEADS = ["entropy", "first"], 3, 2
SHAPE = (len(STATISTICS), LAYERS, HEADS)


def rows_of(trial_id: str, arm: str, seed: int, values: np.ndarray, missing: int | None = None) -> list[dict]:
    """Return the rows of a student from its values (P, S, L, H); problem `missing` has an error instead."""
    return [
        {
            "attention_id": f"{trial_id}/problem-{number:03}",
            "trial_id": trial_id,
            "arm": arm,
            "seed": seed,
            "adapter_digest": "",
            "problem_id": f"problem-{number:03}",
            "num_tokens": 9,
            "values": [] if number == missing else of_problem.ravel(),
            "error": "too long" if number == missing else "",
        }
        for number, of_problem in enumerate(values)
    ]


def written(folder: Path, rows: list[dict], late: set[str] = frozenset()) -> Path:
    for start in range(0, len(rows), 7):
        part = pa.Table.from_pylist(rows[start : start + 7], schema=schemas.ATTENTION)
        row_store.write_part(folder, part)
    trials = dict.fromkeys(sorted({row["trial_id"] for row in rows} - late), "")
    fields = {"trials": trials, "statistics": STATISTICS, "layers": LAYERS, "heads": HEADS}
    row_store.finalize(folder, schemas.ATTENTION, "attention_id", fields)
    return folder


def answers_of(arm: str, seed: int, right: np.ndarray) -> dict:
    rows = [prediction(arm, seed, number, bool(each), bool(each), True) for number, each in enumerate(right)]
    return {(row["problem_id"], 0): row for row in rows}


def test_arms_are_compared_with_base_student_on_common_problems(tmp_path: Path):
    rng = np.random.default_rng(0)
    base = rng.normal(size=(30, *SHAPE))
    seeds = [base + 0.5 + rng.normal(scale=0.1, size=base.shape) for _ in range(2)]
    seeds[1][:, 1, 2, 1] += 3.0
    rows = rows_of(BASE, BASE, 0, base, missing=4)
    rows += [row for seed in (0, 1) for row in rows_of(f"primed-{seed}", "primed", seed, seeds[seed])]
    # A student of an arm that is not compared.
    rows += rows_of("other-0", "other", 0, rng.normal(size=base.shape))
    right = {name: rng.random(30) < share for name, share in ((BASE, 0.2), ("primed-0", 0.6), ("primed-1", 0.7))}
    answers = {
        BASE: answers_of(BASE, 0, right[BASE]),
        "primed-0": answers_of("primed", 0, right["primed-0"]),
        "primed-1": answers_of("primed", 1, right["primed-1"]),
    }
    arms = {BASE: [BASE], "primed": ["primed-0", "primed-1"], "failed": []}
    found = read_attention(written(tmp_path, rows), arms, answers)

    kept = [number for number in range(30) if number != 4]
    assert (found.num_problems, found.num_students, found.num_arms) == (29, 3, 2)
    assert (found.num_layers, found.num_heads, found.statistics) == (LAYERS, HEADS, STATISTICS)
    assert found.notes == ["Attention: 1 of 120 texts could not be measured (too long)"]
    assert [arm.name for arm in found.arms] == [BASE, "primed"]
    assert not found.arms[0].heads
    primed, mean = found.arms[1], (seeds[0] + seeds[1])[kept] / 2
    for number, name in enumerate(STATISTICS):
        assert primed.means[name] == pytest.approx(mean[:, number].mean(0), abs=1e-6)
        paired = (mean - base[kept])[:, number]
        assert primed.heads[name].value.reshape(LAYERS, HEADS) == pytest.approx(paired.mean(0), abs=1e-6)
        assert primed.overall[name].value == pytest.approx([paired.mean()], abs=1e-6)
        assert primed.heads[name].is_significant.all()
        students = [base, *seeds]
        # With two arms, r is 1 or -1.
        assert np.abs(found.accuracy_by_arm[name].value) == pytest.approx(np.ones(LAYERS * HEADS))
        for head in range(LAYERS * HEADS):
            own = [
                np.corrcoef(each[kept][:, number].reshape(29, -1)[:, head], mine[kept])[0, 1]
                for each, mine in zip(students, right.values(), strict=True)
            ]
            expected = np.average(own, weights=[mine[kept].var() for mine in right.values()])
            assert found.correctness_by_problem[name].value[head] == pytest.approx(expected, abs=1e-6)


def test_unmeasured_texts_are_noted(tmp_path: Path):
    rows = [row | {"values": [], "error": "no plain softmax"} for row in rows_of("a-0", "a", 0, np.zeros((12, *SHAPE)))]
    found = read_attention(written(tmp_path, rows), {"a": ["a-0"]}, {})
    assert not found.arms and not found.correctness_by_problem
    assert found.notes == ["Attention: 12 of 12 texts could not be measured (no plain softmax)"]


def test_accuracy_by_arm_averages_seeds(tmp_path: Path):
    rng = np.random.default_rng(1)
    rows, answers, arms, means, accuracy = [], {}, {}, [], []
    for number in range(6):
        arm, own = f"arm{number}", rng.normal(size=(2, 20, *SHAPE)) + rng.normal()
        right = rng.random((2, 20)) < 0.1 + 0.12 * number
        arms[arm] = [f"{arm}-{seed}" for seed in (0, 1)]
        for seed in (0, 1):
            rows += rows_of(f"{arm}-{seed}", arm, seed, own[seed])
            answers[f"{arm}-{seed}"] = answers_of(arm, seed, right[seed])
        means.append(own.mean((0, 1)))
        accuracy.append(right.mean())
    found = read_attention(written(tmp_path, rows), arms, answers)
    assert (found.num_arms, found.num_students) == (6, 12)
    for number, name in enumerate(STATISTICS):
        values = np.array([each[number].ravel() for each in means])
        for head in range(LAYERS * HEADS):
            expected = np.corrcoef(values[:, head], accuracy)[0, 1]
            assert found.accuracy_by_arm[name].value[head] == pytest.approx(expected, abs=1e-5)


def test_incomplete_later_student_is_excluded(tmp_path: Path):
    rng = np.random.default_rng(2)
    values = rng.normal(size=(2, 30, *SHAPE))
    rows = rows_of(BASE, BASE, 0, values[0]) + rows_of("a-0", "a", 0, values[1])
    late = rows_of("a-1", "a", 1, values[1][:5])
    arms = {BASE: [BASE], "a": ["a-0", "a-1"]}
    found = read_attention(written(tmp_path, rows + late, late={"a-1"}), arms, {})
    assert found.num_problems == 30
    assert found.arms[1].means["entropy"] == pytest.approx(values[1][:, 0].mean(0), abs=1e-6)
    assert found.notes == ["Attention: not measured yet for a-1"]
