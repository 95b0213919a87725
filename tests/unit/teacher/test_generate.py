"""Generate: what the teacher is sent, and what does not fit."""

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
from raykd.teacher import completion_set, generate
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
        "begun": {
            "prompt.strategy": "teacher",
            "targets": {"source": "student", "kind": "top_k", "warmup_rounds": 1},
        },
        "begun_hard": {"targets": {"source": "student", "warmup_rounds": 1}},
        "reference": {"targets": {"source": "reference"}},
    },
}


@pytest.fixture
def experiment() -> Experiment:
    return Experiment.model_validate(TREE)


@pytest.fixture
def folder(experiment: Experiment, tmp_path: Path) -> Path:
    return datasets.write_splits(experiment.dataset, tmp_path)


def asked(experiment: Experiment, folder: Path, root: Path) -> dict[str, CompletionSet | None]:
    lessons = variants.arms_by_config_id(variants.variants(experiment, {}))
    return completion_set.completion_sets_for(
        experiment, lessons, files.read_json(folder / row_store.MANIFEST), root, {"model": "a", "revision": "1"}
    )


def test_each_arm_asks_what_it_needs_and_none_asks_twice(experiment: Experiment, folder: Path, tmp_path: Path):
    found = asked(experiment, folder, tmp_path)
    assert (found["reference"], found["own_hard"]) == (None, None)
    requests = {name: request for name, request in found.items() if request}
    assert requests["hard"].folder == requests["soft"].folder, "what has log-probabilities has the tokens too"
    assert requests["hard"].top_k == 8
    assert len({request.folder for request in requests.values()}) == 4
    assert {name: request.source for name, request in requests.items()} == {
        "none": "teacher",
        "soft": "teacher",
        "hard": "teacher",
        "scored": "reference",
        "own": "student",
        "begun": "student",
        "begun/warmup": "reference",
    }
    assert found["begun_hard/warmup"] is None
    assert requests["begun/warmup"].folder == requests["scored"].folder, "what a student begins with is not asked twice"
    # Alone, an arm asks for no more than it needs; it is the same trial all the same.
    alone = experiment.model_copy(update={"arms": {"hard": experiment.arms["hard"]}})
    request = asked(alone, folder, tmp_path)["hard"]
    assert request is not None
    assert request.top_k == 0
    of_problems = files.read_json(folder / row_store.MANIFEST)["content"]
    trials = [
        identity.trial(experiment, experiment.arm(arm), 0, of_problems, each.content, {"model": "b"})
        for arm, each in (("hard", request), ("hard", requests["hard"]), ("soft", requests["soft"]))
    ]
    assert trials[0] == trials[1]
    assert trials[0]["completions"] != trials[2]["completions"]


def test_what_an_earlier_run_asked_serves_whoever_needs_no_more(experiment: Experiment, folder: Path, tmp_path: Path):
    wide = Experiment.model_validate({**TREE, "arms": {"soft": {**TREE["arms"]["soft"], "targets.top_k": 32}}})
    stored = asked(wide, folder, tmp_path)["soft"]
    assert stored is not None
    row_store.write_manifest(stored.folder, {"content": stored.content}, [])
    found = asked(experiment, folder, tmp_path)
    for arm in ("soft", "hard"):
        request = found[arm]
        assert request is not None
        assert request.folder == stored.folder
    # A set that was damaged is nobody's, and stops nobody.
    (stored.folder / "manifest.json").write_text("{")
    request = asked(experiment, folder, tmp_path)["soft"]
    assert request is not None
    assert request.top_k == 8


def test_what_students_are_tested_by_changes_nothing_of_what_is_asked(
    experiment: Experiment, folder: Path, tmp_path: Path
):
    def folders(**changed: int) -> dict[str, Path]:
        told = experiment.dataset.model_copy(update=changed)
        found = asked(experiment, datasets.write_splits(told, tmp_path), tmp_path)
        return {name: request.folder for name, request in found.items() if request}

    assert folders(num_test=3) == folders()
    for changed in ({"num_train": 13}, {"num_validation": 2}, {"seed": 1}):
        assert not set(folders(**changed).values()) & set(folders().values())


def test_what_is_scored_is_the_solution_and_its_end(experiment: Experiment, folder: Path, tmp_path: Path):
    tokenizer = loading.load_tokenizer(Teacher(model="raykd/demo-teacher"))
    problem = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()[0]
    found = asked(experiment, folder, tmp_path)
    scored, written = (found[name] for name in ("scored", "soft"))
    assert scored is not None and written is not None
    row = generate.question_row(tokenizer, problem, scored, "", 0)
    assert tokenizer.decode(row["given_token_ids"][:-1]) == row["given_text"] == problem["reference_solution"]
    assert row["given_token_ids"][-1] == tokenizer.eos_token_id
    again = generate.question_row(tokenizer, problem, written, "", 0)
    assert (again["given_token_ids"], again["given_text"]) == ([], "")
    assert again["prompt_token_ids"] == row["prompt_token_ids"]
    assert again["completion_id"] != generate.question_row(tokenizer, problem, written, "", 1)["completion_id"]


def teacher(max_model_len: int, max_error_rate: float = 0.01) -> Teacher:
    engine = Engine(engine_kwargs={"max_model_len": max_model_len})
    return Teacher(model="raykd/demo-teacher", engine=engine, max_error_rate=max_error_rate)


def test_prompts_that_leave_no_room_are_counted_and_named(experiment: Experiment, folder: Path, tmp_path: Path):
    wanted = [request for name in ("none", "soft") if (request := asked(experiment, folder, tmp_path)[name])]
    tokenizer = loading.load_tokenizer(Teacher(model="raykd/demo-teacher"))
    rows = pyarrow.parquet.read_table(folder / "train.parquet").to_pylist()
    lengths = [
        [len(generate.question_row(tokenizer, row, request, "", 0)["prompt_token_ids"]) for row in rows]
        for request in wanted
    ]
    # Room for the longest bare question, and not for all of the primed ones.
    limit = max(lengths[0]) + 100
    long = [row["problem_id"] for row, length in zip(rows, lengths[1], strict=True) if length + 100 > limit]
    assert long
    with pytest.raises(ValueError) as caught:
        generate.check_teacher_lengths(wanted, folder, teacher(limit), "", 100)
    for words in ("strategy 'teacher'", f"{len(long)} of 12 prompts", f"{limit} tokens", long[0], "max_model_len"):
        assert words in str(caught.value)
    generate.check_teacher_lengths(wanted, folder, teacher(limit, max_error_rate=1.0), "", 100)
    generate.check_teacher_lengths(wanted, folder, teacher(max(lengths[1]) + 100), "", 100)
    with pytest.raises(ValueError, match="strategy 'none'"):
        generate.check_teacher_lengths(wanted, folder, teacher(limit), "", limit)
    # What a student wrote is scored with a token of the engine's own behind it.
    own = asked(experiment, folder, tmp_path)["own"]
    assert own is not None
    generate.check_teacher_lengths([own], folder, teacher(max(lengths[1]) + 101), "", 100)
    with pytest.raises(ValueError, match="strategy 'teacher'"):
        generate.check_teacher_lengths([own], folder, teacher(max(lengths[1]) + 100), "", 100)


def test_answers_without_a_token_are_kept_and_counted_when_rows_are_chosen(
    experiment: Experiment, folder: Path, tmp_path: Path
):
    request = asked(experiment, folder, tmp_path)["own"]
    assert request is not None
    nothing = {
        **dict.fromkeys(schemas.COMPLETION.names, ""),
        "sample_index": 0,
        "prompt_token_ids": [],
        "completion_token_ids": [],
        "is_correct": False,
        "topk_ids": [],
        "topk_logprobs": [],
    }
    answers = [
        {**nothing, "completion_id": "a", "problem_id": "1", "error": "ValueError: too long"},
        {**nothing, "completion_id": "b", "problem_id": "2"},
        {**nothing, "completion_id": "c", "problem_id": "3", "completion_token_ids": [7]},
    ]
    written = tmp_path / "answers"
    row_store.write_part(written, pyarrow.Table.from_pylist(answers, schema=schemas.COMPLETION))
    assert generate._num_to_score(written) == 1
    for _ in range(2):  # the second time changes nothing
        assert generate._keep_empty_answers(written, request) == 2
    kept = row_store.read_rows(request.folder, schemas.COMPLETION).to_pylist()
    assert [(row["problem_id"], row["strategy"]) for row in kept] == [("1", "teacher"), ("2", "teacher")]
    assert row_store.num_failed(written, schemas.COMPLETION) == 1
    reasons = [select_completions([row], experiment.arm("own").targets)[1] for row in kept]
    assert reasons == [{"error": 1}, {"empty": 1}]


def test_arms_may_be_answered_in_different_ways(experiment: Experiment, folder: Path, tmp_path: Path):
    arms = {
        "greedy": {},
        "drawn": {"teacher.sampling": {"temperature": 0.7, "max_tokens": 64}, "teacher.num_samples": 3},
        # Chance has no part in greedy answers.
        "seeded": {"teacher.sampling.seed": 5},
    }
    found = asked(experiment.model_copy(update={"arms": arms}), folder, tmp_path)
    greedy, drawn, seeded = (found[name] for name in arms)
    assert greedy and drawn and seeded
    assert greedy.folder == seeded.folder != drawn.folder
    assert (greedy.sampling.temperature, greedy.sampling.max_tokens, greedy.samples) == (0.0, 512, 1)
    assert (drawn.sampling.temperature, drawn.sampling.max_tokens, drawn.samples) == (0.7, 64, 3)
