"""transformers' vision encoders: ViT, DeiT, DINOv2 (with registers), DINOv3, CLIP, SigLIP, SigLIP 2 and ViT-MAE.

Alone, under a classification head, or as the image side of a two-tower model (whose text side is left alone). A layer
is recognised by its parts: pre-norm attention with separate key projections, then an MLP. Padding (SigLIP 2) is what
size 0 means: padded tokens are seen by none and add nothing to what they merge with.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pyra.attention import SizeBias
from pyra.backbones.layers import MergingLayer, ProjectedKeys, TokenStream, linear_macs, refuse_reentrant, stream_of
from pyra.cost import Geometry
from pyra.errors import UnsupportedModelError

_TAKES_BIAS = ("sdpa", "eager")  # attention implementations that add a float mask to the scores
_PREFIX_TOKENS = ("cls_token", "class_embedding", "distillation_token", "register_tokens", "prompt_tokens")
_PARTS = {"embeddings", "rope_embeddings", "encoder", "model", "layers", "pooler", "head"}  # of a tower, beside norms
_LAYER_ARGUMENTS = ("self", "hidden_states", "attention_mask", "position_embeddings", "kwargs")


@dataclass(frozen=True)
class Layout:
    """Names of a layer's children: norm, attention, what its output passes through, and the same for the MLP."""

    norm1: str
    attention: str
    after_attention: tuple[str, ...]
    norm2: str
    mlp: str
    after_mlp: tuple[str, ...]

    def names(self) -> set[str]:
        """Return all of them."""
        return {self.norm1, self.attention, *self.after_attention, self.norm2, self.mlp, *self.after_mlp}


LAYOUTS = (
    Layout("layernorm_before", "attention", ("dropout",), "layernorm_after", "mlp", ("dropout",)),
    Layout("norm1", "attention", ("layer_scale1", "drop_path"), "norm2", "mlp", ("layer_scale2", "drop_path")),
    Layout("layer_norm1", "self_attn", (), "layer_norm2", "mlp", ()),
)


class MergingEncoderLayer(MergingLayer):
    """Modifications against the layer it stands for: takes tokens or a stream, merges, adds the size bias."""

    def forward(
        self,
        hidden_states: Tensor | TokenStream,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor | TokenStream:
        """Run one layer."""
        refuse_reentrant(self)
        layout, stream = _layout(self), stream_of(hidden_states)
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise self._takes_no_bias()
        if position_embeddings is not None:
            kwargs["position_embeddings"] = tuple(
                rows_of(table, stream.positions, self.step.prefix) for table in position_embeddings
            )
        attention = ProjectedKeys(getattr(self, layout.attention))
        mask = self._mask(stream, attention_mask)
        attended, *_ = attention(self.normed(self._child(layout.norm1), stream.tokens), attention_mask=mask, **kwargs)
        tokens = stream.tokens + self._through(layout.after_attention, attended)
        if stream.size is None and attention_mask is not None:
            stream = TokenStream(tokens, _present(attention_mask), stream.source_map, stream.positions)
        stream = self.merge(stream.holding(tokens), attention, padded=attention_mask is not None)
        changed = self._child(layout.mlp)(self.normed(self._child(layout.norm2), stream.tokens))
        return self.hand_on(stream.holding(stream.tokens + self._through(layout.after_mlp, changed)))

    def _mask(self, stream: TokenStream, attention_mask: Tensor | None) -> Tensor | SizeBias | None:
        """Additive mask [B, 1, 1, N]: size bias, the lowest number for padding; the model's own until tokens merged."""
        if stream.size is None:
            return attention_mask
        mask = self.bias(stream, self._implementation() == "sdpa")
        if mask is None and attention_mask is not None:
            padding = (stream.size == 0).transpose(1, 2).unsqueeze(1)
            mask = torch.zeros_like(padding, dtype=stream.tokens.dtype).masked_fill(
                padding, torch.finfo(stream.tokens.dtype).min
            )
        if mask is not None and self._implementation() not in _TAKES_BIAS:
            raise self._takes_no_bias()
        return mask

    def _implementation(self) -> str:
        name: str = getattr(self, _layout(self).attention).config._attn_implementation
        return name

    def _takes_no_bias(self) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"attention implementation {self._implementation()!r} takes no size bias: load the model with "
            "attn_implementation='sdpa'"
        )

    def _child(self, name: str) -> nn.Module:
        return getattr(self, name)

    def _through(self, names: tuple[str, ...], x: Tensor) -> Tensor:
        for name in names:
            x = self._child(name)(x)
        return x


MERGING = MergingEncoderLayer


def rows_of(table: Tensor, positions: Tensor | None, prefix: int) -> Tensor:
    """Pick the rows [B, 1, N - prefix, d] of a rotary ``table`` [P, d] that belong to the tokens that are left."""
    return table if positions is None else table[positions[:, prefix:] - prefix].unsqueeze(1)


def _present(attention_mask: Tensor) -> Tensor:
    """Sizes [B, N, 1] before any merging, from a mask of padded keys [B, 1, Q, N] (the same for every query)."""
    row = attention_mask[:, 0, 0]
    present = row if row.dtype == torch.bool else row == 0
    return present.to(torch.int32).unsqueeze(-1)


def tower(model: nn.Module) -> nn.Module:
    """Find the image encoder in a model: the module that has the embeddings and the layers.

    Args:
        model: a vision model of transformers, with or without a head, or a two-tower model.
    """
    core: Any = model
    while not hasattr(core, "embeddings"):
        inner = getattr(core, "vision_model", None) or getattr(core, "base_model", core)
        if inner is core:
            break
        core = inner
    return core


def layers(model: nn.Module) -> nn.ModuleList:
    """Return the encoder's layers."""
    found = _layer_list(model)
    if found is None:
        raise UnsupportedModelError("its layers are wrapped in other modules, or are no longer what they were")
    return found


def prepare(model: nn.Module, _outer: nn.Module) -> None:
    """Make a model whose layers merge hand out unmerged hidden states."""
    _recorder(model).register_forward_hook(spread_hidden_states)


def restore(model: nn.Module, _outer: nn.Module) -> None:
    """Undo :func:`prepare`."""
    hooks = _recorder(model)._forward_hooks
    for key in [key for key, hook in hooks.items() if hook is spread_hidden_states]:
        del hooks[key]


def spread_hidden_states(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """Spread every recorded stream in a model's output (a forward hook)."""
    if isinstance(output, tuple):
        return tuple(_spread_all(value) for value in output)
    if getattr(output, "hidden_states", None) is not None:
        output["hidden_states"] = _spread_all(output["hidden_states"])
    return output


def _spread_all(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_spread_all(item) for item in value)
    return value.spread() if isinstance(value, TokenStream) else value


def features(model: nn.Module, images: Tensor, **inputs: Any) -> Tensor:
    """Return the tokens [B, N0, C] that leave the encoder, for ``images`` as the model takes them."""
    tokens: Tensor = model(images, **inputs).last_hidden_state
    return tokens


def geometry(model: nn.Module, input_size: tuple[int, int] | None) -> Geometry:
    """Sizes of the encoder at ``input_size`` pixels (None: its own)."""
    rows, columns = _grid(model, input_size)
    patches = rows * columns
    layer = layers(model)[0]
    layout = _layout(layer)
    attention: Any = getattr(layer, layout.attention)
    plain: Any = model
    prefix = _prefix_tokens(plain.embeddings)
    seen = int(patches * (1 - getattr(plain.config, "mask_ratio", 0.0)))  # ViT-MAE encodes what it does not mask
    heads = getattr(attention, "num_attention_heads", None) or attention.num_heads
    projection = next(m for m in plain.embeddings.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    return Geometry(
        depth=len(layers(model)),
        tokens=seen + prefix,
        prefix_tokens=prefix,
        dim=plain.config.hidden_size,
        attention_dim=heads * attention.head_dim,
        mlp_macs=linear_macs(getattr(layer, layout.mlp)),
        head_dim=attention.head_dim,
        embedding_macs=patches * projection.weight.numel(),
        projection_macs=linear_macs(attention),
        pooling_macs=_pooling_macs(getattr(plain, "head", None), patches),
    )


def patch_grid(model: nn.Module) -> tuple[int, int] | None:
    """Rows and columns of the model's patches; None where they come in another order (ViT-MAE) or shape (SigLIP 2)."""
    config: Any = model.config
    return None if hasattr(config, "mask_ratio") or hasattr(config, "num_patches") else _grid(model, None)


def _grid(model: nn.Module, input_size: tuple[int, int] | None) -> tuple[int, int]:
    config: Any = model.config
    height, width = _pair(config.patch_size)
    if input_size is not None:
        if input_size[0] % height or input_size[1] % width:
            raise ValueError(f"input size {input_size} is not a multiple of the patch size {height} x {width}")
        return input_size[0] // height, input_size[1] // width
    if getattr(config, "num_patches", None) is not None:  # SigLIP 2: a budget of patches of any aspect
        side = round(config.num_patches**0.5)
        return side, side
    rows, columns = _pair(config.image_size)
    return rows // height, columns // width


def obstacle(model: nn.Module) -> str | None:
    """Return what keeps the encoder's tokens from merging, or None."""
    if not isinstance(model, PreTrainedModel):
        return f"{type(model).__name__} is not one of transformers' models"
    if model.main_input_name != "pixel_values" and "pixel_values" not in _arguments(model):
        return f"it reads {model.main_input_name}, not images"
    if not hasattr(model, "embeddings"):
        return "it has no patch embeddings (if it has an image encoder inside, wrap that)"
    if _layer_list(model) is None:
        return (
            "its layers are not those of ViT, DINO, CLIP or SigLIP: pre-norm attention over one sequence an image, "
            "with keys from k_proj, then an MLP, and nothing else"
        )
    more = [name for name, _ in model.named_children() if name not in _PARTS and not name.endswith("norm")]
    if more:
        return f"its {more[0]} may read tokens between layers"
    return _embedding_obstacle(model.embeddings)


def _embedding_obstacle(embeddings: Any) -> str | None:
    """Return what makes it unknown which tokens are patches of one image, or None."""
    if any(isinstance(module, nn.Conv3d) for module in embeddings.modules()):
        return "its patches are cut from videos, not from images"
    names = [name.rpartition(".")[2] for name, _ in embeddings.named_parameters() if "token" in name]
    unknown = [name for name in names if name not in (*_PREFIX_TOKENS, "mask_token")]
    return f"its embeddings add {unknown[0]}, which are neither patches nor known prefix tokens" if unknown else None


def _layer_list(model: nn.Module) -> nn.ModuleList | None:
    lists = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m))
    return next((found for found in lists if all(_is_layer(layer) for layer in found)), None)


def _is_layer(layer: nn.Module) -> bool:
    """Whether a layer has the parts of a layout and no other, and takes what ours takes, in that order."""
    layout = next((layout for layout in LAYOUTS if layout.names() == _children(layer)), None)
    if layout is None or any(True for _ in layer.parameters(recurse=False)):
        return False
    taken = _arguments(layer)
    if taken != [name for name in _LAYER_ARGUMENTS if name in taken]:
        return False
    attention = getattr(layer, layout.attention)
    taken = _arguments(attention)
    packs = "cu_seqlens" in taken  # many images in one sequence
    return hasattr(attention, "k_proj") and hasattr(attention, "head_dim") and "attention_mask" in taken and not packs


def _arguments(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)


def _children(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_children()} - {"reactivation"}


def _layout(layer: nn.Module) -> Layout:
    return next(layout for layout in LAYOUTS if hasattr(layer, layout.norm1))


def _recorder(model: nn.Module) -> nn.Module:
    """Return the innermost of transformers' models around the layers: the one that records hidden states."""
    found = layers(model)
    around = [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(x is found for x in m.modules())]
    return around[-1]


def _prefix_tokens(embeddings: nn.Module) -> int:
    tokens = (getattr(embeddings, name, None) for name in _PREFIX_TOKENS)
    return sum(1 if token.ndim == 1 else token.shape[1] for token in tokens if isinstance(token, Tensor))


def _pooling_macs(head: Any, patches: int) -> int:
    """MACs of attention pooling, which sees every token again."""
    attention = getattr(head, "attention", None)
    if not isinstance(attention, nn.MultiheadAttention):
        return 0
    dim = attention.embed_dim
    return patches * (2 * dim * dim + 2 * dim) + 2 * dim * dim + linear_macs(head.mlp)


def _pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
