"""Comparison of two students, problem by problem."""

from pathlib import Path

import pytest

from raykd import cli
from raykd.report.compare_runs import compare
from synthetic import Experiment, prediction


def experiment(folder: Path, right: dict[str, list[bool]], seeds: tuple[int, ...] = (0,)) -> Path:
    """Write predictions of arms with one seed or several; `right` says which are correct."""
    synthetic_experiment = Experiment(folder, seeds=list(seeds))
    for arm, answers in right.items():
        for seed in seeds:
            rows = [prediction(arm, seed, n, is_right, is_right, True) for n, is_right in enumerate(answers)]
            synthetic_experiment.trial(
                arm, seed, [row | {"completion": f"{arm} answers {row['problem_id']}"} for row in rows]
            )
    return synthetic_experiment.write()


def test_problems_with_one_correct_student_are_listed(tmp_path: Path):
    folder = experiment(tmp_path, {"none": [True, True, False, False], "primed": [True, False, True, True]})
    text = compare(f"{folder}:none", f"{folder}:primed")
    assert "4 problems in common" in text
    assert "both correct 1, neither 0, only none (seed 0) 1, only primed (seed 0) 2" in text
    assert "difference −25.0 points" in text and "McNemar p = 1.00" in text
    before, only_none, only_primed = text.split("only none (seed 0) is correct: 1")[0], *text.split("is correct: ")[1:]
    assert "50.0 % (15.0–85.0)" in before and "75.0 % (30.1–95.4)" in before
    assert "problem-001" in only_none and "problem-002" not in only_none
    assert "none answers problem-001" in only_none and "primed answers problem-001" in only_none
    assert [f"problem-00{n}" in only_primed for n in range(4)] == [False, False, True, True]


def test_limit_shortens_the_list(tmp_path: Path):
    folder = experiment(tmp_path, {"none": [False] * 30, "primed": [True] * 30})
    text = compare(f"{folder}:none", f"{folder}:primed")
    assert "only primed (seed 0) is correct: 10 of 30" in text and text.count("answers problem-") == 20
    assert compare(f"{folder}:none", f"{folder}:primed", limit=None).count("answers problem-") == 60


def test_same_arm_of_two_experiments_is_labeled_by_folder(tmp_path: Path):
    first = experiment(tmp_path / "a", {"none": [True, False]})
    second = experiment(tmp_path / "b", {"none": [True, True]})
    text = compare(str(first), str(second))
    assert "50.0 %" in text.split(str(first))[1] and "100.0 %" in text.split(str(second))[1]


def test_default_seed_is_first_common_seed(tmp_path: Path):
    first = experiment(tmp_path / "a", {"none": [True, False]}, seeds=(0, 1, 2))
    second = experiment(tmp_path / "b", {"primed": [True, True]}, seeds=(1, 2))
    assert "none (seed 1)" in compare(str(first), str(second))
    # A named seed on one side sets the seed of the other side.
    assert "none (seed 2)" in compare(str(first), f"{second}:primed:2")
    assert "none (seed 2)" in compare(f"{first}:none:2", str(second))
    with pytest.raises(ValueError, match=r"predictions for the seeds \[1, 2\] only"):
        compare(str(first), f"{second}:primed:7")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("{}", "several arms.*none, primed"),
        ("{}:prmed", "did you mean 'primed'"),
        ("{}:none:x", "write FOLDER, FOLDER:ARM or FOLDER:ARM:SEED"),
        ("{}/other", "has no run.json"),
    ],
)
def test_unknown_student_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture, named: str, message: str):
    folder = experiment(tmp_path, {"none": [True], "primed": [True]})
    with pytest.raises(ValueError, match=message):
        compare(named.format(folder), f"{folder}:none")
    assert cli.main(["compare", named.format(folder), f"{folder}:none"]) == 2
    assert "raykd: " in capsys.readouterr().err


def test_command_prints_comparison(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = experiment(tmp_path, {"none": [True], "primed": [False]})
    assert cli.main(["compare", f"{folder}:none", f"{folder}:primed", "--score", "flexible", "--limit", "0"]) == 0
    assert "1 problem in common, flexible extract" in capsys.readouterr().out


def test_different_evaluation_settings_give_a_warning(tmp_path: Path):
    first = experiment(tmp_path / "a", {"none": [True, False]})
    second = experiment(tmp_path / "b", {"primed": [True, True]})
    assert "evaluation settings differ" not in compare(str(first), str(second))
    with (second / "experiment.yaml").open("a") as file:
        file.write("evaluate: {protocol: eight_shot_cot}\n")
    text = compare(str(first), str(second))
    assert "evaluation settings differ" in text
    assert "protocol zero_shot_chat, greedy" in text and "protocol eight_shot_cot, greedy" in text
