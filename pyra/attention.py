"""Proportional attention: a token that stands for ``s`` patches attracts the attention of ``s`` tokens.

``log(size)`` of the key is added to the attention scores (ToMe, arXiv 2210.09461, equation 1). There are four ways:

- ``"mask"``: the additive mask of ``scaled_dot_product_attention``, [B, 1, 1, N] and broadcast over heads and queries,
  so no N x N matrix is held in memory.
- ``"fused"``: a kernel that weighs keys with their sizes (:mod:`pyra.kernels.attend`), in half precision and without
  gradients; elsewhere the mask. ``"auto"`` is this one on a GPU that runs it, up to 1024 tokens (on an H200 it was
  1.2 to 2.2 times as fast as the mask at up to 577 tokens, 0.9 times at 1370), and the mask on anything else.
- ``"augmented"``: inside the product of queries and keys. Keys get further channels that hold ``log(size)``, split into
  parts that their precision holds, queries a power of two there; kernels that take no mask (flash attention) run.
- ``"flex"``: PyTorch's ``flex_attention``, which compiles a kernel with the bias in it.

All but the mask reach the attention of timm and transformers where its mask would: :class:`SizeBias` is an object that
takes over a call of ``scaled_dot_product_attention`` (``__torch_function__``). No attention code is copied.

Letters: ``B`` batch, ``H`` heads, ``N`` tokens, ``d`` head channels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pyra.errors import UnsupportedModelError
from pyra.kernels import attend as fused
from pyra.kernels import bias as kernels
from pyra.kernels.choice import autocast_dtype, exporting

ATTENTIONS: tuple[str, ...] = ("auto", "mask", "fused", "augmented", "flex")

_SDPA = F.scaled_dot_product_attention  # as it is before anyone puts a wrapper in its place

# Added to the score of a padded token, of which nothing is left then; float16 holds no more.
_PADDING, _PADDING_IN_FLOAT16 = -1e30, -30000.0
_LEAST_SCALE = 2**-10  # of scores, and its inverse the greatest: beyond it a mask is used
_PARTS = 3  # of log(size) in half precision: 24 bits of it in bfloat16
_LONGEST = 1024  # keys of the fused kernel, unless it was asked for
_GRAIN = 8  # flash kernels take head sizes that are multiples of this


def size_bias(size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Return the attention bias ``log(size)`` of the key tokens, as a mask.

    Args:
        size: [B, N, 1] patches each token stands for, or None while all sizes are 1. Padding, of size 0, gets the
            lowest number.
        dtype: dtype of the queries (the logarithm is taken in float32 at least).

    Returns:
        [B, 1, 1, N], or None for None: no mask until some size exceeds 1.
    """
    return None if size is None else kernels.bias(size, dtype, torch.finfo(dtype).min)


def proportional(size: Tensor, dtype: torch.dtype, way: str = "auto", backend: str = "auto") -> Tensor | SizeBias:
    """Return what a call of ``scaled_dot_product_attention`` is given as its mask.

    Args:
        size: [B, N, 1] patches each token stands for; 0 marks padding.
        dtype: dtype of the queries.
        way: one of :data:`ATTENTIONS`. An exported graph gets the mask, which every runtime knows: same numbers.
        backend: what runs, as in :class:`pyra.PyraConfig`.
    """
    if way == "mask" or (way == "auto" and not size.is_cuda) or exporting():
        return kernels.bias(size, dtype, torch.finfo(dtype).min, backend)
    return SizeBias(size, way, backend)


@dataclass(frozen=True)
class SizeBias:
    """Sizes of the keys, given to ``scaled_dot_product_attention`` in the place of a mask.

    Attributes:
        size: [B, N, 1].
        way: one of :data:`ATTENTIONS`, but not ``"mask"``.
        backend: what runs, as in :class:`pyra.PyraConfig`.
    """

    size: Tensor
    way: str
    backend: str = "auto"

    def mask(self, dtype: torch.dtype) -> Tensor:
        """Return the mask [B, 1, 1, N] that says the same."""
        return kernels.bias(self.size, dtype, torch.finfo(dtype).min, self.backend)

    def wide(self, dtype: torch.dtype) -> Tensor:
        """Return the bias [B, 1, 1, N] in float32 at least, for a product with keys of ``dtype``."""
        padding = _PADDING_IN_FLOAT16 if dtype == torch.float16 and self.way == "augmented" else _PADDING
        return kernels.bias(self.size, torch.promote_types(dtype, torch.float32), padding, self.backend)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Take over attention; any other function does not know this class (a ``TypeError``)."""
        return attend(*args, **(kwargs or {})) if func is _SDPA else NotImplemented


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: SizeBias,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attend with a size bias; arguments as of ``scaled_dot_product_attention``.

    Args:
        query: [B, H, N, d].
        key: [B, H, N, d].
        value: [B, H, N, any].
        attn_mask: the bias and the way.
        dropout_p: of the attention weights; not with ``"flex"``.
        is_causal: refused, as beside any mask.
        scale: of the scores, 1 / sqrt(d) by default. What is not positive, or extreme, gets a mask in any way.
        enable_gqa: fewer heads in ``key`` and ``value``.

    Raises:
        UnsupportedModelError: for what the way cannot do.
    """
    if is_causal:
        raise UnsupportedModelError("a size bias and causal attention do not go together here: use attention='mask'")
    way, scale = attn_mask.way, query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (_as_autocast(part) for part in (query, key, value))
    if way in ("auto", "fused"):
        backend = "triton" if way == "fused" else attn_mask.backend
        short = way == "fused" or key.shape[2] <= _LONGEST
        if short and not dropout_p and not enable_gqa and fused.takes(query, key, value, attn_mask.size, backend):
            return fused.attend(query, key, value, attn_mask.size, scale, backend)
    extreme = not _LEAST_SCALE <= scale <= 1 / _LEAST_SCALE
    if way in ("auto", "fused") or extreme or not query.numel():
        mask = attn_mask.mask(query.dtype)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale, enable_gqa=enable_gqa)
    bias = attn_mask.wide(query.dtype)
    if way == "augmented":
        query, key, wider = augmented(query, key, value, bias, scale)
        mixed = F.scaled_dot_product_attention(
            query, key, wider, dropout_p=dropout_p, scale=scale, enable_gqa=enable_gqa
        )
        return mixed[..., : value.shape[-1]]
    if dropout_p:
        raise UnsupportedModelError(
            f"flex attention has no dropout of its weights, and this model drops {dropout_p}: use attention='mask'"
        )
    if query.device.type == "cpu" and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)):
        raise UnsupportedModelError(
            "flex attention has no gradients on a CPU: use attention='mask' to train there, torch.no_grad() otherwise"
        )
    run = _flex if torch.compiler.is_compiling() or query.device.type == "cpu" else _compiled_flex()
    result: Tensor = run(query, key, value, bias[:, 0, 0], scale, enable_gqa)
    return result


def augmented(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Put a bias of the keys into their product with the queries.

    The queries get a power of two near ``1 / scale``, which every precision holds; the keys the bias over it, in parts
    of which each holds what rounding took from the one before. The values are filled up to the same width where they
    had it, as flash kernels want.

    Args:
        query: [B, H, N, d].
        key: [B, H, N, d].
        value: [B, H, N, any].
        bias: [B, 1, 1, N], float32 or wider.
        scale: of the scores, positive.

    Returns:
        Queries and keys [B, H, N, d + e], and values; ``e`` is at least 1 and makes ``d + e`` a multiple of 8.
    """
    parts = 1 if key.element_size() >= bias.element_size() else _PARTS
    more = parts + (-(query.shape[-1] + parts)) % _GRAIN
    unit = 2.0 ** round(-math.log2(scale))
    rest, held = bias.transpose(2, 3) / (scale * unit), []
    for _ in range(parts):
        held.append(rest.to(key.dtype))
        rest = rest - held[-1]
    filled = torch.cat([*held, key.new_zeros(*held[0].shape[:3], more - parts)], dim=-1)
    ones = torch.cat([query.new_full((parts,), unit), query.new_zeros(more - parts)])
    wide_key = torch.cat([key, filled.expand(*key.shape[:3], more)], dim=-1)
    wide_query = torch.cat([query, ones.expand(*query.shape[:3], more)], dim=-1)
    fits = value.shape[-1] == key.shape[-1]
    return wide_query, wide_key, F.pad(value, (0, more)) if fits else value


def _as_autocast(tensor: Tensor) -> Tensor:
    """Cast as autocast would, which must not round the parts of a bias once they are made."""
    lowered = autocast_dtype(tensor.device.type)
    return tensor if lowered is None or tensor.dtype == torch.float64 else tensor.to(lowered)


def _flex(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float, enable_gqa: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    def biased(score: Tensor, sample: Tensor, head: Tensor, of: Tensor, to: Tensor) -> Tensor:
        return score + bias[sample, to]

    return flex_attention(query, key, value, score_mod=biased, scale=scale, enable_gqa=enable_gqa)


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """Return flex attention compiled, for any number of tokens: every layer has its own."""
    return torch.compile(_flex, dynamic=True)
