"""Schemas: the Arrow schema of each kind of row, column by column, and the values of a trial's status.

The layout of the folders that hold the rows is in `raykd.storage.paths`.
"""

import pyarrow as pa

# The status of a trial in trial.json. Only a complete trial has an adapter.
COMPLETE, STOPPED, FAILED = "complete", "stopped", "failed"

PROBLEM = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("reference_solution", pa.string(), nullable=False),
        # The number after `####`, without thousands commas.
        pa.field("reference_answer", pa.string(), nullable=False),
        # The reference answer of another problem of the same split, for the shuffled hint.
        pa.field("other_answer", pa.string(), nullable=False),
    ]
)

COMPLETION = pa.schema(
    [
        pa.field("completion_id", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("strategy", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        # Ends with the end-of-turn token if the teacher stopped by itself (finish_reason "stop"). Empty, like
        # prompt_token_ids, for a server that returns text only (`teacher.endpoint.api: chat`).
        pa.field("completion_token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("answer_strict", pa.string()),
        pa.field("answer_flexible", pa.string()),
        # Whether the strict answer equals the reference answer.
        pa.field("is_correct", pa.bool_(), nullable=False),
        # The teacher's k most probable tokens at each completion token; empty for hard targets.
        pa.field("topk_ids", pa.list_(pa.list_(pa.int32())), nullable=False),
        pa.field("topk_logprobs", pa.list_(pa.list_(pa.float32())), nullable=False),
        # Why there is no completion; empty if there is one.
        pa.field("error", pa.string(), nullable=False),
    ]
)

PREDICTION = pa.schema(
    [
        pa.field("prediction_id", pa.string(), nullable=False),
        pa.field("trial_id", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        # Digest of the adapter that gave the row; empty for the base student.
        pa.field("adapter_digest", pa.string(), nullable=False),
        # The prompt format (`raykd.data.prompts`).
        pa.field("protocol", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("question", pa.string(), nullable=False),
        pa.field("reference_answer", pa.string(), nullable=False),
        pa.field("completion", pa.string(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        # "stop" if the student ended its turn, "length" if the token limit truncated the answer.
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("answer_strict", pa.string()),
        pa.field("answer_flexible", pa.string()),
        pa.field("is_correct_strict", pa.bool_(), nullable=False),
        pa.field("is_correct_flexible", pa.bool_(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)

ATTENTION = pa.schema(
    [
        pa.field("attention_id", pa.string(), nullable=False),
        pa.field("trial_id", pa.string(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        # Digest of the adapter that gave the row; empty for the base student.
        pa.field("adapter_digest", pa.string(), nullable=False),
        pa.field("problem_id", pa.string(), nullable=False),
        # Number of tokens of the solution, over which the statistics are averaged.
        pa.field("num_tokens", pa.int32(), nullable=False),
        # Shape (statistics, layers, heads), flattened; the manifest holds their names and numbers. NaN: not defined.
        pa.field("values", pa.list_(pa.float32()), nullable=False),
        pa.field("error", pa.string(), nullable=False),
    ]
)
