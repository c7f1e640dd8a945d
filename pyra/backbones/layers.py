"""What all families share: a layer that merges stands in for the model's own, in the same place.

A :class:`MergingLayer` holds the very children, hooks and flags of the layer it replaces, under the same names, and is
an instance of that layer's class: parameters, checkpoints, PEFT targets, recorders of hidden states and FSDP policies
find what they look for. No attention code is copied: :class:`KeyReader` reads the keys. What one forward needs travels
from layer to layer beside the tokens in a :class:`TokenStream`, and the last layer spreads the tokens out again, so
that what follows the layers (norm, pooling, heads) sees one row a token, in order, each weighted by its size.

Letters: ``B`` batch, ``N`` tokens now, ``N0`` tokens at the first layer, ``C`` channels, ``H`` heads.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, MutableSequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pyra.attention import SizeBias, proportional
from pyra.config import PyraConfig
from pyra.errors import ScheduleError, UnsupportedModelError
from pyra.kernels.match import Rules
from pyra.matching import removable
from pyra.merging import spread
from pyra.reactivation import Reactivation
from pyra.step import layer_norm, merge_step

REACTIVATION = "reactivation"  # name of the module in a layer


@dataclass(frozen=True)
class TokenStream:
    """What passes between layers once tokens have merged.

    Attributes:
        tokens: [B, N, C].
        size: [B, N, 1] int32, patches each token stands for, 0 for padding; whole numbers, which no mixed-precision
            policy rounds. None while all are one.
        source_map: [B, N0] row that holds each original token; None while that is its own.
        positions: [B, N] original position of each token; a merged token has that of its destination. None while all
            are in place.
    """

    tokens: Tensor
    size: Tensor | None = None
    source_map: Tensor | None = None
    positions: Tensor | None = None

    def holding(self, tokens: Tensor) -> TokenStream:
        """Return the stream with other values in the same tokens."""
        return TokenStream(tokens, self.size, self.source_map, self.positions)

    def spread(self) -> Tensor:
        """Return [B, N0, C]: for each original token the one that holds it."""
        return self.tokens if self.source_map is None else spread(self.tokens, self.source_map)


torch.export.register_dataclass(TokenStream)


@dataclass(frozen=True)
class Step:
    """What one layer does.

    Attributes:
        layer: index of the layer, from 0.
        depth: number of layers.
        removed: tokens it merges away.
        pairs: rows of its re-activation weights, as many as it removes at any rate; 0 where it never merges.
        prefix: leading tokens that never merge.
        dim: channels ``C``.
        config: how tokens are matched and merged.
        grid: rows and columns of patches the schedule was made for; None where patches come in no fixed order.
        share: of a decoder, what of a prompt is left after the layer.
    """

    layer: int
    depth: int
    removed: int
    pairs: int
    prefix: int
    dim: int
    config: PyraConfig
    grid: tuple[int, int] | None
    share: float = 1.0

    @property
    def last(self) -> bool:
        """Whether the tokens are spread out after this layer."""
        return self.layer == self.depth - 1

    def grid_width(self, tokens: int) -> int | None:
        """Return the patches in a row of an input of ``tokens`` tokens, where the matching asks for it.

        Raises:
            ScheduleError: for an input of another size that is not square either: its shape is not known here.
        """
        if self.config.matching != "local":
            return None
        assert self.grid is not None
        patches, side = tokens - self.prefix, math.isqrt(tokens - self.prefix)
        if patches == math.prod(self.grid):
            return self.grid[1]
        if patches != side * side:
            raise ScheduleError(
                f"local matching needs the patch grid: this input has {patches} patches, neither "
                f"{self.grid[0]} x {self.grid[1]} as the wrapped model nor a square; wrap a model of that image size"
            )
        return side


class MergingLayer(nn.Module):
    """Merging between attention and MLP; a family's subclass has the ``forward``.

    Instances also inherit from the class of the layer that they replace, whose name they keep: policies that wrap by
    class name (FSDP's) go on matching.
    """

    step: Step
    replaced: tuple[nn.Module]  # in a tuple: no child, but copied and pickled along
    origin: tuple[type[MergingLayer], type[nn.Module]]
    layer_norms: tuple[type[nn.Module], ...] = (nn.LayerNorm,)  # classes of norms that are just that

    def merge(self, stream: TokenStream, attention: KeyReader, padded: bool = False) -> TokenStream:
        """Merge the tokens of a stream.

        Args:
            stream: what entered the layer, with ``tokens`` after attention.
            attention: the reader of the keys of that attention.
            padded: whether tokens of size 0 are in the stream, whose keys must not count.

        Raises:
            ScheduleError: where the input is too small for the schedule.
        """
        step = self.step
        if not step.removed:
            return stream
        count = stream.tokens.shape[1]
        entered = count if stream.source_map is None else stream.source_map.shape[1]
        most = removable(count, step.prefix)
        if step.removed > most:
            raise ScheduleError(
                f"layer {step.layer} removes {step.removed} of the {count} tokens of this input: at most {most} can "
                "go; wrap the model with a schedule for this input size"
            )
        config = step.config
        keys, heads = attention.keys()
        if padded and stream.size is not None:
            nobody = stream.size == 0
            keys = keys.masked_fill(nobody.unsqueeze(1) if heads == 1 else nobody.unsqueeze(2), 0)
        return TokenStream(
            *merge_step(
                stream.tokens,
                stream.size,
                stream.source_map,
                stream.positions,
                keys,
                heads,
                # A layer may hold the weights of another adapter than the one whose configuration this is.
                getattr(self, "reactivation", None) if config.reactivation else None,
                step.removed,
                step.prefix,
                Rules(
                    order=config.order,
                    method=config.matching,
                    margin=0.9 - 0.9 * step.layer / step.depth,  # as in PiToMe: later layers count more tokens as alike
                    grid_width=step.grid_width(entered),
                    window=config.window,
                ),
                config.threshold,
                config.backend,
                config.scaled_gates,
            )
        )

    def bias(self, stream: TokenStream, fused: bool) -> Tensor | SizeBias | None:
        """Return what the attention gets as its mask, or None while all tokens count one.

        Args:
            stream: what entered the layer.
            fused: whether the attention calls ``scaled_dot_product_attention``.

        Raises:
            UnsupportedModelError: where a way other than a mask was asked for, and it does not.
        """
        config = self.step.config
        if not config.proportional_attention or stream.size is None:
            return None
        if not fused and config.attention not in ("auto", "mask"):
            raise UnsupportedModelError(
                f"attention={config.attention!r} takes the place of scaled_dot_product_attention, which this model "
                "does not call: create it with fused attention (timm) or attn_implementation='sdpa' (transformers)"
            )
        return proportional(stream.size, stream.tokens.dtype, config.attention if fused else "mask", config.backend)

    def normed(self, norm: nn.Module, tokens: Tensor) -> Tensor:
        """Apply a norm of the layer."""
        return layer_norm(norm, tokens, self.layer_norms)

    def hand_on(self, stream: TokenStream) -> Tensor | TokenStream:
        """Return what the next layer gets, or after the last one [B, N0, C]."""
        return stream.spread() if self.step.last else stream

    def extra_repr(self) -> str:
        """Return what is shown in ``print(model)``."""
        return f"removed={self.step.removed}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the two classes that the instance's own class is made of."""
        return _blank, self.origin, self.__dict__


def refuse_reentrant(layer: Any) -> None:
    """Raise where a stream would lose its gradients: reentrant checkpoints see tensors among the arguments only."""
    if layer.training and layer.gradient_checkpointing:
        function = layer._gradient_checkpointing_func
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise UnsupportedModelError(
                "reentrant gradient checkpointing loses the gradients of merged tokens: enable it with "
                "use_reentrant=False (the default)"
            )


def stream_of(x: Tensor | TokenStream) -> TokenStream:
    """Return the stream that enters a layer: tokens [B, N, C] that nothing merged yet start one."""
    return x if isinstance(x, TokenStream) else TokenStream(x)


def replace_layers(layers: MutableSequence[nn.Module], steps: list[Step], kind: type[MergingLayer]) -> None:
    """Replace the layers in a module list from the first that merges on; ``steps`` has one entry a layer.

    An error leaves the list as it was.
    """
    first = next(index for index, step in enumerate(steps) if step.removed or step.pairs)
    made = [_standing_for(layers[index], steps[index], kind) for index in range(first, len(steps))]
    for index, layer in enumerate(made, first):
        layers[index] = layer


def switch_layers(layers: MutableSequence[nn.Module], steps: list[Step], kind: type[MergingLayer]) -> None:
    """Give the layers of a wrapped model other steps; re-activation weights stay.

    Layers before the first that stood in so far are replaced, if they merge now. An error leaves the list as it was.
    """
    standing = {found.step.layer: found for layer in layers for found in merging_layers(layer)}
    first = min((index for index, step in enumerate(steps) if step.removed), default=len(steps))
    made = {
        index: _standing_for(layers[index], steps[index], kind)
        for index in range(first, len(steps))
        if index not in standing
    }
    for index, layer in standing.items():
        layer.step = replace(steps[index], pairs=layer.step.pairs)
    for index, layer in made.items():
        layers[index] = layer


def restore_layers(layers: MutableSequence[nn.Module]) -> None:
    """Put the replaced layers back, with the children, hooks and flags that their stand-ins have now."""
    for index, layer in enumerate(layers):
        if isinstance(layer, MergingLayer):
            (original,) = layer.replaced
            state = {k: v for k, v in layer.__dict__.items() if k not in ("step", "replaced", *_BOUND)}
            state["_modules"] = {k: v for k, v in layer._modules.items() if k != "reactivation"}
            original.__dict__.update(state)
            layers[index] = original


def _standing_for(layer: nn.Module, step: Step, kind: type[MergingLayer]) -> MergingLayer:
    new = _blank(kind, type(layer))
    new.__dict__.update({name: value for name, value in layer.__dict__.items() if name not in _BOUND})
    for name in ("_modules", "_parameters", "_buffers"):
        new.__dict__[name] = dict(layer.__dict__[name])
    new.step = step
    new.replaced = (layer,)
    if step.pairs and step.config.reactivation:
        give_reactivation(new, step.pairs)
    return new


def give_reactivation(layer: MergingLayer, pairs: int) -> None:
    """Give a layer fresh re-activation weights of ``pairs`` rows, which change nothing yet.

    Raises:
        UnsupportedModelError: where the layer has no weights of a precision that can be trained.
    """
    step = layer.step
    weight = next((p for p in layer.parameters() if p.is_floating_point() and p.element_size() > 1), None)
    if weight is None:
        raise UnsupportedModelError(
            f"layer {step.layer} has no weights of 16 bits or more, which trained re-activation weights would be "
            "like: give reactivation=False"
        )
    with torch.inference_mode(False):  # they are to be trained, wherever this runs
        layer.reactivation = Reactivation(pairs, step.dim, device=weight.device, dtype=weight.dtype)
    layer.reactivation.train(layer.training)


# State of an instance that is bound to it: `Module.compile`, and a forward of its own.
_BOUND = ("_compiled_call_impl", "forward")


def patched_forward(layer: nn.Module) -> str | None:
    """Name what has a forward of its own on the instance, of a layer and its children; None where nothing has."""
    named = (("", layer), *layer.named_children())
    attention = ("attn", "attention", "self_attn")
    found = (name for name, module in named if (not name or name in attention) and "forward" in module.__dict__)
    return next((f"its {name or type(layer).__name__}" for name in found), None)


def class_of(layer: nn.Module) -> type[nn.Module]:
    """Return the class of a layer, or of the one that it stands in for."""
    return layer.origin[1] if isinstance(layer, MergingLayer) else type(layer)


def _blank(kind: type[MergingLayer], base: type[nn.Module]) -> Any:
    cls = _stand_in_class(kind, base)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def _stand_in_class(kind: type[MergingLayer], base: type[nn.Module]) -> type[MergingLayer]:
    return type(base.__name__, (kind, base), {"__module__": __name__, "__doc__": kind.__doc__, "origin": (kind, base)})


class KeyReader:
    """Stands in for an attention module during one call and keeps the keys that it computes.

    The module's own ``forward`` runs with this object as ``self``: every name is looked up on the module, but the
    submodule that yields the keys (``k_norm`` or ``k_proj``) passes by here. The module itself is not touched, so
    calls may interleave, recompute and run in threads.
    """

    def __init__(self, attention: nn.Module) -> None:
        self._attention = attention
        self._keys: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._attention, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module: its own hooks run as in any call, `_call_impl` finds them on it."""
        return nn.Module._call_impl(self, *args, **kwargs)  # type: ignore[arg-type]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward of the module's class with this object as ``self``."""
        if "forward" in self._attention.__dict__:
            raise UnsupportedModelError(
                f"{type(self._attention).__name__} has a forward of its own on the instance, which merging would pass "
                "by: use forward hooks, or unwrap the model before it is changed"
            )
        return type(self._attention).forward(self, *args, **kwargs)

    def keys(self) -> tuple[Tensor, int]:
        """Return the keys of the call with their heads apart, and the axis of the heads."""
        raise NotImplementedError

    def _keep(self, keys: Tensor) -> Tensor:
        self._keys = keys
        return keys

    def _kept(self) -> Tensor:
        if self._keys is None:
            raise UnsupportedModelError(
                f"{type(self._attention).__name__} was called without its keys being seen: torch.jit.trace does that "
                "(use torch.export or torch.compile), or an attention that computes them in another way"
            )
        return self._keys


class NormedKeys(KeyReader):
    """timm: every attention passes its keys [B, H, N, d] through ``k_norm``, before any rotation."""

    def k_norm(self, keys: Tensor) -> Tensor:
        """Apply the module's key norm and keep the outcome."""
        return self._keep(self._attention.k_norm(keys))  # type: ignore[operator]

    def keys(self) -> tuple[Tensor, int]:
        """Return the keys of the call, [B, H, N, d]."""
        return self._kept(), 1


class ProjectedKeys(KeyReader):
    """transformers: every vision attention gets its keys [B, N, H * d] from ``k_proj``, before any rotation."""

    def k_proj(self, x: Tensor) -> Tensor:
        """Apply the module's key projection and keep the outcome."""
        return self._keep(self._attention.k_proj(x))  # type: ignore[operator]

    def keys(self) -> tuple[Tensor, int]:
        """Return the keys of the call, [B, N, H, d]."""
        return self._kept().unflatten(-1, (-1, self._attention.head_dim)), 2


def linear_macs(module: Any) -> int:
    """MACs of the linear layers in ``module`` for one token; PEFT layers count as the layer they stand for."""
    if hasattr(module, "get_base_layer"):
        module = module.get_base_layer()
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features) * int(module.out_features)
    return sum(linear_macs(child) for child in module.children())


def merging_layers(model: nn.Module) -> Iterator[MergingLayer]:
    """Yield the layers of a wrapped model that stand in for its own, in order; what lies in them is not walked."""
    if isinstance(model, MergingLayer):
        yield model
        return
    for child in model.children():
        yield from merging_layers(child)
