"""One experiment on real GSM8K rows, run once by the command line, for all tests that look at what it wrote."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from raykd import config, pipeline
from raykd.demo import resolve_model

RAYKD = str(Path(sys.executable).parent / "raykd")
MAX_TOKENS = 32


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def gsm8k() -> dict[str, str]:
    """GSM8K's own files."""
    folder = os.environ.get("RAYKD_GSM8K_DIR")
    if not folder:
        pytest.skip("RAYKD_GSM8K_DIR is not set: it names the folder with GSM8K's train.jsonl and test.jsonl")
    return {f"{split}_file": str(Path(folder) / f"{split}.jsonl") for split in ("train", "test")}


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in teacher with ideas of its own about sampling, as models from the hub have them."""
    folder = tmp_path_factory.mktemp("models") / "teacher"
    shutil.copytree(resolve_model("raykd/demo-teacher"), folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.5, "top_k": 1, "top_p": 0.5}))
    return folder


@pytest.fixture(scope="session")
def experiment_file(gsm8k: dict[str, str], teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small enough for minutes: hard and soft targets, gold solutions plain and scored, all ZeRO stages but one."""
    engine = {"engine_kwargs": {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 32}}
    tree = {
        "name": "gsm8k",
        "problems": {"source": "jsonl", **gsm8k, "num_train": 40, "num_validation": 8, "num_test": 10},
        "teacher": {
            "model": str(teacher_folder),
            "engine": engine,
            "sampling": {"max_tokens": MAX_TOKENS, "temperature": 0.7},
            "samples": 2,
            "batch_size": 5,
            "concurrency": 2,
        },
        "student": {"model": "raykd/demo-student"},
        "prompt": {"instruction": ""},
        "train": {
            "epochs": 2,
            "batch_size": 8,
            "micro_batch_size": 2,
            "learning_rate": 5e-3,
            "num_workers": 2,
            "dtype": "float32",
            "checkpoint_every_steps": 3,
        },
        "evaluate": {"engine": engine, "sampling": {"max_tokens": MAX_TOKENS}, "batch_size": 8},
        "arms": {
            "none": {"targets.keep": "best", "train.zero_stage": 1},
            "soft": {"prompt.strategy": "teacher", "targets.kind": "top_k", "targets.top_k": 6, "train.packing": True},
            "scored": {
                "prompt.strategy": "ground_truth",
                "targets": {"sequence": "reference", "kind": "top_k", "top_k": 6},
                "loss": {"divergence": "jensen_shannon", "tail": "renormalise", "temperature": 2.0},
            },
            "reference": {"targets.sequence": "reference", "train.zero_stage": 3},
        },
    }
    file = tmp_path_factory.mktemp("experiment") / "gsm8k.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


@dataclass
class Ran:
    """A finished run, and what it printed."""

    plan: pipeline.Plan
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def ran(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """`raykd run`, undisturbed."""
    storage = tmp_path_factory.mktemp("storage")
    arguments = ["run", str(experiment_file), f"storage={storage}"]
    return finish(arguments, storage)


def finish(arguments: list[str], cwd: Path) -> Ran:
    """Runs a command to its end, which must be a good one."""
    done = subprocess.run([RAYKD, *arguments], cwd=cwd, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return Ran(plan_of(arguments), done.stdout, done.stderr)


def plan_of(arguments: list[str]) -> pipeline.Plan:
    """What a command line works on."""
    return pipeline.prepare(config.load(arguments[1], arguments[2:]), "test")


def kill_when(
    condition: Callable[[], bool], arguments: list[str], cwd: Path, timeout_s: float = 900
) -> list[psutil.Process]:
    """Starts a command and kills its driver (SIGKILL) as soon as a condition holds.

    Returns:
        the processes that it had, the driver apart: all of them must end by themselves.
    """
    log = cwd / "killed.log"
    with log.open("w") as stream:
        driver = subprocess.Popen([RAYKD, *arguments], cwd=cwd, stdout=stream, stderr=subprocess.STDOUT)
    family: list[psutil.Process] = []
    try:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert driver.poll() is None, f"ended before it could be killed:\n{log.read_text()}"
            assert time.monotonic() < deadline, f"never came so far:\n{log.read_text()}"
            time.sleep(0.05)
    finally:
        if driver.poll() is None:
            family = psutil.Process(driver.pid).children(recursive=True)
        driver.kill()
        driver.wait()
    return family


def wait_for_end(family: list[psutil.Process], timeout_s: float = 120) -> None:
    """Waits until processes are gone; what is still there after that is ended, and fails the test.

    When Ray's own processes die of SIGKILL, its agents tell the head so for 60 s before they give up.
    """
    _, alive = psutil.wait_procs(family, timeout=timeout_s)
    for process in alive:
        process.kill()
    assert not alive, f"still running after {timeout_s:g} s: {alive}"


def greedy(model, prompt: list[int], eos: int, max_tokens: int) -> list[int]:
    """What a model answers, by transformers alone."""
    with torch.no_grad():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=max_tokens,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    return out[0, len(prompt) :].tolist()


def log_likelihoods(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """The model's own distribution at each token of an answer (T, V), float64, at temperature 1."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits.double(), -1)
