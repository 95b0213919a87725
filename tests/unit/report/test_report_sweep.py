"""The report of a synthetic sweep: best points, comparisons and the table of trials."""

import csv
from pathlib import Path

import pytest
from rich.console import Console

from raykd.config.experiment import BASE
from raykd.report.build import CSV_COLUMNS, SWEEP_COLUMNS, result_tables, write_report
from raykd.report.results import Results
from raykd.report.sweep import all_trials, at_equal_points, best_points, point_text
from raykd.storage.files import read_json
from synthetic import Experiment, drawn

RATES = (1e-4, 1e-3, 1e-2)
# Accuracy on 50 validation problems, and the share of correct test answers, by arm and point.
ACCURACY = {"none": (0.2, 0.4, 0.3), "teacher": (0.9, 0.5, 0.6)}
SHARE = {"none": (0.3, 0.5, 0.4), "teacher": (0.6, 0.9, 0.7)}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """Two arms at three learning rates with two seeds; the second seed of the last point is stopped early."""
    experiment = Experiment(tmp_path, seeds=[0, 1])
    experiment.rows += drawn(BASE, 0, 0.2, 0.9)
    for arm in ("none", "teacher"):
        for point, rate in enumerate(RATES):
            for seed in (0, 1):
                add(experiment, arm, point, rate, seed)
    experiment.completions("teacher", 400, ["teacher"])
    experiment.write()
    with (tmp_path / "experiment.yaml").open("a") as file:
        file.write("sweep: {metric: accuracy, num_validations: 4}\n")
    return write_report(tmp_path)


def add(experiment: Experiment, arm: str, point: int, rate: float, seed: int) -> None:
    trial_id, accuracy = f"{arm}-{seed}-{point}", ACCURACY[arm][point]
    was_stopped = (point, seed) == (2, 1)
    rows = [] if was_stopped else drawn(arm, seed + 10 * point, SHARE[arm][point], 1.0)
    rows = [
        row | {"trial_id": trial_id, "seed": seed, "prediction_id": f"{trial_id}/{n}"} for n, row in enumerate(rows)
    ]
    more = {
        "trial_id": trial_id,
        "hparams": {"train.learning_rate": rate, "student.lora.r": 16},
        "overrides": {"prompt.strategy": arm},
        "status": "stopped" if was_stopped else "complete",
        "num_workers": 2,
        "accelerator": "gpu",
        "adapter": None if was_stopped else "adapter",
        "validation": {
            "number": 1 if was_stopped else 4,
            "n": 50,
            "correct": round(50 * accuracy),
            # A point with a stopped seed must not be selected, although its other seed is best.
            "accuracy": 0.99 if point == 2 and not was_stopped else accuracy,
        },
    }
    experiment.trial(arm, seed, rows, arm, **more)
    folder = experiment.folder / "trials"
    (folder / f"{arm}-{seed}").rename(folder / trial_id)
    assert read_json(folder / trial_id / "trial.json")["trial_id"] == trial_id


def test_best_point_is_selected_by_validation_metric(results: Results):
    best = {arm.name: {trial.hparams["train.learning_rate"] for trial in arm.trials} for arm in results.arms[1:]}
    assert best == {"none": {1e-3}, "teacher": {1e-4}}
    assert [(arm.name, arm.scores.n) for arm in results.arms] == [(BASE, 60), ("none", 120), ("teacher", 120)]
    table = best_points(results)
    assert [row[:4] for row in table.rows] == [
        ["none", "learning_rate 0.001, r 16", "40.0 (27.6–53.8)", "3"],
        ["teacher", "learning_rate 0.0001, r 16", "90.0 (78.6–95.7)", "3"],
    ]
    assert [row[4:] for row in table.rows] == [["5", "1", "0"]] * 2
    assert "500 rows" in table.note and "12 trials" in table.note


def test_arms_are_compared_at_best_and_equal_points(results: Results):
    rows = {trial.trial_id: trial for trial in results.trials}
    at_best_points = next(c for c in results.strict if c.arm == "teacher")
    assert at_best_points.num_pairs == 2 * 60
    expected = sum(rows[f"teacher-{s}-0"].scores.strict.value - rows[f"none-{s}-1"].scores.strict.value for s in (0, 1))
    assert at_best_points.difference == pytest.approx(expected / 2)
    assert results.sweep is not None
    equal = next(c for c in results.sweep.comparisons if c.arm == "teacher")
    # Two seeds at two points, and one seed at the point whose other seed was stopped.
    assert equal.num_pairs == 5 * 60
    pairs = [(seed, point) for seed in (0, 1) for point in range(3) if (point, seed) != (2, 1)]
    expected = sum(
        rows[f"teacher-{s}-{p}"].scores.strict.value - rows[f"none-{s}-{p}"].scores.strict.value for s, p in pairs
    )
    assert equal.difference == pytest.approx(expected / 5)
    (row,) = at_equal_points(results).rows
    assert row[:2] == ["teacher", "none"]


def test_tables_have_every_trial(results: Results, tmp_path: Path):
    with (tmp_path / "results.csv").open() as file:
        written = list(csv.DictReader(file))
    paths = ["train.learning_rate", "student.lora.r"]
    assert list(written[0]) == [*CSV_COLUMNS[:2], *paths, *CSV_COLUMNS[2:], *SWEEP_COLUMNS]
    assert len(written) == 13
    row = next(row for row in written if row["trial_id"] == "none-0-1")
    assert (row["train.learning_rate"], row["student.lora.r"]) == ("0.001", "16")
    assert (row["validation_accuracy"], row["validation_n"], row["validation_number"]) == ("0.4", "50", "4")
    assert float(row["validation_accuracy_low"]) == pytest.approx(0.276, abs=1e-3)
    assert float(row["gpu_seconds"]) == 2 * 61.5
    base = next(row for row in written if row["arm"] == BASE)
    assert {base[name] for name in (*paths, *SWEEP_COLUMNS)} == {""}
    table = all_trials(results)
    assert [row[0] for row in table.rows] == ["none"] * 6 + ["teacher"] * 6
    assert [row[3] for row in table.rows[:6]] == ["complete"] * 5 + ["stopped"]
    assert table.rows[5][5] == "1/4"
    console = Console(width=200, record=True)
    console.print(*result_tables(results))
    shown = console.export_text()
    assert shown.count("learning_rate 0.01, r 16") == 4
    for name in ("report.html", "report.md"):
        text = (tmp_path / name).read_text()
        assert "Best point of each arm" in text and "Differences at equal points" in text and "All trials" in text


def test_stopped_trials_are_not_noted_as_missing(results: Results):
    assert results.notes == []


def test_point_text_uses_last_part_of_unambiguous_paths(results: Results):
    values = {"train.learning_rate": 0.00012345, "student.lora.r": 4}
    assert point_text(results, values) == "learning_rate 0.000123, r 4"
    assert point_text(results, {}) == "–"
