"""Shapes: how large a model is, by its configuration: layers, widths, heads, and how its weights are kept."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raykd.config.errors import one_line
from raykd.errors import UserError
from raykd.models.builtin import resolve_model

# Decoders of Llama's build: what a layer holds is known. Qwen 2 adds biases to queries, keys and values.
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
# Group size and scheme of the INT4 repositories of hugging-quants and of most others.
GROUP_SIZE = 128
# What the names of repositories, methods and algorithms say of weights. The first that is found counts, for a name may
# hold several (W4A16_NVFP4, GPTQ-Int8).
NUMBERS_IN_NAMES = {
    "FP4": ("fp4", 4, GROUP_SIZE),
    r"W4A|(?<![A-Z])INT4|(?<!\d)4-?BIT": ("int4", 4, GROUP_SIZE),
    "FP8": ("fp8", 8, 0),
    r"W8A|(?<![A-Z])INT8|(?<!\d)8-?BIT": ("int8", 8, 0),
    "AWQ|GPTQ": ("int4", 4, GROUP_SIZE),
}


@dataclass(frozen=True)
class Quantization:
    """How the matrices of a model's layers are kept. Embeddings, output layer and norms are never quantized here."""

    name: str = "bf16"
    bits: int = 16
    group_size: int = 0
    """Weights of an input column that share a scale and a zero point (INT4); 0 for a scale for each output."""
    kept: tuple[str, ...] = ()
    """Modules that are left as they are: a run of a module's dotted name, or `re:` and a regular expression."""

    def keeps(self, module: str) -> bool:
        """Whether a module, such as `model.layers.0.self_attn.q_proj`, is left as it is."""
        return self.bits >= 16 or any(
            re.match(each[3:], module) if each.startswith("re:") else f".{each}." in f".{module}." for each in self.kept
        )

    def matrix_bytes(self, inputs: int, outputs: int) -> float:
        """Bytes of a quantized matrix with its scales: 16 bits, and as many as a weight for a zero point, for each
        group of AWQ and GPTQ; 32 bits for each output of FP8."""
        weights = inputs * outputs * self.bits / 8
        if self.group_size:
            return weights + math.ceil(inputs / self.group_size) * outputs * (2 + self.bits / 8)
        return weights + outputs * 4


@dataclass(frozen=True)
class Shape:
    """The shape of a decoder of Llama's build."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    head_dim: int
    quantization: Quantization = Quantization()
    attention_biases: int = 0
    """How many of a layer's projections to heads have a bias, from `q_proj` on: 0, 3 (Qwen 2) or 4."""
    head_norms: bool = False
    """Whether queries and keys are normalised in each head (Qwen 3)."""
    positions: int = 131072
    """Tokens that the model was made for, prompt and answer together; Llama 3's."""
    dtype_bytes: int = 2
    """Of a weight that is not quantized, as the checkpoint has it."""
    source: str = "given"
    """Where it was read."""

    def __post_init__(self) -> None:
        numbers = (self.layers, self.hidden, self.heads, self.kv_heads, self.intermediate, self.vocab, self.head_dim)
        if min(numbers) < 1 or self.heads % self.kv_heads:
            raise UserError(f"no shape of a decoder: {self}")

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of the matrices of a layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (self.hidden, queries),
            "k_proj": (self.hidden, keys),
            "v_proj": (self.hidden, keys),
            "o_proj": (queries, self.hidden),
            "gate_proj": (self.hidden, self.intermediate),
            "up_proj": (self.hidden, self.intermediate),
            "down_proj": (self.intermediate, self.hidden),
        }

    @property
    def layer_vectors(self) -> int:
        """Parameters of a layer that are no matrices: norms and biases."""
        outputs = [self.matrices[name][1] for name in ATTENTION]
        return 2 * self.hidden + 2 * self.head_dim * self.head_norms + sum(outputs[: self.attention_biases])

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values()) + self.layer_vectors

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding, or of an output layer of its own."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; embedding and output layer count once where they are tied."""
        ends = self.embedding_parameters * (1 if self.tied else 2) + self.hidden
        return self.layers * self.layer_parameters + ends

    def adapter_parameters(self, rank: int, modules: tuple[str, ...]) -> int:
        """Parameters of a LoRA adapter on these matrices of every layer; others have none here."""
        sides = (sum(self.matrices[name]) for name in modules if name in self.matrices)
        return self.layers * rank * sum(sides)

    def modules(self, layer: int) -> Iterator[tuple[str, int, int]]:
        """Name, inputs and outputs of a layer's matrices, by transformers' names."""
        for name, (inputs, outputs) in self.matrices.items():
            part = "self_attn" if name in ATTENTION else "mlp"
            yield f"model.layers.{layer}.{part}.{name}", inputs, outputs


# Published shapes, from each repository's config.json (meta-llama on the Hugging Face hub).
LLAMA = {
    "Llama-3.2-1B": Shape(16, 2048, 32, 8, 8192, 128256, True, 64),
    "Llama-3.2-3B": Shape(28, 3072, 24, 8, 8192, 128256, True, 128),
    "Llama-3.1-8B": Shape(32, 4096, 32, 8, 14336, 128256, False, 128),
    "Llama-3.1-70B": Shape(80, 8192, 64, 8, 28672, 128256, False, 128),
    "Llama-3.3-70B": Shape(80, 8192, 64, 8, 28672, 128256, False, 128),
    "Llama-3.1-405B": Shape(126, 16384, 128, 8, 53248, 128256, False, 128),
}


def find_shape(model: str, revision: str | None = None, engine_kwargs: Mapping[str, Any] | None = None) -> Shape | None:
    """A model's shape, as far as this machine knows it: nothing is fetched.

    Args:
        model: a folder, a built-in model, or a hub name whose `config.json` is in the hub's cache or which is one of
            the Llama 3 models of the table.
        revision: on the hub.
        engine_kwargs: vLLM's arguments, of which `quantization` says what becomes of weights that are not quantized.

    Returns:
        None where it is not known, or no decoder of Llama's build.

    Raises:
        UserError: where a `config.json` is there and cannot be read.
    """
    file = _config_file(resolve_model(model), revision)
    shape = read_shape(file) if file else _shape_of_name(model)
    if shape is None:
        return None
    if file and shape.quantization.bits == 16:
        named, kept = _quantization_of_name(model, shape), shape.quantization.kept
        shape = replace(shape, quantization=replace(named, kept=kept or named.kept))
    told = (engine_kwargs or {}).get("quantization")
    if told and shape.quantization.bits == 16:
        shape = replace(shape, quantization=_quantization_of_method({"quant_method": str(told)}))
    return shape


def read_shape(file: Path) -> Shape | None:
    """The shape that a `config.json` tells; None where the model is not of Llama's build.

    Raises:
        UserError: where the file is damaged, with its path.
    """
    try:
        told = json.loads(file.read_text(encoding="utf-8"))
        told = {**told, **(told.get("text_config") or {})}
        kind = told.get("model_type")
        if kind not in LIKE_LLAMA:
            return None
        heads = int(told["num_attention_heads"])
        biased = 3 if kind == "qwen2" else 4 * bool(told.get("attention_bias"))
        dtype = str(told.get("dtype") or told.get("torch_dtype") or "bfloat16")
        return Shape(
            layers=int(told["num_hidden_layers"]),
            hidden=int(told["hidden_size"]),
            heads=heads,
            kv_heads=int(told.get("num_key_value_heads") or heads),
            intermediate=int(told["intermediate_size"]),
            vocab=int(told["vocab_size"]),
            tied=bool(told.get("tie_word_embeddings", False)),
            head_dim=int(told.get("head_dim") or int(told["hidden_size"]) // heads),
            quantization=_quantization_of_method(told.get("quantization_config") or {}),
            attention_biases=biased,
            head_norms=kind == "qwen3",
            positions=max_positions(told) or 131072,
            dtype_bytes=4 if dtype == "float32" else 2,
            source=str(file),
        )
    except (OSError, UnicodeDecodeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        why = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(one_line(f"{file}: no configuration of a model ({why})")) from None


def max_positions(told: Mapping[str, Any]) -> int | None:
    """How long a sequence of a model may be, as vLLM reads its configuration; None where it does not say.

    Rotary embeddings that are scaled (YaRN: arXiv 2309.00071) reach further than `max_position_embeddings`, which those
    of Llama 3 and LongRoPE count in already.
    """
    length = told.get("max_position_embeddings")
    scaling = told.get("rope_parameters") or told.get("rope_scaling") or {}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if not length or kind in ("default", "llama3", "su", "longrope"):
        return int(length) if length else None
    if kind == "yarn":
        length = scaling.get("original_max_position_embeddings") or length
    return int(int(length) * float(scaling.get("factor") or 1))


def _config_file(model: str, revision: str | None) -> Path | None:
    local = Path(model) / "config.json"
    if local.is_file():
        return local
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def _shape_of_name(model: str) -> Shape | None:
    """The shape of a Llama 3 model by its name: `Meta-` before it, `-Instruct` and a quantization behind it."""
    for name, shape in LLAMA.items():
        if re.search(rf"(^|/|-){re.escape(name)}($|-)", model, re.IGNORECASE):
            return replace(shape, quantization=_quantization_of_name(model, shape), source="the table of Llama 3")
    return None


def _quantization_of_name(model: str, shape: Shape) -> Quantization:
    """What the name of a repository says of its weights."""
    said = _number_in_name(model.rsplit("/", 1)[-1])
    if said.name == "fp8" and model.lower().startswith("meta-llama/"):
        # Attention, and all of the first and the last layer, are as they were ("The Llama 3 Herd of Models", arXiv
        # 2407.21783, section 6.2).
        return replace(said, kept=("self_attn", "layers.0", f"layers.{shape.layers - 1}"))
    return said


def _number_in_name(name: str) -> Quantization:
    """What a name says of weights; 16 bits where it says nothing."""
    return next(
        (Quantization(*each) for words, each in NUMBERS_IN_NAMES.items() if re.search(words, name.upper())),
        Quantization(),
    )


def _quantization_of_method(told: Mapping[str, Any]) -> Quantization:
    """What a `quantization_config` says, or vLLM's argument of that name: 16 bits where it tells no number."""
    method = str(told.get("quant_method") or "").lower()
    if not method:
        return Quantization()
    lists = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules")
    # The output layer is not quantized in any case.
    names = tuple(str(each) for each in next((told[name] for name in lists if told.get(name)), ()))
    groups = told.get("config_groups") or {}
    weights = next((each.get("weights") or {} for each in groups.values()), {}) if isinstance(groups, dict) else {}
    # Of modelopt's algorithms the method tells nothing.
    said = _number_in_name(str(told.get("quant_algo") or method))
    loaded = 8 * bool(told.get("load_in_8bit")) or 4 * bool(told.get("load_in_4bit"))
    bits = int(told.get("bits") or weights.get("num_bits") or loaded or said.bits)
    if bits >= 16:
        return Quantization(kept=names)
    size = told.get("group_size") or weights.get("group_size") or (GROUP_SIZE if bits == 4 else 0)
    is_float = weights.get("type") == "float" or said.name.startswith("fp")
    return Quantization(f"fp{bits}" if is_float else f"int{bits}", bits, max(0, int(size)), names)
