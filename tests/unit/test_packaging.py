"""Packaging: the wheel, its metadata, version numbers in files, and the choice of a Python."""

import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import raykd
from wheels import ROOT, build_wheel

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.11", "3.12", "3.13")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    return zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel")))


def files_below(folder: Path) -> dict[str, bytes]:
    files = (file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("inside", "source"),
    [
        ("raykd/assets/configs", "configs"),
        ("raykd/assets/cluster", "cluster"),
        ("raykd/demo/models", "src/raykd/demo/models"),
        ("raykd/report/templates", "src/raykd/report/templates"),
    ],
)
def test_wheel_contains_every_data_file(wheel: zipfile.ZipFile, inside: str, source: str):
    expected = files_below(ROOT / source)
    assert expected
    names = [name for name in wheel.namelist() if name.startswith(f"{inside}/") and not name.endswith("/")]
    assert {name.removeprefix(f"{inside}/"): wheel.read(name) for name in names} == expected


def test_wheel_contains_every_module_and_no_tests(wheel: zipfile.ZipFile):
    modules = {f"raykd/{file.relative_to(ROOT / 'src/raykd')}" for file in (ROOT / "src/raykd").rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == modules
    assert "raykd/__main__.py" in modules and "raykd/py.typed" in wheel.namelist()
    assert {name.split("/")[0] for name in wheel.namelist()} == {"raykd", f"raykd-{raykd.__version__}.dist-info"}


def test_wheel_metadata(wheel: zipfile.ZipFile):
    metadata = email.message_from_bytes(wheel.read(f"raykd-{raykd.__version__}.dist-info/METADATA"))
    assert metadata["Author"] == "raykd developers" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown" and "# raykd" in str(metadata.get_payload())
    assert any("https://github.com/raykd/raykd" in url for url in metadata.get_all("Project-URL", []))
    assert SpecifierSet(metadata["Requires-Python"]) == SpecifierSet(">=3.11,<3.14")
    classifiers = metadata.get_all("Classifier", [])
    assert [each.split(" :: ")[-1] for each in classifiers if re.search(r":: 3\.\d+$", each)] == list(PYTHONS)
    assert set(metadata.get_all("Provides-Extra", [])) == {"gpu", "s3", "gcs", "azure", "dev"}


def test_all_files_name_the_same_version():
    version = PROJECT["project"]["version"]
    assert raykd.__version__ == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## [{version}] - " in (ROOT / "CHANGELOG.md").read_text()
    readme = (ROOT / "README.md").read_text()
    assert f"/v{version}/requirements/cpu.txt raykd=={version}\n" in readme
    assert f"tag `v{version}`" in (ROOT / "cluster" / "README.md").read_text()


@pytest.mark.parametrize("lock", ["cpu", "gpu"])
def test_locked_versions_satisfy_the_requirements(lock: str):
    lines = (ROOT / "requirements" / f"{lock}.txt").read_text().splitlines()
    pinned = dict(line.split(" ;")[0].split("==") for line in lines if line and not line.startswith("#"))
    versions = {canonicalize_name(name.split("[")[0]): version for name, version in pinned.items()}
    extras = PROJECT["project"]["optional-dependencies"]
    extra = PROJECT["dependency-groups"]["cpu"] if lock == "cpu" else extras["gpu"]
    for text in [*PROJECT["project"]["dependencies"], *extras["dev"], *extras["s3"], *extra]:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), text


def test_ci_calls_targets_of_the_makefile():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    called = set()
    for job in workflow["jobs"].values():
        for step in job["steps"]:
            matrix = job.get("strategy", {}).get("matrix", {})
            called |= set(re.findall(r"^make ([a-z-]+)$", step.get("run", "")))
            called |= set(matrix["target"]) if "matrix.target" in step.get("run", "") else set()
    assert called == {"check", "test", "test-all", "test-faults"} and called <= targets
    assert workflow["jobs"]["check"]["strategy"]["matrix"]["python"] == list(PYTHONS)


def python_on(folder: Path, **scripts: str) -> subprocess.CompletedProcess[str]:
    """Run tools/python.sh with only the given shell scripts on the PATH."""
    for name, text in scripts.items():
        script = folder / name.replace("_", ".")
        script.write_text(f"#!/bin/sh\n{text}\n")
        script.chmod(0o755)
    shell = ["/bin/sh", str(ROOT / "tools" / "python.sh")]
    return subprocess.run(shell, env={"PATH": str(folder)}, capture_output=True, text=True, timeout=60)


def test_newest_working_python_is_chosen(tmp_path: Path):
    # A shim of pyenv without that version exits with 127, a Python without ensurepip with 1.
    ran = python_on(tmp_path, python3_13="exit 127", python3_12="exit 1", python3_11="exit 0", python3="exit 0")
    assert (ran.returncode, ran.stdout) == (0, f"{tmp_path}/python3.11\n")
    (tmp_path / "python3.13").write_text("#!/bin/sh\nexit 0\n")
    assert python_on(tmp_path).stdout == f"{tmp_path}/python3.13\n"


def test_missing_python_is_reported_in_one_line(tmp_path: Path):
    ran = python_on(tmp_path, python3="exit 1")
    assert ran.returncode == 1 and ran.stdout == ""
    assert "make install PYTHON=" in ran.stderr and ran.stderr.count("\n") == 1


@pytest.mark.parametrize(("version", "status"), [("3, 10, 9", 1), ("3, 11, 0", 0), ("3, 13, 5", 0), ("3, 14, 0", 1)])
def test_unsupported_python_versions_are_skipped(version: str, status: int, tmp_path: Path):
    code = f"import sys; sys.version_info = ({version}); exec(sys.argv[1])"
    ran = python_on(tmp_path, python3=f'exec {sys.executable} -c "{code}" "$2"')
    assert ran.returncode == status


@pytest.mark.parametrize("module", ["raykd", "raykd.cli"])
def test_python_m_runs_the_command_line(module: str):
    ran = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout) == (0, f"raykd {raykd.__version__}\n")
