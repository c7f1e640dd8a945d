"""LoRA on routed experts: folded, merged for a while, saved, loaded, several at once."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_models import IDS, SUBSET, adapted, apart, layers, logits, make, redrawn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pyra.adapters import add_adapter, fold_adapter, load_adapter, save_adapter
from pyra.backbones.joyai_checkpoint import save_checkpoint
from pyra.errors import ConfigError, PyraError


@pytest.mark.parametrize("options", [{}, {"experts": SUBSET, "target_modules": ["o_proj", "up_proj"]}])
def test_folded_it_is_a_stock_model_with_equal_outputs(options: dict[str, Any], tmp_path: Path) -> None:
    model = redrawn(adapted(**options), std=0.03)
    before, base = logits(model), make()
    assert (before - logits(base)).abs().max() > 1e-2
    folded = fold_adapter(model)
    assert apart(logits(folded), before) < 1e-6
    assert not any("lora" in name for name in folded.state_dict())
    assert [type(module) for module in folded.modules()] == [type(module) for module in base.modules()]
    save_checkpoint(folded, tmp_path / "folded", model_type="deepseek_v3")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    assert type(again).__name__ == "DeepseekV3ForCausalLM"
    assert torch.equal(logits(again), logits(folded))


def test_folding_is_done_in_float32_then_cast() -> None:
    base = make().to(torch.bfloat16)
    weight = base.model.layers[1].mlp.experts.down_proj.detach().clone()
    model = redrawn(adapted(base, experts=[2]))
    factors = layers(model)[0].lora_experts["default"]
    assert all(parameter.dtype == torch.float32 for parameter in factors.parameters())
    expected = weight.clone()
    expected[2] = (weight[2].float() + 4 * factors.down_B[0] @ factors.down_A[0]).to(torch.bfloat16)
    folded = fold_adapter(model).model.layers[1].mlp.experts.down_proj
    assert torch.equal(folded, expected) and not torch.equal(folded, weight)


def test_merging_for_a_while() -> None:
    model = redrawn(adapted())
    before, base = logits(model), logits(make())
    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():  # takes the update out of the weights
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
    layers(model)[0].lora_experts["default"].down_A.data[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        model.merge_adapter(safe_merge=True)


def test_one_folder_holds_experts_attention_and_router(tmp_path: Path) -> None:
    options = {"experts": SUBSET, "target_modules": ["q_b_proj"], "target_parameters": ["mlp.gate.weight"], "r": 3}
    model = redrawn(adapted(**options))
    save_adapter(model, tmp_path)
    kinds = {name.split(".lora_")[1] for name in load_file(tmp_path / "adapter_model.safetensors")}
    assert kinds == {"A.weight", "B.weight", *(f"experts.{k}_{f}" for k in ("gate_up", "down") for f in "AB")}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "EXPERT_LORA" and written["experts"] == {"1": [0, 2, 5], "3": [7]}
    loaded = load_adapter(make(), tmp_path)
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(loaded), logits(make()))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    trainable = load_adapter(make(), tmp_path, is_trainable=True)
    assert {n for n, p in trainable.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if "lora_" in n
    }
    stock = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(logits(stock), logits(model))
    with pytest.raises(PyraError, match=r"layer 1 has no routed experts.*as it was"):
        load_adapter(make(first_k_dense_replace=2), tmp_path)
    with pytest.raises(PyraError, match=r"gate_up_A is \[3, 3, 64\], the model has \[3, 3, 128\]"):
        load_adapter(make(hidden_size=128), tmp_path)


def test_several_adapters(tmp_path: Path) -> None:
    second = redrawn(adapted(experts=[1, 2], r=2), std=0.2)
    save_adapter(second, tmp_path)
    both = add_adapter(redrawn(adapted(experts=SUBSET)), tmp_path, "second")
    first = logits(redrawn(adapted(experts=SUBSET)))
    assert torch.equal(logits(both), first)
    both.set_adapter("second")
    assert torch.equal(logits(both), logits(second))
    both.base_model.set_adapter(["default", "second"])
    together = logits(both)
    assert not torch.equal(together, first) and not torch.equal(together, logits(second))
    torch.testing.assert_close(logits(copy.deepcopy(both).merge_and_unload()), together, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="cannot be combined"):
        both.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    with pytest.raises(ConfigError, match="adapter_names"):
        both(IDS, adapter_names=["default", "second"])
