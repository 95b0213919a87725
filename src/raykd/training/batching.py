"""Collate examples into micro-batches, padded or packed.

B rows, T positions, N target tokens, K top-k.
"""

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from raykd.training.examples import Example


def collate(rows: list[Example], pad_token_id: int, packing: bool) -> dict[str, Tensor]:
    """A micro-batch: rows beneath each other, padded on the right, or one behind the other in a single sequence.

    Returns:
        `input_ids` (B, T), with `attention_mask` (B, T) or, when packed, `position_ids` (1, T), which begin anew with
        each row, and `row_starts` (B + 1) int32; `positions` (N): where in the flattened B x T the logits that predict
        target tokens are; `token_ids` (N); for soft targets `topk_ids`, `topk_logprobs` (N, K).
    """
    # A worker whose share of the last step is empty runs a row without targets, to keep pace with the others.
    sequences = [row.prompt_token_ids + row.completion_token_ids for row in rows] or [[pad_token_id]]
    lengths = [len(sequence) for sequence in sequences]
    if packing:
        batch = {
            "input_ids": torch.tensor([[token for sequence in sequences for token in sequence]]),
            "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        }
        batch["row_starts"] = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        longest = max(lengths)
        padded = [sequence + [pad_token_id] * (longest - len(sequence)) for sequence in sequences]
        mask = [[1] * length + [0] * (longest - length) for length in lengths]
        batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
        starts = np.arange(len(sequences)) * longest
    empty = torch.zeros(0, dtype=torch.long)
    first = [int(start) + len(row.prompt_token_ids) - 1 for start, row in zip(starts, rows, strict=False)]
    spans = [torch.arange(at, at + len(row.completion_token_ids)) for at, row in zip(first, rows, strict=True)]
    batch["positions"] = torch.cat([empty, *spans])
    batch["token_ids"] = torch.tensor([token for row in rows for token in row.completion_token_ids], dtype=torch.long)
    if rows and rows[0].topk_ids_TK is not None:
        batch["topk_ids"] = torch.from_numpy(np.concatenate([row.topk_ids_TK for row in rows]))  # type: ignore[arg-type]
        batch["topk_logprobs"] = torch.from_numpy(np.concatenate([row.topk_logprobs_TK for row in rows]))  # type: ignore[arg-type]
    return batch
