"""transformers' decoders whose layers run as Llama's do: Llama, Mistral, Qwen, SmolLM, DeepSeek-V3, JoyAI and others.

A schedule is the tokens removed in each layer of a prompt of :data:`PROMPT` tokens; a prompt of another length is left
the same shares. One merge, deep and strong, loses less than an early and mild one of equal cost (measured on
SmolLM2-135M without training), so a rate is reached by one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from pyra.backbones.hf_decoder_folder import prepare_saving, restore_saving
from pyra.backbones.hf_decoder_generate import prepare_generation, restore_generation
from pyra.backbones.hf_decoder_inputs import spread_hidden_states, tell_layers, tell_prompt
from pyra.backbones.hf_decoder_layer import MergingDecoderLayer
from pyra.backbones.layers import class_of, linear_macs
from pyra.config import PyraConfig
from pyra.cost import Geometry, geometry_macs
from pyra.errors import ConfigError, ScheduleError
from pyra.prompt_matching import FIRST, LAST
from pyra.prompt_merging import ROWS
from pyra.schedule import check_schedule, solve_schedule

PROMPT = 1024
"""Tokens of the prompt that rates and schedules are about."""
MERGING = MergingDecoderLayer
SAFE_DEPTH, SAFE_KEEP, FAST_RATE = 2 / 3, 0.25, 0.5
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


def tower(model: Any) -> nn.Module:
    """Return the decoder without its head."""
    base: nn.Module = getattr(model, "base_model", model)
    return base


def layers(model: Any) -> nn.ModuleList:
    """Return the decoder's layers."""
    found: nn.ModuleList = model.layers
    return found


def obstacle(model: Any) -> str | None:
    """Return what keeps the tokens of prompts from merging, or None."""
    config = model.config
    if not len(model.layers):
        return "it has no layers"
    for layer in model.layers:
        children = {name for name, _ in layer.named_children()} - {"reactivation"}
        if children != _PARTS or not _runs_as_llama(class_of(layer)):
            return "its layers do not run as Llama's do: attention, then an MLP or experts, each after its norm"
        if not hasattr(layer.self_attn, "scaling") or not hasattr(layer.self_attn, "config"):
            return "its attention does not look its function up as Llama's does"
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"]
    if set(kinds) != {"full_attention"}:
        return "its attention slides over a window, in which merged tokens have no place"
    if not getattr(config, "is_causal", True):
        return "its tokens see what comes after them"
    return None


def _runs_as_llama(kind: type[nn.Module]) -> bool:
    """Whether a layer's forward is compiled from the very lines of Llama's, which the merging layer stands for."""
    own, llama = _code(kind), _code(LlamaDecoderLayer)
    return all(getattr(own, part) == getattr(llama, part) for part in ("co_code", "co_names", "co_varnames"))


def _code(kind: type[nn.Module]) -> Any:
    function: Any = kind.forward
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
    return function.__code__


def prepare(model: nn.Module, outer: nn.Module) -> None:
    """Make a model whose layers merge tell them where prompts end, and hand out unmerged hidden states."""
    model.register_forward_pre_hook(tell_layers, with_kwargs=True)
    model.register_forward_hook(spread_hidden_states)
    if outer is not model:
        outer.register_forward_pre_hook(tell_prompt, with_kwargs=True)
    if hasattr(outer, "generate"):
        prepare_generation(outer)
    if hasattr(outer, "save_pretrained"):
        prepare_saving(outer, model)


def restore(model: nn.Module, outer: nn.Module) -> None:
    """Undo :func:`prepare`."""
    for module in (model, outer):
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (tell_layers, tell_prompt, spread_hidden_states)]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    restore_generation(outer)
    restore_saving(outer)


def patch_grid(_model: nn.Module) -> None:
    """Return None: words are in no grid."""
    return


def features(model: nn.Module, tokens: Tensor, **inputs: Any) -> Tensor:
    """Return the tokens [B, N, C] that leave the decoder, for ids [B, N] of prompts."""
    inputs.setdefault("prompt_mask", torch.ones_like(tokens, dtype=torch.bool))
    found: Tensor = model(tokens, **inputs).last_hidden_state
    return found


def geometry(model: Any, tokens: int | None) -> Geometry:
    """Sizes of the decoder when it reads a prompt of ``tokens`` (None: :data:`PROMPT`); the head is not counted.

    Of experts those that a token is sent to are counted.
    """
    config, count = model.config, PROMPT if tokens is None else tokens
    attention: Any = model.layers[-1].self_attn
    heads = config.num_attention_heads
    width = getattr(attention, "head_dim", 0) * 2
    if hasattr(attention, "qk_head_dim"):  # multi-head latent attention
        width = attention.qk_head_dim + attention.v_head_dim
    mlps = [_mlp_macs(layer.mlp, config) for layer in model.layers]
    usual = mlps[-1]
    return Geometry(
        depth=len(model.layers),
        tokens=count,
        prefix_tokens=FIRST + LAST,
        dim=config.hidden_size,
        attention_dim=heads * width // 2,
        mlp_macs=usual,
        head_dim=width // 2,
        embedding_macs=count * sum(own - usual for own in mlps),  # dense layers come first, where all tokens are
        projection_macs=linear_macs(attention),
        halving=False,
    )


def _mlp_macs(mlp: Any, config: Any) -> int:
    experts = getattr(mlp, "experts", None)
    if experts is None or not hasattr(experts, "gate_up_proj"):
        return linear_macs(mlp)
    active = getattr(mlp, "top_k", None) or config.num_experts_per_tok
    each = experts.gate_up_proj[0].numel() + experts.down_proj[0].numel()
    router = mlp.gate.weight.numel() if hasattr(mlp.gate, "weight") else 0
    shared = sum(linear_macs(child) for name, child in mlp.named_children() if name not in ("experts", "gate"))
    return int(active * each + router + shared)


def schedule(model: Any, config: PyraConfig) -> list[int]:
    """Return the tokens that a configuration removes in each layer of a prompt of :data:`PROMPT` tokens.

    Raises:
        ScheduleError: where it does not fit, or the rate cannot be reached.
        ConfigError: for options of image models.
    """
    _refuse_options(config)
    sizes = geometry(model, None)
    if config.schedule is not None:
        found = list(config.schedule)
    elif config.keep is not None:
        found = _kept(sizes, config.keep)
    elif config.preset == "safe" and config.rate is None:
        found = _kept(sizes, {_safe_layer(sizes): SAFE_KEEP})
    else:
        found = _solved(sizes, FAST_RATE if config.rate is None else config.rate, config)
    _check(found, sizes, config)
    return found


def shares(removed: list[int]) -> list[float]:
    """Return the share of a prompt that is left after each layer, of a schedule for :data:`PROMPT` tokens."""
    left, found = PROMPT, []
    for gone in removed:
        left -= gone
        found.append(left / PROMPT)
    return found


def scaled(removed: list[int], sizes: Geometry) -> list[int]:
    """Return the tokens that go in each layer of a prompt of another length."""
    before, found = sizes.tokens, []
    for share in shares(removed):
        left = max(sizes.tokens - int(sizes.tokens * (1 - share) + 1e-9), min(sizes.prefix_tokens, sizes.tokens))
        found.append(max(before - left, 0))
        before = min(before, left)
    return found


def rows(most: list[int]) -> list[int]:
    """Return the rows of re-activation weights of each layer."""
    return [ROWS if removed else 0 for removed in most]


def _refuse_options(config: PyraConfig) -> None:
    plain = {"matching": "bipartite", "order": "grouped", "threshold": None, "window": 1, "attention": "auto"}
    found = [f"{name}={getattr(config, name)!r}" for name, value in plain.items() if getattr(config, name) != value]
    if found:
        raise ConfigError(f"{', '.join(found)}: an option of image models; decoders have rule, keep and size_bias")


def _kept(sizes: Geometry, keep: dict[int, float]) -> list[int]:
    wrong = [layer for layer in keep if not 0 <= layer < sizes.depth]
    if wrong:
        raise ScheduleError(f"keep names layer {wrong[0]}: the model has layers 0 to {sizes.depth - 1}")
    found, before = [0] * sizes.depth, sizes.tokens
    for layer, share in sorted(keep.items()):
        left = max(sizes.tokens - int(sizes.tokens * (1 - share) + 1e-9), sizes.prefix_tokens)
        if left > before:
            raise ScheduleError(f"keep grows at layer {layer}: it is the share of the prompt that is left there")
        found[layer], before = before - left, left
    return found


def _safe_layer(sizes: Geometry) -> int:
    return min(round(sizes.depth * SAFE_DEPTH), max(sizes.depth - 2, 0))


def _solved(sizes: Geometry, rate: float, config: PyraConfig) -> list[int]:
    if not rate:
        return [0] * sizes.depth
    if config.rule == "bipartite":  # a layer halves at most: the published way, a little in every layer
        return _solved_in_all(sizes, rate)
    if config.preset == "safe":
        places = [_safe_layer(sizes)]
    else:  # (1 - rate) / 2 of the prompt stays, which asks for a share 2 rate / (1 + rate) of the layers behind
        behind = 2 * rate / (1 + rate)
        start = min(round(sizes.depth * (1 - behind)), sizes.depth - 2)
        places = list(range(max(start, 0), -1, -1))
    for layer in places:
        least = _least(sizes, layer, rate)
        if least is not None:
            return least
    most = [0] * sizes.depth
    most[places[-1]] = max(sizes.tokens - sizes.prefix_tokens, 0)
    reached = 1 - geometry_macs(sizes, most) / geometry_macs(sizes)
    raise ScheduleError(
        f"merging after layer {places[-1]} can save at most {reached:.3f} of this model's MACs at prompts of "
        f"{sizes.tokens} tokens, asked for {rate:.3f}"
        + ("; preset='fast' merges earlier" if config.preset == "safe" and places[-1] else "")
    )


def _solved_in_all(sizes: Geometry, rate: float) -> list[int]:
    """Return what halves step by step and saves enough without a merge in the last layer."""
    asked, step = rate, 0.005
    while asked < 1:
        try:
            found = [*solve_schedule(_halving(sizes), rate=asked)[:-1], 0]
        except ScheduleError:
            if asked == rate:
                raise
            break
        if _saves(found, sizes, rate):
            return found
        asked += step
    raise ScheduleError(f"pairs before the last layer cannot save {rate:.3f} of this model's MACs: ask for less")


def _least(sizes: Geometry, layer: int, rate: float) -> list[int] | None:
    """Return the schedule that removes the fewest tokens in one layer and saves enough, or None."""
    low, high = 0, max(sizes.tokens - sizes.prefix_tokens, 0)
    found = [0] * sizes.depth
    found[layer] = high
    if not _saves(found, sizes, rate):
        return None
    while low < high:
        middle = (low + high) // 2
        found[layer] = middle
        low, high = (low, middle) if _saves(found, sizes, rate) else (middle + 1, high)
    found[layer] = high
    return found


def _saves(removed: list[int], sizes: Geometry, rate: float) -> bool:
    return geometry_macs(sizes, removed) <= (1 - rate) * geometry_macs(sizes)


def _halving(sizes: Geometry) -> Geometry:
    return replace(sizes, halving=True)


def _check(found: list[int], sizes: Geometry, config: PyraConfig) -> None:
    named = config.size_bias if isinstance(config.size_bias, (list, tuple)) else []
    if named and max(named) >= sizes.depth:
        raise ConfigError(f"size_bias names layer {max(named)}: the model has layers 0 to {sizes.depth - 1}")
    check_schedule(found, _halving(sizes) if config.rule == "bipartite" else sizes)
    if any(found[-1:]):
        raise ScheduleError(
            f"layer {sizes.depth - 1} is the last one: merging there saves next to nothing, and nothing of the cache"
        )
