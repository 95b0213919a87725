"""Commands for the files of `cluster/`: their options and paths exist, and all stages fit."""

import re
from typing import Any

import pytest
from ray.scripts.scripts import cli as ray_cli

from cloud_files import (
    CLOUDS,
    FILES,
    FOLDER,
    INSTALLED,
    NAMES,
    PROJECT,
    RAY_UP_FILES,
    ROOT,
    assert_all_fits,
    experiment,
    fits,
    gpu_types,
    manifests,
    read,
    readme_experiment,
    readme_job,
)
from raykd.config.loading import load_experiment
from raykd.scaffold import shipped_configs


def test_rayjob_uses_shared_folder_and_gpu_types():
    config = experiment("rayjob")
    assert config.storage == "/mnt/raykd"
    assert config.teacher.engine.accelerator_type == "H100"
    students = (config.evaluate.engine.accelerator_type, config.train.accelerator_type)
    assert config.attention and students == ("L4", "L4") and config.attention.accelerator_type == "L4"


def test_rayjob_fits_its_cluster():
    assert_all_fits(experiment("rayjob"), "kuberay/nodes.yaml")


@pytest.mark.parametrize("name", CLOUDS)
def test_readme_job_fits_cluster_of_each_cloud(name: str):
    text = " ".join((FOLDER / "README.md").read_text().split())
    type_by_cloud = {cloud: kind for kind, cloud in re.findall(r"`([\w-]+)` on (AWS|Google Cloud|Azure)", text)}
    assert [type_by_cloud[NAMES[name]]] == gpu_types(read(name)["available_node_types"]["student"]["resources"])
    assert_all_fits(readme_experiment(type_by_cloud[NAMES[name]]), f"{name}.yaml")


def test_readme_job_fits_kubernetes_cluster():
    text = (FOLDER / "README.md").read_text()
    # The README names the overrides for Kubernetes, which the job has, too.
    assert "`STUDENTS=L4`" in text and "add `teacher.engine.pipeline_parallel_size=2` to that" in text
    config = readme_experiment("L4", "teacher.engine.pipeline_parallel_size=2")
    assert config == experiment("rayjob")
    assert_all_fits(config, "kuberay/nodes.yaml")


def test_readme_command_names_gpu_type_of_each_cloud():
    text = (FOLDER / "README.md").read_text()
    (line,) = re.findall(r"^STUDENTS=.*$", text, re.MULTILINE)
    type_by_cloud = {name: gpu_types(read(name)["available_node_types"]["student"]["resources"])[0] for name in CLOUDS}
    assert line.startswith(f"STUDENTS={type_by_cloud['aws']} ") and "on AWS;" in line
    assert all(f"{type_by_cloud[name]} on {NAMES[name]}" in line for name in ("gcp", "azure"))


def test_8b_student_needs_checkpointing_on_22_gib_only():
    config = readme_experiment("A10G", "train.gradient_checkpointing=false")
    (train,) = [fit for fit in fits(config, "aws.yaml") if fit.stage == "train"]
    assert "A10G has 22.0" in train.problem and train.suggestion == "train.gradient_checkpointing=true"
    assert_all_fits(readme_experiment("A100", "train.gradient_checkpointing=false"), "azure.yaml")


def test_job_metadata_names_experiment_and_stage():
    metadata, file, overrides = readme_job()
    (job,) = manifests("rayjob")
    for each, name in (
        (metadata, load_experiment(shipped_configs()[file], overrides).name),
        (job["spec"]["metadata"], experiment("rayjob").name),
    ):
        assert each == {"job_name": name, "experiment": name, "stage": "run"}


def test_named_paths_exist():
    for file in FILES:
        text = file.read_text()
        for path in re.findall(rf"{INSTALLED}/([\w./-]*\w)", text):
            # The installation creates .venv.
            assert path.startswith(".venv") or (ROOT / path).exists(), f"{file}: {path}"
        for path in re.findall(r"(?<![\w/.])((?:cluster|configs|rayjobs|requirements|src|docs)/[\w./-]*\w)", text):
            assert (ROOT / path).exists(), f"{file}: {path}"


def test_commands_and_options_exist():
    """Commands of the README's blocks and of the nodes exist, and so do the options of Ray's commands."""
    readme = (FOLDER / "README.md").read_text()
    fence = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
    inline = [each.replace("\n", " ") for each in re.findall(r"`([^`]+)`", fence.sub("", readme))]
    blocks = [*fence.findall(readme), *inline]
    node_commands = [
        each for name in RAY_UP_FILES for key, value in read(name).items() if "commands" in key for each in value
    ]
    lines = [line for block in [*blocks, *node_commands] for line in block.replace("\\\n", " ").splitlines()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen: set[str] = set()
    for line in lines:
        for name in re.findall(r"\bmake ([a-z-]+)", line):
            assert name in targets, line
        # The text after a bare `--`, a comment or a closing quotation mark is not part of Ray's command.
        for command in re.findall(r"(?:^|[\s'\"(])ray ([a-z][^#'\"|>)]*)", line):
            words = re.split(r"\s--(?:\s|$)", command)[0].split()
            command: Any = ray_cli
            while words and hasattr(command, "commands"):
                command = command.commands[words.pop(0)]
            options = {option for param in command.params for option in param.opts}
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= options, line
            seen.add(command.name)
    assert {"up", "down", "dashboard", "attach", "exec", "submit", "start", "stop", "get-auth-token"} <= seen


def test_image_installs_locked_packages():
    text = (FOLDER / "Dockerfile").read_text()
    assert 'if [ "$ACCELERATOR" = cpu ]; then make install; else make install-gpu; fi' in text
    (python,) = re.findall(r"^FROM python:(3\.\d+)-", text, re.MULTILINE)
    assert PROJECT["requires-python"].startswith(f">={python},")
    # All Python packages are locked, except the libraries of Google Cloud's and Azure's buckets.
    (line,) = [line for line in text.splitlines() if "pip" in line]
    assert "pip install" in line and '--constraint requirements/$ACCELERATOR.txt -e ".[$EXTRA]"' in line
    for extra, package in (("gcs", "gcsfs"), ("azure", "adlfs")):
        assert any(each.startswith(package) for each in PROJECT["optional-dependencies"][extra])
        for lock in ("cpu", "gpu"):
            assert f"\n{package}==" not in (ROOT / "requirements" / f"{lock}.txt").read_text()


def test_image_sets_nvidia_variables():
    (line,) = re.findall(r"^ENV (LD_LIBRARY_PATH=.*)$", (FOLDER / "Dockerfile").read_text(), re.MULTILINE)
    variables = dict(each.split("=") for each in line.split())
    assert "/usr/local/nvidia/lib64" in variables["LD_LIBRARY_PATH"].split(":")
    assert variables["NVIDIA_VISIBLE_DEVICES"] == "all" and variables["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    for name in CLOUDS:
        # The head has no GPU; `void` overrides the image's variable.
        assert read(name)["docker"]["head_run_options"] == ["--env NVIDIA_VISIBLE_DEVICES=void"]


@pytest.mark.parametrize("name", CLOUDS)
def test_head_setup_packages_are_pinned(name: str):
    commands = read(name)["head_setup_commands"]
    if name == "aws":
        assert commands == [], "boto3 is locked"
        assert re.search(r"^boto3==", (ROOT / "requirements/gpu.txt").read_text(), re.MULTILINE)
        return
    (command,) = commands
    packages = [word for word in command.split()[2:] if not word.startswith(("-", "/"))]
    assert packages and all(re.fullmatch(r"[\w-]+==[\w.]+", each) for each in packages)
    # The README installs the same packages on the machine that starts the cluster.
    assert all(each in (FOLDER / "README.md").read_text() for each in packages)


def test_readme_lists_placeholders_of_each_file():
    text = (FOLDER / "README.md").read_text()
    for file in FILES:
        if file.name == "README.md" or "FILL_IN_" not in file.read_text():
            continue
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{file.relative_to(FOLDER)}` | `FILL_")]
        assert set(re.findall(r"FILL_IN_\w+", file.read_text())) == set(re.findall(r"FILL_IN_\w+", row)), file
