"""Model shapes: published parameter counts, and the files that a shape is read from."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raykd.models import architecture, builtin
from raykd.models.architecture import Quantization
from tiny_llamas import llama_of


# "Model size" of each repository of meta-llama on the Hugging Face hub, from its safetensors: 1.24B, 3.21B, 8.03B,
# 70.6B, 406B parameters.
@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-1B-Instruct", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B-Instruct", 3_212_749_824),
        ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248),
        ("meta-llama/Meta-Llama-3.1-8B", 8_030_261_248),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
        ("meta-llama/Llama-3.1-405B-Instruct-FP8", 405_853_388_800),
        ("hugging-quants/Meta-Llama-3.1-405B-Instruct-AWQ-INT4", 405_853_388_800),
    ],
)
def test_parameter_counts_match_published_llamas(model: str, parameters: int):
    shape = architecture.find_shape(model)
    assert shape is not None
    assert shape.parameters == parameters


@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-3.2-3B", "Llama-3.1-8B"])
def test_parameters_match_transformers(name: str):
    shape = architecture.LLAMA[name]
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_of(shape))
    assert sum(each.numel() for each in model.parameters()) == shape.parameters


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        ({"rope_type": "default"}, 32_768),
        # From the model cards of Qwen 2.5.
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}, 131_072),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8_192}, 32_768),
        ({"rope_type": "linear", "factor": 2.0}, 65_536),
        ({"rope_type": "dynamic", "factor": 2.0}, 65_536),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 8_192,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            32_768,
        ),
    ],
)
def test_max_positions_matches_vllm(scaling: dict, length: int):
    from vllm.config.model import _get_and_verify_max_len

    model = LlamaConfig(max_position_embeddings=32_768, rope_parameters={"rope_theta": 10_000.0, **scaling})
    assert architecture.max_positions({"max_position_embeddings": 32_768, "rope_parameters": scaling}) == length
    # The form of older files.
    older = {"type": scaling["rope_type"], **{name: value for name, value in scaling.items() if name != "rope_type"}}
    assert architecture.max_positions({"max_position_embeddings": 32_768, "rope_scaling": older}) == length
    config: Any = SimpleNamespace(derived_max_model_len_and_key=(32_768, "max_position_embeddings"))
    assert _get_and_verify_max_len(model, config, None, None, False, None) == length


@pytest.mark.parametrize("model", ["raykd/demo-teacher", "raykd/demo-student"])
def test_shape_of_folder_matches_its_model(model: str):
    shape = architecture.find_shape(model)
    assert shape is not None
    folder = builtin.resolve_model(model)
    loaded = LlamaForCausalLM.from_pretrained(folder)
    assert sum(each.numel() for each in loaded.parameters()) == shape.parameters
    assert shape.source == str(Path(folder) / "config.json")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4/config.json
        (
            {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "modules_to_not_convert": None},
            Quantization("int4", 4, 128),
        ),
        (
            {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.up_proj"]},
            Quantization("fp8", 8, 0, ("lm_head", "model.layers.0.mlp.up_proj")),
        ),
        # The form of llm-compressor.
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "group_size": None}}},
                "ignore": ["lm_head", "re:.*self_attn.*"],
            },
            Quantization("fp8", 8, 0, ("lm_head", "re:.*self_attn.*")),
        ),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, Quantization("int8", 8)),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}, Quantization("int4", 4, 128)),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]},
            Quantization("int8", 8, 0, ("lm_head",)),
        ),
        ({"quant_method": "bitsandbytes", "load_in_4bit": False, "load_in_8bit": False}, Quantization()),
        (
            {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]},
            Quantization("fp8", 8, 0, ("lm_head",)),
        ),
        ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, Quantization("fp8", 8)),
        ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4", "group_size": 16}, Quantization("fp4", 4, 16)),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, Quantization("int4", 4, 128)),
        ({"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}, Quantization("int8", 8)),
        ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, Quantization()),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, Quantization("int8", 8)),
        ({"quant_method": "gptq"}, Quantization("int4", 4, 128)),
        ({"quant_method": "mxfp8"}, Quantization("fp8", 8)),
        ({"quant_method": "torchao"}, Quantization()),
        ({}, Quantization()),
    ],
)
def test_quantization_is_read_from_config(config: dict, expected: Quantization, tmp_path: Path):
    tree = llama_of(architecture.LLAMA["Llama-3.2-1B"]).to_dict() | {"quantization_config": config}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    shape = architecture.find_shape(str(tmp_path))
    assert shape is not None
    assert shape.quantization == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama-3.2-1B-Instruct-quantized.w8a8", Quantization("int8", 8, 0, ("lm_head",))),
        ("Llama-3.2-1B-Instruct-GPTQ-Int8", Quantization("int8", 8, 0, ("lm_head",))),
        ("Llama-3.2-1B-Instruct-AWQ", Quantization("int4", 4, 128, ("lm_head",))),
        ("Llama-3.2-1B-Instruct-bnb-4bit", Quantization("int4", 4, 128, ("lm_head",))),
        ("Llama-3.2-1B-Instruct-FP8-KV", Quantization("fp8", 8, 0, ("lm_head",))),
        ("Llama-3.2-1B-Instruct-NVFP4", Quantization("fp4", 4, 128, ("lm_head",))),
        ("Llama-3.2-1B-Instruct-checkpoint8", Quantization(kept=("lm_head",))),
        ("Llama-3.2-8B-it", Quantization(kept=("lm_head",))),
    ],
)
def test_quantization_without_bits_is_read_from_name(name: str, expected: Quantization, tmp_path: Path):
    config = {"quant_method": "quark", "modules_to_not_convert": ["lm_head"]}
    tree = llama_of(architecture.LLAMA["Llama-3.2-1B"]).to_dict() | {"quantization_config": config}
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").write_text(json.dumps(tree))
    shape = architecture.find_shape(str(tmp_path / name))
    assert shape is not None
    assert shape.quantization == expected


def test_unquantized_modules_match_whole_parts_of_a_name():
    meta = architecture.find_shape("meta-llama/Llama-3.1-405B-Instruct-FP8")
    assert meta is not None
    kept = meta.quantization.keeps
    assert kept("model.layers.7.self_attn.q_proj")
    assert kept("model.layers.0.mlp.up_proj") and kept("model.layers.125.mlp.down_proj")
    assert not kept("model.layers.10.mlp.up_proj") and not kept("model.layers.12.mlp.up_proj")
    assert Quantization("fp8", 8, kept=("re:.*self_attn.*",)).keeps("model.layers.3.self_attn.o_proj")
    # Another publisher's checkpoint quantizes all matrices.
    other = architecture.find_shape("RedHatAI/Meta-Llama-3.1-405B-Instruct-FP8")
    assert other is not None
    assert not other.quantization.keeps("model.layers.7.self_attn.q_proj")


def test_engine_quantizes_unquantized_weights():
    shape = architecture.find_shape("meta-llama/Llama-3.1-8B", engine_kwargs={"quantization": "fp8"})
    assert shape is not None
    assert shape.quantization.bits == 8


def test_hub_cache_precedes_the_table(tmp_path: Path):
    repository = tmp_path / "models--meta-llama--Llama-3.1-8B"
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(llama_of(architecture.LLAMA["Llama-3.2-1B"]).to_dict()))
    # huggingface_hub reads the cache's path on import.
    code = (
        "from raykd.models.architecture import find_shape; "
        "found = find_shape('meta-llama/Llama-3.1-8B'); print(found.layers, found.source)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stdout.split() == ["16", str(snapshot / "config.json")], ran.stderr


def test_unknown_model_is_none_and_damaged_config_is_refused(tmp_path: Path):
    assert architecture.find_shape("someone/of-another-build") is None
    assert architecture.find_shape("neither a name nor a folder") is None
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    assert architecture.find_shape(str(tmp_path)) is None
    for text in (
        "{",
        '{"model_type": "llama"}',
        '{"model_type": "llama", "num_attention_heads": 0, "hidden_size": 8}',
        "[]",
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json: not a valid model configuration"):
            architecture.find_shape(str(tmp_path))
