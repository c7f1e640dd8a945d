"""timm's plain ``VisionTransformer``: ViT, AugReg, DeiT, DINO, DINOv2, MAE, and the towers of CLIP and SigLIP.

With a class token or none, distillation and register tokens, any pooling, plain or differential attention. What cannot
be merged is told by what the model is made of, never by its name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from timm.layers import Attention, AttentionPoolLatent, AttentionPoolPrr, DiffAttention, LayerNorm, PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from pyra.backbones.layers import MergingLayer, NormedKeys, TokenStream, class_of, linear_macs, stream_of
from pyra.cost import Geometry
from pyra.errors import UnsupportedModelError


class MergingBlock(MergingLayer):
    """Modifications against timm's ``Block``: takes tokens or a stream, merges, adds the size bias."""

    norm1: nn.Module
    attn: Any
    ls1: nn.Module
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    ls2: nn.Module
    drop_path2: nn.Module
    layer_norms = (nn.LayerNorm, LayerNorm)

    def forward(
        self, x: Tensor | TokenStream, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | TokenStream:
        """Run one block."""
        refuse_masks(attn_mask, is_causal)
        stream = stream_of(x)
        attention = NormedKeys(self.attn)
        attended = attention(self.normed(self.norm1, stream.tokens), attn_mask=self.bias(stream, self.attn.fused_attn))
        stream = self.merge(stream.holding(stream.tokens + self.drop_path1(self.ls1(attended))), attention)
        tokens = stream.tokens
        changed = self.mlp(self.normed(self.norm2, tokens))
        return self.hand_on(stream.holding(tokens + self.drop_path2(self.ls2(changed))))


MERGING = MergingBlock


def layers(model: VisionTransformer) -> nn.Sequential:
    """Return the blocks."""
    return model.blocks


def prepare(model: VisionTransformer, _outer: nn.Module) -> None:
    """Make a model whose blocks merge hand out unmerged feature maps."""
    model.forward_intermediates = functools.partial(forward_intermediates, model)


def restore(model: VisionTransformer, _outer: nn.Module) -> None:
    """Undo :func:`prepare`."""
    del model.forward_intermediates


def features(model: VisionTransformer, images: Tensor) -> Tensor:
    """Return the normed tokens [B, N0, C] of ``images`` [B, 3, H, W]."""
    tokens: Tensor = model.forward_features(images)
    return tokens


def forward_intermediates(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the model's own ``forward_intermediates``; every map is spread out, in place."""
    kind: Any = type(model)
    return kind.forward_intermediates(_Spreading(model), *args, **kwargs)


class _Spreading:
    """Stands in for a wrapped model during one call: its blocks hand out spread tokens and pass on the merged ones."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def blocks(self) -> _SpreadingBlocks:
        return _SpreadingBlocks(self._model.blocks)  # type: ignore[arg-type]


class _SpreadingBlocks:
    def __init__(self, blocks: nn.Sequential) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: slice) -> _SpreadingBlocks:
        return _SpreadingBlocks(self._blocks[index])

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        stream: TokenStream | None = None
        for block in self._blocks:
            # What enters a block is bound when it is handed out: a recomputed block sees the same again.
            call = _SpreadingCall(block, stream)
            yield call
            stream = call.stream


class _SpreadingCall:
    def __init__(self, block: nn.Module, entering: TokenStream | None) -> None:
        self._block, self._entering = block, entering
        self.stream: TokenStream | None = None

    def __call__(self, x: Tensor, **kwargs: Any) -> Tensor:
        result = self._block(x if self._entering is None else self._entering, **kwargs)
        if not isinstance(result, TokenStream):
            return result
        self.stream = result
        return result.spread()


def refuse_masks(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise :class:`UnsupportedModelError` for a mask, whose rows and columns merged tokens would no longer match."""
    if attn_mask is not None or is_causal:
        raise UnsupportedModelError(
            "a wrapped timm model takes no attention mask: its tokens have merged; unwrap(model) first"
        )


def geometry(model: VisionTransformer, input_size: tuple[int, int] | None) -> Geometry:
    """Sizes of the model at ``input_size`` pixels (None: its own)."""
    rows, columns = patch_grid(model, input_size)
    block, depth, patches = model.blocks[0], len(model.blocks), rows * columns
    return Geometry(
        depth=depth,
        tokens=patches + model.num_prefix_tokens,
        prefix_tokens=model.num_prefix_tokens,
        dim=model.embed_dim,
        attention_dim=_attention_dim(block.attn),
        mlp_macs=linear_macs(block.mlp),
        head_dim=block.attn.head_dim,
        embedding_macs=patches * model.patch_embed.proj.weight.numel(),
        # The mean, as blocks may differ in it: Sapiens 2 has fewer key and value heads in its middle blocks.
        projection_macs=sum(linear_macs(each.attn) for each in model.blocks) // depth,
        pooling_macs=_pooling_macs(model, patches),
    )


def patch_grid(model: VisionTransformer, input_size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of patches at ``input_size`` pixels (None: the model's own)."""
    patch = model.patch_embed
    height, width = patch.patch_size
    if input_size is None:
        input_size = patch.img_size
    elif not patch.dynamic_img_pad and (input_size[0] % height or input_size[1] % width):
        raise ValueError(f"input size {input_size} is not a multiple of the patch size {height} x {width}")
    rows, columns = patch.dynamic_feat_size(input_size)
    return int(rows), int(columns)


def obstacle(model: nn.Module) -> str | None:
    """Return what keeps the model's tokens from merging, or None."""
    if not isinstance(model, VisionTransformer):
        return f"{type(model).__name__} is not timm's plain VisionTransformer"
    if type(model.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(model.patch_embed).__name__} (a hybrid), not from a plain projection"
    if not len(model.blocks):
        return "it has no blocks"
    for block in model.blocks:
        if class_of(block).forward is not Block.forward:
            return f"its blocks ({type(block).__name__}) are not pre-norm attention followed by an MLP"
        if type(block.attn).forward not in (Attention.forward, DiffAttention.forward):
            return f"its attention ({type(block.attn).__name__}) does not give its keys and take a size bias"
    return None


def _attention_dim(attention: Any) -> int:
    """Channels that each of the two attention products goes over, for one query."""
    dim: int = attention.num_heads * attention.head_dim
    # Differential attention: twice as many query and key heads, and both maps weight values of twice the width.
    return 3 * dim if isinstance(attention, DiffAttention) else dim


def _pooling_macs(model: Any, patches: int) -> int:
    """MACs of attention pooling, which sees every token again."""
    pool = model.attn_pool
    tokens = patches + (model.num_prefix_tokens if getattr(model, "pool_include_prefix", True) else 0)
    if isinstance(pool, AttentionPoolPrr):
        return 2 * tokens * tokens * int(pool.out_features)
    if not isinstance(pool, AttentionPoolLatent):
        return 0
    every = linear_macs(pool.kv)
    products = 2 * pool.latent_len * pool.num_heads * pool.head_dim
    return tokens * (every + products) + pool.latent_len * (linear_macs(pool) - every)
