"""GPU step: the student's training step at the shapes of Llama 3.1 8B, compared with transformers and peft.

    python benchmarks/gpu_step.py [--tokens 2048,8192] [--layers 32] [--steps 10] [--width 4096]

Random weights, LoRA of rank 16 on all linear layers, bfloat16, rows with the lengths of GSM8K's. Requires torch,
transformers and peft, but not Ray, vLLM or DeepSpeed. Utilization is relative to the rate of matrix products that the
script measures on the device.
"""

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lib import bench, limits
from raykd.config.experiment import Arm, Experiment
from raykd.training import batching, student
from raykd.training.examples import Example

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOP_K = 16
# Minimum and maximum tokens of a prompt and of a completion, as in GSM8K.
PROMPT, COMPLETION = (60, 180), (60, 260)
WARM = 3
Step = Callable[[], Tensor]


def main() -> int:
    parser = bench.parser(__doc__, "gpu_step", rounds=1)
    parser.add_argument("--tokens", default="2048,8192", help="tokens of a step, comma-separated")
    parser.add_argument("--steps", type=int, default=10, help="number of timed steps")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="hidden size, a multiple of 128; others follow")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = limits.product_rate(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}: {rate / 1e12:.3g} T operations/s in matrix products", file=sys.stderr)
    rows: dict[str, dict[str, Any]] = {}
    for tokens, checkpointing in itertools.product(map(int, options.tokens.split(",")), (False, True)):
        for side in ("hard", "top_k", "default"):
            name_of_row = row_name(tokens, checkpointing, side)
            rows[name_of_row] = measure(side, tokens, checkpointing, device, rate, options)
            print(name_of_row, rows[name_of_row], file=sys.stderr, flush=True)
        hard, default = (rows[row_name(tokens, checkpointing, side)].get("tokens/s") for side in ("hard", "default"))
        if isinstance(hard, float) and isinstance(default, float):
            rows[row_name(tokens, checkpointing, "hard / default")] = {"tokens/s": f"{hard / default:.2f}"}
    bench.table(f"{name}, {options.layers} layers of width {options.width}", rows)
    bench.write(options.out, options=vars(options), device=name, product_rate=rate, rows=rows)
    return 0


def row_name(tokens: int, checkpointing: bool, side: str) -> str:
    return f"{tokens} tokens, checkpointing, {side}" if checkpointing else f"{tokens} tokens, {side}"


def measure(
    side: str, tokens: int, checkpointing: bool, device: torch.device, rate: float, options: Any
) -> dict[str, float | str]:
    """Return the tokens per second, utilization and peak memory of a side."""
    rows = list(random_rows(tokens, options.vocabulary, soft=side == "top_k"))
    model: Any = None
    try:
        model, step = build(side, rows, checkpointing, device, options)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(WARM + options.steps):
            limits.synchronize(device)
            began = time.perf_counter()
            step().backward()
            optimizer.step()
            optimizer.zero_grad()
            limits.synchronize(device)
            times.append(time.perf_counter() - began)
    except torch.cuda.OutOfMemoryError:
        return {"tokens/s": "out of memory"}
    finally:
        operations = limits.count_operations(model, rows) if model is not None else 0
        del model
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    seconds = statistics.median(times[WARM:])
    figures: dict[str, float | str] = {
        "tokens/s": sum(map(len, rows)) / seconds,
        "step, ms": 1000 * seconds,
        "utilization, %": 100 * operations / seconds / rate,
    }
    if device.type == "cuda":
        # The peak of a CPU process cannot be reset between sides.
        figures["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return figures


def random_rows(tokens: int, vocabulary: int, soft: bool) -> Iterator[Example]:
    """Yield random rows with `tokens` tokens in total."""
    rng = np.random.default_rng(0)
    while tokens > 0:
        prompt = min(int(rng.integers(*PROMPT)), max(1, tokens - 1))
        completion = min(int(rng.integers(*COMPLETION)), max(1, tokens - prompt))
        tokens -= prompt + completion
        topk = {}
        if soft:
            topk["topk_ids_TK"] = rng.integers(vocabulary, size=(completion, TOP_K))
            shares = rng.dirichlet(np.ones(TOP_K + 1), completion)[:, :TOP_K]
            topk["topk_logprobs_TK"] = np.log(shares).astype(np.float32)
        ids = (rng.integers(vocabulary, size=length).tolist() for length in (prompt, completion))
        yield Example("random", *ids, **topk)


def build(
    side: str, rows: list[Example], checkpointing: bool, device: torch.device, options: Any
) -> tuple[torch.nn.Module, Step]:
    """Return a model and a function that computes the loss of a step."""
    base = random_base(device, options)
    if side == "default":
        if checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM"))
        batch = batching.collate(rows, 0, packing=False)
        labels = torch.full_like(batch["input_ids"], -100)
        for number, row in enumerate(rows):
            start = len(row.prompt_token_ids)
            labels[number, start : len(row)] = torch.tensor(row.completion_token_ids)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        inputs = {key: tensor.to(device) for key, tensor in inputs.items()}
        model.train()
        return model, lambda: model(**inputs).loss
    arm = arm_of(side, checkpointing)
    student_model = student.wrap_student(base, arm, seed=0)
    batch = {key: tensor.to(device) for key, tensor in batching.collate(rows, 0, packing=True).items()}
    return student_model, lambda: student_model(batch) / len(batch["token_ids"])


def arm_of(side: str, checkpointing: bool) -> Arm:
    return Experiment.model_validate(
        {
            "name": "step",
            "dataset": {"source": "demo", "num_train": 1, "num_test": 1},
            "teacher": {"model": "random"},
            "student": {"model": "random", "lora": {"r": 16, "lora_alpha": 32, "target_modules": LINEAR}},
            "targets": {"kind": side, "top_k": TOP_K},
            "train": {"packing": True, "gradient_checkpointing": checkpointing},
        }
    ).arm("default")


def random_base(device: torch.device, options: Any) -> Any:
    """Return the base model with random weights."""
    width = options.width
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2,
        num_hidden_layers=options.layers,
        num_attention_heads=width // 128,
        num_key_value_heads=max(1, width // 512),
        vocab_size=options.vocabulary,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(torch.bfloat16)
        try:
            return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(torch.float32)


if __name__ == "__main__":
    sys.exit(main())
