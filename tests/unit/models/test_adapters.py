"""Adapters: peft's files pass; truncated, modified or additional files are refused by name."""

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
    section = Student(model="raykd/demo-student", lora=Lora(r=4))
    model = student.add_lora(loading.load_base_model(section, torch.float32), section, seed=0)
    path = tmp_path / "trial" / "adapter"
    student.save_adapter(model, path, section, write=True, is_trained=False)
    return path


def test_saved_adapter_passes(folder: Path):
    adapters.check_adapter(folder, 4)


def test_adapter_in_a_bucket_is_checked(folder: Path, bucket: str):
    remote = filesystem.resolve(f"{bucket}/checked/adapter")
    for damage in (None, truncate_weights):
        if damage:
            damage(folder)
        with filesystem.atomic_write_dir(remote) as local:
            for file in folder.iterdir():
                (local / file.name).write_bytes(file.read_bytes())
        if damage is None:
            adapters.check_adapter(remote, 4)
    with pytest.raises(ValueError, match=r"s3://.*adapter_model\.safetensors: is damaged"):
        adapters.check_adapter(remote, 4)
    filesystem.put(remote / "adapter_model.bin", b"")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: does not belong to an adapter"):
        adapters.check_adapter(remote, 4)


def change_config(folder: Path, **fields: object) -> None:
    file = folder / adapters.CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def truncate_weights(folder: Path) -> None:
    file = folder / adapters.WEIGHTS_FILE
    file.write_bytes(file.read_bytes()[:-10])


def write_nan(folder: Path) -> None:
    file = folder / adapters.WEIGHTS_FILE
    weights = safetensors.numpy.load_file(file)
    next(iter(weights.values()))[0, 0] = np.nan
    safetensors.numpy.save_file(weights, file)


def remove_lora_b(folder: Path) -> None:
    file = folder / adapters.WEIGHTS_FILE
    weights = safetensors.numpy.load_file(file)
    del weights[next(name for name in weights if "lora_B" in name)]
    safetensors.numpy.save_file(weights, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_weights, r"adapter_model\.safetensors: is damaged"),
        (write_nan, "values that are not finite"),
        (remove_lora_b, "not half of a pair of rank 4"),
        (lambda folder: (folder / adapters.WEIGHTS_FILE).unlink(), r"adapter_model\.safetensors: is missing"),
        (lambda folder: (folder / "adapter_model.bin").touch(), r"adapter_model\.bin: does not belong to an adapter"),
        (lambda folder: change_config(folder, r=8), "r is '8', not 4"),
        (lambda folder: change_config(folder, peft_type="LOHA"), "peft_type is 'LOHA'"),
        (lambda folder: change_config(folder, auto_mapping={"parent_library": "os"}), "auto_mapping is set"),
        (lambda folder: (folder / adapters.CONFIG_FILE).write_text("{"), r"adapter_config\.json is damaged"),
    ],
)
def test_damaged_adapter_is_refused(folder: Path, damage, message: str):
    damage(folder)
    with pytest.raises(ValueError, match=rf"{message}.*delete"):
        adapters.check_adapter(folder, 4)


def scale_weights(folder: Path) -> None:
    file = folder / adapters.WEIGHTS_FILE
    weights = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({name: value * -50 for name, value in weights.items()}, file, metadata={"format": "pt"})


def flip_bit(folder: Path) -> None:
    file = folder / adapters.WEIGHTS_FILE
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "change",
    [
        scale_weights,
        flip_bit,
        truncate_weights,
        lambda folder: change_config(folder, lora_alpha=80_000),
        lambda folder: change_config(folder, use_dora=True),
        lambda folder: change_config(folder, modules_to_save=["lm_head"]),
    ],
)
def test_modified_adapter_is_refused(folder: Path, change):
    digest = adapters.adapter_digest(folder)
    adapters.check_digest(folder, digest)
    change(folder)
    with pytest.raises(ValueError, match=f"{folder}: was modified after it was trained; delete"):
        adapters.check_digest(folder, digest)


def test_message_names_the_trial_of_a_round(tmp_path: Path):
    folder = tmp_path / "trials" / "arm-s0" / "rounds" / "1" / "adapter"
    folder.mkdir(parents=True)
    with pytest.raises(ValueError, match=f"is missing; delete {tmp_path / 'trials' / 'arm-s0'} to train"):
        adapters.check_digest(folder, "0" * 20)
