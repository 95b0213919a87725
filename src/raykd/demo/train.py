"""Training: `python -m raykd.demo.train tokenizer|teacher|student` makes the models in `models/`."""

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from raykd.demo.data import Batch, attention_mask, pool
from raykd.demo.evaluate import evaluate
from raykd.demo.tokenizer import VOCABULARY_SIZE, special_ids, train_tokenizer
from raykd.models.builtin import MODELS

# B rows, T tokens of a row, H hidden width, N target tokens of a batch.

SHAPES: dict[str, dict[str, int]] = {
    "teacher": {
        "hidden_size": 192,
        "num_hidden_layers": 6,
        "intermediate_size": 512,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "student": {
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "intermediate_size": 352,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
STEPS = {"teacher": 3300, "student": 1600}
BATCH_TOKENS = {"teacher": 4096, "student": 8192}
ROW_TOKENS = 256
WARMUP_STEPS = 40
DECAY_SHARE = 0.5
"""Share of the steps, at the end, in which the learning rate decays linearly to 0."""


@dataclass
class Run:
    """The state of a training run, as saved in a checkpoint."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    pool_number: int = 0
    batch_number: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the state to one file, atomically."""
        state = {"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers]}
        torch.save(state | {"progress": self._progress()}, path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)

    def load(self, path: Path) -> None:
        """Resume from a saved state."""
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name, value in state["progress"].items():
            setattr(self, name, value)

    def _progress(self) -> dict[str, float]:
        names = ("step", "pool_number", "batch_number", "tokens", "seconds")
        return {name: getattr(self, name) for name in names}


def build_model(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama model with the shape of the teacher or the student."""
    config = LlamaConfig(
        **SHAPES[name],
        head_dim=32,
        vocab_size=VOCABULARY_SIZE,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **special_ids(tokenizer),
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")  # takes the mask of packed documents
    return model


def build_optimizers(model: LlamaForCausalLM, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Return the optimizers: Muon for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, lr=learning_rate / 5, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(forward: Any, model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Return the mean cross entropy of the target tokens, in nats (a scalar)."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden_BTH = forward(
            input_ids=batch.input_ids_BT,
            attention_mask=attention_mask(batch.document_BT),
            position_ids=batch.position_ids_BT,
            use_cache=False,
        ).last_hidden_state
        positions_N = batch.is_target_BT[:, 1:].flatten().nonzero()[:, 0]
        fill = -len(positions_N) % 512  # few shapes: PyTorch and oneDNN prepare kernels for each
        hidden_NH = hidden_BTH[:, :-1].flatten(0, 1)[F.pad(positions_N, (0, fill))]
        logits_NV = model.lm_head(hidden_NH)
    targets_N = F.pad(batch.input_ids_BT[:, 1:].flatten()[positions_N], (0, fill), value=-100)
    return F.cross_entropy(logits_NV.float(), targets_N)


def schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step, 0 to 1: linear warm-up, constant, linear decay."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def train(name: str, folder: Path, work: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train one model and save it; an interrupted run resumes from its checkpoint.

    Args:
        name: "teacher" or "student".
        folder: the folder of the model, which has the tokenizer.
        work: the folder of the checkpoint.
        args: the options of the command line.

    Returns:
        `steps`, `tokens`, `seconds` and `last_loss` (mean of the last 50 steps, nats per target token).
    """
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build_model(name, tokenizer)
    run = Run(model, build_optimizers(model, args.learning_rate))
    checkpoint = work / f"{name}.pt"
    if checkpoint.exists():
        run.load(checkpoint)
        print(f"{name}: resuming from step {run.step}", flush=True)
    forward = torch.compile(model.model) if args.compile else model.model
    losses: list[float] = []
    started, saved = time.monotonic() - run.seconds, time.monotonic()
    for batch in _batches(run, name, tokenizer, args):
        factor = schedule(run.step, args.steps)
        for optimizer, rate in zip(run.optimizers, (1.0, 0.2), strict=True):
            optimizer.param_groups[0]["lr"] = args.learning_rate * rate * factor
        loss = loss_of(forward, model, batch)
        loss.backward()
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        run.step += 1
        run.tokens += batch.input_ids_BT.numel()
        run.seconds = time.monotonic() - started
        if run.step % 20 == 0:
            _show(name, run, losses[-20:], args.steps)
        if time.monotonic() - saved > args.save_every_s:
            run.save(checkpoint)
            saved = time.monotonic()
    run.save(checkpoint)
    save_model(model, tokenizer, folder)
    last = sum(losses[-50:]) / max(1, len(losses[-50:]))
    return {
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": round(run.seconds),
        "last_loss": round(last, 4),
    }


def save_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a model to a folder: bfloat16 weights, configuration, generation configuration and tokenizer."""
    copy = LlamaForCausalLM(LlamaConfig(**model.config.to_dict()))
    copy.load_state_dict(model.state_dict())
    copy.generation_config = GenerationConfig(**special_ids(tokenizer))
    copy.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Read the command line and train the tokenizer or a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("tokenizer", "teacher", "student"))
    parser.add_argument("--out", type=Path, help="folder of the model; by default the one in this package")
    parser.add_argument("--work", type=Path, default=Path("storage/demo"), help="folder for checkpoints")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--batch-tokens", type=int, help="tokens per step")
    parser.add_argument(
        "--learning-rate", type=float, default=0.02, help="learning rate of Muon; AdamW's is a fifth of it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--save-every-s", type=float, default=120.0, help="seconds between saved states")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--problems", type=int, default=500, help="held-out problems of the evaluation")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.what == "tokenizer":
        for folder in MODELS.values():
            train_tokenizer(args.out or folder, args.seed)
        return
    args.steps = args.steps or STEPS[args.what]
    args.batch_tokens = args.batch_tokens or BATCH_TOKENS[args.what]
    folder = args.out or MODELS[f"raykd/demo-{args.what}"]
    args.work.mkdir(parents=True, exist_ok=True)
    training = train(args.what, folder, args.work, args)
    metrics = {"training": training, "test": evaluate(args.what, folder, args.problems)}
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


def _batches(run: Run, name: str, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> Iterator[Batch]:
    """Yield the remaining batches of a run."""
    while run.step < args.steps:
        batches = pool(name, tokenizer.backend_tokenizer, args.batch_tokens, ROW_TOKENS, args.seed, run.pool_number)
        for number, batch in enumerate(batches):
            if number < run.batch_number:
                continue
            run.batch_number += 1
            yield batch
            if run.step >= args.steps:
                return
        run.pool_number, run.batch_number = run.pool_number + 1, 0


def _show(name: str, run: Run, losses: list[float], steps: int) -> None:
    speed = run.tokens / run.seconds
    left = math.ceil((steps - run.step) * run.seconds / run.step / 60)
    print(
        f"{name} step {run.step}/{steps}  loss {sum(losses) / len(losses):.4f}  {speed:,.0f} tokens/s  {left} min left",
        flush=True,
    )


if __name__ == "__main__":
    main()
