"""timm's plain ``VisionTransformer``: class token or none, distilled, registers.

A block that merges is replaced by a :class:`MergingBlock` that holds the very same children under the same names, so
parameters, checkpoints and PEFT target names are unchanged, and no attention code is copied. What a forward needs (the
sizes, the source map) travels from block to block beside the tokens in a :class:`TokenStream`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pyra.attention import size_bias
from pyra.config import PyraConfig
from pyra.cost import Geometry
from pyra.errors import ScheduleError, UnsupportedModelError
from pyra.matching import match_tokens, removable
from pyra.merging import compose_source_maps, merge_tokens, spread
from pyra.reactivation import Reactivation


class TokenStream(NamedTuple):
    """What passes between blocks once tokens have merged.

    Attributes:
        tokens: [B, N, C].
        size: [B, N, 1] patches each token stands for; None while that is one.
        source_map: [B, N0] row that holds each original token; None while that is its own.
    """

    tokens: Tensor
    size: Tensor | None
    source_map: Tensor | None


class MergingBlock(nn.Module):
    """timm's ``Block`` with merging between attention and MLP.

    Modifications against ``Block``: takes tokens [B, N, C] or a :class:`TokenStream`; adds the size bias; merges
    ``removed`` tokens; returns a stream. The last block (the one with ``model``) returns tokens: those left, where the
    model pools by class token, else one row for each original token, which weights every pooling by size.
    """

    norm1: nn.Module
    attn: nn.Module
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module

    def __init__(self, block: Block, removed: int, prefix: int, config: PyraConfig, model: VisionTransformer | None):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.removed = removed
        self.prefix = prefix
        self.config = config
        # In tuples: no children, but copied and pickled along.
        self.replaced = (block,)
        self.model = (model,)
        if removed and config.reactivation:
            weight = next(block.parameters())
            dim = block.norm1.normalized_shape[0]
            self.reactivation = Reactivation(removed, dim, device=weight.device, dtype=weight.dtype)
        self.train(block.training)

    def forward(self, x: Tensor | TokenStream) -> Tensor | TokenStream:
        """Run one block; see the class."""
        tokens, size, source_map = x if isinstance(x, TokenStream) else (x, None, None)
        bias = size_bias(size, tokens.dtype) if self.config.proportional_attention else None
        attention = KeyReader(self.attn)
        tokens = tokens + self.drop_path1(self.ls1(attention(self.norm1(tokens), bias)))
        if self.removed:
            most = removable(tokens.shape[1], self.prefix)
            if self.removed > most:
                raise ScheduleError(
                    f"a block removes {self.removed} of the {tokens.shape[1]} tokens of this input: at most {most} can "
                    "go; wrap the model with a schedule for this input size"
                )
            plan = match_tokens(
                attention.keys().mean(dim=1), self.removed, num_prefix_tokens=self.prefix, order=self.config.order
            )
            tokens, size = merge_tokens(tokens, size, plan, getattr(self, "reactivation", None))
            source_map = compose_source_maps(source_map, plan)
        tokens = tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))
        (model,) = self.model
        if model is None:
            return TokenStream(tokens, size, source_map)
        return tokens if source_map is None or _pools_by_class_token(model) else spread(tokens, source_map)

    def extra_repr(self) -> str:
        """Return what is shown in ``print(model)``."""
        return f"removed={self.removed}"


class KeyReader:
    """Stands in for an attention module during one call and keeps the keys that it computes.

    The module's own ``forward`` runs with this object as ``self``: every name is looked up on the module, but
    ``k_norm``, which every timm attention applies to its keys, passes by here. The module itself is not touched, so
    calls may interleave, recompute and run in threads.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self._keys: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Attend over ``x`` [B, N, C] with ``bias`` [B, 1, 1, N] added to the scores."""
        # The module's own hooks run as in any call: `_call_impl` finds them, as everything else, on the module.
        output: Tensor = nn.Module._call_impl(self, x, attn_mask=bias)  # type: ignore[arg-type]
        return output

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the module's own forward with this object as ``self``."""
        output: Tensor = type(self._attention).forward(self, *args, **kwargs)
        return output

    def k_norm(self, keys: Tensor) -> Tensor:
        """Apply the module's key norm to ``keys`` [B, H, N, d] and keep the outcome."""
        self._keys = self._attention.k_norm(keys)  # type: ignore[operator]
        return self._keys

    def keys(self) -> Tensor:
        """Return the keys [B, H, N, d] of the call."""
        assert self._keys is not None
        return self._keys


def wrap_blocks(model: VisionTransformer, schedule: list[int], config: PyraConfig) -> None:
    """Replace the blocks from the first that merges on; ``schedule`` fits the model and is not all zero."""
    check_supported(model)
    first = next(layer for layer, removed in enumerate(schedule) if removed)
    last = len(model.blocks) - 1
    for layer in range(first, last + 1):
        model.blocks[layer] = MergingBlock(
            model.blocks[layer],
            schedule[layer],
            model.num_prefix_tokens,
            config,
            model if layer == last else None,
        )
    model.forward_intermediates = refuse_intermediates


def refuse_intermediates(*_args: Any, **_kwargs: Any) -> Any:
    """Stand in for ``forward_intermediates``, which would fold merged tokens into a grid they no longer fill.

    Raises:
        UnsupportedModelError: always.
    """
    raise UnsupportedModelError(
        "a wrapped model gives no intermediate feature maps: its tokens have merged; unwrap(model) first"
    )


def unwrap_blocks(model: VisionTransformer) -> None:
    """Put the replaced blocks back, holding the children their stand-ins have now."""
    del model.forward_intermediates
    for layer, block in enumerate(model.blocks):
        if isinstance(block, MergingBlock):
            (original,) = block.replaced
            for name in original._modules:
                setattr(original, name, getattr(block, name))
            original.training = block.training
            model.blocks[layer] = original


def geometry(model: nn.Module, input_size: int | tuple[int, int] | None) -> Geometry:
    """Sizes of the model at ``input_size`` pixels (None: its own)."""
    plain: Any = check_supported(model)
    patch = plain.patch_embed
    height, width = patch.patch_size
    if input_size is None:
        rows, columns = patch.grid_size
    else:
        size = (input_size, input_size) if isinstance(input_size, int) else input_size
        if not isinstance(size, tuple) or len(size) != 2 or not all(isinstance(side, int) for side in size):
            raise ValueError(f"input size must be a whole number of pixels or (height, width), got {input_size!r}")
        if size[0] % height or size[1] % width or min(size) <= 0:
            raise ValueError(f"input size {size} is not a multiple of the patch size {height} x {width}")
        rows, columns = size[0] // height, size[1] // width
    block = plain.blocks[0]
    patches = rows * columns
    return Geometry(
        depth=len(plain.blocks),
        tokens=patches + plain.num_prefix_tokens,
        prefix_tokens=plain.num_prefix_tokens,
        dim=plain.embed_dim,
        attention_dim=block.attn.attn_dim,
        mlp_macs=_linear_macs(block.mlp),
        head_dim=block.attn.head_dim,
        embedding_macs=patches * patch.proj.weight.numel(),
    )


def check_supported(model: nn.Module) -> VisionTransformer:
    """Return ``model``, or raise :class:`UnsupportedModelError` with what keeps its tokens from merging."""
    reason = _obstacle(model)
    if reason is not None:
        name = getattr(model, "pretrained_cfg", {}).get("architecture") or type(model).__name__
        raise UnsupportedModelError(f"{name} cannot be merged: {reason}")
    assert isinstance(model, VisionTransformer)
    return model


def _obstacle(model: nn.Module) -> str | None:
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    if any("relative_position" in name or "rel_pos" in name for name in names):
        return "its attention adds a relative position bias for each pair of grid positions, which a merged token lacks"
    if any(hasattr(module, "window_size") for module in model.modules()):
        return "it attends within windows of a fixed grid, which merged tokens no longer form"
    if not isinstance(model, VisionTransformer):
        return f"{type(model).__name__} is not timm's plain VisionTransformer"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(model.patch_embed).__name__} (a hybrid), not from a plain projection"
    for block in model.blocks:
        if not isinstance(block, (Block, MergingBlock)):
            return f"its blocks ({type(block).__name__}) are not pre-norm attention followed by an MLP"
        if not isinstance(block.attn, Attention):
            return f"its attention ({type(block.attn).__name__}) does not give its keys and take a size bias"
    return None


def _pools_by_class_token(model: VisionTransformer) -> bool:
    return model.attn_pool is None and model.global_pool == "token"


def _linear_macs(module: Any) -> int:
    """MACs of the linear layers in ``module`` for one token; PEFT layers count as the layer they stand for."""
    if hasattr(module, "get_base_layer"):
        module = module.get_base_layer()
    if hasattr(module, "in_features") and hasattr(module, "out_features") and not list(module.children()):
        return int(module.in_features) * int(module.out_features)
    return sum(_linear_macs(child) for child in module.children())


def source_maps(model: VisionTransformer, images: Tensor) -> list[Tensor]:
    """Follow every original token through a wrapped model, in a copy of it.

    Args:
        model: wrapped, on the device of ``images``.
        images: [B, 3, H, W].

    Returns:
        One [B, N0] map a block, from the first that merges on: the row that holds each original token after it.
    """
    traced = copy.deepcopy(model).eval()
    maps: list[Tensor] = []
    for block in traced.blocks:
        if isinstance(block, MergingBlock):
            block.model = (None,)
            block.register_forward_hook(lambda _module, _inputs, stream: maps.append(stream.source_map))
    traced.norm.register_forward_pre_hook(lambda _module, inputs: (inputs[0].tokens,))
    with torch.inference_mode():
        traced.forward_features(images)
    return maps
