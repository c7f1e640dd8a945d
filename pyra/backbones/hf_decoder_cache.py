"""The part of transformers' dynamic cache that belongs to a layer behind a merge: fewer keys, and their sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from pyra.errors import ConfigError


class PromptLayer(DynamicLayer):
    """Modifications: keeps the size of each key, and is not cut shorter than the prompt it has merged.

    Attributes:
        size: [B, K] int32 words that each key stands for, 0 for padding.
        padded: whether some key is padding.
        prompt: keys that hold the longest merged prompt of the batch, padding included, less its end, where nothing
            merges: those tokens can be read again.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size: Tensor | None = None
        self.padded = False
        self.prompt = 0

    def remember(self, size: Tensor, padded: bool, prompt: int) -> None:
        """Note what the keys of the prompt, which :meth:`update` brings, stand for."""
        self.size, self.padded, self.prompt = size, padded, prompt

    def extend(self, present: Tensor, padded: bool) -> None:
        """Note that further keys follow: each a word where ``present`` [B, N] is true, padding elsewhere."""
        assert self.size is not None
        self.size = torch.cat([self.size, present.to(self.size)], dim=1)
        self.padded = self.padded or padded

    def follow(self, size: Tensor, padded: bool) -> None:
        """Note that further keys follow, as another layer behind the same merge has noted: ``size`` [B, K]."""
        self.size, self.padded = size, self.padded or padded

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens away."""
        left = self.get_seq_length() - abs(tokens_to_remove)
        if tokens_to_remove and self.is_initialized and left < self.prompt:
            raise ConfigError(
                f"the cache cannot be cropped by {abs(tokens_to_remove)} tokens: they reach into the prompt, whose "
                "tokens have merged; read the prompt again"
            )
        super().crop(tokens_to_remove)
        if tokens_to_remove and self.size is not None:
            self.size = self.size[:, :left]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of beams."""
        super().reorder_cache(beam_idx)
        self.size = _rows(self.size, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        super().batch_repeat_interleave(repeats)
        if self.size is not None:
            self.size = self.size.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.size = _rows(self.size, indices)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.size, self.padded, self.prompt = None, False, 0


def _rows(size: Tensor | None, index: Tensor) -> Tensor | None:
    return None if size is None else size[index.to(size.device)]


def prepare_cache(cache: Cache, first: int, depth: int) -> None:
    """Give an empty cache layers that hold merged prompts behind the layer ``first``.

    Raises:
        ConfigError: for a cache whose layers are not plain dynamic ones.
    """
    kinds = {type(layer) for layer in cache.layers}
    if not isinstance(cache, DynamicCache) or kinds - {DynamicLayer, PromptLayer}:
        other = next((kind.__name__ for kind in kinds if kind not in (DynamicLayer, PromptLayer)), "")
        raise ConfigError(
            f"merged prompts are kept in a DynamicCache of plain layers, this is a {type(cache).__name__}"
            f"{f' of {other}s' if other else ''}: leave cache_implementation and past_key_values out, or unwrap the "
            "model"
        )
    while len(cache.layers) < depth:
        cache.layers.append(DynamicLayer())
    for index in range(first + 1, depth):
        if type(cache.layers[index]) is not PromptLayer:
            cache.layers[index] = PromptLayer()


def remembers(cache: Cache, first: int, depth: int) -> bool:
    """Whether a cache that is not empty holds a prompt that merged behind the layer ``first``."""
    behind = cache.layers[first + 1 : depth]
    return all(isinstance(layer, PromptLayer) and layer.size is not None for layer in behind)


def key_value_bytes(cache: Cache) -> int:
    """Return the bytes of the keys and values that a cache holds, and of what it knows about them."""
    held = 0
    for layer in cache.layers:
        for value in (layer.keys, layer.values, getattr(layer, "size", None)):
            if isinstance(value, torch.Tensor):
                held += value.numel() * value.element_size()
    return held
