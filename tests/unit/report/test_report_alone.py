"""`raykd report` needs only the experiment's folder: no models, no hub, no Ray and no torch."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raykd import cli
from raykd.config.experiment import Experiment
from raykd.config.loading import dump_experiment
from synthetic import full_experiment

# Importing any of these fails.
CODE = """
import sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "ray", "vllm", "transformers", "datasets", "huggingface_hub"):
            raise ImportError(f"{name} must not be imported")

sys.meta_path.insert(0, Refused())
from raykd import cli
sys.exit(cli.main(sys.argv[1:]))
"""
REPORT_FILES = {"results.csv", "report.md", "report.html", "attention.csv", "attention_correctness.csv"}


@pytest.fixture
def finished(tmp_path: Path) -> tuple[Path, Path]:
    """Write an experiment's YAML and its finished folder; its models do not exist."""
    folder = tmp_path / "storage" / "experiments" / "far"
    experiment = full_experiment(folder)
    experiment.run["commands"] = ["raykd run far.yaml"]
    experiment.attention({"none-0": ("none", 0), "ground_truth-0": ("ground_truth", 0)})
    experiment.write()
    arms = {"none": {}, "teacher": {"prompt.strategy": "teacher"}, "ground_truth": {"prompt.strategy": "ground_truth"}}
    fields = {
        "name": "far",
        "storage": str(tmp_path / "storage"),
        "dataset": {"source": "gsm8k"},
        "teacher": {"model": "meta-llama/Llama-3.1-405B-Instruct"},
        "student": {"model": "someone/not-available"},
        "arms": arms,
        "attention": {},
    }
    text = dump_experiment(Experiment.model_validate(fields))
    (folder / "experiment.yaml").write_text(text)
    file = tmp_path / "far.yaml"
    file.write_text(text)
    return file, folder


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


@pytest.mark.parametrize("is_folder", [False, True])
def test_report_needs_only_the_folder(finished: tuple[Path, Path], is_folder: bool):
    file, folder = finished
    before = snapshot(folder.parents[2])
    ran = subprocess.run(
        [sys.executable, "-c", CODE, "report", str(folder if is_folder else file)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    # One trial of this experiment failed.
    assert ran.returncode == 1, ran.stderr
    assert ran.stderr == ""
    assert "report.html" in ran.stdout
    after = snapshot(folder.parents[2])
    changed = {Path(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert {file.name for file in changed} >= REPORT_FILES
    experiment_folder = folder.relative_to(folder.parents[2])
    assert [
        file
        for file in changed
        if file.parent != experiment_folder / "report"
        and file not in {experiment_folder / each for each in REPORT_FILES}
    ] == []
    assert json.loads((folder / "run.json").read_text())["commands"] == ["raykd run far.yaml"]
    assert "    raykd run far.yaml" in (folder / "report.md").read_text()


@pytest.mark.parametrize("has_folder", [False, True])
def test_report_without_experiment_is_one_line_and_writes_nothing(tmp_path: Path, capsys, has_folder: bool):
    folder = tmp_path / "empty"
    if has_folder:
        folder.mkdir()
    assert cli.main(["report", str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and str(folder) in captured.err
    assert list(tmp_path.rglob("*")) == ([folder] if has_folder else [])


def test_report_of_an_experiment_that_never_ran_writes_nothing(tmp_path: Path, capsys):
    quickstart = str(Path(__file__).parents[3] / "configs" / "quickstart.yaml")
    assert cli.main(["report", quickstart, f"storage={tmp_path / 'storage'}"]) == 2
    assert "nothing to report yet" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_overrides_with_folder_are_refused(finished: tuple[Path, Path], capsys):
    assert cli.main(["report", str(finished[1]), "name=other"]) == 2
    assert "is a folder; fields can be set only if FILE is a YAML file" in capsys.readouterr().err


def test_report_of_changed_experiment_is_refused(finished: tuple[Path, Path], capsys):
    file, folder = finished
    before = snapshot(folder)
    assert cli.main(["report", str(file), "student.model=somebody/else"]) == 2
    assert "holds another experiment named 'far'" in capsys.readouterr().err
    assert snapshot(folder) == before


@pytest.fixture
def read_only(finished: tuple[Path, Path]) -> Iterator[tuple[Path, Path]]:
    """The finished experiment in a storage that is mounted read-only."""
    storage = str(finished[1].parents[1])
    commands = [["mount", "--bind", storage, storage], ["mount", "-o", "remount,ro,bind", storage]]
    for command in commands:
        mounted = subprocess.run(command, capture_output=True)
        if mounted.returncode:
            pytest.skip(f"a read-only folder needs the right to mount one: {mounted.stderr.decode().strip()}")
    try:
        yield finished
    finally:
        subprocess.run(["umount", "-l", storage], check=True)


@pytest.mark.parametrize("is_folder", [False, True])
def test_report_on_read_only_storage_shows_the_results(read_only: tuple[Path, Path], is_folder: bool, capsys):
    file, folder = read_only
    assert cli.main(["report", str(folder if is_folder else file)]) == 1
    captured = capsys.readouterr()
    assert captured.err == f"{folder} cannot be written: its report stays as it is\n"
    assert "ground_truth" in captured.out


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "experiment.yaml").unlink(), ["has no experiment.yaml"]),
        (lambda folder: (folder / "experiment.yaml").write_text("a: ["), ["experiment.yaml is damaged: line 1"]),
        (lambda folder: (folder / "experiment.yaml").write_bytes(b"a: \xff"), ["experiment.yaml is damaged"]),
        (lambda folder: (folder / "run.json").unlink(), ["has no run.json"]),
        (lambda folder: (folder / "run.json").write_text('{"name": "a", "name": "b"}'), ["run.json", "occurs twice"]),
        (lambda folder: change(folder, stages=[]), ["run.json", "stages"]),
        (lambda folder: change(folder, processor_seconds=3), ["run.json", "processor_seconds"]),
        (lambda folder: change(folder, models="x"), ["run.json", "models"]),
        (lambda folder: write_trial(folder, "{}"), ["trial.json is damaged: trial_id: is missing"]),
        (lambda folder: change_trial(folder, overrides=[]), ["trial.json is damaged: overrides"]),
        (lambda folder: change_trial(folder, num_workers="two"), ["trial.json is damaged: num_workers", "'two'"]),
        (lambda folder: change_trial(folder, seconds=float("inf")), ["trial.json is damaged", "not a finite number"]),
        (lambda folder: change_trial(folder, unknown=1), ["trial.json is damaged: unknown: unknown key"]),
        (lambda folder: add_point(folder, "[]"), ["metrics.jsonl, line 31 is damaged", "not an object"]),
        (lambda folder: add_point(folder, '{"loss": 1.0}'), ["metrics.jsonl, line 31 is damaged: step: is missing"]),
        (lambda folder: add_point(folder, '{"step": 1, "loss": NaN}'), ["line 31 is damaged", "not a finite number"]),
        (lambda folder: add_point(folder, '{"step": ' + "9" * 5001 + "}"), ["metrics.jsonl, line 31 is damaged"]),
    ],
)
def test_damaged_record_is_one_line_with_file_and_field(finished: tuple[Path, Path], damage, words: list[str], capsys):
    folder = finished[1]
    damage(folder)
    assert cli.main(["report", str(folder)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    for word in words:
        assert word in captured.err


def change(folder: Path, **fields: object) -> None:
    file = folder / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def trial_file(folder: Path, name: str) -> Path:
    return sorted((folder / "trials").glob(f"*/{name}"))[0]


def write_trial(folder: Path, text: str) -> None:
    trial_file(folder, "trial.json").write_text(text)


def change_trial(folder: Path, **fields: object) -> None:
    write_trial(folder, json.dumps(json.loads(trial_file(folder, "trial.json").read_text()) | fields))


def add_point(folder: Path, line: str) -> None:
    with trial_file(folder, "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
