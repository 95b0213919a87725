"""Heads: what a causal language model's attention heads look at while they read a completion, in eight numbers each.

B texts of a batch, T positions, H query heads, G key heads, D width of a head, Q queries of a block, N completion
queries (of a block, or of the batch), L layers, S statistics.

A layer's attention never exists as a whole: it is made and added up by blocks of queries. From one layer to the next
only the mean over its heads is kept, and that for completion queries alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from raykd import compat
from raykd.errors import UserError

STATISTICS = (
    "entropy",
    "entropy_without_first",
    "first",
    "diagonal",
    "question_numbers",
    "previous_result",
    "above_tenth",
    "cosine",
)
"""What is measured of a query's weights over the keys that it may see:

- entropy: in nats;
- entropy_without_first: in nats, of all keys but the text's first token, scaled up to 1; not defined where that is
  the only one, or where it has all the weight that float32 can tell;
- first: the weight of the text's first token, on which heads rest that have nothing to do (the attention sink of
  Xiao et al., arXiv 2309.17453);
- diagonal: the weight of the query's own token;
- question_numbers: the weight of the tokens of the question's numbers; not defined where it has none;
- previous_result: the weight of the tokens of the previous step's result; not defined where there is none;
- above_tenth: the share of the visible keys that have more than a tenth of the weight each;
- cosine: of the weights with those of the layer below, averaged over its heads; not defined in the first layer.
"""

# Attention weights that exist at a time, over texts, heads, queries and keys: an eighth of a GiB in float32, of which
# there are four copies at the peak.
BLOCK_ELEMENTS = 1 << 25
_NAME = "raykd_heads"
# What models pass to their attention besides, and what changes nothing about softmax(q k + mask): a sliding window is
# in the mask as well, and there is no cache.
_HARMLESS = {"position_ids", "position_embeddings", "use_cache", "sliding_window", "is_causal", "cache_position"}


@dataclass(frozen=True)
class Text:
    """A prompt and a completion to be read, and which of their tokens matter; positions are those of both together."""

    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    question_numbers: list[int]
    """Positions of the tokens of the question's numbers, in the prompt."""
    previous_results: list[list[int]]
    """For each completion token the positions of the tokens of the previous step's result; empty where none is."""

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


def attention_statistics(
    model: Any, texts: Sequence[Text], pad_token_id: int, block_elements: int | None = None
) -> np.ndarray:
    """What each head looks at, averaged over the positions of a text's completion tokens.

    The model reads prompt and completion once, teacher-forced; its logits are not made. Weights are computed with in
    float32, whatever the model's type: in half precision they are those of a fused kernel, which the eager attention
    of transformers would round first.

    Args:
        model: a causal language model of transformers, with or without a LoRA adapter, set to evaluation.
        texts: B of them, read side by side.
        pad_token_id: fills up the shorter ones.
        block_elements: attention weights that may exist at a time; `BLOCK_ELEMENTS` where not given.

    Returns:
        (B, S, L, H) float32, with `STATISTICS` along S; NaN where none of a text's completion tokens has it.

    Raises:
        UserError: where the model's attention is more than a softmax over keys, or is not to be had.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, config = base.get_decoder(), base.config.get_text_config()
    assert not base.training, "dropout would be measured as well"
    if base.config.is_encoder_decoder:
        raise UserError(f"{type(base).__name__}: encoder and decoder; heads are measured of decoders alone")
    device = next(base.parameters()).device
    longest = max(len(text) for text in texts)
    sequences = [text.prompt_token_ids + text.completion_token_ids for text in texts]
    padded = [tokens + [pad_token_id] * (longest - len(tokens)) for tokens in sequences]
    lengths_B1 = torch.tensor([[len(tokens)] for tokens in sequences])
    mask_BT = (torch.arange(longest) < lengths_B1).long()
    tally = AttentionAccumulator(texts, longest, block_elements or BLOCK_ELEMENTS, device)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    before = compat.attention_implementation(decoder.config)
    try:
        decoder.set_attn_implementation(_NAME)
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor(padded).to(device), "attention_mask": mask_BT.to(device)}
            decoder(**inputs, use_cache=False, head_tally=tally)
    finally:
        decoder.set_attn_implementation(before)
    if len(tally.layers) != config.num_hidden_layers:
        raise UserError(
            f"{type(base).__name__}: {len(tally.layers)} of {config.num_hidden_layers} layers have attention that can "
            "be measured, by the AttentionInterface of transformers; use a model in which all have"
        )
    return torch.stack(tally.layers, dim=2).cpu().numpy()


class AttentionAccumulator:
    """A batch's completion queries, in order of position, and what the layers so far have made of them."""

    def __init__(self, texts: Sequence[Text], longest: int, block_elements: int, device: torch.device) -> None:
        self.block_elements = block_elements
        self.layers: list[Tensor] = []
        """(B, S, H) each, on the model's device."""
        numbers_BT = np.zeros((len(texts), longest), dtype=bool)
        queries: list[tuple[int, int, list[int]]] = []
        for row, text in enumerate(texts):
            first = len(text.prompt_token_ids)
            assert all(0 <= key < first for key in text.question_numbers), "the question is in the prompt"
            numbers_BT[row, text.question_numbers] = True
            for position, seen in zip(range(first, len(text)), text.previous_results, strict=True):
                assert all(0 <= key < position for key in seen), "a previous result comes before"
                queries.append((position, row, seen))
        queries.sort(key=lambda query: query[:2])
        results_NT = np.zeros((len(queries), longest), dtype=bool)
        for query, (_, _, seen) in enumerate(queries):
            results_NT[query, seen] = True
        self._num_texts = len(texts)
        self._positions = np.array([position for position, _, _ in queries], dtype=np.int64)
        self._positions_N = torch.from_numpy(self._positions).to(device)
        self._rows_N = torch.tensor([row for _, row, _ in queries], dtype=torch.long, device=device)
        self._numbers_BT = torch.from_numpy(numbers_BT).to(device)
        self._results_NT = torch.from_numpy(results_NT).to(device)
        self._below_NT = torch.zeros(results_NT.shape, device=device)
        self._blocks: list[tuple[Tensor, Tensor]] = []

    def add(self, weights_BHQT: Tensor, visible_BQT: Tensor, first: int) -> None:
        """Takes the completion queries out of a block of a layer's attention, which begins at position `first`."""
        block = slice(*np.searchsorted(self._positions, [first, first + weights_BHQT.shape[2]]))
        rows_N, positions_N = self._rows_N[block], self._positions_N[block]
        weights_NHT = weights_BHQT[rows_N, :, positions_N - first]
        visible_NT = visible_BQT[rows_N, positions_N - first]
        numbers_NT, below_NT = self._numbers_BT[rows_N], self._below_NT[block] if self.layers else None
        values = _statistics(weights_NHT, visible_NT, positions_N, numbers_NT, self._results_NT[block], below_NT)
        self._blocks.append(values)
        # The layer above asks for it, and this one no longer does.
        self._below_NT[block] = weights_NHT.mean(1)

    def close_layer(self) -> None:
        """Averages a layer's queries by text."""
        values_SNH, defined_SNH = (torch.cat(parts, dim=1) for parts in zip(*self._blocks, strict=True))
        self._blocks.clear()
        empty_SBH = values_SNH.new_zeros(len(STATISTICS), self._num_texts, values_SNH.shape[-1])
        # What is not defined may be NaN, and would stay so if it were multiplied by 0.
        sums_SBH = empty_SBH.index_add(1, self._rows_N, values_SNH.masked_fill(~defined_SNH, 0))
        counts_SBH = empty_SBH.index_add(1, self._rows_N, defined_SNH.float())
        self.layers.append((sums_SBH / counts_SBH).transpose(0, 1))


def _statistics(
    weights_NHT: Tensor,
    visible_NT: Tensor,
    positions_N: Tensor,
    numbers_NT: Tensor,
    results_NT: Tensor,
    below_NT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The statistics of some queries, and whether each is defined: (S, N, H) both."""
    parts_NHT = torch.special.entr(weights_NHT)
    # Not 1 minus the first, of which rounding would leave little where a head rests on it.
    others_NH = weights_NHT[..., 1:].sum(-1)
    positions_NH1 = positions_N[:, None, None].expand(-1, weights_NHT.shape[1], 1)
    everywhere_N1 = torch.ones_like(positions_N, dtype=torch.bool)[:, None]
    found = {
        "entropy": (parts_NHT.sum(-1), everywhere_N1),
        "entropy_without_first": (parts_NHT[..., 1:].sum(-1) / others_NH + others_NH.log(), others_NH > 0),
        "first": (weights_NHT[..., 0], everywhere_N1),
        "diagonal": (weights_NHT.gather(-1, positions_NH1)[..., 0], everywhere_N1),
        "question_numbers": (_mass(weights_NHT, numbers_NT), numbers_NT.any(-1, keepdim=True)),
        "previous_result": (_mass(weights_NHT, results_NT), results_NT.any(-1, keepdim=True)),
        "above_tenth": ((weights_NHT > 0.1).sum(-1) / visible_NT.sum(-1, keepdim=True), everywhere_N1),
    }
    if below_NT is None:
        found["cosine"] = (torch.zeros_like(others_NH), ~everywhere_N1)
    else:
        lengths_NH = weights_NHT.norm(dim=-1) * below_NT.norm(dim=-1, keepdim=True)
        found["cosine"] = (_mass(weights_NHT, below_NT) / lengths_NH, everywhere_N1)
    values_SNH = torch.stack([found[name][0] for name in STATISTICS])
    return values_SNH, torch.stack([found[name][1].expand_as(others_NH) for name in STATISTICS])


def _mass(weights_NHT: Tensor, keys_NT: Tensor) -> Tensor:
    """How much of each head's weight is on some keys, or its product with other weights: (N, H)."""
    return (weights_NHT @ keys_NT.to(weights_NHT.dtype)[..., None])[..., 0]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Which keys a query may see, (B, 1, T, T): the mask of torch's own attention, but never left out."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    head_tally: AttentionAccumulator | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """A layer's attention as `AttentionInterface` has it: it gets the mask of `_mask`, and gives back (B, T, H, D)."""
    name = type(module).__name__
    if head_tally is None:
        raise UserError(f"{name} is not handed what its model was called with, so that its heads cannot be measured")
    more = sorted(key for key in others.keys() - _HARMLESS if others[key] is not None and others[key] is not False)
    if attention_mask is None or attention_mask.dtype != torch.bool:
        more.append("a mask of its own making")
    if more or attention_mask is None:
        raise UserError(
            f"{name} computes with {', '.join(more)} besides queries, keys and values: its heads cannot be measured, "
            "which is done of a plain softmax over the text's keys; use a model without"
        )
    batch, heads, length, _ = query_BHTD.shape
    # Each key head serves as many query heads in a row.
    repeats = heads // key_BGTD.shape[1]
    key_BHDT = key_BGTD.repeat_interleave(repeats, dim=1).transpose(2, 3).float()
    value_BHTD = value_BGTD.repeat_interleave(repeats, dim=1)
    size = max(1, head_tally.block_elements // (batch * heads * length))
    output = []
    for first in range(0, length, size):
        block = slice(first, first + size)
        scores_BHQT = query_BHTD[:, :, block].float() * scaling @ key_BHDT
        visible_B1QT = attention_mask[:, :, block]
        # Finite, as eager attention has it: padding that sees nothing must not become NaN, which no weight of 0 undoes.
        scores_BHQT.masked_fill_(~visible_B1QT, torch.finfo(torch.float32).min)
        weights_BHQT = scores_BHQT.softmax(-1)
        head_tally.add(weights_BHQT, visible_B1QT[:, 0], first)
        output.append(weights_BHQT.to(value_BHTD.dtype) @ value_BHTD)
    head_tally.close_layer()
    return torch.cat(output, dim=2).transpose(1, 2).contiguous(), None
