"""Identity: the fields that change each key, and golden keys."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import create_model

from raykd import identity
from raykd.config.base import ConfigModel, is_runtime_only
from raykd.config.experiment import ARM_SECTIONS, Arm, Experiment, affects_teacher
from raykd.config.overrides import set_path
from raykd.config.parsing import parse_yaml
from raykd.config.sections import Dataset
from raykd.storage import hashing

TREE: dict[str, Any] = {
    "name": "small",
    "dataset": {"num_train": 12, "num_validation": 3, "num_test": 2},
    "teacher": {"model": "a", "engine": {"engine_kwargs": {"dtype": "float32"}}, "sampling": {"temperature": 0.5}},
    "student": {"model": "b"},
    "evaluate": {"sampling": {"temperature": 0.5}},
    "sweep": {"scheduler": "none", "space": {"train.weight_decay": {"choice": [0.0, 0.1]}}},
    "arms": {
        "hard": {"prompt.strategy": "teacher"},
        "soft": {"prompt.strategy": "gold_hint", "targets.kind": "top_k"},
        "own": {"targets": {"source": "student", "kind": "top_k"}},
        "reference": {"targets.source": "reference"},
    },
}
TEACHER, STUDENT = {"model": "a", "revision": "1"}, {"model": "b", "revision": "2"}
STATISTICS = ("entropy", "first")


def keys(experiment: Experiment, arms: dict[str, Arm]) -> dict[str, str]:
    """Return all keys of an experiment with the given arms."""
    problems = identity.problem_set(experiment.dataset)
    found = {
        "problems": problems,
        "predictions": identity.evaluation_settings(experiment.evaluate),
    }
    if experiment.sweep:
        found["search"] = identity.search_settings(experiment.sweep)
    if experiment.attention:
        dtype = experiment.attention.dtype or experiment.train.dtype
        found["attention"] = identity.attention_settings(experiment.attention, dtype, STATISTICS)
    for name, arm in arms.items():
        completions = identity.completion_set(experiment, arm, problems, TEACHER) if arm.needs_teacher else None
        if completions:
            found[f"completions {name}"] = completions
        found[f"trial {name}"] = identity.trial(experiment, arm, 0, problems, completions, STUDENT)
    return {name: hashing.content_key(content) for name, content in found.items()}


def keys_of(**sections: Any) -> dict[str, str]:
    experiment = Experiment.model_validate(TREE | sections)
    return keys(experiment, {name: experiment.arm(name) for name in experiment.arms})


def leaves(section: ConfigModel, path: str = "") -> Iterator[tuple[str, Any]]:
    """Return the path and annotation of each field that is not a section."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, ConfigModel):
            yield from leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", field.annotation


def other(annotation: Any, value: Any) -> Any:
    """Return another value for a field, which may be invalid."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    kind = next(each for each in kinds if each is not NoneType)
    if get_origin(kind) is Literal:
        return [each for each in get_args(kind) if each != value][-1]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, tuple):
        return (*value, "more")
    if isinstance(value, dict):
        return {**value, "more": 1}
    return f"{value}-other" if isinstance(value, str) else {int: 7, float: 7.0, str: "other"}.get(kind, ("other",))


def changed(section: Any, path: str, value: Any) -> Any:
    """Return a copy with another value, without validation."""
    name, _, rest = path.partition(".")
    return section.model_copy(update={name: changed(getattr(section, name), rest, value) if rest else value})


def is_marked(path: str) -> bool:
    """Return whether a field or one of its sections is runtime-only."""
    section: Any = Experiment.model_validate(TREE | {"teacher": {"model": "a", "endpoint": {"url": "http://host/v1"}}})
    for name in path.split("."):
        if is_runtime_only(type(section), name):
            return True
        section = getattr(section, name)
    return False


# Fields in no key: names, the numbers of arms, seeds and points, fields that are identified by content, and fields that
# this experiment does not use.
UNKEYED_FIELDS = {"name", "arms", "seeds", "prompt.strategies", "teacher.model", "teacher.revision"}
UNKEYED_FIELDS |= {"sweep.num_samples", "sweep.test_top_n", "dataset.revision"}
BASE = Experiment.model_validate(TREE)
ARMS = {name: BASE.arm(name) for name in BASE.arms}
FIELDS = {path: annotation for path, annotation in leaves(BASE) if path != "teacher.endpoint"}


BEFORE = keys(BASE, ARMS)


@functools.cache
def keys_changed_by(path: str) -> frozenset[str]:
    """Return the keys that change in any arm if a field has another value."""
    found: set[str] = set()
    for name, arm in ARMS.items():
        is_of_arms = path.split(".")[0] in Arm.model_fields
        value: Any = arm if is_of_arms else BASE
        for each in path.split("."):
            value = getattr(value, each)
        value = "confidence" if path == "prompt.strategy" else other(FIELDS[path], value)
        experiment = changed(BASE, path, value)
        after = keys(experiment, {name: changed(arm, path, value) if is_of_arms else arm})
        found |= {key for key in after if after[key] != BEFORE.get(key)}
    return frozenset(found)


@pytest.mark.parametrize("path", sorted(FIELDS))
def test_field_changes_a_key_unless_runtime_only(path: str):
    found = keys_changed_by(path)
    assert bool(found) == (not is_marked(path) and path not in UNKEYED_FIELDS), found


@pytest.mark.parametrize(
    ("path", "kinds"),
    [
        ("dataset.num_train", {"problems", "completions", "trial"}),
        ("dataset.num_test", {"problems"}),
        ("dataset.seed", {"problems", "completions", "trial"}),
        ("teacher.sampling.seed", {"completions", "trial"}),
        ("prompt.instruction", {"completions", "trial"}),
        ("targets.top_k", {"completions", "trial"}),
        ("targets.filter", {"trial"}),
        ("loss.temperature", {"trial"}),
        ("train.learning_rate", {"trial"}),
        ("evaluate.num_samples", {"predictions"}),
        ("evaluate.sampling.max_tokens", {"predictions", "trial"}),
        ("attention.num_problems", {"attention"}),
        ("sweep.seed", {"search"}),
    ],
)
def test_field_changes_only_the_keys_it_affects(path: str, kinds: set[str]):
    assert {key.split()[0] for key in keys_changed_by(path)} == kinds


@pytest.mark.parametrize(
    "path", [path for path in FIELDS if any(f"{path}.".startswith(f"{each}.") for each in ARM_SECTIONS)]
)
def test_affects_teacher_agrees_with_completion_keys(path: str):
    changes_completions = any(key.startswith("completions") for key in keys_changed_by(path))
    assert changes_completions == affects_teacher(path)


GOLDEN = {
    "problems": "afc7b82ba88f0450daee",
    "predictions": "21bc188b640501651143",
    "search": "8409f57e2c0d6290d0fa",
    "attention": "ed1f6ab5a5c369d9fc19",
    "completions hard": "3df377c1258f5497caf0",
    "trial hard": "e6e21d643fccacfaae03",
    "completions soft": "8fb7132c6c06fd524a7f",
    "trial soft": "f2381ec5411cbf5ff3df",
    "completions own": "a8feabaaecc2c9e9b094",
    "trial own": "5d8b91a2cedca26fc21d",
    "trial reference": "3115400a582582c38bfb",
    "completions hard, endpoint": "0e7e15fc7373ff3cf97b",
    "completions soft, endpoint": "1e5e8ded3e1a3fe07076",
    "completions own, endpoint": "b8382c10756a8a339056",
}


def test_golden_keys():
    """A changed key discards every earlier result of its kind: raise the version of its kind and say why."""
    found = keys_of()
    found |= {f"{name}, endpoint": key for name, key in keys_of(teacher=ENDPOINT).items() if "completions" in name}
    assert found == GOLDEN


ENDPOINT = {"model": "a", "endpoint": {"url": "http://host/v1"}, "sampling": {"temperature": 0.5}}


def with_new_field(section: Any) -> Any:
    """Return a section whose classes have one more field, at every level."""
    made = create_model(f"New{type(section).__name__}", __base__=type(section), new_field=(bool, False))
    values = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        values[name] = with_new_field(value) if isinstance(value, ConfigModel) else value
    return made.model_construct(**values, new_field=False)


def test_new_field_at_its_default_changes_no_key():
    new, arms = with_new_field(BASE), {name: with_new_field(arm) for name, arm in ARMS.items()}
    assert "new_field" in type(new.train).model_fields and new.teacher.sampling.new_field is False
    assert keys(new, arms) == keys(BASE, ARMS)
    for path in ("train", "student.lora", "loss", "targets.rollout"):
        after = keys(new, {"own": changed(arms["own"], f"{path}.new_field", True)})
        assert after["trial own"] != keys(BASE, ARMS)["trial own"], path


def test_every_vllm_argument_is_classified():
    """After an upgrade of vLLM, decide for each new argument whether it affects answers."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    assert not identity.RUNTIME_ARGUMENTS & identity.ANSWER_ARGUMENTS
    assert known == identity.RUNTIME_ARGUMENTS | identity.ANSWER_ARGUMENTS


def test_runtime_arguments_are_omitted():
    runtime = {"load_format": "runai_streamer", "model_loader_extra_config": {"concurrency": 16}, "enforce_eager": True}
    runtime |= {"compilation_config": {"level": 3}, "max_num_seqs": 8, "enable_sleep_mode": True, "block_size": 32}
    affecting = {"dtype": "float32", "max_model_len": 64, "hf_overrides": {"rope_theta": 1.0}, "not_known_yet": 1}
    assert identity.engine_arguments(runtime | affecting) == affecting
    for load_format in ("dummy", "bitsandbytes"):
        assert identity.engine_arguments({"load_format": load_format}) == {"load_format": load_format}


def test_problem_set_key_follows_file_content(tmp_path: Path):
    file, same = tmp_path / "problems.jsonl", tmp_path / "same.jsonl"
    for each in (file, same):
        each.write_text('{"question": "1 + 1?", "answer": "#### 2"}')
    dataset = Dataset(source="jsonl", train_file=str(file), test_file=str(file), seed=3)
    first = identity.problem_set(dataset)
    assert str(tmp_path) not in str(first)
    assert first["train_file"] == hashing.fingerprint(file) == first["test_file"]
    assert "seed" not in first, "the seed of unused generated problems is in the key"
    assert set(first) - set(identity.train_problems(first)) == {"test_file"}
    file.write_text('{"question": "1 + 2?", "answer": "#### 3"}')
    assert identity.problem_set(dataset) != first


def test_unused_fields_are_in_no_key():
    greedy = {"model": "a", "sampling": {"temperature": 0}}
    assert keys_of(teacher=greedy) == keys_of(teacher={"model": "a", "sampling": {"seed": 7, "top_p": 0.5}})
    explicit = {name: key for name, key in keys_of(loss={"divergence": "forward_kl"}).items() if name != "trial own"}
    assert explicit.items() < keys_of().items(), "an explicit default changes a key"


def load(*overrides: str) -> Experiment:
    tree: dict[str, Any] = {"name": "small", "teacher": {"model": "a"}, "student": {"model": "b"}}
    for override in overrides:
        path, _, value = override.partition("=")
        set_path(tree, path, parse_yaml(value))
    return Experiment.model_validate(tree)


def test_experiment_fields_are_those_that_affect_results():
    base = identity.experiment_fields(load())
    same = ["teacher.concurrency=9", "train.max_failures=9", "arms={other: {}}", "seeds=[5]", "storage=other"]
    same += ["train.min_workers=1", "train.micro_batch_size=1", "train.gradient_checkpointing=true"]
    assert identity.experiment_fields(load(*same)) == base
    engine_fields = ["teacher.engine.tensor_parallel_size=8", "teacher.engine.engine_kwargs={max_num_seqs: 8}"]
    assert identity.experiment_fields(load(*engine_fields)) == base
    evaluation_fields = ("evaluate.protocol=zero_shot_raw", "evaluate.sampling.max_tokens=9", "evaluate.stop=[x]")
    evaluation_fields += ("evaluate.engine.engine_kwargs={dtype: float32}",)
    assert identity.experiment_fields(load(*evaluation_fields)) == base
    changed = identity.experiment_fields(load("train.learning_rate=0.5"))
    assert {key for key in changed if changed[key] != base[key]} == {"train.learning_rate"}


def test_evaluation_engine_affects_on_policy_arms():
    own = "arms={own: {targets: {source: student}}}"
    other = identity.experiment_fields(load(own, "evaluate.engine.engine_kwargs={dtype: float32, max_num_seqs: 8}"))
    base = identity.experiment_fields(load(own, "evaluate.engine.engine_kwargs={max_num_seqs: 4}"))
    assert {key for key in other if other[key] != base[key]} == {"evaluate.engine.engine_kwargs"}
    engine = {"engine": {"engine_kwargs": {"dtype": "float32"}}, "sampling": {"temperature": 0.5}}
    before, after = keys_of(), keys_of(evaluate=engine)
    assert {name for name in before if before[name] != after[name]} == {"predictions", "trial own"}


def test_answer_length_affects_an_accuracy_search():
    few = "dataset={num_train: 9, num_validation: 5, num_test: 5}"
    search = (few, "sweep.space={train.learning_rate: {choice: [0.1, 0.2]}}")
    by_accuracy, longer = (load(*search, f"evaluate.sampling.max_tokens={n}") for n in (9, 10))
    assert identity.experiment_fields(by_accuracy) != identity.experiment_fields(longer)
    by_loss, longer = (load(*search, "sweep.metric=loss", f"evaluate.sampling.max_tokens={n}") for n in (9, 10))
    assert identity.experiment_fields(by_loss) == identity.experiment_fields(longer)


def test_endpoint_is_known_by_its_url_or_by_the_name_given():
    def key(**endpoint: str) -> str:
        return keys_of(teacher=ENDPOINT | {"endpoint": {"url": "http://host/v1", **endpoint}})["completions hard"]

    assert key() != key(url="http://other/v1")
    assert key() != key(identity="mine")
    assert key(identity="mine") != key(identity="other")
    assert key(identity="mine") == key(identity="mine", url="http://other/v1")
