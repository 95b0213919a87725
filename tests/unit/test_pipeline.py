"""Pipeline: what does not go together is told before anything is started."""

from pathlib import Path
from typing import Any

import pytest

from raykd import pipeline
from raykd.config import Experiment
from raykd.demo import resolve_model


def prepare(tmp_path: Path, **tree: Any) -> pipeline.Plan:
    experiment: dict[str, Any] = {
        "name": "small",
        "storage": str(tmp_path),
        "problems": {"source": "demo", "num_train": 20, "num_test": 2},
        "teacher": {"model": "raykd/demo-teacher"},
        "student": {"model": "raykd/demo-student"},
    }
    return pipeline.prepare(Experiment.model_validate(experiment | tree), "raykd run small.yaml")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        (
            {"targets": {"sequence": "student", "rounds": 3}, "train": {"batch_size": 40, "epochs": 2}},
            ["rounds=3", "2 optimizer"],
        ),
        ({"teacher": {"model": "nowhere/at-all"}}, ["model 'nowhere/at-all'"]),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, tree: dict[str, Any], words: list[str]):
    with pytest.raises(ValueError) as caught:
        prepare(tmp_path, **tree)
    for word in words:
        assert word in str(caught.value)


def test_soft_targets_need_one_tokenizer(tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    for file in Path(resolve_model("raykd/demo-student")).iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    vocabulary = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(vocabulary.replace('"<|end|>"', '"<|over|>"'))
    settings = (other / "tokenizer_config.json").read_text()
    (other / "tokenizer_config.json").write_text(settings.replace("<|end|>", "<|over|>"))
    student = {"model": str(other)}
    with pytest.raises(ValueError, match=r"arm 'default': soft targets need one tokenizer.*targets\.kind=hard"):
        prepare(tmp_path, student=student, targets={"kind": "top_k"})
    assert not prepare(tmp_path, student=student, name="hard").same_tokens
