"""Collate examples into micro-batches, padded or packed.

B rows, T positions, N target tokens, K top-k.
"""

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from raykd.training.examples import Example


def collate(rows: list[Example], pad_token_id: int, packing: bool) -> dict[str, Tensor]:
    """Return a micro-batch of examples.

    Args:
        rows: examples; either all have soft targets or none has.
        pad_token_id: pads rows on the right.
        packing: concatenate the rows to a single sequence instead of padding them.

    Returns:
        `input_ids` (B, T) with `attention_mask` (B, T), or packed (1, T) with `position_ids` (1, T), which restart at
        0 in each row, and `row_starts` (B + 1) int32. `positions` (N): indices of the logits that predict target
        tokens, in the flattened B x T. `token_ids` (N). For soft targets `topk_ids` and `topk_logprobs` (N, K).
    """
    # A worker without rows in a short step runs one token without targets: all workers must take part in the step.
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
    spans = [torch.arange(start, start + len(row.completion_token_ids)) for start, row in zip(first, rows, strict=True)]
    batch["positions"] = torch.cat([empty, *spans])
    batch["token_ids"] = torch.tensor([token for row in rows for token in row.completion_token_ids], dtype=torch.long)
    if rows and rows[0].topk_ids_TK is not None:
        batch["topk_ids"] = torch.from_numpy(np.concatenate([row.topk_ids_TK for row in rows]))  # type: ignore[arg-type]
        batch["topk_logprobs"] = torch.from_numpy(np.concatenate([row.topk_logprobs_TK for row in rows]))  # type: ignore[arg-type]
    return batch
