"""The attention of a decoder, read and biased: queries and keys are seen, the sizes of keys join the scores.

No attention code is copied: :class:`AttentionReader` runs the module's own forward and stands between it and the
attention function that it looks up.

Letters: ``B`` batch, ``N`` tokens, ``K`` keys, ``H`` query heads, ``G`` key heads, ``d`` head channels.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pyra.attention import augmented
from pyra.backbones.layers import KeyReader

ATTENTION = "pyra_prompt"
"""Name of the attention function that is read, in transformers' registry."""
_MASKED = ("sdpa", "eager")  # attention functions that take an additive mask


class AttentionReader(KeyReader):
    """Stands in for an attention module during one call, between it and the attention function that it looks up.

    Args:
        attention: of transformers.
        bias: [B, 1, 1, K] that joins the scores; None adds nothing.
        keep: keep queries and keys.
    """

    def __init__(self, attention: nn.Module, bias: Tensor | None, keep: bool) -> None:
        super().__init__(attention)
        self.config = _ReadConfig(attention.config)
        self._bias, self._wanted = bias, keep
        self._read: tuple[Tensor, Tensor] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
        """Run the module's attention function; arguments as transformers gives them."""
        if self._wanted:
            self._read = query, key
        name: str = self.config.read._attn_implementation
        eager = getattr(sys.modules[type(self._attention).__module__], "eager_attention_forward", None)
        run = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)
        bias = self._bias
        if bias is None:
            return run(self, query, key, value, mask, **kwargs)
        if name in _MASKED and (mask is not None or query.shape[2] == 1):
            return run(self, query, key, value, _biased(mask, bias.to(query.dtype)), **kwargs)
        query, key, wide = augmented(query, key, value, bias, kwargs["scaling"])
        mixed, *rest = run(self, query, key, wide, mask, **kwargs)
        return mixed[..., : value.shape[-1]], *rest

    def queries_and_keys(self) -> tuple[Tensor, Tensor]:
        """Return those of the call, rotated: [B, H, N, d] and [B, G, N, d]."""
        if self._read is None:
            raise RuntimeError(f"{type(self._attention).__name__} does not look its attention function up")
        return self._read


class _ReadConfig:
    """The configuration of an attention, but for the attention function that it names."""

    _attn_implementation = ATTENTION

    def __init__(self, config: Any) -> None:
        self.read = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.read, name)


def _attend(module: AttentionReader, *args: Any, **kwargs: Any) -> Any:
    return module.attend(*args, **kwargs)


AttentionInterface.register(ATTENTION, _attend)


def biased_layers(config: Any, depth: int) -> tuple[int, ...]:
    """Return the layers whose attention adds the logarithm of the sizes of keys.

    Without a word in the configuration: those of the second half, in which it helped (the others it hurt).
    """
    if not config.proportional_attention:
        return ()
    if isinstance(config.size_bias, bool):
        return tuple(range(depth)) if config.size_bias else ()
    if config.size_bias is None:
        return tuple(range(math.ceil(depth / 2), depth))
    return tuple(config.size_bias)


def _biased(mask: Tensor | None, bias: Tensor) -> Tensor:
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return mask + bias
