"""Losses: what a student's logits are worth against the targets, as sums over target tokens.

N target tokens, V vocabulary, K top-k. Each function returns a sum; the caller divides once, by the number of
target tokens of the whole optimizer step, so that neither batch split nor worker count changes the result.
"""

import torch
from torch import Tensor
from torch.nn import functional

# The student's mass outside the teacher's top-k is kept this far from 0, where its logarithm ends.
_SMALLEST_TAIL = 1e-7


def cross_entropy(logits_NV: Tensor, token_ids_N: Tensor) -> Tensor:
    """Sum over tokens of -log q(token), in nats.

    Args:
        logits_NV: the student's logits, of any floating type; computed with in float32.
        token_ids_N: the tokens.
    """
    return functional.cross_entropy(logits_NV.float(), token_ids_N, reduction="sum")


def forward_kl(logits_NV: Tensor, topk_ids_NK: Tensor, topk_logprobs_NK: Tensor) -> Tensor:
    """Sum over tokens of KL(teacher || student), in nats, over the teacher's top-k and one bucket for the rest.

    Merging outcomes can only lower a divergence (the data-processing inequality), so this bounds the full one
    from below and equals it where K = V (Cover and Thomas, Elements of Information Theory, 2.8).

    Args:
        logits_NV: the student's logits, of any floating type; computed with in float32.
        topk_ids_NK: the teacher's k most probable tokens.
        topk_logprobs_NK: their log-probabilities; what they leave to 1 is the bucket's.
    """
    log_q_NV = torch.log_softmax(logits_NV.float(), dim=-1)
    log_q_NK = log_q_NV.gather(-1, topk_ids_NK)
    log_p_NK = topk_logprobs_NK.float()
    p_NK = log_p_NK.exp()
    # xlogy-like: where p = 0 (log p = -inf) the term is 0, not nan.
    terms_NK = torch.where(p_NK > 0, p_NK * (log_p_NK - log_q_NK), torch.zeros_like(p_NK))
    p_rest_N = (1 - p_NK.sum(-1)).clamp(min=0)
    q_rest_N = (1 - log_q_NK.exp().sum(-1)).clamp(min=_SMALLEST_TAIL)
    rest_N = torch.where(
        p_rest_N > 0,
        p_rest_N * (p_rest_N.clamp(min=torch.finfo(torch.float32).tiny).log() - q_rest_N.log()),
        torch.zeros_like(p_rest_N),
    )
    return terms_NK.sum() + rest_N.sum()
