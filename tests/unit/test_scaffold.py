"""`raykd init`, and shipped configurations by name."""

import os
import re
from pathlib import Path

import pytest

from raykd import cli, scaffold
from raykd.cluster import nodes
from raykd.config.loading import load_experiment

ROOT = Path(__file__).parents[2]


def test_every_configuration_is_shipped():
    assert set(scaffold.shipped_configs()) == {
        str(file.relative_to(ROOT / "configs").with_suffix("")) for file in (ROOT / "configs").rglob("*.yaml")
    }
    assert {"quickstart", "starter", "gsm8k/8b-to-1b", "sweeps/demo"} <= set(scaffold.shipped_configs())


@pytest.mark.parametrize("name", sorted(scaffold.shipped_configs()))
def test_every_shipped_configuration_loads(name: str):
    assert load_experiment(scaffold.find_config(name)).arms


def test_file_takes_precedence_over_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert Path(scaffold.find_config("quickstart")).samefile(ROOT / "configs" / "quickstart.yaml")
    Path("quickstart").mkdir()
    assert scaffold.find_config("quickstart") != "quickstart"
    Path("quickstart").rmdir()
    Path("quickstart").write_text("name: mine\n")
    assert scaffold.find_config("quickstart") == "quickstart"


def test_find_config_returns_paths_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # as `<(command)` of a shell
    for file in ("nowhere.yaml", "x.json", "pipe", f"{'long' * 100}.yaml", str(tmp_path)):
        assert scaffold.find_config(file) == file


def test_unknown_name_lists_shipped_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "quikstart"]) == 2
    error = capsys.readouterr().err
    assert "no such file" in error and "did you mean 'quickstart'" in error and "gsm8k/8b-to-1b" in error
    assert error.count("\n") == 1
    assert cli.main(["plan", "x" * 300]) == 2


def test_plan_and_prompts_accept_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "gsm8k/8b-to-1b"]) == 0
    assert cli.main(["prompts", "quickstart", "dataset.num_train=8", "dataset.num_test=4"]) == 0
    assert "--- student" in capsys.readouterr().out


def test_help_lists_the_shipped_configurations(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert set(scaffold.shipped_configs()) <= set(capsys.readouterr().out.split())


def test_init_writes_an_experiment_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "mine"]) == 0
    assert load_experiment("mine.yaml").name == "mine"
    assert "next: raykd run mine.yaml" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.parametrize("name", ["1e3", "on", "0x10", "2026-01-01", "null"])
def test_init_quotes_names_that_yaml_would_convert(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    scaffold.write_experiment(name)
    assert load_experiment(f"{name}.yaml").name == name


@pytest.mark.parametrize("source", sorted(scaffold.shipped_configs()))
def test_init_copies_any_shipped_configuration(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "mine", "--from", source]) == 0
    shipped = load_experiment(scaffold.find_config(source))
    assert load_experiment("mine.yaml") == shipped.model_copy(update={"name": "mine"})


def test_commented_alternatives_of_the_starter_load(tmp_path: Path):
    text = (ROOT / "configs" / "starter.yaml").read_text()
    # Each commented section replaces the section of the same name.
    sections: dict[str, list[str]] = {}
    for line in re.findall(r"^#: (.*)$", text, re.MULTILINE):
        key = line.split(":")[0] if not line.startswith(" ") else list(sections)[-1].split("/")[0]
        if line.startswith(" "):
            sections[list(sections)[-1]].append(line)
        else:
            sections[f"{key}/{len(sections)}"] = [line]
    assert len(sections) == 8
    for name, lines in sections.items():
        key = name.split("/")[0]
        rest = re.sub(rf"^{key}:.*\n(?:  .*\n)*", "", text, flags=re.MULTILINE)
        file = tmp_path / "experiment.yaml"
        file.write_text("\n".join([rest, *lines, ""]))
        assert load_experiment(file) != load_experiment(ROOT / "configs" / "starter.yaml"), lines


@pytest.mark.parametrize("cluster", scaffold.CLUSTERS)
def test_init_writes_cluster_files(cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", "mine", "--cluster", cluster]) == 0
    shown = capsys.readouterr().out
    written = [file for file in (tmp_path / "cluster").rglob("*") if file.is_file()]
    assert tmp_path / "cluster" / "README.md" in written and len(written) > 1
    for file in written:
        assert file.read_text() == (ROOT / file.relative_to(tmp_path)).read_text()
        assert str(file.relative_to(tmp_path)) in shown
    # The files in the printed commands exist, and `raykd plan` reads the cluster file.
    (plan,) = re.findall(r"raykd plan mine.yaml --cluster (\S+)", shown)
    assert cluster == "local" or nodes.read_cluster_file(Path(plan))
    for named in re.findall(r"cluster/\S+\.yaml", shown):
        assert Path(named.rstrip(",")).is_file()
    assert "storage=/mnt/raykd" in shown


def test_init_never_overwrites(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("cluster").mkdir()
    Path("cluster/aws.yaml").write_text("mine")
    assert cli.main(["init", "mine", "--cluster", "aws"]) == 2
    assert "cluster/aws.yaml already exists" in capsys.readouterr().err
    assert not Path("mine.yaml").exists() and Path("cluster/aws.yaml").read_text() == "mine"
    Path("mine.yaml").symlink_to("nowhere")
    assert cli.main(["init", "mine"]) == 2
    assert not Path("nowhere").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a/b"], "invalid name 'a/b'"),
        (["mine\n"], "invalid name"),
        (["mine", "--from", "nothing"], "--from nothing: no such shipped configuration"),
    ],
)
def test_init_reports_invalid_arguments_in_one_line(
    arguments, words, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["init", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_init_reports_an_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("cluster").write_text("a file where a folder is needed")
    assert cli.main(["init", "mine", "--cluster", "aws"]) == 2
    assert "init: cannot write cluster/" in capsys.readouterr().err
