"""Linear layers that train as they will be rounded: torchao's own quantisation-aware training.

``torchao-int4`` writes what was trained of image models, ``engine-int4`` of decoders: the same integers and scales.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import nn

from pyra.errors import ConfigError, UnsupportedModelError
from pyra.experts.quantising import QuantisingConfig
from pyra.export.formats import need

INT4 = "torchao-int4"
GROUP = 32
"""Inputs of a weight that share a scale."""
LINEAR = QuantisingConfig(bits=4, group_size=GROUP, by_inverse=True)
"""The rounding of :func:`int4_config`, to the bit in float32."""

Model = TypeVar("Model", bound=nn.Module)


def fake_quantise_linear(model: Model, leave: Collection[nn.Module] = ()) -> Model:
    """Have the linear layers of a model train as ``torchao-int4`` rounds them, in place; parameters keep their names.

    This is the step "prepare" of torchao's ``QATConfig``: weights are rounded in each forward, and the gradient goes to
    the float weights, but for values that are cut off at the end of the range (the largest of a group where it is
    positive). Layers whose inputs the groups do not divide stay float, as in the export.

    Args:
        model: without an adapter. One that is attached afterwards (:func:`pyra.adapters.adapt`, plain LoRA) is rounded
            with the weights that it folds into.
        leave: linear layers that stay float.

    Raises:
        ConfigError: where torchao is missing (names the extra), the model carries an adapter, or is of float64.
        UnsupportedModelError: for a model without such layers.
    """
    need("torchao", "training linear layers as int4", "torchao")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ConfigError("fake_quantise_linear takes the backbone: round it first, and adapt it then")
    left = {id(module) for module in leave}
    chosen: list[Any] = [one for name, one in model.named_modules() if id(one) not in left and fits(one, name)]
    if any(layer.weight.dtype == torch.float64 for layer in chosen):
        raise ConfigError("torchao rounds float32, bfloat16 and float16, not weights of float64: model.float() first")
    from torchao.quantization import quantize_
    from torchao.quantization.qat import QATConfig

    logging.getLogger("torchao").setLevel(logging.ERROR)
    prepare: Any = QATConfig(int4_config(), step="prepare")
    quantize_(model, prepare, filter_fn=lambda module, name: id(module) not in left and fits(module, name))
    if not trains_as_rounded(model):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no linear layers of a multiple of {GROUP} inputs that could be rounded"
        )
    return model


def undo_fake_quantise_linear(model: Model) -> Model:
    """Put ordinary linear layers back, with the float weights as they are now; return the model."""
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            if is_rounded(child):
                layer: Any = child
                setattr(holder, name, layer.to_linear())
    return model


def trains_as_rounded(model: nn.Module) -> bool:
    """Whether :func:`fake_quantise_linear` was applied to a model; torchao is not asked for it."""
    return any(is_rounded(module) for module in model.modules())


def is_rounded(module: nn.Module) -> bool:
    """Whether a linear layer is one that :func:`fake_quantise_linear` put there."""
    return hasattr(module, "weight_fake_quantizer")


def int4_config() -> Any:
    """Return how torchao rounds weights of this format."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    return IntxWeightOnlyConfig(weight_dtype=int4_type(), granularity=PerGroup(GROUP))


def int4_type() -> Any:
    """Return ``torch.int4``."""
    return getattr(torch, "int4")  # noqa: B009 - torch has it, its annotations do not


def linear_layers(model: nn.Module) -> tuple[dict[str, nn.Linear], list[str]]:
    """Return the linear layers of a decoder that are rounded, by name, and the names of those that the groups spare.

    Its head is neither: it stays float, as the embedding that it may share its weight with.
    """
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not output}
    rounded = {name: module for name, module in found.items() if fits(module, name)}
    return rounded, [name for name in found if name not in rounded]


def fits(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer whose inputs the groups divide."""
    return type(module).__name__.endswith("Linear") and getattr(module, "in_features", 1) % GROUP == 0
