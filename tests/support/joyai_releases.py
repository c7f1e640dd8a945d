"""JoyAI-LLM Flash as it is released, with random weights: as floats, in FP8, INT8 and INT4."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pyra.backbones import joyai
from pyra.backbones.joyai_checkpoint import INDEX

BLOCK, GROUP = 32, 16
_LARGEST = 448.0  # of float8_e4m3fn


def published_state(config: joyai.JoyAIConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint as it is published, by name: random, a matrix an expert."""
    state: dict[str, Tensor] = {}
    for name, value in joyai.JoyAIForCausalLM(config).state_dict().items():
        if name.endswith(".experts.gate_up_proj"):
            for index, (gate, up) in enumerate(part.chunk(2) for part in value):
                stem = name.replace("gate_up_proj", str(index))
                state |= {f"{stem}.gate_proj.weight": gate, f"{stem}.up_proj.weight": up}
        elif name.endswith(".experts.down_proj"):
            state |= {name.replace("down_proj", f"{i}.down_proj.weight"): part for i, part in enumerate(value)}
        else:
            state[name] = value
    for offset, layer in enumerate(joyai.mtp_layers(config)):
        prefix = f"model.layers.{config.num_hidden_layers + offset}."
        for name, value in layer.state_dict().items():
            renamed = name.replace("mtp_block.", "").replace("post_norm.", "shared_head.norm.")
            state[prefix + renamed.replace("attention_layershared_head.norm", "attention_layernorm")] = value
        state[f"{prefix}embed_tokens.weight"] = state["model.embed_tokens.weight"].clone()
    generator = torch.Generator().manual_seed(0)
    return {name: 0.2 * torch.randn(value.shape, generator=generator) for name, value in state.items()}


def write_published(
    folder: Path, config: joyai.JoyAIConfig, state: Mapping[str, Tensor] | None = None, **told: Any
) -> Path:
    """Write a checkpoint as it is published: a shard a layer, one for the MTP layer, an index."""
    folder.mkdir()
    shards: dict[str, dict[str, Tensor]] = {}
    for name, value in (published_state(config) if state is None else state).items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else 0
        mtp = layer >= config.num_hidden_layers
        file = "model-mtp.safetensors" if mtp else f"model-{layer + 1}-of-{config.num_hidden_layers}.safetensors"
        shards.setdefault(file, {})[name] = value.contiguous()
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, tensors in shards.items() for name in tensors}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), **told}))
    return folder


Quantised = tuple[dict[str, Tensor], Tensor]  # what is stored of a weight, by what follows its name; what it stands for


def fp8_blocks(weight: Tensor) -> Quantised:
    """DeepSeek's FP8: a scale for 32 x 32 values, fewer at the ends."""
    rows, columns = weight.shape
    stored, meant = torch.empty(rows, columns, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for row in range(0, rows, BLOCK):
        for column in range(0, columns, BLOCK):
            here = (slice(row, row + BLOCK), slice(column, column + BLOCK))
            scale = weight[here].abs().max() / _LARGEST
            stored[here] = (weight[here] / scale).to(torch.float8_e4m3fn)
            meant[here] = stored[here].float() * scale
            scales[row // BLOCK, column // BLOCK] = scale
    return {"": stored, "_scale_inv": scales}, meant


def fp8_rows(weight: Tensor) -> Quantised:
    """FP8 of compressed-tensors: a scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / _LARGEST
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"": stored, "_scale": scale}, stored.float() * scale


def fp8_matrix(weight: Tensor) -> Quantised:
    """FP8 of compressed-tensors: a scale a matrix, and one for activations that are not quantised here."""
    scale = weight.abs().max().reshape(1) / _LARGEST
    stored = (weight / scale).to(torch.float8_e4m3fn)
    return {"": stored, "_scale": scale}, stored.float() * scale


def int8_rows(weight: Tensor) -> Quantised:
    """INT8 of compressed-tensors: a scale a row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    stored = (weight / scale).round().to(torch.int8)
    return {"": stored, "_scale": scale}, stored.float() * scale


def int4_groups(weight: Tensor) -> Quantised:
    """INT4 of compressed-tensors: a scale for 16 values of a row, eight values in a word."""
    groups = weight.reshape(len(weight), -1, GROUP)
    scale = groups.abs().amax(-1) / 7.5
    values = (groups / scale.unsqueeze(-1)).round().clamp(-8, 7)
    words = (values.reshape(len(weight), -1, 8).long() + 8) << (4 * torch.arange(8))
    packed = words.sum(-1)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    shape = torch.tensor(weight.shape)
    meant = (values * scale.unsqueeze(-1)).reshape(weight.shape)
    return {"_packed": packed, "_scale": scale, "_shape": shape}, meant


def _compressed(format: str, bits: int, kind: str, strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False, **more}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "format": format}},
        "ignore": ["lm_head"],
    }


QUANTISERS: dict[str, Callable[[Tensor], Quantised]] = {
    "fp8-blocks": fp8_blocks,
    "fp8-rows": fp8_rows,
    "fp8-matrix": fp8_matrix,
    "int8-rows": int8_rows,
    "int4-groups": int4_groups,
}
TOLD: dict[str, dict[str, Any]] = {
    "fp8-blocks": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]},
    "fp8-rows": _compressed("float-quantized", 8, "float", "channel"),
    "fp8-matrix": _compressed("float-quantized", 8, "float", "tensor"),
    "int8-rows": _compressed("int-quantized", 8, "int", "channel"),
    "int4-groups": _compressed("pack-quantized", 4, "int", "group", group_size=GROUP),
}
"""``quantization_config`` of each kind of release."""


def write_quantised(folder: Path, kind: str) -> dict[str, Tensor]:
    """Write a quantised release and return what its weights stand for; INT4 is for routed experts only."""
    config = joyai.tiny_config(dtype="bfloat16")
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, value in published_state(config).items():
        routed = ".experts." in name
        if routed if kind == "int4-groups" else "proj" in name and value.dim() == 2 and "eh_proj" not in name:
            parts, meant[name] = QUANTISERS[kind](value)
            stored |= {name + part: tensor for part, tensor in parts.items()}
            if kind == "fp8-matrix":
                stored[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
        else:
            stored[name] = meant[name] = value if name.endswith("bias") else value.bfloat16()
    write_published(folder, config, stored, quantization_config=TOLD[kind])
    return meant
