"""Attention of packed rows against a dense float64 softmax of each row."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, MistralConfig, MistralForCausalLM

from raykd.training import packing

LENGTHS = (7, 1, 12, 4)
SHAPE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def dense(query: np.ndarray, key: np.ndarray, value: np.ndarray, scaling: float, window: int | None) -> np.ndarray:
    """Return the attention output of one row and head."""
    output = np.zeros_like(query)
    for at in range(len(query)):
        first = 0 if window is None else max(0, at + 1 - window)
        scores = np.array([query[at] @ key[each] * scaling for each in range(first, at + 1)])
        weights = np.exp(scores - scores.max())
        output[at] = (weights[:, None] * value[first : at + 1]).sum(0) / weights.sum()
    return output


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_each_row_attends_only_to_itself(window: int | None, scaling: float | None):
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, sum(LENGTHS), 8, generator=draw, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, sum(LENGTHS), 8, generator=draw, dtype=torch.float64)
    starts = torch.tensor(np.cumsum([0, *LENGTHS]), dtype=torch.int32)
    kwargs = packing.packed_inputs(starts)
    mask = kwargs.pop("attention_mask")
    output, _ = packing.attend(
        torch.nn.Module(), query, key, value, mask, scaling=scaling, sliding_window=window, **kwargs
    )
    assert output.shape == (1, sum(LENGTHS), 4, 8)
    for head in range(4):
        for at, length in zip(starts.tolist(), LENGTHS, strict=False):
            row = slice(at, at + length)
            # Two query heads share a key head.
            parts = (query[0, head, row], key[0, head // 2, row], value[0, head // 2, row])
            expected = dense(*(part.numpy() for part in parts), scaling or 1 / math.sqrt(8), window)
            assert np.allclose(output[0, row, head].numpy(), expected, atol=1e-12)


def llama(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **kwargs)).double().eval()


def mistral(**kwargs: Any) -> Any:
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(sliding_window=3, **SHAPE, **kwargs)).double().eval()


@pytest.mark.parametrize("make", [llama, mistral])
def test_packed_logits_equal_those_of_separate_rows(make: Any):
    rows = [torch.randint(50, (length,), generator=torch.Generator().manual_seed(length)) for length in LENGTHS]
    expected = torch.cat([make()(input_ids=row[None]).logits[0] for row in rows])
    model = make()
    packing.enable_packing(model)
    starts = torch.tensor(np.cumsum([0, *LENGTHS]), dtype=torch.int32)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    logits = model(
        input_ids=torch.cat(rows)[None], position_ids=positions, use_cache=False, **packing.packed_inputs(starts)
    ).logits[0]
    assert torch.allclose(logits, expected, atol=1e-10)
    # Without row arguments the model attends as before.
    assert torch.allclose(model(input_ids=rows[2][None]).logits[0], expected[8:20], atol=1e-10)


def test_model_without_row_arguments_fails():
    """Otherwise tokens would silently attend to other rows."""
    model = llama()
    kwargs = packing.packed_inputs(torch.tensor([0, 3, 5], dtype=torch.int32))
    with pytest.raises(RuntimeError):
        model(input_ids=torch.arange(5)[None], attention_mask=kwargs["attention_mask"], use_cache=False)


def test_stateful_model_is_refused():
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": 50}
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*train\.packing=false"):
        packing.enable_packing(MambaForCausalLM(MambaConfig(**shape)))


def test_unsupported_attention_is_refused():
    kwargs = packing.packed_inputs(torch.tensor([0, 3, 5], dtype=torch.int32))
    kwargs["softcap"] = 50.0
    query = torch.zeros(1, 1, 5, 8)
    with pytest.raises(ValueError, match=r"softcap; set train\.packing=false"):
        packing.attend(torch.nn.Module(), query, query, query, kwargs.pop("attention_mask"), **kwargs)
