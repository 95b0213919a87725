"""Architecture: a model's layers, widths, heads and quantization, read from its configuration without loading it."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from raykd.display import display
from raykd.errors import UserError
from raykd.models.builtin import resolve_model

# Decoders with Llama's architecture, whose parameters are known. Qwen 2 adds biases to queries, keys and values.
LIKE_LLAMA = ("llama", "mistral", "qwen2", "qwen3")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
# Group size and scheme of the INT4 repositories of hugging-quants and of most others.
GROUP_SIZE = 128
# Quantization by parts of the names of repositories, methods and algorithms: name, bits, group size. The first match
# counts, since a name may have several parts (W4A16_NVFP4, GPTQ-Int8).
NUMBERS_IN_NAMES = {
    "FP4": ("fp4", 4, GROUP_SIZE),
    r"W4A|(?<![A-Z])INT4|(?<!\d)4-?BIT": ("int4", 4, GROUP_SIZE),
    "FP8": ("fp8", 8, 0),
    r"W8A|(?<![A-Z])INT8|(?<!\d)8-?BIT": ("int8", 8, 0),
    "AWQ|GPTQ": ("int4", 4, GROUP_SIZE),
}


@dataclass(frozen=True)
class Quantization:
    """The storage format of a layer's matrices. Embeddings, output layer and norms are assumed not to be quantized."""

    name: str = "bf16"
    bits: int = 16
    group_size: int = 0
    """Weights of an input column that share a scale and a zero point (INT4); 0 for one scale per output."""
    kept: tuple[str, ...] = ()
    """Modules that are not quantized: consecutive parts of a dotted name, or `re:` and a regular expression."""

    def keeps(self, module: str) -> bool:
        """Return whether a module, such as `model.layers.0.self_attn.q_proj`, is not quantized."""
        return self.bits >= 16 or any(_names_module(pattern, module) for pattern in self.kept)

    def matrix_bytes(self, inputs: int, outputs: int) -> float:
        """Return the bytes of a quantized matrix with its scales.

        AWQ and GPTQ have a scale of 16 bits and a zero point (as many bits as a weight) for each group; FP8 has a scale
        of 32 bits for each output.
        """
        weights = inputs * outputs * self.bits / 8
        if self.group_size:
            return weights + math.ceil(inputs / self.group_size) * outputs * (2 + self.bits / 8)
        return weights + outputs * 4


def _names_module(pattern: str, module: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return f".{pattern}." in f".{module}."


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder with Llama's architecture."""

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
    """Number of attention projections with a bias, in the order of `ATTENTION`: 0, 3 (Qwen 2) or 4."""
    head_norms: bool = False
    """Whether queries and keys are normalized in each head (Qwen 3)."""
    positions: int = 131072
    """Context length in tokens, prompt and answer together; the default is Llama 3's."""
    source: str = "given"
    """The file or table that the shape was read from."""

    def __post_init__(self) -> None:
        numbers = (self.layers, self.hidden, self.heads, self.kv_heads, self.intermediate, self.vocab, self.head_dim)
        if min(numbers) < 1 or self.heads % self.kv_heads:
            raise UserError(f"invalid shape of a decoder: {self}")

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of each matrix of a layer, by name."""
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
        """Parameters of a layer outside its matrices: norms and biases."""
        outputs = [self.matrices[name][1] for name in ATTENTION]
        head_norms = 2 * self.head_dim if self.head_norms else 0
        return 2 * self.hidden + head_norms + sum(outputs[: self.attention_biases])

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        return sum(inputs * outputs for inputs, outputs in self.matrices.values()) + self.layer_vectors

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the embedding; an untied output layer has as many."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters; a tied embedding and output layer count once."""
        ends = self.embedding_parameters * (1 if self.tied else 2) + self.hidden
        return self.layers * self.layer_parameters + ends

    def adapter_parameters(self, rank: int, modules: tuple[str, ...]) -> int:
        """Return the parameters of a LoRA adapter on the named matrices of every layer; other names are ignored."""
        sides = (sum(self.matrices[name]) for name in modules if name in self.matrices)
        return self.layers * rank * sum(sides)

    def modules(self, layer: int) -> Iterator[tuple[str, int, int]]:
        """Yield name (as in transformers), inputs and outputs of each matrix of a layer."""
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
    """Return a model's shape from local files or the table of Llama 3; nothing is downloaded.

    Args:
        model: a folder, a built-in model, or a name on the hub. For the last, `config.json` must be in the hub's cache,
            or the model in the table.
        revision: branch, tag or commit on the hub.
        engine_kwargs: vLLM's arguments; its `quantization` applies to weights that are not quantized yet.

    Returns:
        the shape; None where it is unknown, or the architecture is not Llama's.

    Raises:
        UserError: a `config.json` exists and cannot be read.
    """
    file = _config_file(resolve_model(model), revision)
    shape = read_shape(file) if file else _shape_of_name(model)
    if shape is None:
        return None
    if file and shape.quantization.bits == 16:
        by_name, kept = _quantization_of_name(model, shape), shape.quantization.kept
        shape = replace(shape, quantization=replace(by_name, kept=kept or by_name.kept))
    method = (engine_kwargs or {}).get("quantization")
    if method and shape.quantization.bits == 16:
        shape = replace(shape, quantization=_quantization_of_method({"quant_method": str(method)}))
    return shape


def read_shape(file: Path) -> Shape | None:
    """Return the shape from a `config.json`; None where the architecture is not Llama's.

    Raises:
        UserError: the file is damaged; the message names it.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        config = {**config, **(config.get("text_config") or {})}
        model_type = config.get("model_type")
        if model_type not in LIKE_LLAMA:
            return None
        heads = int(config["num_attention_heads"])
        attention_biases = 4 if config.get("attention_bias") else 0
        if model_type == "qwen2":
            attention_biases = 3
        return Shape(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
            quantization=_quantization_of_method(config.get("quantization_config") or {}),
            attention_biases=attention_biases,
            head_norms=model_type == "qwen3",
            positions=max_positions(config) or 131072,
            source=str(file),
        )
    except (OSError, UnicodeDecodeError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        reason = f"has no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(display(f"{file}: not a valid model configuration ({reason})")) from None


def max_positions(config: Mapping[str, Any]) -> int | None:
    """Return a model's longest sequence in tokens, computed as in vLLM; None where the configuration has none.

    Scaled rotary embeddings (YaRN: arXiv 2309.00071) extend `max_position_embeddings`; for Llama 3 and LongRoPE this
    field includes the scaling already.

    Args:
        config: the fields of `config.json`.
    """
    length = config.get("max_position_embeddings")
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
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
    """Return the shape of a Llama 3 model by name, with an optional prefix `Meta-` and suffixes such as `-Instruct`."""
    for name, shape in LLAMA.items():
        if re.search(rf"(^|/|-){re.escape(name)}($|-)", model, re.IGNORECASE):
            return replace(shape, quantization=_quantization_of_name(model, shape), source="the table of Llama 3")
    return None


def _quantization_of_name(model: str, shape: Shape) -> Quantization:
    """Return the quantization that a repository's name implies."""
    quantization = _number_in_name(model.rsplit("/", 1)[-1])
    if quantization.name == "fp8" and model.lower().startswith("meta-llama/"):
        # Attention, and the whole first and last layer, are not quantized ("The Llama 3 Herd of Models", arXiv
        # 2407.21783, section 6.2).
        return replace(quantization, kept=("self_attn", "layers.0", f"layers.{shape.layers - 1}"))
    return quantization


def _number_in_name(name: str) -> Quantization:
    """Return the first quantization of `NUMBERS_IN_NAMES` that a name matches; 16 bits without a match."""
    for pattern, (kind, bits, group_size) in NUMBERS_IN_NAMES.items():
        if re.search(pattern, name.upper()):
            return Quantization(kind, bits, group_size)
    return Quantization()


def _quantization_of_method(config: Mapping[str, Any]) -> Quantization:
    """Return the quantization of a `quantization_config`, or of vLLM's argument; 16 bits without a number of bits."""
    method = str(config.get("quant_method") or "").lower()
    if not method:
        return Quantization()
    kept = _modules_kept(config)
    groups = config.get("config_groups") or {}
    weights = next((group.get("weights") or {} for group in groups.values()), {}) if isinstance(groups, dict) else {}
    # For modelopt, only the algorithm names the format.
    by_name = _number_in_name(str(config.get("quant_algo") or method))
    bits = int(config.get("bits") or weights.get("num_bits") or _bitsandbytes_bits(config) or by_name.bits)
    if bits >= 16:
        return Quantization(kept=kept)
    group_size = config.get("group_size") or weights.get("group_size") or (GROUP_SIZE if bits == 4 else 0)
    is_float = weights.get("type") == "float" or by_name.name.startswith("fp")
    return Quantization(f"fp{bits}" if is_float else f"int{bits}", bits, max(0, int(group_size)), kept)


def _modules_kept(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the modules that a `quantization_config` excludes."""
    for field in ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules"):
        if config.get(field):
            return tuple(str(module) for module in config[field])
    return ()


def _bitsandbytes_bits(config: Mapping[str, Any]) -> int:
    if config.get("load_in_8bit"):
        return 8
    return 4 if config.get("load_in_4bit") else 0
