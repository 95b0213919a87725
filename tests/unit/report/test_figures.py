"""Report figures: positions, texts and files against their data."""

import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from raykd.analysis.head_effects import Effect
from raykd.config.experiment import BASE
from raykd.report.build import write_report
from raykd.report.figures import figures
from raykd.report.panels import curves_panel, heat_map
from raykd.report.results import Results, read_results
from raykd.report.svg import Figure, ForestRow, Mark, PlotAxis, axis_over, forest_plot
from synthetic import Experiment, drawn, full_experiment

SVG = "{http://www.w3.org/2000/svg}"
NAMES = ["accuracy", "differences", "format_rate", "answer_length", "teacher", "training", "attention_by_layer"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    experiment = full_experiment(tmp_path_factory.mktemp("report"))
    trials = {f"{arm}-{seed}": (arm, seed) for arm in ("none", "ground_truth") for seed in (0, 1)}
    experiment.attention({BASE: (BASE, 0)} | trials, num_problems=40)
    write_report(experiment.write())
    return read_results(experiment.folder)


@pytest.fixture(scope="module")
def by_name(results: Results) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures(results)}


def percents(svg: str, attribute: str) -> list[float]:
    return [float(value) for value in re.findall(f' {attribute}="([0-9.]+)%"', svg)]


def test_forest_plot_places_marks_on_the_axis():
    axis = PlotAxis([20.0, 30.0, 40.0])
    row = ForestRow("an arm", "primed", [Mark(25, 22, 38, seeds=[24.0, 26.0]), None], ["25.0 (22.0–38.0)", "–"])
    svg, height = forest_plot([row], axis, ["dot", "ring"], [], "Accuracy, %")
    mark = svg.split('<g class="mark">')[1].split("</g>")[0]
    assert percents(mark, "x1") == [10.0, 20.0, 30.0] and percents(mark, "x2") == [90.0, 20.0, 30.0]
    assert percents(mark, "cx") == [25.0]
    assert svg.count('<g class="mark">') == 1, "an unknown value was drawn"
    assert "<title>an arm: 25.0 (22.0–38.0)</title>" in mark
    assert 60 < height < 160


def test_axis_holds_all_values_within_its_limits():
    assert axis_over([3, 97], 0, 100).ticks == [0, 20, 40, 60, 80, 100]
    assert axis_over([-4.2, 4.2, None], -100, 100).ticks == [-6, -4, -2, 0, 2, 4, 6]
    assert axis_over([100], 0, 100).ticks == [99.5, 100]
    assert axis_over([], 0, 100).ticks == [0, 20, 40, 60, 80, 100]


def test_accuracy_figure_matches_results(results: Results, by_name: dict[str, Figure]):
    figure = by_name["accuracy"]
    for arm in results.arms:
        text = f"{100 * (arm.scores.strict.value or 0):.1f} ("
        assert f"{arm.name}: strict match {text}" in figure.description
        assert text in figure.content
    # Two seeds each of five of the six trained arms; one seed of the sixth arm failed.
    assert figure.content.count('class="seed"') == 2 * 5


def test_heat_map_shows_sign_size_and_significance():
    value = np.array([1.0, -1.0, 0.0, 0.5, np.nan, -0.5])
    effect = Effect(value, value, value, p=np.array([0.01, 0.01, 1.0, 0.2, np.nan, 0.01]))
    paths = dict(re.findall('<path class="([^"]*)" d="([^"]*)"', heat_map(effect, 1.0, (2, 3), 100)))
    # Classes from blue, h0, to red, h10; row by row, without the undefined head.
    assert paths == {
        "h10": "M0 0.5h1",
        "h0": "M1 0.5h1",
        "h5 pale": "M2 0.5h1",
        "h7 pale": "M0 1.5h1",
        "h3": "M2 1.5h1",
    }


def test_heat_map_merges_equal_neighbors():
    value = np.ones(8)
    effect = Effect(value, value, value, p=np.zeros(8))
    assert re.findall(' d="([^"]*)"', heat_map(effect, 1.0, (2, 4), 100)) == ["M0 0.5h4M0 1.5h4"]


def test_curves_omit_undefined_values():
    panel = curves_panel("a statistic", [("c0", [(0, float("nan")), (1, 2.0), (2, 4.0)])], (2.0, 4.0), "", ("", ""))
    assert 'points="50.00,60.00 100.00,0.00"' in panel.content


def test_long_curve_is_thinned_with_both_ends_kept():
    curve = [(float(step), 1.0 / step) for step in range(1, 2001)]
    panel = curves_panel("loss", [("primed", curve)], (0.0, 1.0), "", ("", ""))
    points = re.findall(r"([0-9.]+),([0-9.]+)", panel.content.split('points="')[1].split('"')[0])
    assert 200 <= len(points) <= 240
    assert points[0] == ("0.00", "0.00") and points[-1] == ("100.00", "59.97")


def test_figure_files_are_well_formed_and_named_in_markdown(results: Results, by_name: dict[str, Figure]):
    markdown = (results.folder / "report.md").read_text()
    files = {path.stem: path for path in (results.folder / "report").iterdir()}
    assert list(by_name)[: len(NAMES)] == NAMES and len(by_name) == len(NAMES) + 8
    assert files.keys() == by_name.keys()
    for name, path in files.items():
        root = ElementTree.parse(path).getroot()
        assert root.tag == f"{SVG}svg" and root.get("role") == "img"
        assert by_name[name].title in str(root.get("aria-label"))
        assert not [each for each in root.iter() if each.tag in (f"{SVG}script", f"{SVG}image", f"{SVG}a")]
        assert f"](report/{name}.svg)" in markdown


def test_page_and_file_have_same_drawing(results: Results, by_name: dict[str, Figure]):
    page = (results.folder / "report.html").read_text()
    for name, figure in by_name.items():
        assert figure.content in page
        assert figure.content in (results.folder / "report" / f"{name}.svg").read_text()
        assert str(figure.caption) in page.replace("&#39;", "'")


def test_figure_of_an_earlier_report_is_removed(tmp_path: Path):
    experiment = full_experiment(tmp_path)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "attention_heads_entropy.svg").write_text("of an earlier configuration")
    write_report(experiment.write())
    assert not (tmp_path / "report" / "attention_heads_entropy.svg").exists()
    assert "attention" not in (tmp_path / "report.md").read_text().lower()


def test_external_names_are_escaped_and_wrapped(tmp_path: Path):
    name = "a" * 60 + " <b>&\x1b"
    experiment = Experiment(tmp_path)
    rows = [row | {"arm": name} for row in drawn("none", 0, 0.5, 0.9)]
    experiment.trial("none", 0, rows, arm=name)
    write_report(experiment.write())
    root = ElementTree.parse(tmp_path / "report" / "accuracy.svg").getroot()
    texts = [each.text for each in root.iter(f"{SVG}text") if each.get("class") == "name"]
    assert texts == ["a" * 44, "a" * 16 + " <b>&\ufffd"]
