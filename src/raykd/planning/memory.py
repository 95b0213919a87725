"""Memory of an engine's process and of a training worker, estimated from the model's shape.

Engines: the fullest process of vLLM's tensor and pipeline parallel split. Workers: tensors that `training.student`,
`training.packing` and `training.losses` keep for the backward pass, and DeepSpeed's buffers.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from raykd.cluster.gpus import GIB, Gpu
from raykd.config.engine import Engine
from raykd.config.training import Lora, Train
from raykd.models.adapters import padded_rank
from raykd.models.architecture import Quantization, Shape

# Fixed memory of a process on a GPU: CUDA context and libraries, NCCL buffers of multi-process groups, and the CUDA
# graphs of an engine.
CUDA_CONTEXT, NCCL_BUFFERS, CUDA_GRAPHS = GIB // 2, GIB // 2, GIB
# Main memory of Python and its libraries.
HOST_PROCESS = GIB
# vLLM 0.29: default of gpu_memory_utilization.
UTILIZATION = 0.92
# Defaults of max_num_batched_tokens and max_num_seqs in vLLM 0.29, doubled by performance_mode=throughput: a server on
# GPUs of 160 GiB or more, of 70 GiB or more except A100, on other GPUs, and an engine of Ray Data.
_SERVED_LARGEST, _SERVED_LARGE, _SERVED, _BATCH = (32768, 2048), (16384, 2048), (4096, 512), (4096, 256)
# Least length to plan for where vLLM computes max_model_len from the free memory.
_MIN_CONTEXT = 1024
# Bytes of a logit: the model's, its float32 copy, and the sampler's copy.
_LOGIT_BYTES = 10
# Equals `student.CHUNK_ELEMENTS`.
CHUNK_ELEMENTS = 1 << 26
# Peak number of float32 copies of a chunk of logits, where there is one chunk and where there are several.
_COPIES_OF_SINGLE_CHUNK, _COPIES_OF_SEVERAL_CHUNKS = 3.0, 4.6
# DeepSpeed's default of stage3_max_live_parameters.
ZERO3_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class EngineMemory:
    """Memory of an engine's fullest process, in bytes."""

    weights: int
    adapters: int
    work: int
    """Activations and logits of a step, and fixed memory."""
    kv_token: int
    """KV cache of a token."""
    max_model_len: int
    max_num_seqs: int
    utilization: float
    """Fraction of the GPU's memory that the engine takes (`gpu_memory_utilization`); 1 on a CPU."""

    @property
    def min_gpu_bytes(self) -> int:
        """Least memory of a GPU: vLLM does not start unless one sequence of `max_model_len` fits."""
        return math.ceil((self.fixed + self.kv_sequence) / self.utilization)

    @property
    def fixed(self) -> int:
        """All memory except the KV cache."""
        return self.weights + self.adapters + self.work

    @property
    def kv_sequence(self) -> int:
        """KV cache of a sequence of `max_model_len`."""
        return self.kv_token * self.max_model_len

    def sequences(self, memory: int) -> int:
        """Return how many sequences of `max_model_len` fit into a GPU of `memory` bytes; may be negative."""
        return min(self.max_num_seqs, int((memory * self.utilization - self.fixed) // self.kv_sequence))


def engine_memory(
    shape: Shape,
    engine: Engine,
    gpu: Gpu | None,
    adapters: tuple[int, int] = (0, 0),
    served: bool = True,
) -> EngineMemory:
    """Return the memory of an engine's fullest process.

    Args:
        shape: the model's shape.
        engine: the engine's configuration.
        gpu: GPU of each process; None for a CPU.
        adapters: number of LoRA adapters, and their largest rank.
        served: whether Ray Serve runs the engine, rather than Ray Data.
    """
    kwargs, tensor = engine.engine_kwargs, engine.tensor_parallel_size
    layers = pipeline_stages(shape.layers, engine.pipeline_parallel_size)
    width = _bytes_per_value(kwargs.get("dtype"))
    tokens, sequences = _serving_defaults(gpu) if served else _BATCH
    length = model_length(shape, engine)
    sequences = kwargs.get("max_num_seqs") or sequences
    tokens = kwargs.get("max_num_batched_tokens") or min(tokens, sequences * length)
    # vLLM replicates KV heads where there are fewer than tensor parallel processes.
    heads = max(1, shape.kv_heads // tensor)
    kv_width = 1 if str(kwargs.get("kv_cache_dtype", "auto")).startswith("fp8") else width
    bytes_per_token = 4 * shape.hidden + (3 * shape.intermediate + shape.head_dim * (shape.heads + 2 * heads)) / tensor
    work = tokens * bytes_per_token * width + min(sequences, tokens) * shape.vocab * _LOGIT_BYTES
    if gpu:
        work += CUDA_CONTEXT
        if engine.tensor_parallel_size * engine.pipeline_parallel_size > 1:
            work += NCCL_BUFFERS
        if not kwargs.get("enforce_eager"):
            work += CUDA_GRAPHS
    else:
        work += HOST_PROCESS
    number, rank = adapters
    return EngineMemory(
        weights=max(_stage_weights(shape, tensor, first, last, width) for first, last in layers),
        adapters=number * shape.adapter_parameters(padded_rank(rank), tuple(shape.matrices)) * width if number else 0,
        work=round(work),
        kv_token=max(last - first for first, last in layers) * 2 * heads * shape.head_dim * kv_width,
        max_model_len=length,
        max_num_seqs=sequences,
        utilization=(kwargs.get("gpu_memory_utilization") or UTILIZATION) if gpu else 1.0,
    )


def _serving_defaults(gpu: Gpu | None) -> tuple[int, int]:
    """Return vLLM's defaults of max_num_batched_tokens and max_num_seqs for a server."""
    if gpu is None or gpu.bytes < 70 * GIB:
        return _SERVED
    if gpu.bytes >= 160 * GIB:
        return _SERVED_LARGEST
    return _SERVED if "A100" in gpu.kind else _SERVED_LARGE


def model_length(shape: Shape, engine: Engine) -> int:
    """Return the longest sequence of an engine, in tokens: `max_model_len`, or the model's own maximum."""
    length = engine.engine_kwargs.get("max_model_len")
    if length == -1:
        # vLLM then computes it from the free memory.
        return min(_MIN_CONTEXT, shape.positions)
    return length or shape.positions


def weight_bytes(shape: Shape, dtype: str | None = None) -> int:
    """Return the bytes of all weights of a model.

    Args:
        shape: the model's shape.
        dtype: vLLM's `dtype`, the type of weights that are not quantized.
    """
    return _stage_weights(shape, 1, 0, shape.layers, _bytes_per_value(dtype))


def pipeline_stages(layers: int, pipeline: int) -> list[tuple[int, int]]:
    """Return the first layer of each pipeline stage, and the layer after its last.

    As in `vllm.distributed.get_pp_indices`, the remainder goes to the middle stages, from the last but one backwards.
    """
    sizes = [layers // pipeline] * pipeline
    for offset in range(2, layers % pipeline + 2):
        sizes[-offset] += 1
    ends = [sum(sizes[: stage + 1]) for stage in range(pipeline)]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@lru_cache(maxsize=4096)
def _stage_weights(shape: Shape, tensor: int, first: int, last: int, width: int) -> int:
    """Return the bytes of layers `first` to `last` - 1 in one of `tensor` processes.

    The first stage also holds the embedding, the last one the output layer.
    """
    total = sum(_layer_weights(shape, layer, tensor, width) for layer in range(first, last))
    if first == 0:
        total += math.ceil(shape.vocab / tensor) * shape.hidden * width
    if last == shape.layers:
        # The final norm.
        total += shape.hidden * width
        # A tied output layer shares the embedding, unless that is in another pipeline stage.
        if not shape.tied or first > 0:
            total += math.ceil(shape.vocab / tensor) * shape.hidden * width
    return math.ceil(total)


def _layer_weights(shape: Shape, layer: int, tensor: int, width: int) -> float:
    total = float(shape.layer_vectors * width)
    for module, inputs, outputs in shape.modules(layer):
        # vLLM replicates KV heads where there are fewer than tensor parallel processes.
        shards = min(tensor, shape.kv_heads) if module.endswith(("k_proj", "v_proj")) else tensor
        quantization: Quantization = shape.quantization
        if quantization.keeps(module):
            total += inputs * outputs * width / shards
        else:
            total += quantization.matrix_bytes(inputs, outputs) / shards
    return total


def _bytes_per_value(dtype: Any) -> int:
    """Return the bytes of a value of vLLM's `dtype`; 2 for `auto`, which never stands for float32."""
    return 4 if str(dtype) in ("float32", "float") else 2


@dataclass(frozen=True)
class WorkerMemory:
    """Memory of one training worker, in bytes."""

    base: int
    """Frozen weights; under ZeRO stage 3 the worker's shard and the gathered parameters."""
    adapter: int
    gradients: int
    optimizer: int
    """Both moments of Adam, and float32 weights from ZeRO stage 1 on."""
    buffers: int
    """DeepSpeed's gradient buffers."""
    activations: int
    """Activations kept for the backward pass, and recomputed in it."""
    loss: int
    """Logits of target tokens at the peak of the loss."""
    fixed: int

    @property
    def total(self) -> int:
        """Peak memory."""
        state = self.base + self.adapter + self.gradients + self.optimizer + self.buffers + self.fixed
        return state + self.activations + self.loss


def worker_memory(shape: Shape, lora: Lora, train: Train, targets: int, on_gpu: bool = True) -> WorkerMemory:
    """Return the memory of one training worker for rows of the maximum length.

    Args:
        shape: the student's shape.
        lora: configuration of its adapter.
        train: training configuration.
        targets: largest number of target tokens of a row.
        on_gpu: whether the worker runs on a GPU.
    """
    width, stage, workers = (2 if train.dtype == "bfloat16" else 4), train.zero_stage, train.num_workers
    trained = shape.adapter_parameters(lora.r, lora.target_modules)
    rows = min(train.micro_batch_size, math.ceil(train.batch_size / workers))
    tokens, chunk = rows * train.max_length, max(1, CHUNK_ELEMENTS // shape.vocab)
    target_tokens = rows * min(targets, train.max_length)
    shards = 1 if stage < 1 else workers
    base, adapter = shape.parameters * width, trained * width
    if stage == 3:
        base = math.ceil(base / workers) + min(base, ZERO3_LIVE_PARAMETERS * width)
        adapter = math.ceil(adapter / workers)
    gradients = {
        0: 4 * trained,
        # The float32 sum, and the micro-batch's gradients unless they are float32 too.
        1: (4 if width == 4 else 4 + width) * trained,
        2: math.ceil(4 * trained / shards) + width * trained,
        3: math.ceil(4 * trained / shards) + width * trained,
    }[stage]
    kept = activation_bytes(shape, lora, train)
    recomputed = _backward_bytes(shape, width)
    if train.gradient_checkpointing:
        recomputed += layer_activation_bytes(shape, lora, width)
    copies = _COPIES_OF_SINGLE_CHUNK if target_tokens <= chunk else _COPIES_OF_SEVERAL_CHUNKS
    peak_loss = copies * 4 * min(target_tokens, chunk) * shape.vocab
    fixed = HOST_PROCESS
    if on_gpu:
        fixed = CUDA_CONTEXT + NCCL_BUFFERS if workers > 1 else CUDA_CONTEXT
    # Logits are freed before the layers' backward passes, so only the larger of the two peaks counts.
    return WorkerMemory(
        base=base,
        adapter=adapter,
        gradients=gradients,
        optimizer=math.ceil((8 if stage < 1 else 12) * trained / shards),
        # Stage 1 accumulates in float32, stages 2 and 3 in the type of the gradients.
        buffers=trained * {0: 0, 1: 4, 2: width, 3: width}[stage],
        activations=round(
            tokens * kept + target_tokens * shape.hidden * width + max(0, tokens * recomputed - peak_loss)
        ),
        loss=round(peak_loss),
        fixed=fixed,
    )


def activation_bytes(shape: Shape, lora: Lora, train: Train) -> float:
    """Return the bytes per token that are kept from the forward to the backward pass, without those of the loss.

    With checkpointing, these are the inputs of the layers; without, every tensor that a layer's backward pass reads.
    The final norm adds its input and scale in float32, and its output.
    """
    width = 2 if train.dtype == "bfloat16" else 4
    per_layer = shape.hidden * width if train.gradient_checkpointing else layer_activation_bytes(shape, lora, width)
    return shape.layers * per_layer + 4 * shape.hidden + 4 + shape.hidden * width


def layer_activation_bytes(shape: Shape, lora: Lora, width: int) -> int:
    """Return the bytes per token that one layer keeps for its backward pass.

    The matrices are frozen, so autograd keeps the inputs only of those with an adapter. Norms keep their input and
    scale in float32. Attention keeps queries, keys, values, its output, and a float32 sum for each head. The gated
    feed-forward unit keeps both inputs and the activation.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    adapted = set(lora.target_modules) & set(shape.matrices)
    total = 2 * (4 * shape.hidden + 4) + (2 * queries + 2 * keys) * width + 4 * shape.heads
    total += 3 * shape.intermediate * width + len(adapted) * lora.r * width
    if lora.lora_dropout:
        # Each adapter keeps its own dropped-out input and the mask (1 byte a value on a GPU).
        return total + sum(shape.matrices[name][0] for name in adapted) * 2 * width
    # `o_proj` needs nothing more: its input is the output of attention, which is kept in any case.
    if adapted & {"q_proj", "k_proj", "v_proj"}:
        total += shape.hidden * width
    if adapted & {"gate_proj", "up_proj"}:
        total += shape.hidden * width
    if "down_proj" in adapted:
        total += shape.intermediate * width
    return total


def _backward_bytes(shape: Shape, width: int) -> int:
    """Return the peak bytes per token of gradients in a layer's backward pass.

    These are three gradients of the gated unit, and float32 copies of a norm's gradient.
    """
    return 3 * shape.intermediate * width + 16 * shape.hidden


def fits(needed: int, memory: int) -> bool:
    """Return whether a training worker fits; 5 % of the memory is left for fragmentation."""
    return needed <= memory * 0.95


def holds_engine(gpu: Gpu, shape: Shape, engine: Engine, needs: EngineMemory) -> bool:
    """Return whether a GPU holds a process of an engine, and supports its type.

    vLLM computes in bfloat16, except where `dtype` is float16 or the weights have 4 bits.
    """
    is_bfloat16 = engine.engine_kwargs.get("dtype", "auto") in ("auto", "bfloat16") and shape.quantization.bits != 4
    return needs.min_gpu_bytes <= gpu.bytes and (gpu.has_bfloat16 or not is_bfloat16)


def holds_worker(gpu: Gpu, needed: int, train: Train) -> bool:
    """Return whether a GPU holds a training worker, and supports its type."""
    return fits(needed, gpu.bytes) and (gpu.has_bfloat16 or train.dtype != "bfloat16")
