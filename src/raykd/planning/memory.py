"""Memory: bytes that an engine's process and a training worker need, by the model's shape.

Engines: vLLM's split over T tensor and P pipeline parallel processes, the fullest of which is reckoned. Workers: what
`student`, `packed` and `losses` keep for the backward pass, and what DeepSpeed holds beside it.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from raykd.cluster.gpus import GIB, Gpu
from raykd.config.engine import Engine
from raykd.config.sections import Lora, Train
from raykd.models.adapters import padded_rank
from raykd.models.architecture import Quantization, Shape

# What a process holds on a GPU beside what is reckoned here: CUDA's context and libraries, NCCL's buffers between
# several of them, and an engine's recorded graphs.
CUDA_CONTEXT, NCCL_BUFFERS, CUDA_GRAPHS = GIB // 2, GIB // 2, GIB
# What Python and the libraries take of a machine's memory.
HOST_PROCESS = GIB
# vLLM 0.29: the share of a GPU that an engine takes.
UTILIZATION = 0.92
# vLLM 0.29, doubled by performance_mode=throughput: tokens in a step and sequences at a time, as a server on GPUs from
# 160 GiB on, on those from 70 on that are no A100, on others, and under Ray Data.
_SERVED_LARGEST, _SERVED_LARGE, _SERVED, _BATCH = (32768, 2048), (16384, 2048), (4096, 512), (4096, 256)
# Tokens of a sequence that there should be room for where vLLM is to find out how many there is.
_MIN_CONTEXT = 1024
# Logits of one sequence: the model's, in float32, and a sampler's copy.
_LOGIT_BYTES = 10
# As `student.CHUNK_ELEMENTS`, and the float32 copies of a chunk at its peak: of the only one, and of several.
CHUNK_ELEMENTS, _COPIES, _COPIES_OF_SEVERAL = 1 << 26, 3.0, 4.6
# DeepSpeed's default: elements of the weights that stage 3 holds gathered at a time.
ZERO3_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class EngineMemory:
    """What the fullest process of an engine needs, in bytes."""

    weights: int
    adapters: int
    work: int
    """For a step's activations and logits, and what is there whatever the model."""
    kv_token: int
    """Keys and values of a token."""
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
        """All but keys and values."""
        return self.weights + self.adapters + self.work

    @property
    def kv_sequence(self) -> int:
        """Keys and values of a sequence of `max_model_len`."""
        return self.kv_token * self.max_model_len

    def sequences(self, memory: int) -> int:
        """How many sequences of `max_model_len` fit into a GPU's memory at a time; less than 1 is none."""
        return min(self.max_num_seqs, int((memory * self.utilization - self.fixed) // self.kv_sequence))


def engine_memory(
    shape: Shape,
    engine: Engine,
    gpu: Gpu | None,
    adapters: tuple[int, int] = (0, 0),
    served: bool = True,
) -> EngineMemory:
    """What the fullest process of an engine needs.

    Args:
        shape: the model's.
        engine: the configuration's section.
        gpu: what it runs on; None for a CPU.
        adapters: how many LoRA adapters it holds, and the largest rank.
        served: whether Ray Serve runs it, rather than Ray Data.
    """
    told, tensor = engine.engine_kwargs, engine.tensor_parallel_size
    layers = pipeline_stages(shape.layers, engine.pipeline_parallel_size)
    width = _bytes_per_value(told.get("dtype"))
    tokens, sequences = _serving_defaults(gpu) if served else _BATCH
    length = model_length(shape, engine)
    sequences = told.get("max_num_seqs") or sequences
    tokens = told.get("max_num_batched_tokens") or min(tokens, sequences * length)
    # Heads of keys and values that are fewer than processes are there more than once.
    heads = max(1, shape.kv_heads // tensor)
    cached = 1 if str(told.get("kv_cache_dtype", "auto")).startswith("fp8") else width
    each_token = 4 * shape.hidden + (3 * shape.intermediate + shape.head_dim * (shape.heads + 2 * heads)) / tensor
    work = tokens * each_token * width + min(sequences, tokens) * shape.vocab * _LOGIT_BYTES
    if gpu:
        several = engine.tensor_parallel_size * engine.pipeline_parallel_size > 1
        work += CUDA_CONTEXT + NCCL_BUFFERS * several + CUDA_GRAPHS * (not told.get("enforce_eager"))
    else:
        work += HOST_PROCESS
    number, rank = adapters
    return EngineMemory(
        weights=max(_stage_weights(shape, tensor, first, last, width) for first, last in layers),
        adapters=number * shape.adapter_parameters(padded_rank(rank), tuple(shape.matrices)) * width if number else 0,
        work=round(work),
        kv_token=max(last - first for first, last in layers) * 2 * heads * shape.head_dim * cached,
        max_model_len=length,
        max_num_seqs=sequences,
        utilization=(told.get("gpu_memory_utilization") or UTILIZATION) if gpu else 1.0,
    )


def _serving_defaults(gpu: Gpu | None) -> tuple[int, int]:
    """Tokens in a step and sequences at a time of an engine that serves, where neither is told."""
    if gpu is None or gpu.bytes < 70 * GIB:
        return _SERVED
    if gpu.bytes >= 160 * GIB:
        return _SERVED_LARGEST
    return _SERVED if "A100" in gpu.kind else _SERVED_LARGE


def model_length(shape: Shape, engine: Engine) -> int:
    """How long a sequence of an engine may be: `max_model_len`, or what the model was made for."""
    told = engine.engine_kwargs.get("max_model_len")
    # By -1 vLLM takes what there is room for.
    return min(_MIN_CONTEXT, shape.positions) if told == -1 else told or shape.positions


def weight_bytes(shape: Shape, dtype: str | None = None) -> int:
    """Bytes of all weights of a model.

    Args:
        shape: the model's.
        dtype: of the weights that are not quantized, as vLLM's argument has it.
    """
    return _stage_weights(shape, 1, 0, shape.layers, _bytes_per_value(dtype))


def kv_bytes_per_token(shape: Shape, width: int = 2) -> int:
    """Bytes of a token's keys and values in all layers, of values of `width` bytes."""
    return shape.layers * 2 * shape.kv_heads * shape.head_dim * width


def pipeline_stages(layers: int, pipeline: int) -> list[tuple[int, int]]:
    """First and last but one layer of each pipeline stage, as vLLM divides them (`vllm.distributed.get_pp_indices`):
    what is left over goes to the middle stages, from the last but one on."""
    sizes = [layers // pipeline] * pipeline
    for number in range(2, layers % pipeline + 2):
        sizes[-number] += 1
    ends = [sum(sizes[: number + 1]) for number in range(pipeline)]
    return [(end - size, end) for end, size in zip(ends, sizes, strict=True)]


@lru_cache(maxsize=4096)
def _stage_weights(shape: Shape, tensor: int, first: int, last: int, width: int) -> int:
    """Bytes of the layers from first up to last, with their ends, in one of so many tensor parallel processes."""
    total = sum(_layer_weights(shape, layer, tensor, width) for layer in range(first, last))
    if first == 0:
        total += math.ceil(shape.vocab / tensor) * shape.hidden * width
    if last == shape.layers:
        # A tied output layer is the embedding, and a copy of it where that is in another stage.
        is_own = not shape.tied or first > 0
        total += math.ceil(shape.vocab / tensor) * shape.hidden * width * is_own + shape.hidden * width
    return math.ceil(total)


def _layer_weights(shape: Shape, layer: int, tensor: int, width: int) -> float:
    total = float(shape.layer_vectors * width)
    for module, inputs, outputs in shape.modules(layer):
        # Keys' and values' heads that are fewer than processes are there more than once.
        shares = min(tensor, shape.kv_heads) if module.endswith(("k_proj", "v_proj")) else tensor
        quantization: Quantization = shape.quantization
        whole = inputs * outputs * width
        total += (whole if quantization.keeps(module) else quantization.matrix_bytes(inputs, outputs)) / shares
    return total


def _bytes_per_value(dtype: Any) -> int:
    """Bytes of a value of a type as vLLM names it; by default two, for it never takes float32 by itself."""
    return 4 if str(dtype) in ("float32", "float") else 2


@dataclass(frozen=True)
class WorkerMemory:
    """What one training worker needs, in bytes."""

    base: int
    """The frozen weights; under ZeRO stage 3 its part, and what is gathered at a time."""
    adapter: int
    gradients: int
    optimizer: int
    """Weights in float32 and both moments of Adam."""
    buffers: int
    """In which DeepSpeed gathers gradients."""
    activations: int
    """Kept for the backward pass, and what is made anew in it."""
    loss: int
    """Logits of target tokens, at the loss' peak."""
    fixed: int

    @property
    def total(self) -> int:
        """At its peak."""
        held = self.base + self.adapter + self.gradients + self.optimizer + self.buffers + self.fixed
        return held + self.activations + self.loss


def worker_memory(shape: Shape, lora: Lora, train: Train, targets: int, on_gpu: bool = True) -> WorkerMemory:
    """What one training worker needs where every row is as long as it may be.

    Args:
        shape: the student's.
        lora: its adapter.
        train: how it is trained.
        targets: target tokens of a row at most.
        on_gpu: whether it runs on a GPU.
    """
    width, stage, workers = (2 if train.dtype == "bfloat16" else 4), train.zero_stage, train.num_workers
    trained = shape.adapter_parameters(lora.r, lora.target_modules)
    rows = min(train.micro_batch_size, math.ceil(train.batch_size / workers))
    tokens, chunk = rows * train.max_length, max(1, CHUNK_ELEMENTS // shape.vocab)
    wanted = rows * min(targets, train.max_length)
    part = 1 if stage < 1 else workers
    base, adapter = shape.parameters * width, trained * width
    if stage == 3:
        base = math.ceil(base / workers) + min(base, ZERO3_LIVE_PARAMETERS * width)
        adapter = math.ceil(adapter / workers)
    gradients = {
        0: 4 * trained,
        # Beside the sum in float32 those of the micro-batch.
        1: (4 + width * (width < 4)) * trained,
        2: math.ceil(4 * trained / part) + width * trained,
        3: math.ceil(4 * trained / part) + width * trained,
    }[stage]
    kept, one_layer, passing = (
        activation_bytes(shape, lora, train),
        layer_activation_bytes(shape, lora, width),
        _backward_bytes(shape, width),
    )
    again = (one_layer if train.gradient_checkpointing else 0) + passing
    peak_loss = (_COPIES if wanted <= chunk else _COPIES_OF_SEVERAL) * 4 * min(wanted, chunk) * shape.vocab
    # The loss is over before the layers' gradients are made; only the greater of the two counts.
    return WorkerMemory(
        base=base,
        adapter=adapter,
        gradients=gradients,
        optimizer=math.ceil((8 if stage < 1 else 12) * trained / part),
        # Stage 1 sums in float32, the others gather what the backward pass makes.
        buffers=trained * {0: 0, 1: 4, 2: width, 3: width}[stage],
        activations=round(tokens * kept + wanted * shape.hidden * width + max(0, tokens * again - peak_loss)),
        loss=round(peak_loss),
        fixed=(CUDA_CONTEXT + NCCL_BUFFERS * (workers > 1)) if on_gpu else HOST_PROCESS,
    )


def activation_bytes(shape: Shape, lora: Lora, train: Train) -> float:
    """Bytes that are kept of each token from the forward to the backward pass, without those of the loss.

    With checkpointing the input of each layer; else all that its backward pass reads. Then the last norm's input in
    float32 and its scale, and what leaves it.
    """
    width = 2 if train.dtype == "bfloat16" else 4
    each = shape.hidden * width if train.gradient_checkpointing else layer_activation_bytes(shape, lora, width)
    return shape.layers * each + 4 * shape.hidden + 4 + shape.hidden * width


def layer_activation_bytes(shape: Shape, lora: Lora, width: int) -> int:
    """Bytes that one layer keeps of each token for its backward pass.

    Matrices are frozen, so that their inputs are kept only where there is an adapter. Norms keep their input in
    float32, and its scale; attention queries, keys, values, what it gives and a sum for each head in float32; the
    gated unit both of its inputs and the activation.
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    adapted = set(lora.target_modules) & set(shape.matrices)
    total = 2 * (4 * shape.hidden + 4) + (2 * queries + 2 * keys) * width + 4 * shape.heads
    total += 3 * shape.intermediate * width + len(adapted) * lora.r * width
    if lora.lora_dropout:
        # Each adapter's own input, and which of it was dropped (on a GPU in a byte).
        return total + sum(shape.matrices[name][0] for name in adapted) * 2 * width
    total += shape.hidden * width * bool(adapted & {"q_proj", "k_proj", "v_proj"})
    total += shape.hidden * width * bool(adapted & {"gate_proj", "up_proj"})
    # What attention gives is kept anyhow.
    return total + shape.intermediate * width * ("down_proj" in adapted)


def _backward_bytes(shape: Shape, width: int) -> int:
    """Bytes of a token's gradients that exist at a time in a layer's backward pass: three of the gated unit, and some
    copies in float32 of a norm's."""
    return 3 * shape.intermediate * width + 16 * shape.hidden


def fits(needed: int, memory: int) -> bool:
    """Whether a training worker fits, with a twentieth for what an allocator cannot use."""
    return needed <= memory * 0.95


def holds_engine(gpu: Gpu, shape: Shape, told: Engine, needs: EngineMemory) -> bool:
    """Whether a process of an engine runs on a GPU: vLLM computes in bfloat16, but in float16 where it is told to, or
    where that is what is between weights of 4 bits."""
    in_bfloat16 = told.engine_kwargs.get("dtype", "auto") in ("auto", "bfloat16") and shape.quantization.bits != 4
    return needs.min_gpu_bytes <= gpu.bytes and (gpu.has_bfloat16 or not in_bfloat16)


def holds_worker(gpu: Gpu, needed: int, train: Train) -> bool:
    """Whether a training worker runs on a GPU."""
    return fits(needed, gpu.bytes) and (gpu.has_bfloat16 or train.dtype != "bfloat16")
