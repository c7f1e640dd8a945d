"""The published implementation's results are reproduced: values and gradients, step by step and whole models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from pyra import PyraConfig, Reactivation, load_published_checkpoint, match_tokens, merge_tokens, wrap
from pyra.errors import CheckpointError

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "merge_cases.json").read_text())
VALUES = {"atol": 1e-5, "rtol": 1e-4}
GRADIENTS = {"atol": 1e-4, "rtol": 1e-3}


@pytest.mark.parametrize("index", range(len(CASES)))
def test_merge_case(index: int) -> None:
    case = CASES[index]
    prefix = f"case{index}."
    stored = load_file(GOLDEN / "merge_cases.safetensors")
    tensors = {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
    x = tensors["x"].requires_grad_()
    reactivation = None
    if case["reactivation"]:
        reactivation = Reactivation(len(tensors["w_r"]), case["channels"])
        with torch.no_grad():
            reactivation.pair_weight.copy_(tensors["w_r"])
            reactivation.channel_weight.copy_(tensors["w_d"])
            reactivation.norm.weight.copy_(tensors["norm_weight"])
            reactivation.norm.bias.copy_(tensors["norm_bias"])
    plan = match_tokens(tensors["metric"], case["r"], num_prefix_tokens=case["class_token"] + case["distill_token"])
    merged, size = merge_tokens(x, tensors.get("size"), plan, reactivation)
    merged.backward(tensors["grad_out"])

    torch.testing.assert_close(merged, tensors["merged"], **VALUES)
    torch.testing.assert_close(size, tensors["merged_size"], **VALUES)
    source = torch.nn.functional.one_hot(plan.source_map(), merged.shape[1]).transpose(1, 2).float()
    torch.testing.assert_close(source, tensors["source"].float(), atol=0, rtol=0)
    torch.testing.assert_close(x.grad, tensors["grad_x"], **GRADIENTS)
    if reactivation is not None:
        names = {k for k in tensors if k.startswith("grad_")} - {"grad_out", "grad_x"}
        own = {
            "grad_w_r": reactivation.pair_weight.grad,
            "grad_w_d": reactivation.channel_weight.grad,
            "grad_norm_weight": reactivation.norm.weight.grad,
            "grad_norm_bias": reactivation.norm.bias.grad,
        }
        assert names == set(own)
        for name, gradient in own.items():
            torch.testing.assert_close(gradient, tensors[name], **GRADIENTS)


@pytest.mark.parametrize("name", ["vit_lora", "vit_adapter", "deit_distilled_lora"])
def test_model(name: str) -> None:
    shape = json.loads((GOLDEN / f"{name}.json").read_text())
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    build = VisionTransformerDistilled if shape["distilled"] else VisionTransformer
    model = build(
        img_size=shape["img_size"],
        patch_size=shape["patch_size"],
        embed_dim=shape["embed_dim"],
        depth=shape["depth"],
        num_heads=shape["num_heads"],
        num_classes=shape["num_classes"],
        qkv_bias=shape["qkv_bias"],
    ).eval()
    wrap(model, PyraConfig(schedule=shape["schedule"]))
    weights = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    load_published_checkpoint(model, weights)

    logits = model(tensors["input"])
    logits.backward(tensors["grad_out"])
    torch.testing.assert_close(logits, tensors["logits"], **VALUES)

    own = dict(model.named_parameters())
    trained = {k for k, p in own.items() if p.requires_grad}
    expected = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    translated = {_translate(k): v for k, v in expected.items()}
    assert trained == set(translated)
    for key, gradient in translated.items():
        torch.testing.assert_close(own[key].grad, gradient, **GRADIENTS, msg=lambda text, key=key: f"{key}: {text}")


def test_checkpoint_names_what_does_not_fit() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2)
    wrap(model, PyraConfig(schedule=[1, 0]))
    with pytest.raises(CheckpointError, match=r"pyra_nonsense has no place.*head\.weight is \[10, 48\]"):
        load_published_checkpoint(model, {"head.weight": torch.zeros(10, 48), "blocks.0.pyra_nonsense": torch.zeros(1)})


def _translate(name: str) -> str:
    """Published name -> name in a wrapped and injected timm model, spelled out independently of the loader."""
    head, _, rest = name.rpartition(".attn.LoRA_")
    if head:
        return f"{head}.attn.qkv.lora_{rest[0].upper()}.default.weight"
    head, _, rest = name.rpartition(".adapter.ln")
    if head:
        return f"{head}.mlp.bottleneck_layers.default.{'down' if rest[0] == '1' else 'up'}.{rest[2:]}"
    head, _, rest = name.rpartition(".pyra_")
    if head:
        own = {"a": "pair_weight", "b": "channel_weight"}.get(rest, rest)
        return f"{head}.reactivation.{own}"
    return name
