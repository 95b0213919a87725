"""Adapters: peft's own files pass; truncated, modified or additional files are refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from raykd.config.training import Lora, Student
from raykd.models import adapters, loading
from raykd.storage import filesystem
from raykd.training import student


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Save a student's adapter."""
    named = Student(model="raykd/demo-student", lora=Lora(r=4))
    model = student.add_lora(loading.load_base_model(named, torch.float32), named, seed=0)
    made = tmp_path / "trial" / "adapter"
    student.save_adapter(model, made, named, write=True, is_trained=False)
    return made


def test_saved_adapter_passes(folder: Path):
    adapters.check_adapter(folder, 4)


def test_adapter_in_a_bucket_is_checked(folder: Path, bucket: str):
    there = filesystem.resolve(f"{bucket}/checked/adapter")
    for damage in (None, cut):
        if damage:
            damage(folder)
        with filesystem.atomic_write_dir(there) as local:
            for file in folder.iterdir():
                (local / file.name).write_bytes(file.read_bytes())
        if damage is None:
            adapters.check_adapter(there, 4)
    with pytest.raises(ValueError, match=r"s3://.*adapter_model\.safetensors: is damaged"):
        adapters.check_adapter(there, 4)
    filesystem.put(there / "adapter_model.bin", b"")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: does not belong to an adapter"):
        adapters.check_adapter(there, 4)


def changed(folder: Path, **fields: object) -> None:
    file = folder / adapters.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def cut(folder: Path) -> None:
    file = folder / adapters.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-10])


def not_finite(folder: Path) -> None:
    file = folder / adapters.WEIGHTS_FILE
    weights = safetensors.numpy.load_file(file)
    next(iter(weights.values()))[0, 0] = np.nan
    safetensors.numpy.save_file(weights, file)


def without_a_half(folder: Path) -> None:
    file = folder / adapters.WEIGHTS_FILE
    weights = safetensors.numpy.load_file(file)
    del weights[next(name for name in weights if "lora_B" in name)]
    safetensors.numpy.save_file(weights, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"adapter_model\.safetensors: is damaged"),
        (not_finite, "values that are not finite"),
        (without_a_half, "not half of a pair of rank 4"),
        (lambda folder: (folder / adapters.WEIGHTS_FILE).unlink(), r"adapter_model\.safetensors: is missing"),
        (lambda folder: (folder / "adapter_model.bin").touch(), r"adapter_model\.bin: does not belong to an adapter"),
        (lambda folder: changed(folder, r=8), "r is '8', not 4"),
        (lambda folder: changed(folder, peft_type="LOHA"), "peft_type is 'LOHA'"),
        (lambda folder: changed(folder, auto_mapping={"parent_library": "os"}), "auto_mapping is set"),
        (lambda folder: (folder / adapters.CONFIG_FILE).write_text("{"), r"adapter_config\.json is damaged"),
    ],
)
def test_damaged_adapter_is_refused(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(ValueError, match=rf"{message}.*delete"):
        adapters.check_adapter(folder, 4)
