"""timm's ``Eva``: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary positions.

The rotation of a token travels with it: a merged token turns by the position of its destination.
"""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm, PatchEmbed
from timm.layers.attention import AttentionRope
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from pyra.backbones import timm_vit
from pyra.backbones.layers import MergingLayer, NormedKeys, TokenStream, class_of, stream_of
from pyra.cost import Geometry

layers = timm_vit.layers
prepare = timm_vit.prepare
restore = timm_vit.restore
features = timm_vit.features
patch_grid = timm_vit.patch_grid


class MergingEvaBlock(MergingLayer):
    """Modifications against timm's ``EvaBlock``: as in ``timm_vit``, and the rotations follow the tokens."""

    norm1: nn.Module
    attn: Any
    gamma_1: Tensor | None
    drop_path1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    gamma_2: Tensor | None
    drop_path2: nn.Module
    layer_norms = (nn.LayerNorm, LayerNorm)

    def forward(
        self,
        x: Tensor | TokenStream,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor | TokenStream:
        """Run one block."""
        timm_vit.refuse_masks(attn_mask, is_causal)
        stream = stream_of(x)
        attention = NormedKeys(self.attn)
        rope = rows_of(rope, stream.positions, self.step.prefix)
        attended = attention(
            self.normed(self.norm1, stream.tokens), rope=rope, attn_mask=self.bias(stream, self.attn.fused_attn)
        )
        if self.gamma_1 is not None:
            attended = self.gamma_1 * attended
        stream = self.merge(stream.holding(stream.tokens + self.drop_path1(attended)), attention)
        changed = self.mlp(self.normed(self.norm2, stream.tokens))
        if self.gamma_2 is not None:
            changed = self.gamma_2 * changed
        return self.hand_on(stream.holding(stream.tokens + self.drop_path2(changed)))


MERGING = MergingEvaBlock


def rows_of(rope: Tensor | None, positions: Tensor | None, prefix: int) -> Tensor | None:
    """Pick the rotations of the tokens that are left.

    Args:
        rope: [P, d] or [H, P, d] for ``P`` patches, or with the batch in front [B, 1 | H, P, d].
        positions: [B, N] original positions, prefix tokens first, or None while all are in place.
        prefix: number of prefix tokens, which do not turn.

    Returns:
        [B, 1 | H, N - prefix, d], or ``rope`` as it is.
    """
    if rope is None or positions is None:
        return rope
    index = positions[:, prefix:] - prefix
    if rope.ndim == 4:
        return rope.take_along_dim(index[:, None, :, None], dim=2)
    return rope[index].unsqueeze(1) if rope.ndim == 2 else rope[:, index].transpose(0, 1)


def geometry(model: Eva, input_size: tuple[int, int] | None) -> Geometry:
    """Sizes of the model at ``input_size`` pixels (None: its own)."""
    return timm_vit.geometry(model, input_size)


def obstacle(model: nn.Module) -> str | None:
    """Return what keeps the model's tokens from merging, or None."""
    if not isinstance(model, Eva):
        return f"{type(model).__name__} is not timm's Eva"
    plain: Any = model
    if type(plain.patch_embed) is not PatchEmbed:
        return f"its patches come from a {type(plain.patch_embed).__name__} (a hybrid), not from a plain projection"
    if not len(plain.blocks):
        return "it has no blocks"
    for block in plain.blocks:
        if class_of(block).forward is not EvaBlock.forward:
            return f"its blocks ({type(block).__name__}) are not pre-norm attention followed by an MLP"
        if type(block.attn).forward not in (EvaAttention.forward, AttentionRope.forward):
            return f"its attention ({type(block.attn).__name__}) does not give its keys and take a size bias"
    return None
