"""INT4 experts in compressed-tensors' layout: what stock transformers and our reader make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match
from expert_models import IDS, adapted, logits, make, redrawn
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

from pyra.adapters import fold_adapter
from pyra.backbones import joyai
from pyra.backbones.joyai_checkpoint import INDEX, check_checkpoint, load_model, save_checkpoint
from pyra.errors import ConfigError, ExportError, OutputError, UnsupportedModelError
from pyra.experts import QuantisingConfig, fake_quantise, undo_fake_quantise
from pyra.export import write_int4

SMALL = {"moe_intermediate_size": 64, "num_nextn_predict_layers": 0}


def tiny(**changes: Any) -> nn.Module:
    return make(**{**SMALL, **changes})


def stock(folder: Path, **options: Any) -> nn.Module:
    """What transformers opens by itself."""
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model) is DeepseekV3ForCausalLM
    return model.eval()


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({}, 64),  # the group is the width
        ({"n_routed_experts": 2, "num_experts_per_tok": 1}, 64),
        ({"hidden_size": 128, "moe_intermediate_size": 192}, 64),
        ({"moe_intermediate_size": 96}, 32),
        ({"first_k_dense_replace": 0, "num_hidden_layers": 1, "moe_intermediate_size": 24}, 8),
    ],
)
def test_stock_transformers_gives_the_very_logits(tmp_path: Path, changes: dict[str, Any], group: int) -> None:
    model = fake_quantise(tiny(**changes), QuantisingConfig(group_size=group))
    write_int4(model, tmp_path / "int4")
    expected = logits(model)
    assert torch.equal(logits(stock(tmp_path / "int4")), expected)
    assert torch.equal(logits(load_model(tmp_path / "int4")), expected)
    assert not torch.equal(logits(undo_fake_quantise(model)), expected)


def test_a_float_model_is_rounded_the_same_way(tmp_path: Path) -> None:
    write_int4(tiny(), tmp_path / "int4", group_size=32)
    assert torch.equal(logits(stock(tmp_path / "int4")), logits(fake_quantise(tiny(), QuantisingConfig(group_size=32))))


def test_one_expert_that_every_token_is_sent_to(tmp_path: Path) -> None:
    model = tiny(n_routed_experts=2, num_experts_per_tok=1)
    for layer in model.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias[0] = 5.0
    fake_quantise(model)
    write_int4(model, tmp_path / "int4")
    assert torch.equal(logits(stock(tmp_path / "int4")), logits(model))


def test_trained_weights_are_what_is_written(tmp_path: Path) -> None:
    model = fake_quantise(tiny()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        model(IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    write_int4(model, tmp_path / "int4")
    assert torch.equal(logits(stock(tmp_path / "int4")), logits(model))
    assert (logits(model) - logits(fake_quantise(tiny()))).abs().max() > 0.01


def test_a_folded_adapter_on_experts_is_rounded_once(tmp_path: Path) -> None:
    model = redrawn(adapted(fake_quantise(tiny())))
    trained = logits(model)
    with pytest.raises(ConfigError, match="fold_adapter it first"):
        write_int4(model, tmp_path / "int4")
    write_int4(fold_adapter(model), tmp_path / "int4")
    assert torch.equal(logits(stock(tmp_path / "int4")), trained)


def test_bfloat16_is_exact_where_experts_are_bfloat16(tmp_path: Path) -> None:
    save_checkpoint(tiny(), tmp_path / "float")
    model = load_model(tmp_path / "float", dtype=torch.bfloat16).eval()
    fake_quantise(model)
    write_int4(model, tmp_path / "int4")
    expected = logits(model)
    assert expected.dtype == torch.bfloat16
    assert torch.equal(logits(load_model(tmp_path / "int4")), expected)
    theirs = stock(tmp_path / "int4")
    experts = [p for name, p in theirs.named_parameters() if ".experts." in name]
    assert {p.dtype for p in experts} == {torch.float32}  # as transformers 5.23 opens such a folder
    for parameter in experts:
        parameter.data = parameter.data.bfloat16()
    assert torch.equal(logits(theirs), expected)


def test_the_folder_says_what_is_in_it(tmp_path: Path) -> None:
    model = tiny()
    write_int4(model, tmp_path / "int4")
    values = json.loads((tmp_path / "int4" / "config.json").read_text())
    assert values["model_type"] == "deepseek_v3" and values["architectures"] == ["DeepseekV3ForCausalLM"]
    assert values["rope_theta"] == values["rope_parameters"]["rope_theta"] == 1e4
    assert values["num_nextn_predict_layers"] == 0
    assert check_checkpoint(tmp_path / "int4").quantised == "INT4 in groups of 64"
    told = QuantizationConfig.model_validate(values["quantization_config"])
    weights = told.config_groups["group_0"].weights
    assert weights is not None and (weights.num_bits, weights.group_size, weights.symmetric) == (4, 64, True)
    names = json.loads((tmp_path / "int4" / INDEX).read_text())["weight_map"]
    stem = "model.layers.1.mlp.experts.3."
    shard = load_file(tmp_path / "int4" / names[f"{stem}up_proj.weight_packed"])
    found = {n.removeprefix(stem): (v.dtype, tuple(v.shape)) for n, v in shard.items() if n.startswith(stem)}
    for projection in ("gate_proj", "up_proj", "down_proj"):
        assert found.pop(f"{projection}.weight_packed") == (torch.int32, (64, 8))
        assert found.pop(f"{projection}.weight_scale") == (torch.float32, (64, 1))
        assert found.pop(f"{projection}.weight_shape") == (torch.int64, (2,))
    assert not found
    linear = nn.Linear(1, 1)
    plain = [name.removesuffix(".weight") for name in names if name.endswith("proj.weight")]
    assert len(plain) > 20 and all(is_match(name, linear, told.ignore) for name in [*plain, "lm_head"])
    packed = [name.removesuffix(".weight_packed") for name in names if name.endswith("weight_packed")]
    assert len(packed) == 3 * 8 * 3 and not any(is_match(name, linear, told.ignore) for name in packed)


def test_mtp_weights_go_along(tmp_path: Path) -> None:
    from joyai_releases import write_published

    config = joyai.tiny_config(moe_intermediate_size=64, num_nextn_predict_layers=1)
    source = write_published(tmp_path / "published", config)
    model = load_model(source)
    write_int4(model, tmp_path / "int4", mtp=source)
    checkpoint = check_checkpoint(tmp_path / "int4")
    assert checkpoint.config.num_nextn_predict_layers == 1 and checkpoint.mtp == check_checkpoint(source).mtp
    assert torch.equal(logits(load_model(tmp_path / "int4")), logits(fake_quantise(model)))
    drafted = load_model(tmp_path / "int4").generate(IDS[:1], use_mtp=True, max_new_tokens=5, do_sample=False)
    assert drafted.shape == (1, 17)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="groups of 64 do not divide 32 inputs"):
        write_int4(make(), tmp_path / "int4")
    with pytest.raises(ConfigError, match="4 bits in groups of 32, and INT4 in groups of 64"):
        write_int4(fake_quantise(tiny(), QuantisingConfig(group_size=32)), tmp_path / "int4", group_size=64)
    with pytest.raises(ConfigError, match="3 bits in groups of 64"):
        write_int4(fake_quantise(tiny(), QuantisingConfig(bits=3)), tmp_path / "int4")
    with pytest.raises(UnsupportedModelError, match="got Linear"):
        write_int4(nn.Linear(2, 2), tmp_path / "int4")
    broken = tiny()
    broken.model.layers[2].mlp.experts.down_proj.data[1, 2, 3] = float("nan")
    with pytest.raises(ExportError, match=r"layers\.2\.mlp\.experts\.1\.down_proj\.weight holds NaN"):
        write_int4(broken, tmp_path / "int4")
    assert not list(tmp_path.iterdir())
    (tmp_path / "int4").mkdir()
    (tmp_path / "int4" / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="choose another folder"):
        write_int4(tiny(), tmp_path / "int4")


def test_a_folder_of_rounded_experts_is_not_rounded_again(tmp_path: Path) -> None:
    write_int4(tiny(), tmp_path / "int4")
    for opened in (load_model(tmp_path / "int4"), undo_fake_quantise(load_model(tmp_path / "int4"))):
        with pytest.raises(ConfigError, match="rounded to 4 bits already"):
            write_int4(opened, tmp_path / "again")
    with pytest.raises(ConfigError, match="holds this model quantised"):
        write_int4(stock(tmp_path / "int4"), tmp_path / "again")
