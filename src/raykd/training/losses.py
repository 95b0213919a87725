"""Losses of a student's logits against targets, as sums over target tokens.

N target tokens, V vocabulary, K top-k, M outcomes of a distribution: K, or K and the bucket. Each function returns a
sum. The caller divides once, by the number of target tokens of the whole optimizer step, so that the split into
batches, packing and worker count do not change the result.

A teacher's top-k log-probabilities do not determine the remaining probability mass of each token. With `bucket` the
remaining tokens are one more outcome: by the data-processing inequality, merging outcomes never raises a divergence.
With `renormalize` they are left out, and both distributions are renormalized over the k tokens.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

MissingMass = Literal["bucket", "renormalize"]
# Rounding error of the mass outside the k tokens, computed from float32 log-probabilities: the minimum of the bucket.
_SMALLEST_TAIL = 1e-7
# Finite values for log 0 and for a logit of -inf, whose product with a probability of 0 is 0, not NaN.
_LOG_ZERO, _NEVER = -100.0, -1e9


def cross_entropy(logits_NV: Tensor, token_ids_N: Tensor) -> Tensor:
    """Return the sum over tokens of -log q(token), in nats.

    Args:
        logits_NV: the student's logits, of any floating dtype; converted to float32.
        token_ids_N: the target tokens.
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
    """Return the sum over tokens of a divergence between teacher p and student q, in nats.

    For K = V it is the dense divergence, for any `missing_mass`.

    Args:
        kind: one of `DIVERGENCES`.
        logits_NV: the student's logits, of any floating dtype; converted to float32.
        topk_ids_NK: the teacher's k most probable tokens.
        topk_logprobs_NK: their log-probabilities at temperature 1.
        missing_mass: treatment of all other tokens.
        temperature: divides the logits of both; the sum is multiplied by its square, so that gradients keep their
            scale (Hinton et al., arXiv 1503.02531, section 2.1). Values other than 1 need `renormalize` or K = V, since
            the distribution within a bucket is unknown.
    """
    has_bucket = missing_mass == "bucket" and topk_ids_NK.shape[-1] < logits_NV.shape[-1]
    assert temperature == 1 or not has_bucket, "a bucket has no temperature"
    picked_NK = logits_NV.gather(-1, topk_ids_NK).float().clamp(min=_NEVER)
    log_p_NM = topk_logprobs_NK.float().clamp(min=_LOG_ZERO)
    if has_bucket:
        # From the logits: as 1 minus the k probabilities, rounding would lose its gradient.
        rest_N1 = torch.logsumexp(logits_NV.float().scatter(-1, topk_ids_NK, _NEVER), dim=-1, keepdim=True)
        total_N1 = torch.logaddexp(torch.logsumexp(picked_NK, dim=-1, keepdim=True), rest_N1)
        p_rest_N1 = 1 - log_p_NM.exp().sum(-1, keepdim=True)
        # Where the teacher's bucket is within rounding error, a smaller bucket of the student costs nothing.
        floor_N1 = torch.where(p_rest_N1 > _SMALLEST_TAIL, _LOG_ZERO, math.log(_SMALLEST_TAIL))
        log_p_NM = torch.cat([log_p_NM, p_rest_N1.clamp(min=_SMALLEST_TAIL).log()], dim=-1)
        log_q_NM = torch.cat([picked_NK - total_N1, (rest_N1 - total_N1).maximum(floor_N1)], dim=-1)
    else:
        log_p_NM = torch.log_softmax(log_p_NM / temperature, dim=-1)
        log_q_NM = torch.log_softmax(picked_NK / temperature, dim=-1)
    return temperature**2 * DIVERGENCES[kind](log_p_NM, log_q_NM.clamp(min=_LOG_ZERO))


def forward_kl(log_p_NM: Tensor, log_q_NM: Tensor) -> Tensor:
    """Return the sum of KL(p || q), which is mode-covering."""
    return (log_p_NM.exp() * (log_p_NM - log_q_NM)).sum()


def reverse_kl(log_p_NM: Tensor, log_q_NM: Tensor) -> Tensor:
    """Return the sum of KL(q || p), which is mode-seeking (Gu et al., arXiv 2306.08543)."""
    return (log_q_NM.exp() * (log_q_NM - log_p_NM)).sum()


def jensen_shannon(log_p_NM: Tensor, log_q_NM: Tensor) -> Tensor:
    """Return the sum of (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (Lin 1991); at most log 2 per token."""
    log_m_NM = torch.logaddexp(log_p_NM, log_q_NM) - math.log(2)
    return (forward_kl(log_p_NM, log_m_NM) + forward_kl(log_q_NM, log_m_NM)) / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
}
