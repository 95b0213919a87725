"""Report attention: tables and CSV files against their data."""

import csv

import numpy as np
import pytest

from raykd.config.experiment import BASE
from raykd.report import attention
from raykd.report.build import write_report
from raykd.report.results import Results, read_results
from synthetic import full_experiment


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    experiment = full_experiment(tmp_path_factory.mktemp("report"))
    trials = {f"{arm}-{seed}": (arm, seed) for arm in ("none", "ground_truth") for seed in (0, 1)}
    experiment.attention({BASE: (BASE, 0)} | trials, num_problems=40)
    write_report(experiment.write())
    return read_results(experiment.folder)


def test_table_gives_base_mean_and_differences(results: Results):
    assert results.attention
    table = attention.changes(results.attention)
    assert [row[0] for row in table.rows] == [BASE, "none", "ground_truth"]
    base, _, primed = results.attention.arms
    first = table.columns.index("Weight on the first token")
    assert table.rows[0][first] == f"{base.means['first'].mean():.3f}"
    effect = primed.overall["first"]
    assert effect.value == pytest.approx((primed.means["first"] - base.means["first"]).mean(), abs=1e-6)
    assert table.rows[2][first].startswith(f"{effect.value[0]:+.3f} (+0.")
    assert "40 problems" in table.note
    # The primed arm is higher by 0.5 in every head; the unprimed one differs by chance only.
    assert attention.changed_heads(results.attention).rows[1][first] == "6↑ 0↓"
    assert attention.changed_heads(results.attention).rows[0][first] in ("0↑ 0↓", "1↑ 0↓", "0↑ 1↓")


def test_correctness_table_names_strongest_head(results: Results):
    assert results.attention
    table = attention.correctness(results.attention)
    assert len(table.rows) == 8
    effect = results.attention.correctness_by_problem["entropy"]
    layer, head = divmod(int(np.abs(effect.value).argmax()), 2)
    assert table.rows[0][1] == f"layer {layer}, head {head}"
    assert "5 students" in table.note and "3 arms" in table.note


def test_csv_files_have_every_head(results: Results):
    assert results.attention
    with (results.folder / "attention.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 8 * 6
    primed = results.attention.arms[2]
    for row in rows:
        if row["arm"] != "ground_truth":
            assert row["arm"] == "none" or row["difference"] == ""
            continue
        at = int(row["layer"]) * 2 + int(row["head"])
        effect = primed.heads[row["statistic"]]
        for column, values in (("difference", effect.value), ("low", effect.low), ("p_corrected", effect.p)):
            if np.isnan(values[at]):
                assert row[column] == "" and row["statistic"] == "cosine" and row["layer"] == "0"
            else:
                assert float(row[column]) == pytest.approx(values[at], rel=1e-5)
    with (results.folder / "attention_correctness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 6
    assert float(rows[3]["r_by_problem"]) == pytest.approx(
        results.attention.correctness_by_problem["entropy"].value[3], rel=1e-5
    )
