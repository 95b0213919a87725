"""Bad input gives a result or a UserError that names its source, and no other exception.

`RAYKD_CASES` sets the number of cases of each test.
"""

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raykd.config.loading import dump_experiment, load_experiment
from raykd.config.sections import Dataset
from raykd.data import datasets, grading
from raykd.display import display
from raykd.errors import UserError
from raykd.evaluation import attention_spans
from raykd.models import adapters
from raykd.report import build, compare_runs
from raykd.storage import files, row_store, schemas

ROOT = Path(__file__).parents[2]
CASES = int(os.environ.get("RAYKD_CASES", "60"))
many_cases = settings(
    max_examples=CASES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
# Values of YAML and JSON files, and likely typing errors.
words = st.sampled_from(["", "~", "none", "ground_truth", "student", "top_k", "auto", "1e-3", "../up", "a/b", "null"])
numbers = st.integers(-3, 10**20) | st.floats() | st.booleans()
scalars = st.none() | numbers | words | st.text(max_size=12)
keys = (
    words
    | st.sampled_from(["name", "arms", "sweep", "space", "teacher", "prompt.strategy", "grid"])
    | st.text(max_size=6)
)
trees = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys | st.integers(-1, 3), inner, max_size=3),
    max_leaves=8,
)
CONFIGURATIONS = sorted(ROOT.glob("configs/**/*.yaml"))


def check_loading(file: Path, *overrides: str) -> None:
    """Load an experiment; an error must be one line that names the file or the argument."""
    try:
        experiment = load_experiment(file, overrides)
    except UserError as error:
        assert str(file) in str(error) or "override" in str(error), error
        assert "\n" not in str(error), error
        assert type(error) is UserError, type(error)
        return
    # A loaded experiment can be dumped and loaded again.
    again = file.with_suffix(".again")
    again.write_text(dump_experiment(experiment), encoding="utf-8")
    # In arguments for a library, keys that are numbers become strings.
    assert dump_experiment(load_experiment(again)) == dump_experiment(experiment)


def value_paths(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found += value_paths(value, (*path, key))
    return found


@many_cases
@given(tree=trees)
def test_arbitrary_yaml_loads_or_raises_user_error(tmp_path: Path, tree: Any):
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    check_loading(file)


@many_cases
@given(data=st.data(), file=st.sampled_from(CONFIGURATIONS))
def test_arbitrary_config_values_load_or_raise_user_error(tmp_path: Path, data: st.DataObject, file: Path):
    tree = yaml.safe_load(file.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = data.draw(st.sampled_from(value_paths(tree)))
        at = tree
        for key in parents:
            at = at[key]
        at[last] = copy.deepcopy(data.draw(trees))
    changed = tmp_path / "experiment.yaml"
    changed.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    check_loading(changed)


@many_cases
@given(content=st.binary(max_size=60))
def test_arbitrary_bytes_as_yaml_load_or_raise_user_error(tmp_path: Path, content: bytes):
    file = tmp_path / "experiment.yaml"
    file.write_bytes(content)
    check_loading(file)


@many_cases
@given(typed=st.lists(st.text(max_size=20) | st.builds("{}={}".format, keys, st.text(max_size=12)), max_size=3))
def test_arbitrary_overrides_load_or_raise_user_error(tmp_path: Path, typed: list[str]):
    file = tmp_path / "experiment.yaml"
    file.write_text((ROOT / "configs/quickstart.yaml").read_text())
    check_loading(file, *typed)


lines = st.binary(max_size=40) | st.builds(
    lambda tree: json.dumps(tree).encode(),
    st.dictionaries(st.sampled_from(["question", "answer", "x"]), scalars | st.just("so\n#### 1,234"), max_size=3)
    | trees,
)


@many_cases
@given(content=st.lists(lines, max_size=4))
def test_arbitrary_json_lines_give_problems_or_user_error(tmp_path: Path, content: list[bytes]):
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\n".join(content))
    try:
        dataset = Dataset(source="jsonl", train_file=str(file), test_file=str(file))
        rows = datasets.read_split(dataset, tmp_path, "train")
    except UserError as error:
        # A file without a problem has no line to name.
        assert str(file) in str(error) or "dataset.num_" in str(error), error
        assert type(error) is UserError, type(error)
        return
    assert rows and all(row["question"] and row["reference_answer"] for row in rows)


texts = st.text(max_size=200) | st.lists(
    st.sampled_from(
        ["#### ", "18", "-", "$", ",", ".", "= ", "<<", ">>", "\n", "\\boxed{", "answer is ", "x", "½", "٣"]
    ),
    max_size=60,
).map("".join)


@many_cases
@given(text=texts, reference=texts)
def test_arbitrary_completion_is_graded_without_exception(text: str, reference: str):
    for found in (grading.strict_match(text), grading.flexible_extract(text)):
        assert found is None or any(character.isdigit() for character in found)
        assert grading.is_correct(found, reference) in (True, False)
    assert grading.states_answer_first(text) in (True, False)
    assert 0 <= grading.repeated_share(text) < 1
    for start, end in attention_spans.number_spans(text):
        assert any(character.isdigit() for character in text[start:end])
    offsets = [(at, at + 1) for at in range(len(text))]
    for at, seen in enumerate(attention_spans.previous_results(text, offsets)):
        assert all(0 <= each < at for each in seen)
    assert display(text).isprintable()
    shown = build.escape_markdown(text)
    assert "<" not in shown and "\n" not in shown
    try:
        assert grading.reference_answer(text)
    except UserError as error:
        assert "####" in str(error)


manifests = trees | st.fixed_dictionaries({"rows": scalars, "parts": trees})


@many_cases
@given(content=st.binary(max_size=80) | manifests.map(lambda tree: json.dumps(tree).encode()))
def test_arbitrary_manifest_or_rows_raise_only_user_error(tmp_path: Path, content: bytes):
    (tmp_path / row_store.MANIFEST).write_bytes(content)
    for part in tmp_path.glob("part-*"):
        part.unlink()
    (tmp_path / "part-0.parquet").write_bytes(content)
    for read in (
        lambda: row_store.read_manifest(tmp_path),
        lambda: row_store.read_rows(tmp_path, schemas.PREDICTION),
        lambda: files.read_json_lines(tmp_path / row_store.MANIFEST),
    ):
        try:
            read()
        except UserError as error:
            assert str(tmp_path) in str(error) and type(error) is UserError, repr(error)


def tensor_file(names: list[str], shapes: list[tuple[int, ...]], fill: float) -> bytes:
    return safetensors.numpy.save({n: np.full(s, fill, np.float32) for n, s in zip(names, shapes, strict=False)})


tensors = st.builds(
    tensor_file,
    st.lists(st.sampled_from(["x.lora_A.weight", "x.lora_B.weight", "y.lora_A.weight", "z"]), unique=True, max_size=4),
    st.lists(st.sampled_from([(2, 3), (3, 2), (2, 2), (2,), (), (0, 2)]), min_size=4, max_size=4),
    st.sampled_from([0.0, 1.0, float("nan"), float("inf")]),
)
config_keys = st.sampled_from(["peft_type", "r", "auto_mapping", "megatron_config"])
configs = trees | st.dictionaries(config_keys, scalars | st.sampled_from(["LORA", 2]), max_size=4)


@many_cases
@given(
    config=st.binary(max_size=40) | configs.map(lambda tree: json.dumps(tree).encode()),
    weights=st.binary(max_size=80) | tensors | tensors.map(lambda content: content[:-3]),
    more=st.sampled_from(["", "adapter_model.bin", "own.py"]),
)
def test_arbitrary_adapter_passes_or_raises_user_error(tmp_path: Path, config: bytes, weights: bytes, more: str):
    folder = tmp_path / "trial" / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / adapters.CONFIG_FILE).write_bytes(config)
    (folder / adapters.WEIGHTS_FILE).write_bytes(weights)
    if more:
        (folder / more).touch()
    try:
        adapters.check_adapter(folder, 2)
    except UserError as error:
        assert str(folder) in str(error) and "delete" in str(error) and type(error) is UserError, repr(error)
        return
    assert not more and json.loads(config)["r"] == 2
    loaded = safetensors.numpy.load(weights)
    assert loaded and all(np.isfinite(value).all() for value in loaded.values())


@many_cases
@given(text=st.text(max_size=30) | st.builds("{}:{}:{}".format, words, words, words | st.integers(-5, 5)))
def test_arbitrary_student_name_parses_or_raises_user_error(text: str):
    try:
        folder, arm, seed = compare_runs.parse_student(text)
    except UserError as error:
        assert "FOLDER:ARM:SEED" in str(error)
        return
    path, *more = text.split(":")
    assert folder == Path(path)
    assert [arm or "", str(seed)][: len(more)] == [*more[:1], *(str(int(each)) for each in more[1:])]


def test_deep_nesting_is_refused(tmp_path: Path):
    file = tmp_path / "experiment.yaml"
    for text in ("[" * 5000, "a: &a [*a]", "a: &a {b: *a}", "{" * 3000 + "}" * 3000):
        file.write_text(text)
        with pytest.raises(UserError, match=r"experiment\.yaml"):
            load_experiment(file)
