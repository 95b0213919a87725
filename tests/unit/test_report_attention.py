"""Report attention: tables, colours and files against the numbers that they are made from."""

import csv
from pathlib import Path

import numpy as np
import pytest
from synthetic import full_experiment

from raykd import report_attention as attention
from raykd.effects import Effect
from raykd.report import write_report
from raykd.results import Results, read_results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    experiment = full_experiment(tmp_path_factory.mktemp("report"))
    trials = {f"{arm}-{seed}": (arm, seed) for arm in ("none", "ground_truth") for seed in (0, 1)}
    experiment.attention({"untouched": ("untouched", 0)} | trials, num_problems=40)
    write_report(experiment.write())
    return read_results(experiment.folder)


def test_the_table_gives_the_untouched_mean_and_the_others_difference(results: Results):
    assert results.attention
    table = attention.changes(results.attention)
    assert [row[0] for row in table.rows] == ["untouched", "none", "ground_truth"]
    untouched, _, primed = results.attention.arms
    first = table.columns.index("On the first token")
    assert table.rows[0][first] == f"{untouched.means['first'].mean():.3f}"
    effect = primed.overall["first"]
    assert effect.value == pytest.approx((primed.means["first"] - untouched.means["first"]).mean(), abs=1e-6)
    assert table.rows[2][first].startswith(f"{effect.value[0]:+.3f} (+0.")
    assert "40 problems" in table.note
    # Drawn half higher: every head; those without a prime: none, but for chance.
    assert attention.clear_heads(results.attention).rows[1][first] == "6↑ 0↓"
    assert attention.clear_heads(results.attention).rows[0][first] in ("0↑ 0↓", "1↑ 0↓", "0↑ 1↓")


def test_the_strongest_head_is_named(results: Results):
    assert results.attention
    table = attention.being_right(results.attention)
    assert len(table.rows) == 8
    effect = results.attention.right["entropy"]
    layer, head = divmod(int(np.abs(effect.value).argmax()), 2)
    assert table.rows[0][1] == f"layer {layer}, head {head}"
    assert "5 students" in table.note and "3 arms" in table.note


def test_colours_tell_more_from_less_and_what_is_clear():
    value = np.array([1.0, -1.0, 0.0, 0.5, np.nan, -0.5])
    effect = Effect(value, value, value, p=np.array([0.01, 0.01, 1.0, 0.2, np.nan, 0.01]))
    colors = attention.pixels(effect, 1.0, (2, 3)).reshape(6, 4)
    red, blue = colors[:, 0], colors[:, 2]
    assert red[0] > blue[0] and blue[1] > red[1] and red[2] == pytest.approx(blue[2], abs=0.02)
    assert red[3] > blue[3] and blue[5] > red[5]
    assert colors[:, 3] == pytest.approx([1, 1, 0.22, 0.22, 0, 1])


def test_the_files_hold_every_head(results: Results):
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
    with (results.folder / "attention_and_being_right.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8 * 6
    assert float(rows[3]["r_by_problem"]) == pytest.approx(results.attention.right["entropy"].value[3], rel=1e-5)


def test_curves_leave_out_what_is_not_defined(results: Results):
    assert results.attention
    colors = dict.fromkeys(("untouched", "none", "ground_truth"), "c0")
    panels = {panel.statistic: panel for panel in attention.layer_panels(results.attention, colors)}
    assert len(panels) == 8
    # Three layers, the first of which has none below.
    points = panels["Likeness to the layer below"].svg.split('points="')[1].split('"')[0].split()
    assert [point.split(",")[0] for point in points] == ["50.00", "100.00"]


def test_the_picture_files_are_there_and_named_in_the_text(results: Results):
    text = (results.folder / "report.md").read_text()
    pictures = {path.name for path in (results.folder / "report").iterdir()}
    names = ("accuracy", "differences", "form", "teacher", "training", "attention_by_layer", "attention_by_head")
    assert pictures == {f"{name}.png" for name in names}
    for name in pictures:
        assert f"](report/{name})" in text
        assert (results.folder / "report" / name).read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_there_is_nothing_for_any_more_is_taken_away(tmp_path: Path):
    experiment = full_experiment(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "attention_by_head.png").write_bytes(b"of an earlier configuration")
    write_report(experiment.write())
    assert not (tmp_path / "report" / "attention_by_head.png").exists()
    assert "attention" not in (tmp_path / "report.md").read_text().lower()
