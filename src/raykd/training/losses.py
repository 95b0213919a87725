"""Losses: what a student's logits are worth against the targets, as sums over target tokens.

N target tokens, V vocabulary, K top-k, M outcomes that are told apart. Each function returns a sum; the caller
divides once, by the number of target tokens of the whole optimizer step, so that neither batch split, packing nor
worker count changes the result.

A teacher's k log-probabilities leave open how the rest is spread. Either that rest is one outcome more
(`bucket`: nothing is made up, and merging outcomes only ever lowers a divergence, by the data-processing
inequality), or it is left out and both distributions are scaled up to 1 over the k tokens (`renormalize`).
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

MissingMass = Literal["bucket", "renormalize"]
# Float32 log-probabilities leave this much doubt about what is outside the k tokens: less counts as this much.
_SMALLEST_TAIL = 1e-7
# Stands for log 0, so that 0 times it is 0; and a logit that stands for -inf, for a token that cannot be said.
_LOG_ZERO, _NEVER = -100.0, -1e9


def cross_entropy(logits_NV: Tensor, token_ids_N: Tensor) -> Tensor:
    """Sum over tokens of -log q(token), in nats.

    Args:
        logits_NV: the student's logits, of any floating type; computed with in float32.
        token_ids_N: the tokens.
    """
    return functional.cross_entropy(logits_NV.float(), token_ids_N, reduction="sum")


def divergence(
    kind: str,
    logits_NV: Tensor,
    topk_ids_NK: Tensor,
    topk_logprobs_NK: Tensor,
    missing_mass: MissingMass = "bucket",
    temperature: float = 1.0,
) -> Tensor:
    """Sum over tokens of a divergence between teacher p and student q, in nats.

    Where K = V it is the dense divergence, whatever the missing_mass.

    Args:
        kind: one of `DIVERGENCES`.
        logits_NV: the student's logits, of any floating type; computed with in float32.
        topk_ids_NK: the teacher's k most probable tokens.
        topk_logprobs_NK: their log-probabilities at temperature 1.
        missing_mass: what becomes of all other tokens.
        temperature: both distributions are flattened by it, and the sum is multiplied by its square, so that
            gradients keep their size (Hinton et al., arXiv 1503.02531, section 2.1). Other than 1 only with
            `renormalize` or K = V: how a bucket's tokens would spread when flattened is not known.
    """
    has_bucket = missing_mass == "bucket" and topk_ids_NK.shape[-1] < logits_NV.shape[-1]
    assert temperature == 1 or not has_bucket, "a bucket cannot be flattened"
    picked_NK = logits_NV.gather(-1, topk_ids_NK).float().clamp(min=_NEVER)
    log_p_NM = topk_logprobs_NK.float().clamp(min=_LOG_ZERO)
    if has_bucket:
        # By itself, for as 1 minus the others it would lose its gradient to rounding.
        rest_N1 = torch.logsumexp(logits_NV.float().scatter(-1, topk_ids_NK, _NEVER), dim=-1, keepdim=True)
        total_N1 = torch.logaddexp(torch.logsumexp(picked_NK, dim=-1, keepdim=True), rest_N1)
        p_rest_N1 = 1 - log_p_NM.exp().sum(-1, keepdim=True)
        # What the teacher's rounding hides is not asked of the student.
        floor_N1 = torch.where(p_rest_N1 > _SMALLEST_TAIL, _LOG_ZERO, math.log(_SMALLEST_TAIL))
        log_p_NM = torch.cat([log_p_NM, p_rest_N1.clamp(min=_SMALLEST_TAIL).log()], dim=-1)
        log_q_NM = torch.cat([picked_NK - total_N1, (rest_N1 - total_N1).maximum(floor_N1)], dim=-1)
    else:
        log_p_NM = torch.log_softmax(log_p_NM / temperature, dim=-1)
        log_q_NM = torch.log_softmax(picked_NK / temperature, dim=-1)
    return temperature**2 * DIVERGENCES[kind](log_p_NM, log_q_NM.clamp(min=_LOG_ZERO))


def forward_kl(log_p_NM: Tensor, log_q_NM: Tensor) -> Tensor:
    """Sum of KL(p || q): the student is to cover all that the teacher does."""
    return (log_p_NM.exp() * (log_p_NM - log_q_NM)).sum()


def reverse_kl(log_p_NM: Tensor, log_q_NM: Tensor) -> Tensor:
    """Sum of KL(q || p): the student is to do nothing that the teacher would not (Gu et al., arXiv 2306.08543)."""
    return (log_q_NM.exp() * (log_q_NM - log_p_NM)).sum()


def jensen_shannon(log_p_NM: Tensor, log_q_NM: Tensor) -> Tensor:
    """Sum of half of KL(p || m) and half of KL(q || m), m their mean (Lin 1991); at most log 2 for each token."""
    log_m_NM = torch.logaddexp(log_p_NM, log_q_NM) - math.log(2)
    return (forward_kl(log_p_NM, log_m_NM) + forward_kl(log_q_NM, log_m_NM)) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
