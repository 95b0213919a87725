"""Statistics of a causal language model's attention heads over the completion tokens of given texts.

B texts of a batch, T positions, H query heads, G key heads, D width of a head, Q queries of a block, N completion
queries (of a block, or of the batch), L layers, S statistics.

A layer's attention weights are computed and reduced by blocks of queries, so that they never exist as a whole. Only
their mean over heads, for completion queries, is kept until the next layer.
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
"""Statistics of a query's attention weights over its visible keys:

- entropy: in nats;
- entropy_without_first: in nats, over all keys except the text's first token, renormalized; undefined if there is no
  other key, or if the first has all the weight in float32;
- first: weight of the text's first token, the attention sink of idle heads (Xiao et al., arXiv 2309.17453);
- diagonal: weight of the query's own token;
- question_numbers: weight of the tokens of the question's numbers; undefined if it has none;
- previous_result: weight of the tokens of the previous step's result; undefined if there is none;
- above_tenth: share of the visible keys that have more than a tenth of the weight each;
- cosine: similarity to the weights of the layer below, averaged over its heads; undefined in the first layer.
"""

# Attention weights of a block, over texts, heads, queries and keys: an eighth of a GiB in float32. At the peak there
# are four such tensors.
BLOCK_ELEMENTS = 1 << 25
_NAME = "raykd_heads"
# Arguments of attention functions that do not change softmax(q k + mask): the mask includes a sliding window, and there
# is no cache.
_IGNORED_ARGUMENTS = {
    "position_ids",
    "position_embeddings",
    "use_cache",
    "sliding_window",
    "is_causal",
    "cache_position",
}


@dataclass(frozen=True)
class Text:
    """A prompt and a completion, and positions in their concatenation that the statistics refer to."""

    prompt_token_ids: list[int]
    completion_token_ids: list[int]
    question_numbers: list[int]
    """Positions of the tokens of the question's numbers, in the prompt."""
    previous_results: list[list[int]]
    """For each completion token, positions of the tokens of the previous step's result; empty if there is none."""

    def __len__(self) -> int:
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


def attention_statistics(
    model: Any, texts: Sequence[Text], pad_token_id: int, block_elements: int | None = None
) -> np.ndarray:
    """Return the statistics of each head, averaged over a text's completion tokens.

    The model reads prompt and completion once, teacher-forced, without computing logits. Attention weights are
    computed in float32 for every dtype, as fused kernels do; the eager attention of transformers rounds them to half
    precision.

    Args:
        model: a causal language model of transformers, with or without a LoRA adapter, in evaluation mode.
        texts: the B texts of a batch.
        pad_token_id: pads the shorter texts.
        block_elements: maximum number of attention weights in memory; None for `BLOCK_ELEMENTS`.

    Returns:
        (B, S, L, H) float32, with `STATISTICS` along S; NaN if undefined for all completion tokens of a text.

    Raises:
        UserError: the model's attention is not a plain softmax over keys, or cannot be replaced.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder, config = base.get_decoder(), base.config.get_text_config()
    assert not base.training, "dropout would change the weights"
    if base.config.is_encoder_decoder:
        raise UserError(
            f"{type(base).__name__}: attention can be measured for decoders only; this is an encoder-decoder"
        )
    device = next(base.parameters()).device
    longest = max(len(text) for text in texts)
    sequences = [text.prompt_token_ids + text.completion_token_ids for text in texts]
    padded = [tokens + [pad_token_id] * (longest - len(tokens)) for tokens in sequences]
    lengths_B1 = torch.tensor([[len(tokens)] for tokens in sequences])
    mask_BT = (torch.arange(longest) < lengths_B1).long()
    accumulator = AttentionAccumulator(texts, longest, block_elements or BLOCK_ELEMENTS, device)
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    original = compat.attention_implementation(decoder.config)
    try:
        decoder.set_attn_implementation(_NAME)
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor(padded).to(device), "attention_mask": mask_BT.to(device)}
            decoder(**inputs, use_cache=False, head_accumulator=accumulator)
    finally:
        decoder.set_attn_implementation(original)
    if len(accumulator.layers) != config.num_hidden_layers:
        raise UserError(
            f"{type(base).__name__}: {len(accumulator.layers)} of {config.num_hidden_layers} layers use the "
            "AttentionInterface of transformers, by which attention is measured; use a model in which all layers do"
        )
    return torch.stack(accumulator.layers, dim=2).cpu().numpy()


class AttentionAccumulator:
    """Completion queries of a batch, ordered by position, and their statistics in the layers so far.

    Args:
        texts: the texts of the batch.
        longest: T, the length of the longest text.
        block_elements: maximum number of attention weights in memory.
        device: of the model.
    """

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
            for position, result_keys in zip(range(first, len(text)), text.previous_results, strict=True):
                assert all(0 <= key < position for key in result_keys), "a previous result precedes its query"
                queries.append((position, row, result_keys))
        queries.sort(key=lambda query: query[:2])
        results_NT = np.zeros((len(queries), longest), dtype=bool)
        for query, (_, _, result_keys) in enumerate(queries):
            results_NT[query, result_keys] = True
        self._num_texts = len(texts)
        self._positions = np.array([position for position, _, _ in queries], dtype=np.int64)
        self._positions_N = torch.from_numpy(self._positions).to(device)
        self._rows_N = torch.tensor([row for _, row, _ in queries], dtype=torch.long, device=device)
        self._numbers_BT = torch.from_numpy(numbers_BT).to(device)
        self._results_NT = torch.from_numpy(results_NT).to(device)
        self._below_NT = torch.zeros(results_NT.shape, device=device)
        self._blocks: list[tuple[Tensor, Tensor]] = []

    def add(self, weights_BHQT: Tensor, visible_BQT: Tensor, first: int) -> None:
        """Add the completion queries of a block of a layer's attention.

        Args:
            weights_BHQT: attention weights.
            visible_BQT: the keys that each query may see.
            first: position of the block's first query.
        """
        block = slice(*np.searchsorted(self._positions, [first, first + weights_BHQT.shape[2]]))
        rows_N, positions_N = self._rows_N[block], self._positions_N[block]
        weights_NHT = weights_BHQT[rows_N, :, positions_N - first]
        visible_NT = visible_BQT[rows_N, positions_N - first]
        numbers_NT, below_NT = self._numbers_BT[rows_N], self._below_NT[block] if self.layers else None
        values = _statistics(weights_NHT, visible_NT, positions_N, numbers_NT, self._results_NT[block], below_NT)
        self._blocks.append(values)
        # For the cosine of the layer above; this layer has used the entries of the layer below.
        self._below_NT[block] = weights_NHT.mean(1)

    def close_layer(self) -> None:
        """Average the queries of a layer by text, and append the result to `layers`."""
        values_SNH, defined_SNH = (torch.cat(parts, dim=1) for parts in zip(*self._blocks, strict=True))
        self._blocks.clear()
        empty_SBH = values_SNH.new_zeros(len(STATISTICS), self._num_texts, values_SNH.shape[-1])
        # Undefined values may be NaN, which a weight of 0 would not remove.
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
    """Return the statistics of N queries, and whether each is defined: both (S, N, H)."""
    entropy_terms_NHT = torch.special.entr(weights_NHT)
    # Summed: 1 minus the first weight would lose all precision where that weight is near 1.
    others_NH = weights_NHT[..., 1:].sum(-1)
    positions_NH1 = positions_N[:, None, None].expand(-1, weights_NHT.shape[1], 1)
    always_N1 = torch.ones_like(positions_N, dtype=torch.bool)[:, None]
    statistics = {
        "entropy": (entropy_terms_NHT.sum(-1), always_N1),
        "entropy_without_first": (entropy_terms_NHT[..., 1:].sum(-1) / others_NH + others_NH.log(), others_NH > 0),
        "first": (weights_NHT[..., 0], always_N1),
        "diagonal": (weights_NHT.gather(-1, positions_NH1)[..., 0], always_N1),
        "question_numbers": (_mass(weights_NHT, numbers_NT), numbers_NT.any(-1, keepdim=True)),
        "previous_result": (_mass(weights_NHT, results_NT), results_NT.any(-1, keepdim=True)),
        "above_tenth": ((weights_NHT > 0.1).sum(-1) / visible_NT.sum(-1, keepdim=True), always_N1),
    }
    if below_NT is None:
        statistics["cosine"] = (torch.zeros_like(others_NH), ~always_N1)
    else:
        lengths_NH = weights_NHT.norm(dim=-1) * below_NT.norm(dim=-1, keepdim=True)
        statistics["cosine"] = (_mass(weights_NHT, below_NT) / lengths_NH, always_N1)
    values_SNH = torch.stack([statistics[name][0] for name in STATISTICS])
    return values_SNH, torch.stack([statistics[name][1].expand_as(others_NH) for name in STATISTICS])


def _mass(weights_NHT: Tensor, keys_NT: Tensor) -> Tensor:
    """Return each head's weight on selected keys, or its dot product with other weights: (N, H)."""
    return (weights_NHT @ keys_NT.to(weights_NHT.dtype)[..., None])[..., 0]


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """Return the boolean mask of visible keys, (B, 1, T, T), which SDPA would skip for causal attention."""
    return sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})


def _attention(
    module: nn.Module,
    query_BHTD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    head_accumulator: AttentionAccumulator | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute a layer's attention output (B, T, H, D) as an `AttentionInterface` function, and accumulate its weights.

    Raises:
        UserError: the model's attention is not a plain softmax over keys.
    """
    name = type(module).__name__
    if head_accumulator is None:
        raise UserError(
            f"{name} does not receive its model's keyword arguments, by which attention is measured; use another model"
        )
    unsupported = sorted(
        key for key in others.keys() - _IGNORED_ARGUMENTS if others[key] is not None and others[key] is not False
    )
    if attention_mask is None or attention_mask.dtype != torch.bool:
        unsupported.append("a mask of its own")
    if unsupported or attention_mask is None:
        raise UserError(
            f"{name} computes attention with {', '.join(unsupported)}; attention can be measured only for a plain "
            "softmax over queries and keys; use another model"
        )
    batch, heads, length, _ = query_BHTD.shape
    # Grouped queries: each key head serves `repeats` consecutive query heads.
    repeats = heads // key_BGTD.shape[1]
    key_BHDT = key_BGTD.repeat_interleave(repeats, dim=1).transpose(2, 3).float()
    value_BHTD = value_BGTD.repeat_interleave(repeats, dim=1)
    size = max(1, head_accumulator.block_elements // (batch * heads * length))
    output = []
    for first in range(0, length, size):
        block = slice(first, first + size)
        scores_BHQT = query_BHTD[:, :, block].float() * scaling @ key_BHDT
        visible_B1QT = attention_mask[:, :, block]
        # Finite, as in eager attention: -inf would turn rows of padding without visible keys into NaN.
        scores_BHQT.masked_fill_(~visible_B1QT, torch.finfo(torch.float32).min)
        weights_BHQT = scores_BHQT.softmax(-1)
        head_accumulator.add(weights_BHQT, visible_B1QT[:, 0], first)
        output.append(weights_BHQT.to(value_BHTD.dtype) @ value_BHTD)
    head_accumulator.close_layer()
    return torch.cat(output, dim=2).transpose(1, 2).contiguous(), None
