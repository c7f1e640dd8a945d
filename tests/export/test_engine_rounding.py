"""``engine-int4`` of dense decoders: what is written is what torchao trained, and what stock transformers computes."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils import is_match
from engine_models import SIZES, dense, opened, subject
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from pyra.adapters import adapt, fold_adapter
from pyra.adapters.methods import peft_config
from pyra.errors import ConfigError, UnsupportedModelError
from pyra.experts.quantising import QuantisingConfig, quantise, rounded
from pyra.export import export_language_model
from pyra.export.engine_rounding import int4_rounding
from pyra.export.linear_training import LINEAR, fake_quantise_linear, undo_fake_quantise_linear
from pyra.tasks.language.models import count_macs, load_decoder

IDS = torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(1))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def reopened(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def as_trained(model: nn.Module) -> nn.Module:
    """The model with its linear layers but the head as ``--qat int4`` trains them."""
    pytest.importorskip("torchao", reason="the extra `torchao` is not installed")
    return fake_quantise_linear(model, [model.get_output_embeddings()])  # type: ignore[operator]


@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 96), (256, 512)])
def test_it_rounds_as_torchao_does_to_the_bit(rows: int, columns: int) -> None:
    pytest.importorskip("torchao", reason="the extra `torchao` is not installed")
    from torchao.quantization import quantize_

    from pyra.export.linear_training import int4_config

    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    weight[0, :32] = 0  # a group of zeros
    weight[-1, -32:] *= 1e-38  # and one of numbers that are hardly any
    layer = nn.Sequential(nn.Linear(columns, rows, bias=False))
    layer[0].weight.data = weight.clone()
    trained = fake_quantise_linear(copy.deepcopy(layer))[0]
    values, scale = quantise(weight, LINEAR)
    assert torch.equal(rounded(weight, LINEAR), trained.weight_fake_quantizer(trained.weight))  # type: ignore[operator]
    quantize_(layer, int4_config())
    theirs = layer[0].weight
    assert torch.equal(values, theirs.qdata) and torch.equal(scale, theirs.scale)  # type: ignore[attr-defined]
    divided, same = quantise(weight[1:-1], QuantisingConfig(4, 32))
    moved = divided != values[1:-1]
    assert torch.equal(same, scale[1:-1]) and (rows < 256 or moved.any())  # where a largest value is negative
    steps = (weight[1:-1].unflatten(-1, (-1, 32)).double() / same[..., None].double()).flatten(-2)[moved]
    assert torch.allclose(steps, torch.full_like(steps, -7.5), atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "biased"])
def test_stock_transformers_computes_what_rounded_layers_do(kind: str, tmp_path: Path) -> None:
    model = dense(kind)
    plain, expected = logits(model), logits(as_trained(copy.deepcopy(model)))
    record = export_language_model(opened(model, tmp_path / "source"), tmp_path / "out", "engine-int4")
    assert record.reloaded is not None and record.reloaded["weight_difference"] == 0 and record.notes == []
    found = logits(reopened(tmp_path / "out"))
    assert torch.equal(found, expected) and (found - plain).abs().max() > 0.1
    assert record.reloaded["largest_difference"] == 0 < record.reloaded["rounding"]["relative_difference"]
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    packed = {name.removesuffix(".weight_packed") for name in tensors if name.endswith("_packed")}
    assert len(packed) == 2 * 7 and all(tensors[f"{name}.weight_packed"].dtype == torch.int32 for name in packed)
    values = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    told = QuantizationConfig.model_validate(values)
    assert told.ignore == ["lm_head"] and not any(is_match(name, nn.Linear(1, 1), told.ignore) for name in packed)
    assert values["config_groups"]["group_0"]["weights"]["group_size"] == 32


@pytest.mark.parametrize("lora", [False, True])
def test_what_was_trained_rounded_is_what_is_written(lora: bool, tmp_path: Path) -> None:
    model = as_trained(dense("qwen3"))
    start = logits(model)
    if lora:
        model = adapt(model, peft=peft_config("lora", 4, 0.0, ["q_proj", "down_proj"]))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(model.eval())
    float_weights = undo_fake_quantise_linear(fold_adapter(model))
    before = logits(float_weights)
    source = replace(opened(float_weights, tmp_path / "source"), rounded=True)
    record = export_language_model(source, tmp_path / "out", "engine-int4")
    assert record.reloaded is not None and record.reloaded["largest_difference"] == 0 == record.reloaded["differing"]
    assert (
        "rounding" not in record.reloaded
        and record.reloaded["tolerance"] == 1e-4
        and torch.equal(logits(float_weights), before)
    )
    assert torch.equal(logits(reopened(tmp_path / "out")), trained)
    assert (trained - start).abs().max() > 0.01 < (logits(float_weights) - trained).abs().max()


def test_layers_that_groups_do_not_divide_stay_float_and_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "intermediate_size": 48})).eval()
    expected = logits(as_trained(copy.deepcopy(model)))
    record = export_language_model(opened(model, tmp_path / "source"), tmp_path / "out", "engine-int4")
    left = [f"model.layers.{layer}.mlp.down_proj" for layer in (0, 1)]
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["quantization_config"]["ignore"] == ["lm_head", *left]
    assert record.notes == [
        f"2 layers stay float, since groups of 32 do not divide their inputs: {', '.join(left)}",
    ]
    assert torch.equal(logits(reopened(tmp_path / "out")), expected)


def test_what_is_refused(tmp_path: Path) -> None:
    narrow = LlamaForCausalLM(LlamaConfig(**{**SIZES, "hidden_size": 24, "intermediate_size": 40}))
    with pytest.raises(UnsupportedModelError, match="no linear layers of a multiple of 32 inputs"):
        int4_rounding(narrow)
    model = dense("llama")
    export_language_model(opened(model, tmp_path / "source"), tmp_path / "out", "engine-int4")
    theirs = reopened(tmp_path / "out")
    with pytest.raises(ConfigError, match="holds this model quantised: export the float model"):
        export_language_model(subject(theirs), tmp_path / "again", "engine-int4")
    for name in int4_rounding(model).weights:
        parameter = model.get_parameter(name)
        parameter.data = rounded(parameter.data, LINEAR)
    with pytest.raises(ConfigError, match=r"q_proj holds a weight that was rounded to 4 bits already"):
        export_language_model(subject(model), tmp_path / "again", "engine-int4")
    nn.init.normal_(model.get_parameter("model.layers.0.self_attn.q_proj.weight"))
    with pytest.raises(ConfigError, match=r"k_proj holds a weight that was rounded to 4 bits already"):
        export_language_model(subject(model), tmp_path / "again", "engine-int4")


def test_an_int4_folder_is_a_backbone_in_floats(tmp_path: Path) -> None:
    export_language_model(opened(dense("llama"), tmp_path / "source"), tmp_path / "out", "engine-int4")
    model = load_decoder(str(tmp_path / "out"))
    layers = [module for name, module in model.named_modules() if name.endswith("_proj")]
    assert len(layers) == 2 * 7 and all(type(layer) is nn.Linear for layer in layers)
    assert torch.equal(logits(model), logits(reopened(tmp_path / "out")))
    assert count_macs(model, 10) == count_macs(load_decoder(str(tmp_path / "source")), 10)
