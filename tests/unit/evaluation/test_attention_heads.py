"""Attention statistics against an oracle in Python floats, computed from transformers' eager attention."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DogeConfig,
    DogeForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StableLmConfig,
    StableLmForCausalLM,
)

from raykd.config.training import Student
from raykd.evaluation import attention_heads
from raykd.evaluation.attention_heads import STATISTICS, Text
from raykd.training import student

V, L, H = 61, 3, 4
# The initial weights are large enough for peaked attention.
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": L,
    "num_attention_heads": H,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
}


def build(config: Any, model_class: Any) -> Any:
    torch.manual_seed(0)
    return model_class(config).eval()


@pytest.fixture
def llama() -> Any:
    return build(LlamaConfig(**SIZES), LlamaForCausalLM)


def example_texts() -> list[Text]:
    """Return texts of different lengths; one has no number in its question, another no earlier step."""
    generator = np.random.default_rng(0)

    def text(prompt: int, answer: int, numbers: list[int], results: list[list[int]]) -> Text:
        tokens = generator.integers(0, V, prompt + answer).tolist()
        return Text(tokens[:prompt], tokens[prompt:], numbers, results)

    return [
        text(9, 12, [2, 3, 7], [[]] * 5 + [[11, 12]] * 4 + [[16]] * 3),
        text(4, 5, [], [[], [], [4], [4], [5, 6]]),
        text(6, 1, [0, 5], [[]]),
    ]


def attention_of(model: Any, text: Text) -> np.ndarray:
    """Return the attention weights of one text without padding: (L, H, T, T)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    original = base.config._attn_implementation
    base.set_attn_implementation("eager")
    with torch.no_grad():
        tokens = torch.tensor([text.prompt_token_ids + text.completion_token_ids])
        attentions = base(input_ids=tokens, output_attentions=True).attentions
    base.set_attn_implementation(original)
    return torch.cat(attentions).double().numpy()


def entropy_of(weights: list[float]) -> float:
    return -sum(weight * math.log(weight) for weight in weights if weight > 0)


def cosine_of(one: list[float], other: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, other, strict=True))
    return product / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def oracle(weights_LHTT: np.ndarray, text: Text, window: int = 10**6) -> np.ndarray:
    """Compute the statistics by their definitions, one query at a time: (S, L, H)."""
    first, length = len(text.prompt_token_ids), len(text.prompt_token_ids) + len(text.completion_token_ids)
    result = np.full((len(STATISTICS), *weights_LHTT.shape[:2]), np.nan)
    for layer, head in np.ndindex(*weights_LHTT.shape[:2]):
        values: dict[str, list[float]] = {name: [] for name in STATISTICS}
        for query in range(first, length):
            row = weights_LHTT[layer, head, query].tolist()
            visible = range(max(0, query - window + 1), query + 1)
            assert sum(row[key] for key in visible) == pytest.approx(1, abs=1e-2)
            values["entropy"].append(entropy_of(row))
            others = row[1:]
            if sum(others) > 0:
                values["entropy_without_first"].append(entropy_of([weight / sum(others) for weight in others]))
            values["first"].append(row[0])
            values["diagonal"].append(row[query])
            if text.question_numbers:
                values["question_numbers"].append(sum(row[key] for key in text.question_numbers))
            if result_keys := text.previous_results[query - first]:
                values["previous_result"].append(sum(row[key] for key in result_keys))
            values["above_tenth"].append(sum(row[key] > 0.1 for key in visible) / len(visible))
            if layer:
                below = [weights_LHTT[layer - 1, :, query, key].mean() for key in range(length)]
                values["cosine"].append(cosine_of(row, below))
        for number, name in enumerate(STATISTICS):
            if values[name]:
                result[number, layer, head] = sum(values[name]) / len(values[name])
    return result


def expected(model: Any, window: int = 10**6) -> np.ndarray:
    return np.stack([oracle(attention_of(model, text), text, window) for text in example_texts()])


def assert_close(measured: np.ndarray, expected_values: np.ndarray, tolerance: float = 2e-6) -> None:
    assert measured.dtype == np.float32
    assert measured.shape == expected_values.shape == (len(example_texts()), len(STATISTICS), L, H)
    for number, name in enumerate(STATISTICS):
        np.testing.assert_allclose(measured[:, number], expected_values[:, number], atol=tolerance, err_msg=name)


@pytest.mark.parametrize("block_elements", [None, 1, 3 * H * 21 * 4, 3 * H * 21 * 5])
def test_statistics_match_definitions_for_any_block_size(llama, block_elements):
    assert_close(attention_heads.attention_statistics(llama, example_texts(), 0, block_elements), expected(llama))


def test_expected_statistics_are_diverse(llama):
    wanted = expected(llama)
    defined = wanted[np.isfinite(wanted)].reshape(-1)
    assert len(np.unique(defined.round(4))) > 0.8 * len(defined)
    above = wanted[:, STATISTICS.index("above_tenth")]
    assert 0.1 < above.min() < above.max() < 0.9


def test_undefined_statistics_are_nan(llama):
    values = dict(
        zip(
            STATISTICS,
            attention_heads.attention_statistics(llama, example_texts(), 0).transpose(1, 0, 2, 3),
            strict=True,
        )
    )
    assert np.isnan(values["cosine"][:, 0]).all()
    assert np.isfinite(values["cosine"][:, 1:]).all()
    assert np.isnan(values["question_numbers"]).all((1, 2)).tolist() == [False, True, False]
    assert np.isnan(values["previous_result"]).all((1, 2)).tolist() == [False, False, True]
    for name in ("entropy", "entropy_without_first", "first", "diagonal", "above_tenth"):
        assert np.isfinite(values[name]).all(), name


def test_entropy_without_first_is_undefined_for_a_single_key(llama):
    single = Text([], [7, 8, 9], [], [[], [], []])
    measured = attention_heads.attention_statistics(llama, [single, Text([3], [], [], []), Text([], [5], [], [[]])], 0)
    np.testing.assert_allclose(measured[0], oracle(attention_of(llama, single), single), atol=2e-6)
    assert np.isnan(measured[1]).all()
    # A single token attends only to itself.
    lone = {"entropy": 0, "first": 1, "diagonal": 1, "above_tenth": 1, "cosine": 1}
    for number, name in enumerate(STATISTICS):
        np.testing.assert_allclose(measured[2, number, 1:], lone.get(name, np.nan), atol=1e-6, err_msg=name)


def test_statistics_do_not_depend_on_batch_or_padding(llama):
    together = attention_heads.attention_statistics(llama, example_texts(), pad_token_id=0)
    np.testing.assert_allclose(
        attention_heads.attention_statistics(llama, example_texts(), pad_token_id=17), together, atol=2e-6
    )
    alone = [attention_heads.attention_statistics(llama, [text], pad_token_id=0) for text in example_texts()]
    np.testing.assert_allclose(np.concatenate(alone), together, atol=2e-6)


def test_adapter_is_measured_with_its_base_model(llama):
    before = attention_heads.attention_statistics(llama, example_texts(), 0)
    adapted: Any = student.add_lora(llama, Student(model="none"), seed=0).eval()
    np.testing.assert_array_equal(attention_heads.attention_statistics(adapted, example_texts(), 0), before)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    measured = attention_heads.attention_statistics(adapted, example_texts(), 0)
    assert_close(measured, expected(adapted))
    assert np.nanmax(np.abs(measured - before)) > 0.05
    with adapted.disable_adapter():
        np.testing.assert_array_equal(attention_heads.attention_statistics(adapted, example_texts(), 0), before)


@pytest.mark.parametrize(
    ("config", "model_class"),
    [
        (Qwen2Config(**SIZES), Qwen2ForCausalLM),
        (Qwen3Config(**SIZES, head_dim=16), Qwen3ForCausalLM),
        (LlamaConfig(**SIZES | {"num_key_value_heads": H}), LlamaForCausalLM),
        (LlamaConfig(**SIZES | {"num_key_value_heads": 1}), LlamaForCausalLM),
    ],
    ids=["qwen2", "qwen3", "as many key heads", "one key head"],
)
def test_other_architectures_match_their_eager_attention(config, model_class):
    model = build(config, model_class)
    assert_close(attention_heads.attention_statistics(model, example_texts(), 0), expected(model))


@pytest.mark.parametrize("window", [3, 64])
def test_statistics_match_sliding_window_attention(window: int):
    model = build(MistralConfig(**SIZES, sliding_window=window), MistralForCausalLM)
    assert_close(attention_heads.attention_statistics(model, example_texts(), 0), expected(model, window))


def test_bfloat16_differs_by_rounding_only(llama):
    wanted = attention_heads.attention_statistics(llama, example_texts(), 0)
    rounded = llama.bfloat16()
    # Rounding can move a weight across the threshold of a tenth.
    smooth = [number for number, name in enumerate(STATISTICS) if name != "above_tenth"]
    measured = attention_heads.attention_statistics(rounded, example_texts(), 0)
    np.testing.assert_allclose(measured[:, smooth], expected(rounded)[:, smooth], atol=0.03)
    np.testing.assert_allclose(measured[:, smooth], wanted[:, smooth], atol=0.15)
    above = STATISTICS.index("above_tenth")
    assert np.abs(measured[:, above] - wanted[:, above]).mean() < 0.02


@pytest.mark.parametrize("before", ["eager", "sdpa"])
def test_model_is_unchanged(llama, before: str):
    llama.set_attn_implementation(before)
    tokens = torch.tensor([example_texts()[0].prompt_token_ids])
    logits = llama(input_ids=tokens).logits
    attention_heads.attention_statistics(llama, example_texts(), 0)
    assert llama.config._attn_implementation == llama.model.config._attn_implementation == before
    assert torch.equal(llama(input_ids=tokens).logits, logits)
    assert not any(parameter.grad is not None for parameter in llama.parameters())


def test_hidden_states_match_eager_attention_without_logits(llama):
    hidden_states: list[torch.Tensor] = []
    llama.model.norm.register_forward_hook(lambda module, inputs, output: hidden_states.append(output))
    logits_calls: list[int] = []
    llama.lm_head.register_forward_hook(lambda module, inputs, output: logits_calls.append(1))
    attention_heads.attention_statistics(llama, example_texts(), 0, block_elements=3 * H * 21 * 4)
    assert not logits_calls
    llama.set_attn_implementation("eager")
    for row, text in enumerate(example_texts()):
        tokens = torch.tensor([text.prompt_token_ids + text.completion_token_ids])
        with torch.no_grad():
            alone = llama.model(input_ids=tokens).last_hidden_state[0]
        assert torch.allclose(hidden_states[0][row, : len(alone)], alone, atol=1e-5)
    assert not hidden_states[0].requires_grad


class _Largest(TorchDispatchMode):
    """Records the largest float32 tensor over a number of keys that any operation returns."""

    def __init__(self, keys: int) -> None:
        super().__init__()
        self.keys, self.elements = keys, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for each in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32 and each.shape[-1:] == (self.keys,):
                self.elements = max(self.elements, each.numel())
        return output


def test_attention_weights_never_exceed_a_block(llama):
    # No other dimension has this size.
    texts = [Text([1] * 10, [2] * 43, [0], [[]] * 43) for _ in range(3)]
    with _Largest(keys=53) as largest:
        attention_heads.attention_statistics(llama, texts, 0, block_elements=3 * H * 53 * 12)
    assert largest.elements == 3 * H * 53 * 12


def test_model_in_training_mode_is_refused(llama):
    with pytest.raises(AssertionError, match="dropout"):
        attention_heads.attention_statistics(llama.train(), example_texts(), 0)


_BART: dict[str, Any] = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


@pytest.mark.parametrize(
    ("config", "model_class", "named"),
    [
        (Gemma2Config(**SIZES, head_dim=8), Gemma2ForCausalLM, "softcap"),
        (GptOssConfig(**SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1), GptOssForCausalLM, "s_aux"),
        (BartConfig(**_BART), BartForConditionalGeneration, "encoder"),
        (BloomConfig(vocab_size=V, hidden_size=32, n_layer=2, n_head=4), BloomForCausalLM, "0 of 2 layers"),
        (DogeConfig(**SIZES), DogeForCausalLM, "a mask of its own"),
        (StableLmConfig(**SIZES), StableLmForCausalLM, "does not receive"),
    ],
    ids=["softcap", "sinks", "encoder and decoder", "attention of its own", "dynamic mask", "arguments not passed on"],
)
def test_unsupported_attention_is_refused_by_name(config, model_class, named: str):
    model = build(config, model_class)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=named):
        attention_heads.attention_statistics(model, example_texts(), 0)
    assert model.config._attn_implementation == before
