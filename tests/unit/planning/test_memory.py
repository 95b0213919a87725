"""Memory estimates against published sizes and measured forward passes."""

import pytest
import torch
from transformers import LlamaForCausalLM

from raykd.cluster.gpus import GIB, GPUS
from raykd.config.engine import Engine
from raykd.config.experiment import Experiment
from raykd.config.training import Lora, Train
from raykd.models import architecture
from raykd.models.architecture import Shape
from raykd.planning import memory
from raykd.training import batching, student
from raykd.training.examples import Example
from tiny_llamas import llama_of

BF16, FP8 = "meta-llama/Llama-3.1-405B-Instruct", "meta-llama/Llama-3.1-405B-Instruct-FP8"
INT4 = "hugging-quants/Meta-Llama-3.1-405B-Instruct-AWQ-INT4"
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shape_of(model: str) -> Shape:
    found = architecture.find_shape(model)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("model", "unit", "published"),
    [
        # "around 203 GiB of VRAM are needed only for loading the model checkpoint": the repository's model card.
        (INT4, GIB, 203),
        # huggingface.co/blog/llama31, "Inference Memory Requirements", FP16: 810, 140 and 16 GB.
        (BF16, 1e9, 810),
        ("meta-llama/Llama-3.1-70B", 1e9, 140),
        ("meta-llama/Llama-3.1-8B", 1e9, 16),
        # All matrices of the layers in FP8, embedding and output layer in 16 bits: the sizes of its files.
        ("RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8", 1e9, 9.1),
        # huggingface.co/hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4, sizes of its files: 5.73 GB.
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", 1e9, 5.73),
    ],
)
def test_weight_sizes_match_published(model: str, unit: float, published: float):
    assert memory.weight_bytes(shape_of(model)) / unit == pytest.approx(published, rel=0.01)


def test_meta_fp8_keeps_attention_and_outer_layers_in_16_bits():
    # Of 405.85 billion parameters those of 124 layers' feed-forward are in FP8 (arXiv 2407.21783, section 6.2).
    quantized = 124 * 3 * 16384 * 53248
    expected = quantized + 2 * (405_853_388_800 - quantized)
    assert memory.weight_bytes(shape_of(FP8)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("model", "token", "gib_of_16k"),
    [
        # huggingface.co/blog/llama31, "KV cache size": 16k tokens take 1.95 and 4.88 GB of 8B and 70B (16,000 tokens,
        # 2**30 bytes); 405B has as many heads of keys and values as 70B, and 126 / 80 of its layers.
        ("meta-llama/Llama-3.1-8B", 131_072, 1.95),
        ("meta-llama/Llama-3.1-70B", 327_680, 4.88),
        ("meta-llama/Llama-3.1-405B", 516_096, 7.69),
        ("meta-llama/Llama-3.2-1B", 32_768, 0.49),
    ],
)
def test_kv_cache_sizes_match_published(model: str, token: int, gib_of_16k: float):
    assert memory.engine_memory(shape_of(model), Engine(), None).kv_token == token
    assert token * 16_000 / GIB == pytest.approx(gib_of_16k, abs=0.01)


@pytest.mark.parametrize(
    ("model", "tensor", "pipeline", "kind", "holds"),
    [
        # The paper's teacher: INT4 on four GPUs of 80 GB (arXiv 2412.17846), and not on two.
        (INT4, 4, 1, "A100-80G", True),
        (INT4, 4, 1, "H100", True),
        (INT4, 2, 1, "H100", False),
        (INT4, 8, 1, "A100-40G", True),
        (INT4, 4, 1, "A100-40G", False),
        # FP8 lets "the model run within a single server node" (ai.meta.com/blog/meta-llama-3-1), of eight H100.
        (FP8, 8, 1, "H100", True),
        (FP8, 4, 1, "H100", False),
        (FP8, 4, 2, "H100", True),
        (FP8, 4, 1, "H200", True),
        # BF16 by TP 8 x PP 2 over two nodes of eight (blog.vllm.ai/2024/07/23/llama31.html).
        (BF16, 8, 1, "H100", False),
        (BF16, 8, 1, "A100-80G", False),
        (BF16, 8, 2, "H100", True),
        (BF16, 8, 2, "A100-80G", True),
        (BF16, 8, 1, "H200", True),
        ("meta-llama/Llama-3.1-70B", 4, 1, "A100-80G", True),
        ("meta-llama/Llama-3.1-70B", 1, 1, "H100", False),
        ("meta-llama/Llama-3.1-8B", 1, 1, "A10G", True),
        ("meta-llama/Llama-3.1-8B", 1, 1, "T4", False),
        ("hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4", 1, 1, "L4", True),
    ],
)
def test_engines_fit_published_gpus(model: str, tensor: int, pipeline: int, kind: str, holds: bool):
    engine = Engine(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline, engine_kwargs={"max_model_len": 4096})
    needs = memory.engine_memory(shape_of(model), engine, GPUS[kind])
    assert (needs.min_gpu_bytes <= GPUS[kind].bytes) == holds
    assert (needs.sequences(GPUS[kind].bytes) >= 1) == holds


def test_shards_sum_to_the_model_and_its_replicated_kv_heads():
    shape = shape_of(BF16)

    def fullest(tensor: int, pipeline: int) -> int:
        engine = Engine(tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        return memory.engine_memory(shape, engine, GPUS["H100"]).weights

    whole = memory.weight_bytes(shape)
    assert fullest(1, 1) == whole
    assert fullest(8, 1) == pytest.approx(whole / 8, rel=1e-3)
    # With eight KV heads, each of the sixteen processes holds a head that another one holds, too.
    keys_and_values = 126 * 2 * 16384 * 1024 * 2
    assert fullest(16, 1) == pytest.approx((whole + keys_and_values) / 16, rel=1e-3)
    assert fullest(8, 2) == pytest.approx(whole / 16, rel=1e-3)


def test_pipeline_stages_match_vllm():
    from vllm.distributed.utils import get_pp_indices

    for layers in (2, 16, 28, 126):
        for pipeline in (1, 2, 3, 4, 5, 8, 16):
            if pipeline <= layers:
                expected = [get_pp_indices(layers, rank, pipeline) for rank in range(pipeline)]
                assert memory.pipeline_stages(layers, pipeline) == expected


@pytest.mark.parametrize(
    ("kind", "tokens", "sequences"),
    # `EngineArgs.get_batch_defaults` of vLLM 0.29, doubled by performance_mode=throughput.
    [("L4", 4096, 512), ("A100-80G", 4096, 512), ("H100", 16384, 2048), ("B200", 32768, 2048)],
)
def test_server_defaults_match_vllm(kind: str, tokens: int, sequences: int):
    shape = shape_of("meta-llama/Llama-3.1-8B")
    engine_kwargs = {"max_num_batched_tokens": tokens, "max_num_seqs": sequences}
    assert memory.engine_memory(shape, Engine(), GPUS[kind]) == memory.engine_memory(
        shape, Engine(engine_kwargs=engine_kwargs), GPUS[kind]
    )


def test_fp8_kv_cache_and_shorter_length_save_memory():
    shape, gpu = shape_of("meta-llama/Llama-3.1-8B"), GPUS["A10G"]
    plain = memory.engine_memory(shape, Engine(engine_kwargs={"max_model_len": 4096}), gpu)
    small = memory.engine_memory(shape, Engine(engine_kwargs={"max_model_len": 4096, "kv_cache_dtype": "fp8"}), gpu)
    assert plain.kv_token == 2 * small.kv_token == 131_072
    assert small.sequences(gpu.bytes) >= 2 * plain.sequences(gpu.bytes) > 0
    # At Llama 3.1's default of 131,072 tokens, a sequence takes 16 GiB.
    whole = memory.engine_memory(shape, Engine(), gpu)
    assert whole.kv_sequence == 16 * GIB
    assert whole.sequences(gpu.bytes) < 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("modules", [("q_proj", "k_proj", "v_proj", "o_proj"), ("v_proj",), ALL])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layer_activations_equal_a_measured_forward_pass(
    dtype: str, modules: tuple, dropout: float, checkpointing: bool
):
    lora = Lora(r=4, target_modules=modules, lora_dropout=dropout)
    # Padded rows, because CPUs have no kernel for packed ones and copy them.
    train = Train(dtype=dtype, gradient_checkpointing=checkpointing, packing=False)  # type: ignore[arg-type]
    rows = [Example(str(number), [1] * 40, [2] * 8) for number in range(2)]
    kept = {layers: _saved_bytes(_shape(layers), lora, train, rows) for layers in (2, 3)}
    expected = memory.activation_bytes(_shape(3), lora, train) - memory.activation_bytes(_shape(2), lora, train)
    assert (kept[3] - kept[2]) / (2 * 48) == expected
    assert kept[3] <= 2 * 48 * memory.activation_bytes(_shape(3), lora, train) + 16 * (64 * 4 + 3 * 4 * 256)


def test_checkpointing_keeps_only_layer_inputs():
    shape = shape_of("meta-llama/Llama-3.1-8B")
    with_it, without = Train(gradient_checkpointing=True), Train()
    assert memory.activation_bytes(shape, Lora(), with_it) == 32 * 2 * 4096 + 6 * 4096 + 4
    assert memory.activation_bytes(shape, Lora(), without) > 15 * memory.activation_bytes(shape, Lora(), with_it)


@pytest.mark.parametrize(
    ("kind", "length", "checkpointing", "holds"),
    [
        ("A10G", 1024, True, True),
        ("L4", 2048, True, True),
        ("A10G", 16384, True, False),
        ("L4", 32768, True, False),
        ("A10G", 2048, False, False),
        ("A100-80G", 16384, True, True),
    ],
)
def test_llama_8b_trains_on_24_gb_with_checkpointing_and_short_rows(
    kind: str, length: int, checkpointing: bool, holds: bool
):
    train = Train(micro_batch_size=1, max_length=length, gradient_checkpointing=checkpointing)
    needs = memory.worker_memory(shape_of("meta-llama/Llama-3.1-8B"), Lora(), train, targets=512)
    assert needs.base == 16_060_522_496
    assert memory.fits(needs.total, GPUS[kind].bytes) == holds


def test_zero_stages_shard_as_published():
    # Rajbhandari et al., arXiv 1910.02054, figure 1: stage 1 shards the optimizer, stage 2 the gradients, stage 3 the
    # weights, of which DeepSpeed gathers a billion at a time.
    shape, lora, workers = shape_of("meta-llama/Llama-3.1-70B"), Lora(r=64), 8
    trained = shape.adapter_parameters(64, lora.target_modules)
    needs = [
        memory.worker_memory(shape, lora, Train(zero_stage=stage, dtype=dtype, num_workers=workers), targets=512)  # type: ignore[arg-type]
        for stage, dtype in ((0, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "bfloat16"))
    ]
    assert [each.optimizer for each in needs] == [8 * trained, *[12 * trained // workers] * 3]
    assert [each.gradients for each in needs] == [
        4 * trained,
        6 * trained,
        *[(4 // 8 + 2) * trained + trained // 2] * 2,
    ]
    assert [each.base // shape.parameters for each in needs[:3]] == [4, 2, 2]
    assert needs[3].base == shape.parameters * 2 // workers + 2 * 10**9


def test_loss_chunk_matches_student():
    assert memory.CHUNK_ELEMENTS == student.CHUNK_ELEMENTS
    needs = memory.worker_memory(shape_of("meta-llama/Llama-3.1-8B"), Lora(), Train(micro_batch_size=8), targets=512)
    assert needs.loss <= 1.2 * GIB
    few = memory.worker_memory(shape_of("meta-llama/Llama-3.1-8B"), Lora(), Train(micro_batch_size=1), targets=100)
    assert few.loss == 3 * 4 * 100 * 128256


def _shape(layers: int) -> Shape:
    return Shape(layers, 64, 4, 2, 176, 256, False, 16)


def _saved_bytes(shape: Shape, lora: Lora, train: Train, rows: list[Example]) -> int:
    """Return the bytes that autograd saves for the backward pass, without the parameters."""
    config = llama_of(shape)
    dtype = getattr(torch, train.dtype)
    base = LlamaForCausalLM(config).to(dtype)
    tree = {"name": "memory", "teacher": {"model": "a"}, "student": {"model": "b"}}
    arm = Experiment.model_validate(tree).arm("default")
    student_config = arm.student.model_copy(update={"lora": lora})
    # DeepSpeed converts the adapter to the base model's type.
    learner = student.wrap_student(base, arm.model_copy(update={"student": student_config, "train": train}), seed=0).to(
        dtype
    )
    parameters = {each.untyped_storage().data_ptr() for each in learner.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        learner(batching.collate(rows, 0, train.packing))
    return sum(each.untyped_storage().nbytes() for at, each in kept.items() if at not in parameters)
