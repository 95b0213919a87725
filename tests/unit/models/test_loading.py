"""Loading models: remote code only by request, and never pickled weights."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import huggingface_hub
import pytest
import torch
from transformers import AutoModelForCausalLM

from raykd.config import experiment
from raykd.config.sections import Teacher
from raykd.config.training import Student
from raykd.models import loading, tokenization
from raykd.models.builtin import resolve_model

CODE = """
from pathlib import Path
from transformers import LlamaConfig
Path({proof!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = "own"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write a model with a custom configuration class."""
    path = tmp_path / "model"
    shutil.copytree(resolve_model("raykd/demo-student"), path)
    file = path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}))
    (path / "own.py").write_text(CODE.format(proof=str(tmp_path / "executed")))
    return path


def test_remote_code_is_not_run(folder: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"trust_remote_code beside the model's name"):
        loading.load_config(Teacher(model=str(folder)))
    assert not (tmp_path / "executed").exists()


def test_remote_code_runs_with_trust_remote_code(folder: Path, tmp_path: Path):
    found = loading.load_config(Student(model=str(folder), trust_remote_code=True))
    assert type(found).__name__ == "OwnConfig"
    assert (tmp_path / "executed").exists()


def test_trust_remote_code_in_engine_kwargs_is_refused():
    with pytest.raises(ValueError, match="set trust_remote_code beside the model's name"):
        experiment.Experiment.model_validate(
            {
                "name": "x",
                "teacher": {"model": "a", "engine": {"engine_kwargs": {"trust_remote_code": True}}},
                "student": {"model": "b"},
            }
        )


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "gemma2", "attn_logit_softcapping": 50.0}, "has soft-capped attention"),
        ({"model_type": "qwen3_next"}, "has linear_attention"),
        ({"model_type": "mistral", "sliding_window": 8}, None),
    ],
)
def test_models_that_would_mix_packed_rows_are_refused(tmp_path: Path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused = pytest.raises(ValueError, match=f"{words}.*train.packing=false") if words else nullcontext()
    with refused:
        loading.check_packing(Student(model=str(tmp_path)))


@pytest.mark.parametrize("model", ["/nowhere/at/all", "no-such-owner/no-such-model"])
def test_missing_model_is_reported_in_one_line(model: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match=f"model '{model}': not a local directory, and could not be loaded") as caught:
        loading.load_tokenizer(Teacher(model=model))
    assert "\n" not in str(caught.value)


def test_context_length_defaults_to_model():
    teacher = Teacher(model="raykd/demo-teacher")
    own = loading.load_config(teacher).max_position_embeddings
    assert [
        tokenization.context_length(teacher, engine_kwargs)
        for engine_kwargs in ({}, {"max_model_len": -1}, {"max_model_len": 99})
    ] == [
        own,
        own,
        99,
    ]


def test_pickled_weights_are_refused(tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(resolve_model("raykd/demo-student"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        loading.load_base_model(Student(model=str(folder)), torch.float32)


def test_hub_model_is_identified_by_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--somebody--small"
    (folder / "refs").mkdir(parents=True)
    for commit in ("a" * 40, "b" * 40):
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text(json.dumps({"model_type": "llama"}))
        (folder / "refs" / "main").write_text(commit)
        found = loading.identify_model(Student(model="somebody/small"))
        assert found == {"model": "somebody/small", "revision": commit}
    assert loading.identify_model(Student(model="somebody/small", revision="a" * 40))["revision"] == "a" * 40
