"""Experts with low-rank factors beside their weights.

The weights of all experts lie in two stacks, and peft's way to adapt them (``target_parameters``) adds ``s B_e A_e`` to
each whole stack in every forward. Here only tokens go through the factors: rows are sorted by expert once, and the
stacks and the factors multiply them in grouped products, as transformers' own ``grouped_mm`` experts do.

Letters: ``T`` tokens, ``k`` experts a token, ``S = T k`` rows, ``E`` experts, ``M`` adapted ones, ``H`` hidden and
``I`` intermediate channels, ``r`` rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.adapters.expert_lora.config import ExpertLoraConfig
from pyra.errors import ConfigError
from pyra.experts.quantising import FakeQuantisedExperts

ALIGNED = 16
"""Bytes that rows start at multiples of in torch's grouped product."""


class _Groups(NamedTuple):
    """Rows sorted by expert: their positions among all rows (None: all of them, in order) and where each group ends."""

    rows: Tensor | None
    ends: Tensor


class ExpertFactors(nn.Module):
    """The factors of one adapter: ``gate_up_A`` [M, r, H], ``gate_up_B`` [M, 2I, r], ``down_A``, ``down_B``.

    Args:
        experts: the stacks, ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I].
        index: [M], ascending: the experts that are adapted.
        config: rank, scaling, dropout and which stacks.
    """

    index: Tensor

    def __init__(self, experts: Any, index: Tensor, config: ExpertLoraConfig) -> None:
        super().__init__()
        self.r = config.r
        self.scaling = config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)
        self.dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        self.every = len(index) == len(experts.gate_up_proj)
        self.register_buffer("index", index.to(experts.gate_up_proj.device), persistent=False)
        for projection in config.projections:
            stack = getattr(experts, projection)
            factory = {"device": stack.device, "dtype": stack.dtype}
            name = projection.removesuffix("_proj")
            first = nn.Parameter(torch.empty(len(index), config.r, stack.shape[2], **factory))
            second = nn.Parameter(torch.zeros(len(index), stack.shape[1], config.r, **factory))
            nn.init.uniform_(first, -(stack.shape[2] ** -0.5), stack.shape[2] ** -0.5)  # as nn.Linear and so peft
            self.register_parameter(f"{name}_A", first)
            self.register_parameter(f"{name}_B", second)

    def groups(self, chosen: Tensor, ends: Tensor) -> _Groups:
        """Return the rows of adapted experts, from the sorted expert of each row [S] and the ends of all groups [E]."""
        if self.every:
            return _Groups(None, ends)
        rows = torch.isin(chosen, self.index).nonzero().squeeze(1)
        return _Groups(rows, _ends(chosen[rows], self.index))

    def add(self, projection: str, product: Tensor, x: Tensor, groups: _Groups) -> Tensor:
        """Return ``product`` [S, out] with this adapter's part for the sorted rows ``x`` [S, in]."""
        if not hasattr(self, f"{projection}_A"):
            return product
        first, second = (getattr(self, f"{projection}_{factor}").to(x.dtype) for factor in "AB")
        short = -self.r % (ALIGNED // x.element_size())
        if short:
            first, second = F.pad(first, (0, 0, 0, short)), F.pad(second, (0, short))
        entering = self.dropout(x if groups.rows is None else x[groups.rows])
        added = _grouped(self.scaling * _grouped(entering, first, groups.ends), second, groups.ends)
        return product + added if groups.rows is None else product.index_add(0, groups.rows, added)

    @torch.no_grad()
    def fold_into(self, experts: Any, sign: int) -> None:
        """Add ``sign * s B_e A_e`` to each adapted expert, in float32, one expert after another."""
        for projection, stack in _stacks(experts):
            for expert, weight in self.folded(projection, stack.data, sign):
                stack.data[expert] = weight

    def folded(self, projection: str, weights: Tensor | list[Tensor], sign: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield the adapted experts of a stack, each with its weight [out, in] and the update in it."""
        if not hasattr(self, f"{projection}_A"):
            return
        first, second = (getattr(self, f"{projection}_{factor}").float() for factor in "AB")
        for place, expert in enumerate(self.index.tolist()):
            weight = weights[expert]
            update = (sign * self.scaling) * (second[place] @ first[place]).to(weight.device)
            yield expert, (weight.float() + update).to(weight.dtype)

    def extra_repr(self) -> str:
        """Return what is shown in ``print(model)``."""
        names = ", ".join(name for name, _ in self.named_parameters(recurse=False))
        return f"experts={len(self.index)}, r={self.r}, scaling={self.scaling:g}, {names}"


class ExpertLoraLayer(nn.Module, BaseTunerLayer):
    """Stacked experts with the factors of the active adapters; without any the experts run as they are.

    Args:
        base_layer: experts of transformers (``gate_up_proj``, ``down_proj``, ``act_fn``).
        adapter_name: of the first adapter.
        config: of it.
        index: [M], ascending: the experts that it adapts.
    """

    base_layer: Any  # what follows comes from peft, which has no annotations
    lora_experts: nn.ModuleDict
    set_adapter: Any
    active_adapters: Any
    adapter_layer_names = ("lora_experts",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: ExpertLoraConfig, index: Tensor) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_experts = nn.ModuleDict()
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config, index)

    def update_layer(self, adapter_name: str, config: ExpertLoraConfig, index: Tensor) -> None:
        """Add the factors of one more adapter."""
        self.lora_experts[adapter_name] = ExpertFactors(self.base_layer, index, config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the named (default: active) adapters to the weights.

        Raises:
            ValueError: with ``safe_merge``, for factors that are not finite; the weights are then as they were.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name not in self.lora_experts:
                continue
            factors: Any = self.lora_experts[name]
            if safe_merge and not all(bool(value.isfinite().all()) for value in factors.parameters()):
                raise ValueError(f"the factors of adapter {name} are not finite")
            factors.fold_into(self.base_layer, 1)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo :meth:`merge`, to within the rounding of the weights' type."""
        while self.merged_adapters:
            factors: Any = self.lora_experts[self.merged_adapters.pop()]
            factors.fold_into(self.base_layer, -1)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the experts: tokens [T, H], chosen experts [T, k] and their gates [T, k] give [T, H]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.lora_experts]
        if self.disable_adapters or self.merged or not names:
            plain: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return plain
        if isinstance(self.base_layer, FakeQuantisedExperts):  # what is rounded is what will be folded
            stacks = self.folded_stacks(names)
            whole: Tensor = self.base_layer.run(stacks, hidden_states, top_k_index, top_k_weights)
            return whole
        return self._adapted([self.lora_experts[name] for name in names], hidden_states, top_k_index, top_k_weights)

    def folded_stacks(self, names: list[str]) -> dict[str, Tensor]:
        """Return the stacks with the factors of the named adapters in them, by the parameters' names.

        They are those that :meth:`merge` makes, to the bit, and gradients reach the factors.

        Raises:
            ConfigError: where the factors have dropout in training: it drops inputs, which weights do not know of.
        """
        adapters: list[Any] = [self.lora_experts[name] for name in names]
        if self.training and any(getattr(factors.dropout, "p", 0) for factors in adapters):
            raise ConfigError("experts that train as they will be rounded take no lora_dropout: set it to 0")
        stacks = {}
        for projection, stack in _stacks(self.base_layer):
            weights = list(stack.unbind())
            with torch.autocast(stack.device.type, enabled=False):
                for factors in adapters:
                    for expert, weight in factors.folded(projection, weights):
                        weights[expert] = weight
            stacks[f"{projection}_proj"] = torch.stack(weights)
        return stacks

    def _adapted(self, adapters: list[Any], hidden: Tensor, top_k_index: Tensor, gates: Tensor) -> Tensor:
        experts, (tokens, active) = self.base_layer, top_k_index.shape
        chosen, order = top_k_index.reshape(-1).sort()
        ends = _ends(chosen, torch.arange(len(experts.gate_up_proj), device=chosen.device))
        groups = [factors.groups(chosen, ends) for factors in adapters]
        rows = hidden[order // active].to(experts.gate_up_proj.dtype)
        for projection, stack in _stacks(experts):
            product = _grouped(rows, stack, ends)
            for factors, own in zip(adapters, groups, strict=True):
                product = factors.add(projection, product, rows, own)
            rows = _gated(experts, product) if projection == "gate_up" else product
        weighted = rows * gates.reshape(-1)[order, None]
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return weighted[back].view(tokens, active, -1).sum(dim=1).to(hidden.dtype)


def _stacks(experts: Any) -> tuple[tuple[str, Tensor], tuple[str, Tensor]]:
    return ("gate_up", experts.gate_up_proj), ("down", experts.down_proj)


def _gated(experts: Any, product: Tensor) -> Tensor:
    """Gate [S, 2I] to [S, I], as the family does it."""
    if hasattr(experts, "_apply_gate"):
        gated: Tensor = experts._apply_gate(product)
        return gated
    gate, up = product.chunk(2, dim=-1)
    both: Tensor = experts.act_fn(gate) * up
    return both


def _ends(chosen: Tensor, experts: Tensor) -> Tensor:
    """Return where the rows of each of ``experts`` end [M] in the sorted ``chosen`` [S], which holds no others."""
    return torch.searchsorted(chosen, experts, right=True).to(torch.int32)


def _grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply each group of ``rows`` [S, in] with its own of ``weights`` [M, out, in]: [S, out]."""
    return F.grouped_mm(rows, weights.mT, offs=ends)
