"""One experiment on real GSM8K rows, run once by the command line, for all tests that look at what it wrote."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import stores
from raykd import location
from raykd.demo import resolve_model
from runs import Ran, finish

MAX_TOKENS = 32


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URI of a bucket on a server of this machine that answers as S3 does."""
    with stores.s3() as uri:
        yield uri


@pytest.fixture(params=["folder", "bucket"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Somewhere empty: a folder, and a bucket's prefix."""
    if request.param == "folder":
        (tmp_path / "place").mkdir()
        return location.at(str(tmp_path / "place"))
    return location.at(f"{request.getfixturevalue('bucket')}/with space/{uuid.uuid4().hex}")


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


@pytest.fixture(scope="session")
def ran(experiment_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """`raykd run`, undisturbed."""
    storage = tmp_path_factory.mktemp("storage")
    arguments = ["run", str(experiment_file), f"storage={storage}"]
    return finish(arguments, storage)
