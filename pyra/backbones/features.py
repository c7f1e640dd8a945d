"""Features for dense tasks, and what merged with what: the token map of a backbone, wrapped or not."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from pyra.backbones import locate
from pyra.backbones.layers import MergingLayer, TokenStream, merging_layers


@dataclass(frozen=True)
class TokenFeatures:
    """Tokens that leave a backbone.

    Letters: ``B`` batch, ``N`` tokens, ``N0`` tokens at the first layer, ``C`` channels.

    Attributes:
        tokens: [B, N, C], prefix tokens first; N is N0 for dense features, else what is left after the last layer.
        size: [B, N, 1] int32, patches each token stands for (in dense features: the patches it shares its values with,
            itself included); 0 for padding. None unless the merged tokens or the source map were asked for.
        source_map: [B, N0], the row of the merged tokens that holds each original token; None unless asked for.
        num_prefix_tokens: leading tokens (class, distillation, registers) that are no patches.
    """

    tokens: Tensor
    size: Tensor | None
    source_map: Tensor | None
    num_prefix_tokens: int

    @property
    def patches(self) -> Tensor:
        """[B, N - prefix, C]; with dense features one row a patch, row by row over the image."""
        return self.tokens[:, self.num_prefix_tokens :]


def token_features(
    model: nn.Module, images: Tensor, *, dense: bool = False, source_map: bool = False, **inputs: Any
) -> TokenFeatures:
    """Run a backbone and return its tokens instead of its head's output.

    Args:
        model: a supported backbone, wrapped or not, also inside a PEFT model, under a head, or in two towers.
        images: [B, 3, H, W], or what the model takes as its first input.
        dense: one row for each original token, in order: a segmentation-style head sees what it sees of the unwrapped
            model, with merged patches sharing their values. False returns the merged tokens that are left.
        source_map: also return which row of the merged tokens holds each original token.
        inputs: further inputs of the model (``interpolate_pos_encoding``, SigLIP 2's masks and shapes).

    Returns:
        :class:`TokenFeatures`; gradients flow as through the model.

    Raises:
        UnsupportedModelError, ScheduleError: as the model does.

    Example:
        >>> patches = token_features(model, images, dense=True).patches  # doctest: +SKIP
    """
    family, core = locate(model)
    prefix = int(family.geometry(core, None).prefix_tokens)
    if dense and not source_map:
        return TokenFeatures(family.features(core, images, **inputs), None, None, prefix)
    tokens, streams = _recorded(model, images, inputs)
    last = streams[-1] if streams else TokenStream(tokens)
    return _assembled(tokens, last, dense, source_map, prefix)


def source_maps(model: nn.Module, images: Tensor, **inputs: Any) -> dict[int, Tensor]:
    """Follow every original token through a wrapped model, in evaluation mode.

    Args:
        model: as for :func:`token_features`.
        images: [B, 3, H, W], or what the model takes as its first input.
        inputs: further inputs of the model.

    Returns:
        For each layer from the first that merges on, its index and a [B, N0] map: the row that holds each original
        token after it.
    """
    with torch.inference_mode():
        _, streams = _recorded(model, images, inputs, evaluate=True)
    _, core = locate(model)
    indices = [layer.step.layer for layer in merging_layers(core)]
    maps = [stream.source_map for stream in streams]
    return {index: found for index, found in zip(indices, maps, strict=True) if found is not None}


def _recorded(
    model: nn.Module, images: Tensor, inputs: dict[str, Any], evaluate: bool = False
) -> tuple[Tensor, list[TokenStream]]:
    """Run a private twin of the backbone, which shares every tensor, and keep what leaves its merging layers."""
    family, core = locate(model)
    shared: dict[int, Any] = {id(tensor): tensor for tensor in chain(core.parameters(), core.buffers())}
    twin = copy.deepcopy(core, shared)
    if evaluate:
        twin.eval()
    streams: list[TokenStream] = []
    for layer in merging_layers(twin):
        layer.hand_on = functools.partial(_record, streams, layer)  # type: ignore[method-assign]
    return family.features(twin, images, **inputs), streams


def _record(streams: list[TokenStream], layer: MergingLayer, stream: TokenStream) -> Tensor | TokenStream:
    streams.append(stream)
    return type(layer).hand_on(layer, stream)


def _assembled(tokens: Tensor, last: TokenStream, dense: bool, wanted: bool, prefix: int) -> TokenFeatures:
    batch, count = tokens.shape[:2]
    places = torch.arange(count, device=tokens.device).expand(batch, -1)
    source_map = places if last.source_map is None else last.source_map
    positions = places if last.positions is None else last.positions
    size = torch.ones_like(tokens[..., :1], dtype=torch.int32) if last.size is None else last.size
    if dense:
        size = size.take_along_dim(source_map[..., None], dim=1)
    else:
        tokens = tokens.take_along_dim(positions[..., None], dim=1)  # a merged token sits where its destination was
    return TokenFeatures(tokens, size, source_map if wanted else None, prefix)
