"""Packed: attention among rows that lie one behind the other in one sequence, none of which sees another.

H heads, T positions, D width of a head, R rows. A mask would make attention pay for T x T; here each row pays for its
own length squared, and nobody for padding.
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

# By which name models are loaded that are to attend so.
ATTENTION_NAME = "raykd_packed"


def packed_inputs(row_starts: Tensor) -> dict[str, Any]:
    """What a model's forward pass is told of the rows, by the names that transformers has for it.

    Args:
        row_starts: (R + 1) int32, where each row begins, and the end of the last.
    """
    longest = int(row_starts.diff().max())
    return {
        # Of four dimensions, so that no mask is made; empty, so that a model that does not pass on the rest fails.
        "attention_mask": torch.empty(1, 1, 0, 0, device=row_starts.device),
        "cu_seq_lens_q": row_starts,
        "cu_seq_lens_k": row_starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def enable_packing(model: Any) -> None:
    """Has a model attend so.

    Raises:
        UserError: where it does not attend by transformers' AttentionInterface, or carries a state from row to row.
    """
    model.set_attn_implementation(ATTENTION_NAME)
    # Where it cannot be set, transformers only warns.
    if compat.attention_implementation(model.config.get_text_config()) != ATTENTION_NAME or compat.is_stateful(model):
        raise UserError(f"{type(model).__name__} cannot keep packed rows apart: set train.packing=false")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row, as a function of transformers' AttentionInterface; as SDPA without rows.

    Args:
        module: the layer.
        query: (1, H, T, D).
        key: (1, H', T, D), H' a divisor of H (grouped queries).
        value: as `key`.
        attention_mask: not looked at where there are rows.
        dropout: of the attention's weights.
        scaling: of the scores; None for 1 / sqrt(D).
        sliding_window: how many positions each looks back upon, itself included; None for all.
        more: `cu_seq_lens_q` and `max_length_q`, which `arguments` makes.

    Returns:
        (1, T, H, D), and no weights.

    Raises:
        UserError: where the model attends in a way that is not known here.
    """
    starts = more.get("cu_seq_lens_q")
    if starts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **more)
    if strange := [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]:
        raise UserError(f"this model's attention has {', '.join(strange)}: set train.packing=false")
    # Rows that are no longer than the window do not notice it.
    window = sliding_window if sliding_window and sliding_window < more["max_length_q"] else None
    if _has_kernel(query) and not dropout:
        from torch.nn.attention.varlen import varlen_attn

        by_position = [each[0].transpose(0, 1) for each in (query, key, value)]
        rows: Any = varlen_attn(
            by_position[0],
            by_position[1],
            by_position[2],
            starts,
            starts,
            more["max_length_q"],
            more["max_length_q"],
            scale=scaling,
            window_size=(window - 1 if window else -1, 0),
            enable_gqa=True,
        )
        return rows[None], None
    attended = [
        _attend(query[:, :, at:end], key[:, :, at:end], value[:, :, at:end], dropout, scaling, window)
        for at, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)
    ]
    return torch.cat(attended, dim=2).transpose(1, 2).contiguous(), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """One row."""
    told: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": True}
    if window is None:
        return scaled_dot_product_attention(query, key, value, is_causal=True, **told)
    near = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return scaled_dot_product_attention(query, key, value, attn_mask=near, **told)


def _has_kernel(query: Tensor) -> bool:
    """Whether PyTorch's kernel for rows of different lengths runs: FlashAttention, from NVIDIA's Ampere on."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.is_cuda and half and torch.cuda.get_device_capability(query.device)[0] >= 8


AttentionInterface.register(ATTENTION_NAME, attend)
# For passes without rows.
AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
