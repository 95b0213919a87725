"""Models: code of their own is run only where that is asked for by name, and weights are never pickles."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from raykd import config, models, student
from raykd.demo import resolve_model
from raykd.sections import Student, Teacher

CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({proof!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose configuration is made by code that comes with it."""
    made = tmp_path / "model"
    shutil.copytree(resolve_model("raykd/demo-student"), made)
    file = made / "config.json"
    told = json.loads(file.read_text())
    file.write_text(json.dumps(told | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (made / "own.py").write_text(CODE.format(proof=str(tmp_path / "was run")))
    return made


def test_code_that_comes_with_a_model_is_not_run(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"trust_remote_code beside the model's name"):
        models.load_config(Teacher(model=str(folder)))
    assert not (tmp_path / "was run").exists()


def test_unless_asked_for_by_name(folder: Path, tmp_path: Path):
    found = models.load_config(Student(model=str(folder), trust_remote_code=True))
    assert type(found).__name__ == "OwnConfig"
    assert (tmp_path / "was run").exists()


def test_an_engines_arguments_are_no_way_around_it():
    with pytest.raises(ValueError, match="set beside the model's name"):
        config.Experiment.model_validate(
            {
                "name": "x",
                "teacher": {"model": "a", "engine": {"engine_kwargs": {"trust_remote_code": True}}},
                "student": {"model": "b"},
            }
        )


def test_weights_in_a_pickle_are_refused(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("raykd/demo-student"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        student.load_base(Student(model=str(folder)), torch.float32)
