"""Calls of the teacher: their prompts and sampling parameters."""

from pathlib import Path
from typing import Any

import numpy as np

from raykd.config.strategies import BUILT_IN
from raykd.teacher.client import TeacherCall
from raykd.teacher.completion_set import CompletionSet


def call(source: str, sample_index: int = 0, temperature: float = 0.7, **row: Any) -> TeacherCall:
    sampling = {"temperature": temperature, "max_tokens": 64, "top_p": 0.9, "seed": 5}
    content = {"source": source, "top_k": 3, "num_samples": 2, "sampling": sampling}
    completion_set = CompletionSet("teacher", BUILT_IN["teacher"], Path("completions"), content)
    tokens = {"prompt_token_ids": np.array([1, 2]), "given_token_ids": np.array([], int), "messages": ""}
    return TeacherCall(completion_set, sample_index, [tokens | row])


def test_samples_of_a_problem_have_different_seeds():
    seeds = [call("teacher", index).sampling_params["seed"] for index in range(3)]
    assert seeds == [5, 6, 7]
    assert call("teacher", 1, temperature=0.0).sampling_params["seed"] is None


def test_generation_requests_log_probabilities_of_answers():
    params = call("teacher").sampling_params
    assert (params["max_tokens"], params["top_p"], params["logprobs"]) == (64, 0.9, 3)
    assert "prompt_logprobs" not in params


def test_scoring_requests_log_probabilities_of_the_prompt():
    for source in ("reference", "student"):
        scoring = call(source, given_token_ids=np.array([3]))
        assert scoring.sampling_params == {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 3}
        assert scoring.prompts == [[1, 2, 3]]


def test_chat_messages_replace_tokens():
    assert call("teacher", messages='[{"role": "user", "content": "Hi"}]').prompts == [
        [{"role": "user", "content": "Hi"}]
    ]
