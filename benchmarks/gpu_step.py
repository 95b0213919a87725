"""GPU step: the student's training step at the shapes of Llama 3.1 8B, beside transformers and peft as they are.

    python benchmarks/gpu_step.py [--tokens 2048,8192] [--layers 32] [--steps 10] [--width 4096]

Random weights, LoRA of rank 16 on all linear layers, bfloat16, rows as long as GSM8K's. Needs torch, transformers and
peft, but neither Ray nor vLLM nor DeepSpeed. Utilisation is of the matrix products' rate on this device, measured
here.
"""

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import bench
import limits
import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from raykd.config.experiment import Arm, Experiment
from raykd.training import batching, student
from raykd.training.examples import Example

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOP_K = 16
# Rows of GSM8K: so many tokens of prompt and of completion, from the least to the most.
PROMPT, COMPLETION = (60, 180), (60, 260)
WARM = 3
Step = Callable[[], Tensor]


def main() -> int:
    parser = bench.parser(__doc__, "gpu_step", rounds=1)
    parser.add_argument("--tokens", default="2048,8192", help="of a step, separated by commas")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, help="all widths in proportion (a multiple of 128)")
    parser.add_argument("--vocabulary", type=int, default=128_256)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate = limits.product_rate(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}: {rate / 1e12:.3g} T operations/s in matrix products", file=sys.stderr)
    rows: dict[str, dict[str, Any]] = {}
    for tokens, checkpointing in itertools.product(map(int, options.tokens.split(",")), (False, True)):
        for side in ("hard", "top_k", "default"):
            told = f"{tokens} tokens, {'checkpointing, ' if checkpointing else ''}{side}"
            rows[told] = measure(side, tokens, checkpointing, device, rate, options)
            print(told, rows[told], file=sys.stderr, flush=True)
        hard, default = (rows[told.replace("default", side)].get("tokens/s") for side in ("hard", "default"))
        if hard and default:
            rows[told.replace("default", "hard / default")] = {"tokens/s": f"{hard / default:.2f}"}
    bench.table(f"{name}, {options.layers} layers of width {options.width}", rows)
    bench.write(options.out, options=vars(options), device=name, product_rate=rate, rows=rows)
    return 0


def measure(
    side: str, tokens: int, checkpointing: bool, device: torch.device, rate: float, options: Any
) -> dict[str, float | str]:
    """Tokens per second, utilisation and peak memory of a side."""
    rows = list(drawn(tokens, options.vocabulary, soft=side == "top_k"))
    model: Any = None
    try:
        model, step = made(side, rows, checkpointing, device, options)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-4)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(WARM + options.steps):
            limits.finished(device)
            began = time.perf_counter()
            step().backward()
            optimizer.step()
            optimizer.zero_grad()
            limits.finished(device)
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
    told: dict[str, float | str] = {
        "tokens/s": sum(map(len, rows)) / seconds,
        "step, ms": 1000 * seconds,
        "utilisation, %": 100 * operations / seconds / rate,
    }
    if device.type == "cuda":
        # A process has one peak of its memory, and all sides are in this one: a CPU cannot tell theirs apart.
        told["peak, GB"] = torch.cuda.max_memory_allocated() / 1e9
    return told


def drawn(tokens: int, vocabulary: int, soft: bool) -> Iterator[Example]:
    """Rows that are as many tokens together."""
    draw = np.random.default_rng(0)
    while tokens > 0:
        prompt = min(int(draw.integers(*PROMPT)), max(1, tokens - 1))
        completion = min(int(draw.integers(*COMPLETION)), max(1, tokens - prompt))
        tokens -= prompt + completion
        best = {}
        if soft:
            best["topk_ids_TK"] = draw.integers(vocabulary, size=(completion, TOP_K))
            shares = draw.dirichlet(np.ones(TOP_K + 1), completion)[:, :TOP_K]
            best["topk_logprobs_TK"] = np.log(shares).astype(np.float32)
        ids = (draw.integers(vocabulary, size=length).tolist() for length in (prompt, completion))
        yield Example("drawn", *ids, **best)


def made(
    side: str, rows: list[Example], checkpointing: bool, device: torch.device, options: Any
) -> tuple[torch.nn.Module, Step]:
    """A model, and what makes a step's loss with it."""
    base = random_base(device, options)
    if side == "default":
        if checkpointing:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        model: Any = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules=LINEAR, task_type="CAUSAL_LM"))
        batch = batching.collate(rows, 0, packing=False)
        labels = torch.full_like(batch["input_ids"], -100)
        for number, row in enumerate(rows):
            at = len(row.prompt_token_ids)
            labels[number, at : len(row)] = torch.tensor(row.completion_token_ids)
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}
        inputs = {key: tensor.to(device) for key, tensor in inputs.items()}
        model.train()
        return model, lambda: model(**inputs).loss
    arm = arm_of(side, checkpointing)
    learner = student.wrap_student(base, arm, seed=0)
    batch = {key: tensor.to(device) for key, tensor in batching.collate(rows, 0, packing=True).items()}
    return learner, lambda: learner(batch) / len(batch["token_ids"])


def arm_of(side: str, checkpointing: bool) -> Arm:
    return Experiment.model_validate(
        {
            "name": "step",
            "dataset": {"source": "demo", "num_train": 1, "num_test": 1},
            "teacher": {"model": "drawn"},
            "student": {"model": "drawn", "lora": {"r": 16, "lora_alpha": 32, "target_modules": LINEAR}},
            "targets": {"kind": side, "top_k": TOP_K},
            "train": {"packing": True, "gradient_checkpointing": checkpointing},
        }
    ).arm("default")


def random_base(device: torch.device, options: Any) -> Any:
    """The model, with weights that nobody trained."""
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
