"""Completion sets and the prompts of the teacher: sharing between arms, scoring rows, and length checks."""

from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from raykd import identity
from raykd.config.engine import Engine
from raykd.config.experiment import Experiment
from raykd.config.sections import Teacher
from raykd.data import datasets
from raykd.models import loading
from raykd.storage import files, row_store, schemas
from raykd.teacher import build_prompts, completion_set, generate
from raykd.teacher.completion_set import CompletionSet
from raykd.training.examples import select_completions
from raykd.tuning import variants

TREE: dict[str, Any] = {
    "name": "small",
    "dataset": {"source": "demo", "num_train": 12, "num_test": 2},
    "teacher": {"model": "raykd/demo-teacher"},
    "student": {"model": "raykd/demo-student"},
    "arms": {
        "none": {},
        "soft": {"prompt.strategy": "teacher", "targets.kind": "top_k", "targets.top_k": 8},
        "hard": {"prompt.strategy": "teacher"},
        "scored": {"prompt.strategy": "teacher", "targets": {"source": "reference", "kind": "top_k"}},
        "own": {"prompt.strategy": "teacher", "targets": {"source": "student", "kind": "top_k"}},
        "own_hard": {"targets": {"source": "student"}},
        "warm_soft": {
            "prompt.strategy": "teacher",
            "targets": {"source": "student", "kind": "top_k", "warmup_rounds": 1},
        },
        "warm_hard": {"targets": {"source": "student", "warmup_rounds": 1}},
        "reference": {"targets": {"source": "reference"}},
    },
}


@pytest.fixture
def experiment() -> Experiment:
    return Experiment.model_validate(TREE)


@pytest.fixture
def folder(experiment: Experiment, tmp_path: Path) -> Path:
    return datasets.write_splits(experiment.dataset, tmp_path)


def completion_sets_of(experiment: Experiment, folder: Path, root: Path) -> dict[str, CompletionSet | None]:
    arms = variants.arms_by_config_id(variants.variants(experiment, {}))
    return completion_set.completion_sets_for(
        experiment, arms, files.read_json(folder / row_store.MANIFEST)["content"], root, {"model": "a", "revision": "1"}
    )


def test_arms_share_completion_sets(experiment: Experiment, folder: Path, tmp_path: Path):
    found = completion_sets_of(experiment, folder, tmp_path)
    assert (found["reference"], found["own_hard"]) == (None, None)
    sets = {name: one_set for name, one_set in found.items() if one_set}
    assert sets["hard"].folder == sets["soft"].folder, "arms without log-probabilities do not reuse the set"
    assert sets["hard"].top_k == 8
    assert len({one_set.folder for one_set in sets.values()}) == 4
    assert {name: one_set.source for name, one_set in sets.items()} == {
        "none": "teacher",
        "soft": "teacher",
        "hard": "teacher",
        "scored": "reference",
        "own": "student",
        "warm_soft": "student",
        "warm_soft/warmup": "reference",
    }
    assert found["warm_hard/warmup"] is None
    assert sets["warm_soft/warmup"].folder == sets["scored"].folder, "warm-up rounds do not reuse the set"
    # A single arm has only the log-probabilities that it needs, and the trial's identity does not change.
    alone = experiment.model_copy(update={"arms": {"hard": experiment.arms["hard"]}})
    one_set = completion_sets_of(alone, folder, tmp_path)["hard"]
    assert one_set is not None
    assert one_set.top_k == 0
    problems = files.read_json(folder / row_store.MANIFEST)["content"]
    trials = [
        identity.trial(experiment, experiment.arm(arm), 0, problems, each.content, {"model": "b"})
        for arm, each in (("hard", one_set), ("hard", sets["hard"]), ("soft", sets["soft"]))
    ]
    assert trials[0] == trials[1]
    assert trials[0]["completions"] != trials[2]["completions"]


def test_stored_set_serves_arms_that_need_less(experiment: Experiment, folder: Path, tmp_path: Path):
    wide = Experiment.model_validate({**TREE, "arms": {"soft": {**TREE["arms"]["soft"], "targets.top_k": 32}}})
    stored = completion_sets_of(wide, folder, tmp_path)["soft"]
    assert stored is not None
    row_store.write_manifest(stored.folder, {"content": stored.content}, [])
    found = completion_sets_of(experiment, folder, tmp_path)
    for arm in ("soft", "hard"):
        one_set = found[arm]
        assert one_set is not None
        assert one_set.folder == stored.folder
    # A damaged set is ignored.
    for text in ("{", "{}", '{"content": null}', '{"content": {"top_k": 64}}', '{"content": {"top_k": "many"}}'):
        (stored.folder / "manifest.json").write_text(text)
        one_set = completion_sets_of(experiment, folder, tmp_path)["soft"]
        assert one_set is not None
        assert one_set.top_k == 8


def test_test_split_size_changes_no_completion_set(experiment: Experiment, folder: Path, tmp_path: Path):
    def folders(**changed: int) -> dict[str, Path]:
        dataset = experiment.dataset.model_copy(update=changed)
        found = completion_sets_of(experiment, datasets.write_splits(dataset, tmp_path), tmp_path)
        return {name: one_set.folder for name, one_set in found.items() if one_set}

    assert folders(num_test=3) == folders()
    for changed in ({"num_train": 13}, {"num_validation": 2}, {"seed": 1}):
        assert not set(folders(**changed).values()) & set(folders().values())


def test_scored_reference_is_the_solution_with_end_token(experiment: Experiment, folder: Path, tmp_path: Path):
    tokenizer = loading.load_tokenizer(Teacher(model="raykd/demo-teacher"))
    problem = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()[0]
    found = completion_sets_of(experiment, folder, tmp_path)
    scored, written = (found[name] for name in ("scored", "soft"))
    assert scored is not None and written is not None
    row = build_prompts.question_row(tokenizer, problem, scored, "", 0)
    assert tokenizer.decode(row["given_token_ids"][:-1]) == row["given_text"] == problem["reference_solution"]
    assert row["given_token_ids"][-1] == tokenizer.eos_token_id
    again = build_prompts.question_row(tokenizer, problem, written, "", 0)
    assert (again["given_token_ids"], again["given_text"]) == ([], "")
    assert again["prompt_token_ids"] == row["prompt_token_ids"]
    assert again["completion_id"] != build_prompts.question_row(tokenizer, problem, written, "", 1)["completion_id"]


def teacher(max_model_len: int, max_error_rate: float = 0.01) -> Teacher:
    engine = Engine(engine_kwargs={"max_model_len": max_model_len})
    return Teacher(model="raykd/demo-teacher", engine=engine, max_error_rate=max_error_rate)


def test_too_long_prompts_are_counted_and_named(experiment: Experiment, folder: Path, tmp_path: Path):
    sets = [one_set for name in ("none", "soft") if (one_set := completion_sets_of(experiment, folder, tmp_path)[name])]
    tokenizer = loading.load_tokenizer(Teacher(model="raykd/demo-teacher"))
    rows = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()
    lengths = [
        [len(build_prompts.question_row(tokenizer, row, one_set, "", 0)["prompt_token_ids"]) for row in rows]
        for one_set in sets
    ]
    # Fits the longest question without a prime, but not all with one.
    limit = max(lengths[0]) + 100
    long = [row["problem_id"] for row, length in zip(rows, lengths[1], strict=True) if length + 100 > limit]
    assert long
    with pytest.raises(ValueError) as caught:
        build_prompts.check_teacher_lengths(sets, folder, teacher(limit), "", 100)
    for words in ("strategy 'teacher'", f"{len(long)} of 12 prompts", f"{limit} tokens", long[0], "max_model_len"):
        assert words in str(caught.value)
    build_prompts.check_teacher_lengths(sets, folder, teacher(limit, max_error_rate=1.0), "", 100)
    build_prompts.check_teacher_lengths(sets, folder, teacher(max(lengths[1]) + 100), "", 100)
    with pytest.raises(ValueError, match="strategy 'none'"):
        build_prompts.check_teacher_lengths(sets, folder, teacher(limit), "", limit)
    # To score a student's answer, the engine generates one more token.
    own = completion_sets_of(experiment, folder, tmp_path)["own"]
    assert own is not None
    build_prompts.check_teacher_lengths([own], folder, teacher(max(lengths[1]) + 101), "", 100)
    with pytest.raises(ValueError, match="strategy 'teacher'"):
        build_prompts.check_teacher_lengths([own], folder, teacher(max(lengths[1]) + 100), "", 100)


def test_empty_answers_are_kept_and_counted_as_dropped(experiment: Experiment, folder: Path, tmp_path: Path):
    one_set = completion_sets_of(experiment, folder, tmp_path)["own"]
    assert one_set is not None
    empty_row = {
        **dict.fromkeys(schemas.COMPLETION.names, ""),
        "sample_index": 0,
        "prompt_token_ids": [],
        "completion_token_ids": [],
        "is_correct": False,
        "topk_ids": [],
        "topk_logprobs": [],
    }
    answers = [
        {**empty_row, "completion_id": "a", "problem_id": "1", "error": "ValueError: too long"},
        {**empty_row, "completion_id": "b", "problem_id": "2"},
        {**empty_row, "completion_id": "c", "problem_id": "3", "completion_token_ids": [7]},
    ]
    written = tmp_path / "answers"
    row_store.write_part(written, pyarrow.Table.from_pylist(answers, schema=schemas.COMPLETION))
    assert generate._num_to_score(written) == 1
    for _ in range(2):  # the second call changes nothing
        assert generate._keep_empty_answers(written, one_set) == 2
    kept = row_store.read_rows(one_set.folder, schemas.COMPLETION).to_pylist()
    assert [(row["problem_id"], row["strategy"]) for row in kept] == [("1", "teacher"), ("2", "teacher")]
    assert row_store.num_failed(written, schemas.COMPLETION) == 1
    reasons = [select_completions([row], experiment.arm("own").targets)[1] for row in kept]
    assert reasons == [{"error": 1}, {"empty": 1}]


def test_arms_with_different_sampling_have_separate_sets(experiment: Experiment, folder: Path, tmp_path: Path):
    arms = {
        "greedy": {},
        "drawn": {"teacher.sampling": {"temperature": 0.7, "max_tokens": 64}, "teacher.num_samples": 3},
        # Greedy decoding ignores the seed.
        "seeded": {"teacher.sampling.seed": 5},
    }
    found = completion_sets_of(experiment.model_copy(update={"arms": arms}), folder, tmp_path)
    greedy, drawn, seeded = (found[name] for name in arms)
    assert greedy and drawn and seeded
    assert greedy.folder == seeded.folder != drawn.folder
    assert (greedy.sampling.temperature, greedy.sampling.max_tokens, greedy.num_samples) == (0.0, 512, 1)
    assert (drawn.sampling.temperature, drawn.sampling.max_tokens, drawn.num_samples) == (0.7, 64, 3)
