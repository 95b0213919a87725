"""Limits: the upper bound of training speed on a device, from the rate of its matrix products."""

import statistics
import time
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from raykd.training.examples import Example


def product_rate(device: torch.device) -> float:
    """Return the operations per second of a large matrix product in bfloat16."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        synchronize(device)
        began = time.perf_counter()
        _ = left @ right
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times[5:])


def synchronize(device: torch.device) -> None:
    """Wait for all kernels of a GPU; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_operations(model: Any, rows: Collection[Example]) -> float:
    """Return the minimum number of operations of a training step on rows.

    A frozen weight takes 4 operations a token (forward, and backward to the activations), in the output layer for
    target tokens only. A LoRA weight takes 6. Attention is added. Recomputation does not count.
    """
    num_tokens, num_targets = sum(map(len, rows)), sum(len(row.completion_token_ids) for row in rows)
    total = 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            total += 6 * parameter.numel() * num_tokens
        elif "lm_head" in name:
            total += 4 * parameter.numel() * num_targets
        elif "embed_tokens" not in name:
            total += 4 * parameter.numel() * num_tokens
    config = next(module.config for module in model.modules() if isinstance(module, PreTrainedModel))
    # Two products, forward once and backward twice, halved by the causal mask.
    num_pairs = sum(len(row) ** 2 for row in rows)
    return total + config.num_hidden_layers * 6 * num_pairs * config.hidden_size
