"""Attention of packed rows: several rows in one sequence, each of which attends to itself only.

H heads, T positions, D width of a head, R rows. A mask would cost T x T; here each row costs its own length squared,
without padding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from raykd import compat
from raykd.errors import UserError

# Name of this attention implementation in transformers.
ATTENTION_NAME = "raykd_packed"


def packed_inputs(row_starts: Tensor) -> dict[str, Any]:
    """Return the keyword arguments of a model's forward pass that delimit packed rows, by transformers' names.

    Args:
        row_starts: (R + 1) int32, the first position of each row, and the end of the last.
    """
    longest = int(row_starts.diff().max())
    return {
        # Four dimensions, so that transformers builds no mask. Empty, so that a model fails which does not pass the
        # other arguments to its attention.
        "attention_mask": torch.empty(1, 1, 0, 0, device=row_starts.device),
        "cu_seq_lens_q": row_starts,
        "cu_seq_lens_k": row_starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def enable_packing(model: Any) -> None:
    """Set a model's attention to `attend`.

    Raises:
        UserError: the model does not use transformers' AttentionInterface, or carries a state across positions.
    """
    model.set_attn_implementation(ATTENTION_NAME)
    # transformers only warns if it cannot set the implementation.
    if compat.attention_implementation(model.config.get_text_config()) != ATTENTION_NAME or compat.is_stateful(model):
        raise UserError(f"train.packing: {type(model).__name__} cannot separate packed rows; set train.packing=false")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute causal attention within each row, as a function of transformers' AttentionInterface.

    Without `cu_seq_lens_q` it is transformers' SDPA attention.

    Args:
        module: the layer.
        query: (1, H, T, D).
        key: (1, H', T, D), H' a divisor of H (grouped queries).
        value: as `key`.
        attention_mask: ignored for packed rows.
        dropout: probability of dropout on attention weights.
        scaling: of the scores; None for 1 / sqrt(D).
        sliding_window: positions that a query attends to, its own included; None for all.
        kwargs: `cu_seq_lens_q` and `max_length_q`, from `packed_inputs`.

    Returns:
        (1, T, H, D), and None for the weights.

    Raises:
        UserError: the model's attention has terms that are not supported here.
    """
    row_starts = kwargs.get("cu_seq_lens_q")
    if row_starts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if unsupported := [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]:
        raise UserError(f"train.packing: this model's attention has {', '.join(unsupported)}; set train.packing=false")
    longest = kwargs["max_length_q"]
    # A window has no effect on rows that are not longer.
    window = sliding_window if sliding_window and sliding_window < longest else None
    if _has_kernel(query) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        output: Any = varlen_attn(
            query[0].transpose(0, 1),
            key[0].transpose(0, 1),
            value[0].transpose(0, 1),
            row_starts,
            row_starts,
            longest,
            longest,
            scale=scaling,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=True,
        )
        return output[None], None
    outputs = [
        _attend_row(query[:, :, start:end], key[:, :, start:end], value[:, :, start:end], dropout, scaling, window)
        for start, end in zip(row_starts[:-1].tolist(), row_starts[1:].tolist(), strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _attend_row(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """Return the causal attention of one row."""
    kwargs: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
    if window is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **kwargs)
    mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, **kwargs)


def _has_kernel(query: Tensor) -> bool:
    """Return whether PyTorch's varlen kernel runs: FlashAttention, on NVIDIA GPUs from Ampere on, in half precision."""
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and is_half and torch.cuda.get_device_capability(query.device)[0] >= 8


AttentionInterface.register(ATTENTION_NAME, attend)
# The mask for forward passes without packed rows.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
