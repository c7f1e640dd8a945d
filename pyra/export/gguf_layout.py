"""The tensors of a GGUF file: a model's own, under llama.cpp's names and in its layouts, and the way back.

What differs from a checkpoint: experts of a layer stay stacked; ``kv_b_proj`` is split into keys (transposed) and
values, a matrix a head; and queries and keys of the architecture ``llama`` have the channels that rotate together side
by side, not half a head apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyra.backbones.joyai_mtp_weights import without_mtp
from pyra.errors import ExportError
from pyra.export.engine_check import template_of
from pyra.export.engine_config import family_of
from pyra.export.engine_names import DEEPSEEK, engines_for

ARCHITECTURES = {DEEPSEEK: "deepseek2", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture of each family."""

_STACKS = (("gate_up_proj", "gate"), ("gate_up_proj", "up"), ("down_proj", "down"))


@dataclass(frozen=True)
class Laid:
    """A tensor in llama.cpp's layout, and whether it stays in float32 whatever the others are rounded to."""

    name: str
    value: Tensor
    keep: bool


def laid_out(model: nn.Module) -> Iterator[Laid]:
    """Yield a model's tensors, a layer after another.

    Raises:
        ExportError: for a tensor that llama.cpp has no name for.
    """
    family, config = family_of(model), getattr(model, "config")  # noqa: B009
    names = engines_for(family)[-1].parameters
    for name, value in without_mtp(model.state_dict()).items():
        value = value.detach()
        if name == "lm_head.weight" and config.tie_word_embeddings and family != DEEPSEEK:
            continue
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        if name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
            yield from _stacks(name, value, layer)
            continue
        found = names.get(template_of(name))
        if found is None:
            raise ExportError(f"llama.cpp has no name for {name}: this model cannot be a GGUF file")
        keep = value.ndim < 2 or name.endswith(".gate.weight")  # norms, biases, routers
        if family == DEEPSEEK and name.endswith("kv_b_proj.weight"):
            keys, values = split_latent(value, config)
            yield Laid(f"blk.{layer}.attn_k_b.weight", keys, False)
            yield Laid(f"blk.{layer}.attn_v_b.weight", values, False)
        else:
            own = name.rpartition("self_attn.")[2]
            if ARCHITECTURES[family] == "llama" and own.startswith(("q_proj", "k_proj")):
                heads = config.num_attention_heads if own[0] == "q" else config.num_key_value_heads
                value = interleaved(value, heads)
            yield Laid(found.format(l=layer), value, keep)


def _stacks(name: str, value: Tensor, layer: str) -> Iterator[Laid]:
    stem = name.rpartition(".")[2]
    for source, side in _STACKS:
        if source == stem:
            half = value.shape[1] // 2
            part = value if stem == "down_proj" else value[:, :half] if side == "gate" else value[:, half:]
            yield Laid(f"blk.{layer}.ffn_{side}_exps.weight", part, False)


def split_latent(value: Tensor, config: Any) -> tuple[Tensor, Tensor]:
    """Split ``kv_b_proj`` [H (N + V), L] into keys [H, L, N] and values [H, V, L]."""
    keys, values = value.view(config.num_attention_heads, -1, value.shape[-1]).split(
        [config.qk_nope_head_dim, config.v_head_dim], dim=1
    )
    return keys.transpose(1, 2), values


def joined_latent(keys: Tensor, values: Tensor) -> Tensor:
    """Undo :func:`split_latent`."""
    return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


def interleaved(value: Tensor, heads: int) -> Tensor:
    """Put channel ``i`` of each head beside channel ``i + D / 2``: [H D, ...] in the order that ``llama`` rotates in.

    >>> interleaved(torch.arange(4), 1).tolist()
    [0, 2, 1, 3]
    """
    return value.view(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def stock_state(tensors: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Return the state dict of transformers' ``DeepseekV3ForCausalLM`` from the tensors of a ``deepseek2`` file.

    Raises:
        ExportError: for a tensor that has no place in it.
    """
    own = {
        gguf: name
        for name, gguf in engines_for(DEEPSEEK)[-1].parameters.items()
        if ".experts." not in name and not name.endswith("kv_b_proj.weight")
    }
    state, used = {}, set()
    for layer in range(config.num_hidden_layers):
        stem, blk = f"model.layers.{layer}", f"blk.{layer}"
        parts = [f"{blk}.attn_k_b.weight", f"{blk}.attn_v_b.weight"]
        state[f"{stem}.self_attn.kv_b_proj.weight"] = joined_latent(*(tensors[name] for name in parts))
        used |= set(parts)
        stacks = [f"{blk}.ffn_{side}_exps.weight" for side in ("gate", "up", "down")]
        if stacks[0] in tensors:
            gate, up, down = (tensors[name] for name in stacks)
            state[f"{stem}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            state[f"{stem}.mlp.experts.down_proj"] = down
            used |= set(stacks)
    for name in tensors.keys() - used:
        layer_of = name.split(".")[1] if name.startswith("blk.") else ""
        place = own.get(name.replace(f"blk.{layer_of}.", "blk.{l}.", 1) if layer_of else name)
        if place is None:
            raise ExportError(f"{name} has no place in a deepseek_v3 model")
        state[place.format(l=layer_of)] = tensors[name]
    return state
