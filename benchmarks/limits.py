"""Limits: what training could reach on a device, were it nothing but matrix products."""

import statistics
import time
from collections.abc import Collection
from typing import Any

import torch
from transformers import PreTrainedModel

from raykd.training.examples import Example


def product_rate(device: torch.device) -> float:
    """Operations per second of a large matrix product in bfloat16."""
    size = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(20):
        finished(device)
        began = time.perf_counter()
        _ = left @ right
        finished(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times[5:])


def finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def count_operations(model: Any, rows: Collection[Example]) -> float:
    """What training on rows takes at least.

    4 operations for each frozen weight and token (forward, and backward to the activations; of the output layer for
    target tokens only), 6 for each of LoRA's, and attention's; what is computed twice counts once.
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
    config = next(each.config for each in model.modules() if isinstance(each, PreTrainedModel))
    # Scores and their use, forward once and backward twice, of causal attention half.
    each = sum(len(row) ** 2 for row in rows)
    return total + config.num_hidden_layers * 6 * each * config.hidden_size
