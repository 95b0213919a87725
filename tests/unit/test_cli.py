"""The command line: mistakes end in one line and status 2, before anything heavy is loaded."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from raykd import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["run", "configs/quickstart.yaml", "train.epoch=3"], "did you mean 'epochs'"),
        (["generate", "configs/quickstart.yaml", "arms={a: {prompt.strategy: x}}"], "unknown strategy 'x'"),
        (["sweep", "configs/quickstart.yaml"], "configs/quickstart.yaml: has no section `sweep`"),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_a_mistake_is_told_before_torch_and_ray_are_loaded():
    code = (
        "import sys; from raykd import cli; cli.main(['run', 'nowhere.yaml']); "
        "print(*(set(sys.modules) & {'torch', 'ray', 'vllm', 'transformers'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split() == []


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["train", "--help"]])
def test_help_is_there(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 0
    assert "FILE" in capsys.readouterr().out


def test_plan_shows_in_what_arms_differ_and_nothing_else(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = "{targets: {sequence: student, kind: top_k}}"
    arms = f"arms={{plain: {{}}, soft: {{prompt.strategy: teacher, targets.kind: top_k}}, own: {own}}}"
    assert cli.main(["plan", "configs/quickstart.yaml", arms]) == 0
    shown = capsys.readouterr().out
    for word in ("strategy", "kind", "sequence", "divergence", "reverse_kl", "top_k", "student"):
        assert word in shown
    assert "epochs" not in shown
    # What plays no part in an arm is no difference: a hard arm has no divergence.
    (plain,) = (line for line in shown.splitlines() if line.split()[:1] == ["plain"])
    assert "kl" not in plain


def test_plan_shows_what_a_single_arm_names(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    soft = "{targets: {kind: top_k, top_k: 64}, loss: {tail: renormalise, temperature: 3}}"
    own = "{targets: {sequence: student, rounds: 9, warmup_rounds: 2}}"
    assert cli.main(["plan", "configs/quickstart.yaml", f"arms={{plain: {{}}, soft: {soft}, own: {own}}}"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.split()[:1] in (["soft"], ["own"])}
    assert {"64", "3.0"} <= set(rows["soft"])
    assert "renorm" in shown, "folded where the terminal is narrow"
    assert {"9", "2"} <= set(rows["own"])


def test_plan_shows_what_a_sweep_would_train(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "configs/sweeps/demo.yaml", "seeds=[0, 1]", "sweep.finalists=2"]) == 0
    shown = capsys.readouterr().out
    assert "train.learning_rate: loguniform [0.001, 0.02]" in shown
    assert shown.count("5 points x 2 seeds = 10 trials") == 3
    assert "the best 2 of each arm" in shown


def test_prompts_shows_what_teacher_and_student_are_sent(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    arguments = ["prompts", "configs/quickstart.yaml", f"storage={tmp_path}", "prompt.instruction=State the number."]
    assert cli.main([*arguments, "--problem", "3"]) == 0
    shown = capsys.readouterr().out
    prime = "smaller models will learn from your answer"
    teacher, student = shown.split("--- student")
    assert prime in teacher
    assert prime not in student
    assert "strategy ground_truth (arms: ground_truth)" in teacher
    assert student.count("State the number.") == 1
    assert re.search(r"every arm: \d+ tokens", student)
    assert cli.main([*arguments, "--problem", "100000"]) == 2
    assert "no training problem '100000'" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["run", "sweep", "generate", "train", "evaluate", "report"])
def test_every_stage_has_a_job_script(stage, tmp_path):
    script = ROOT / "rayjobs" / f"{stage}.py"
    assert len(script.read_text().splitlines()) <= 25
    ran = subprocess.run(
        [sys.executable, str(script), "nowhere.yaml"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert ran.returncode == 2
    assert "nowhere.yaml: no such file" in ran.stderr


def test_prompts_show_how_the_test_problems_are_asked_where_that_is_another_way(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["prompts", "configs/quickstart.yaml", f"storage={tmp_path}"]
    assert cli.main(arguments) == 0
    assert "as the test problems are asked" not in capsys.readouterr().out
    assert cli.main([*arguments, "evaluate.protocol=zero_shot_raw"]) == 0
    shown = capsys.readouterr().out.split("as the test problems are asked (zero_shot_raw): ")[1]
    assert shown.split("\n")[1].startswith("Question: ") and shown.rstrip().endswith("\nAnswer:")
