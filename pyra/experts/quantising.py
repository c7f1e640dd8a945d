"""Routed experts that train as they will be rounded: fake quantisation with a straight-through gradient.

The forward uses weights that are rounded to few bits, with a float32 scale for each group of inputs, and the gradient
goes to the float weights (the master weights) as if nothing had been rounded (arXiv 1712.05877, 1308.3432). Everything
but the routed experts stays float: attention, shared experts, dense layers, router, head, as in the INT4 release of
JoyAI-LLM Flash (arXiv 2604.03044). Weights are rounded from the master in each forward, and once more, from the master
again, when they are exported (:func:`pyra.export.write_int4`): never from what was rounded.

The rounding is that of compressed-tensors' symmetric integers: scale = largest magnitude of the group / 7.5, integers
from -8 to 7 (4 bits). A positive largest value is 7.5 steps, and becomes 7: no value moves by more than half a step,
so the gradient is the identity everywhere. A negative one is -7.5 steps give or take a rounding error, which decides
between -8 and -7: dividing by the scale, as here, and multiplying by its inverse, as torchao does where it trains
linear layers, differ there (``by_inverse``).

Letters: ``E`` experts, ``H`` hidden and ``I`` intermediate channels, ``G`` group size.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyra.errors import ConfigError, UnsupportedModelError
from pyra.experts.layers import expert_layers

STACKS = ("gate_up_proj", "down_proj")
"""Parameters that are rounded: [E, 2I, H] and [E, H, I], each along its last dimension."""
BITS = (2, 3, 4, 8)
_WORD = 8  # values of 4 bits in a word of 32
_AT_ONCE = 1 << 24  # values that are rounded together: the memory beside the result
_EXACT = {torch.float32: 1e-4, torch.float64: 1e-4}  # steps off the grid that are rounding errors of a type
_NEAR = 0.05
_GROUPS = (64, 32, 16, 8)

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class QuantisingConfig:
    """How weights are rounded.

    Args:
        bits: of an integer; 4 is what is exported, the others are for studies.
        group_size: inputs that share a scale, a multiple of 8; 64 as in the INT4 release of JoyAI-LLM Flash.
        by_inverse: multiply by the inverse of the scale as torchao does, instead of dividing by it.

    Raises:
        ConfigError: for values that are none.
    """

    bits: int = 4
    group_size: int = 64
    by_inverse: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        problems = []
        if type(self.bits) is not int or self.bits not in BITS:
            problems.append(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits!r}")
        if type(self.group_size) is not int or self.group_size < _WORD or self.group_size % _WORD:
            problems.append(f"group_size must be a multiple of {_WORD}, such as 64, got {self.group_size!r}")
        if problems:
            raise ConfigError(f"QuantisingConfig: {'; '.join(problems)}")

    @property
    def lowest(self) -> int:
        """The smallest integer; the largest is ``-lowest - 1``."""
        return -(1 << (self.bits - 1))


def quantise(weight: Tensor, config: QuantisingConfig) -> tuple[Tensor, Tensor]:
    """Round a weight [..., in] to integers.

    Returns:
        The integers, int8 [..., in], and the float32 scales [..., in / G] of their groups.

    >>> values, scale = quantise(torch.tensor([[-1.5, 1.5, 0.2, 0, 0, 0, 0, 0]]), QuantisingConfig(group_size=8))
    >>> values.tolist(), round(scale.item(), 3)
    ([[-8, 7, 1, 0, 0, 0, 0, 0]], 0.2)
    """
    groups = weight.detach().float().unflatten(-1, (-1, config.group_size))
    scale = groups.abs().amax(dim=-1) / (-config.lowest - 0.5)
    if config.by_inverse:
        scale = scale.clamp_(min=torch.finfo(torch.float32).smallest_normal)
        steps = groups * (1 / scale).unsqueeze(-1)
    else:
        scale = torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)  # as compressed-tensors
        steps = groups / scale.unsqueeze(-1)
    values = steps.clamp_(config.lowest, -config.lowest - 1).round_()
    return values.to(torch.int8).flatten(-2), scale


def rounded(weight: Tensor, config: QuantisingConfig) -> Tensor:
    """Return a weight [..., in] as what is deployed stands for: integers times scales, in the weight's own type."""
    values, scale = quantise(weight, config)
    return (values.float().unflatten(-1, (-1, config.group_size)) * scale.unsqueeze(-1)).flatten(-2).to(weight.dtype)


class _StraightThrough(torch.autograd.Function):
    """Rounds a stack [E, out, in] forwards, a few experts at a time, and hands gradients on backwards."""

    @staticmethod
    def forward(ctx: Any, stack: Tensor, config: QuantisingConfig) -> Tensor:
        several = max(1, _AT_ONCE // max(1, stack[:1].numel()))
        return torch.cat([rounded(part, config) for part in stack.split(several)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(stack: Tensor, config: QuantisingConfig) -> Tensor:
    """Return :func:`rounded` weights of all experts [E, out, in], with the gradient of the identity."""
    result: Tensor = _StraightThrough.apply(stack, config)
    return result


class FakeQuantisedExperts(nn.Module):
    """Stands in for stacked experts, in their place: same parameters, hooks and flags, and rounded in each forward.

    Instances also inherit from the class of the experts that they stand in for.
    """

    quantising: QuantisingConfig
    replaced: tuple[nn.Module]  # in a tuple: no child, but copied and pickled along
    origin: type[nn.Module]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the experts with rounded weights."""
        return self.run({name: getattr(self, name) for name in STACKS}, *args, **kwargs)

    def run(self, stacks: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Run the experts with other master weights, such as those with an adapter in them, rounded."""
        weights = {name: straight_through(stack, self.quantising) for name, stack in stacks.items()}
        return self.origin.forward(_With(self, weights), *args, **kwargs)

    def extra_repr(self) -> str:
        """Return what is shown in ``print(model)``."""
        own = self.origin.extra_repr(self)
        return f"{own + ', ' if own else ''}bits={self.quantising.bits}, group_size={self.quantising.group_size}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the class that is stood in for."""
        return _blank, (self.origin,), self.__dict__


class _With:
    """Experts with other weights, during one call: the module itself is not touched, so calls may interleave."""

    def __init__(self, experts: nn.Module, weights: dict[str, Tensor]) -> None:
        self._experts = experts
        self.gate_up_proj, self.down_proj = (weights[name] for name in STACKS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._experts, name)


def fake_quantise(model: Model, config: QuantisingConfig | None = None) -> Model:
    """Have the routed experts of a model work as they will be rounded, in place; parameters keep names and values.

    A model that is fake-quantised already keeps its parameters and takes the new configuration. LoRA on experts
    (:class:`pyra.adapters.ExpertLoraConfig`, before or after this call) is rounded with the weights that it is folded
    into, since that is what is deployed: the whole stacks are then made in each forward, and dropout cannot be had.

    Args:
        model: with layers as :func:`~pyra.experts.layers.expert_layers` finds them.
        config: 4 bits in groups of 64 by default.

    Returns:
        The model.

    Raises:
        ConfigError: for widths that the groups do not divide, or weights that were rounded already: rounding what was
            rounded moves it again.
        UnsupportedModelError: for a model without routed experts, or with experts of another layout or adapter. Nothing
            has changed then.

    Example:
        >>> model = fake_quantise(model)  # doctest: +SKIP
    """
    config = QuantisingConfig() if config is None else config
    holders = _holders(model)
    refuse_unfit(model, config)
    for holder, name, experts in holders:
        setattr(holder, name, _standing_for(experts, config))
    return model


def undo_fake_quantise(model: Model) -> Model:
    """Put the experts back that :func:`fake_quantise` replaced, with the parameters as they are now; return the model.

    A model that is not fake-quantised is returned as it is.
    """
    for holder in list(model.modules()):
        for name, child in list(holder.named_children()):
            if isinstance(child, FakeQuantisedExperts):
                setattr(holder, name, _original(child))
    return model


def quantising_config(model: nn.Module) -> QuantisingConfig | None:
    """Return how the experts of a model are rounded; None where they are not."""
    found = (module.quantising for module in model.modules() if isinstance(module, FakeQuantisedExperts))
    return next(found, None)


def refuse_unfit(model: nn.Module, config: QuantisingConfig) -> None:
    """Raise where the routed experts of a model cannot be rounded so; see :func:`fake_quantise`."""
    for name, mixture in expert_layers(model, through_adapters=True).items():
        experts = _inner(mixture.experts)
        for stack in (getattr(experts, parameter) for parameter in STACKS):
            if not stack.is_floating_point() or stack.element_size() < 2:
                raise UnsupportedModelError(f"{name}.experts has weights of {stack.dtype}: open it in bfloat16 or more")
            if stack.shape[-1] % config.group_size:
                raise ConfigError(
                    f"{name}.experts: groups of {config.group_size} do not divide {stack.shape[-1]} inputs; take a "
                    f"group_size that divides all, such as {fitting_group(model)}"
                )
        if not experts.gate_up_proj.is_meta and was_rounded(experts.gate_up_proj[0], config):
            raise ConfigError(
                f"{name}.experts holds weights that were rounded to {config.bits} bits already, and rounding them "
                "again moves them: open the float checkpoint that they were made from"
            )


def fitting_group(model: nn.Module) -> int:
    """Return the largest of 64, 32, 16 and 8 that divides the inputs of all routed experts; 64 where none does."""
    experts = [_inner(layer.experts) for layer in expert_layers(model, through_adapters=True).values()]
    widths = {getattr(one, stack).shape[-1] for one in experts for stack in STACKS}
    return next((size for size in _GROUPS if not any(width % size for width in widths)), _GROUPS[0])


def was_rounded(weight: Tensor, config: QuantisingConfig) -> bool:
    """Whether all groups of a weight [out, in] are whole multiples of something, which floats never are."""
    groups = weight.detach().float().unflatten(-1, (-1, config.group_size))
    largest = groups.abs().amax(dim=-1, keepdim=True)
    within = _EXACT.get(weight.dtype, _NEAR)
    fitting = torch.zeros_like(largest, dtype=torch.bool)
    for steps in range(1, -config.lowest + 1):  # that the largest value may be
        ratio = groups * (steps / largest.clamp(min=torch.finfo(torch.float32).tiny))
        fitting |= ((ratio - ratio.round()).abs() < within).all(dim=-1, keepdim=True)
    return bool(largest.any()) and bool(fitting.all())


def _inner(experts: Any) -> Any:
    """Return experts without the PEFT layers around them."""
    while hasattr(experts, "base_layer"):
        experts = experts.base_layer
    return experts


def _holders(model: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Return where experts hang: the module, the name in it, and the experts."""
    found: list[tuple[nn.Module, str, nn.Module]] = []
    for name, mixture in expert_layers(model, through_adapters=True).items():
        holder, child, experts = mixture, "experts", mixture.experts
        while hasattr(experts, "base_layer"):
            if not hasattr(experts, "folded_stacks"):
                raise UnsupportedModelError(
                    f"{name}.experts carries {type(experts).__name__}, which is not rounded with the weights: adapt "
                    "experts with ExpertLoraConfig"
                )
            holder, child, experts = experts, "base_layer", experts.base_layer
        if "forward" in experts.__dict__:
            raise UnsupportedModelError(
                f"{name}.experts has a forward of its own on the instance, which rounding would pass by"
            )
        if getattr(experts, "is_transposed", False):
            raise UnsupportedModelError(f"{name}.experts holds transposed weights, whose groups lie the other way")
        found.append((holder, child, experts))
    return found


def _standing_for(experts: nn.Module, config: QuantisingConfig) -> FakeQuantisedExperts:
    experts = _original(experts) if isinstance(experts, FakeQuantisedExperts) else experts
    new = _blank(type(experts))
    new.__dict__.update(experts.__dict__)  # parameters, hooks and children lie in the same dictionaries
    new.quantising = config
    new.replaced = (experts,)
    return new


def _original(standing: FakeQuantisedExperts) -> nn.Module:
    (original,) = standing.replaced
    original.__dict__.update({k: v for k, v in standing.__dict__.items() if k not in ("quantising", "replaced")})
    return original


def _blank(base: type[nn.Module]) -> FakeQuantisedExperts:
    cls = _stand_in_class(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


@functools.cache
def _stand_in_class(base: type[nn.Module]) -> type[FakeQuantisedExperts]:
    described = {"__module__": __name__, "__doc__": FakeQuantisedExperts.__doc__, "origin": base}
    return type(base.__name__, (FakeQuantisedExperts, base), described)
