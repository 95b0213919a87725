"""The README's command installs the wheel and the CPU stack into an empty environment, in which raykd runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import raykd
from wheels import ROOT, build_wheel

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def documented_command() -> list[str]:
    """The arguments of the README's `pip install` of the CPU stack."""
    (command,) = re.findall(r"^pip (install --no-deps (?:.*\\\n)*.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    return shlex.split(command.replace("\\\n", " "))


# Installs the whole stack. In `make test`, test_packaging.py covers the wheel's content; nothing there installs it.
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_wheel_and_cpu_stack_install_and_generate(tmp_path: Path):
    wheel = build_wheel(tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True, timeout=300)
    binaries = tmp_path / "venv" / "bin"
    local_files = {
        f"https://raw.githubusercontent.com/raykd/raykd/v{raykd.__version__}/requirements/cpu.txt": str(
            ROOT / "requirements" / "cpu.txt"
        ),
        f"raykd=={raykd.__version__}": str(wheel),
    }
    command = documented_command()
    assert set(local_files) <= set(command)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    # pip also looks for every package in PyTorch's index, which some machines cannot reach.
    environment |= {"PIP_RETRIES": "0", "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{binaries}:{environment['PATH']}"

    def run(*arguments: str, timeout: int) -> subprocess.CompletedProcess[str]:
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        return subprocess.run(
            [str(binaries / arguments[0]), *arguments[1:]],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    installed = run("pip", *(local_files.get(each, each) for each in command), timeout=1800)
    assert installed.returncode == 0, installed.stderr
    missing = re.findall(r"requires ([\w-]+), which is not installed", run("pip", "check", timeout=300).stdout)
    assert set(missing) == LEFT_OUT
    fields = ["dataset.num_train=8", "dataset.num_test=4", "arms={teacher: {prompt.strategy: teacher}}"]
    generated = run("raykd", "generate", "quickstart", *fields, timeout=900)
    assert generated.returncode == 0, generated.stderr
    assert list((tmp_path / "work" / "storage" / "completions").rglob("*.parquet"))
