"""The command line: invalid input ends in one line and status 2, before torch and Ray are imported."""

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
def test_invalid_input_is_reported_in_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_invalid_input_is_reported_without_torch_and_ray():
    code = (
        "import sys; from raykd import cli; cli.main(['run', 'nowhere.yaml']); "
        "print(*(set(sys.modules) & {'torch', 'ray', 'vllm', 'transformers'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split() == []


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["train", "--help"]])
def test_command_help_shows_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 0
    assert "FILE" in capsys.readouterr().out


def test_plan_shows_only_how_arms_differ(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    own = "{targets: {source: student, kind: top_k}}"
    arms = f"arms={{plain: {{}}, soft: {{prompt.strategy: teacher, targets.kind: top_k}}, own: {own}}}"
    assert cli.main(["plan", "configs/quickstart.yaml", arms]) == 0
    shown = capsys.readouterr().out
    for word in ("strategy", "kind", "source", "divergence", "reverse_kl", "top_k", "student"):
        assert word in shown
    assert "epochs" not in shown
    # A field without effect on an arm is not shown: an arm with hard targets has no divergence.
    (plain,) = (line for line in shown.splitlines() if line.split()[:1] == ["plain"])
    assert "kl" not in plain


def test_plan_shows_fields_of_a_single_arm(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    soft = "{targets: {kind: top_k, top_k: 64}, loss: {missing_mass: renormalize, temperature: 3}}"
    own = "{targets: {source: student, rounds: 9, warmup_rounds: 2}}"
    assert cli.main(["plan", "configs/quickstart.yaml", f"arms={{plain: {{}}, soft: {soft}, own: {own}}}"]) == 0
    shown = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.split()[:1] in (["soft"], ["own"])}
    assert {"64", "3.0"} <= set(rows["soft"])
    assert "renorm" in shown, "the value is missing, or wrapped in a narrow terminal"
    assert {"9", "2"} <= set(rows["own"])


def test_plan_shows_the_trials_of_a_sweep(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.main(["plan", "configs/sweeps/demo.yaml", "seeds=[0, 1]", "sweep.test_top_n=2"]) == 0
    shown = capsys.readouterr().out
    assert "train.learning_rate: loguniform [0.001, 0.02]" in shown
    assert shown.count("5 points x 2 seeds = 10 trials") == 3
    assert "the best 2 of each arm" in shown


RAY_UP_FILE = """
head_node_type: head
max_workers: 2
available_node_types:
  head: {resources: {CPU: 8}}
  worker: {resources: {CPU: 96, GPU: 8, "accelerator_type:A100-80G": 1}}
"""


@pytest.mark.parametrize("file", ["quickstart.yaml", *sorted(each.name for each in (ROOT / "configs/gsm8k").glob("*"))])
def test_plan_shows_requirements(file, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = f"configs/{file}" if file == "quickstart.yaml" else f"configs/gsm8k/{file}"
    assert cli.main(["plan", path]) == 0
    shown = capsys.readouterr().out
    for word in ("Teacher ", "parameters", "KV cache", "Student ", "ZeRO", "GPUs", "Teacher generation"):
        assert word in shown


def test_plan_refuses_a_misfit_and_suggests_a_fit(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    (tmp_path / "up.yaml").write_text(RAY_UP_FILE)
    plan = ["plan", "configs/gsm8k/405b-fp8-to-8b.yaml", "--cluster", str(tmp_path / "up.yaml")]
    bf16 = "teacher.model=meta-llama/Llama-3.1-405B-Instruct"
    assert cli.main([*plan, bf16]) == 2
    captured = capsys.readouterr()
    assert "does not fit: a process needs" in captured.out
    assert captured.err.count("\n") == 1
    assert "does not fit: teacher: a process needs" in captured.err
    (suggestion,) = re.findall(r"closest fit: (\S+)", captured.err)
    assert suggestion == "teacher.engine.pipeline_parallel_size=2"
    # Fields may be set before and after options.
    assert cli.main([plan[0], plan[1], bf16, *plan[2:], suggestion]) == 0
    assert "2 nodes (8 on worker, 8 on worker)" in capsys.readouterr().out


def test_plan_shows_hours_and_cost_from_rates(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    rates = ["--generation-rate", "1000", "--completion-tokens", "200", "--training-rate=500", "--eval-rate=2000"]
    assert cli.main(["plan", "configs/gsm8k/405b-awq-to-8b.yaml", *rates, "prices.gpu_hour=2.5", "seeds=[0]"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith(" Teacher generation"))
    # 6 strategies x 6,973 problems x 200 tokens / 1,000 a second = 2.32 hours of 4 GPUs (9.30) at 2.50.
    assert line.split()[-6:] == ["41,838", "8,367,600", "1,000", "2.32", "9.30", "23.24"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cluster", "nowhere.yaml"], "nowhere.yaml: no such file"),
        (["--cluster", "live"], "set RAY_ADDRESS"),
        (["--rates-from", "nowhere"], "nowhere has no run.json"),
        (["--training-rate", "0"], "--training-rate 0: should be above 0"),
        (
            ["teacher.engine.engine_kwargs={max_model_len: long}"],
            "teacher.engine: engine_kwargs.max_model_len: should be an integer",
        ),
    ],
)
def test_invalid_plan_options_are_reported_in_one_line(arguments, words, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main(["plan", "configs/quickstart.yaml", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1


def test_plan_does_not_import_ray_or_vllm():
    code = (
        "import sys; from raykd import cli; cli.main(['plan', 'configs/gsm8k/70b-to-8b.yaml']); "
        "print(*(set(sys.modules) & {'ray', 'vllm', 'deepspeed'}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    assert ran.stdout.splitlines()[-1] == ""


def test_unknown_options_are_refused(capsys):
    for arguments in (["plan", "a.yaml", "--clutser", "x"], ["compare", "a", "b", "c=1"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def test_prompts_shows_teacher_and_student_prompts(capsys, monkeypatch, tmp_path):
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
    assert list(tmp_path.iterdir()) == [], "a file was written"
    assert cli.main([*arguments, "--problem", "100000"]) == 2
    assert "no training problem '100000'" in capsys.readouterr().err
    # str.isdigit accepts the superscript, int() rejects it.
    assert cli.main([*arguments, "--problem", "²"]) == 2
    assert "no training problem '²'" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["run", "train"])
def test_job_script_runs_any_command(stage, tmp_path):
    script = ROOT / "rayjobs" / "run.py"
    ran = subprocess.run(
        [sys.executable, str(script), stage, "nowhere.yaml"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert ran.returncode == 2
    assert "nowhere.yaml: no such file" in ran.stderr


def test_prompts_shows_the_test_protocol_if_it_differs(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = ["prompts", "configs/quickstart.yaml", f"storage={tmp_path}"]
    assert cli.main(arguments) == 0
    assert "student, test problems" not in capsys.readouterr().out
    assert cli.main([*arguments, "evaluate.protocol=zero_shot_raw"]) == 0
    shown = capsys.readouterr().out.split("student, test problems (zero_shot_raw): ")[1]
    assert shown.split("\n")[1].startswith("Question: ") and shown.rstrip().endswith("\nAnswer:")
