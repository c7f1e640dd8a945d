"""LoRA on routed experts: settings and models that it refuses, and what stock LoRA costs there."""

from __future__ import annotations

import warnings
from typing import Any

import peft
import pytest
import torch
from expert_models import IDS, adapted, logits, make
from transformers import LlamaConfig, LlamaForCausalLM

from pyra.adapters import ExpertLoraConfig, adapt
from pyra.adapters.expert_lora import advice
from pyra.errors import ConfigError, UnsupportedModelError
from pyra.experts import score_experts


def test_experts_with_an_adapter_are_not_scored_as_if_they_had_none() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.3\.mlp has experts or a router with an adapter"):
        score_experts(adapted(layers=[3]), [{"input_ids": IDS}])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": 2.5}, "r must be a whole number"),
        ({"experts": []}, "experts must be lists of different indices"),
        ({"experts": {}}, "experts must be lists of different indices"),
        ({"experts": {1: [2, 2]}}, "experts must be lists of different indices"),
        ({"experts": [-1]}, "experts must be lists of different indices"),
        ({"layers": [1, 1]}, "layers must be a list of different numbers"),
        ({"projections": ["gate_up"]}, r"projections must be some of .*did you mean 'gate_up_proj'"),
        ({"projections": []}, "projections must be some of"),
        ({"use_dora": True, "lora_bias": True}, "use_dora has no counterpart for experts; lora_bias has no"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights must be True, got 'pissa'"),
    ],
)
def test_wrong_settings(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExpertLoraConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"experts": [0, 8]}, r"model\.layers\.1\.mlp has no expert 8, of 8; .*layers with experts: 1, 2, 3"),
        ({"layers": [0, 1]}, "layer 0 has no routed experts"),
        ({"layers": [4]}, "layer 4 has no routed experts"),
        ({"experts": {"model.layers.0.mlp": [1]}}, r"layer model\.layers\.0\.mlp has no routed experts"),
        ({"experts": {1: [1]}, "layers": [2]}, "layers and experts have no layer in common"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "these are the experts that this method adapts anyway"),
        ({"target_modules": ["o_proj", "o_porj"]}, "target_modules o_porj: the model has no such module"),
        ({"target_modules": "all-line"}, "target_modules all-line: the model has no such module"),
    ],
)
def test_what_a_model_does_not_have(wrong: dict[str, Any], said: str) -> None:
    base = make()
    before, names = logits(base), [name for name, _ in base.named_modules()]
    with pytest.raises(ConfigError, match=said):
        adapted(base, **wrong)
    assert torch.equal(logits(base), before) and [name for name, _ in base.named_modules()] == names
    assert all(parameter.requires_grad for parameter in base.parameters())


def test_all_linear_layers_beside_the_experts() -> None:
    names = {
        name.rpartition(".")[2]
        for name, module in adapted(target_modules="all-linear").named_modules()
        if hasattr(module, "lora_A")
    }
    assert {"o_proj", "kv_b_proj", "down_proj"} <= names and "lm_head" not in names


def test_models_without_such_experts() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no layer with stacked experts"):
        adapted(LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32)))
    with pytest.raises(UnsupportedModelError, match="has rows of 120 bytes, no multiple of 16"):
        adapted(make(moe_intermediate_size=30))
    for flag, said in (("has_bias", "biases"), ("_is_expert_parallel", "experts on other processes")):
        base = make()
        setattr(base.model.layers[2].mlp.experts, flag, True)
        with pytest.raises(UnsupportedModelError, match=rf"layers\.2\.mlp\.experts has {said}"):
            adapted(base)
    theirs = peft.get_peft_model(
        make(), peft.LoraConfig(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    )
    with pytest.raises(ConfigError, match="already carries an adapter"):
        adapted(theirs)


def test_stock_lora_on_large_stacks_is_told_what_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapt(make(), peft=config)
    assert not [one for one in caught if "stacks of experts" in str(one.message)]
    layer = 4 * 8 * (64 * 64 + 64 * 32)
    monkeypatch.setattr(advice, "LARGE", layer - 1)
    with pytest.warns(UserWarning, match=r"1 MB in every forward \(0 MB a layer\), and trains 0 MB .*ExpertLoraConfig"):
        adapt(make(), peft=config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapt(make(), peft=peft.LoraConfig(r=4, target_modules=["o_proj"], target_parameters=["mlp.gate.weight"]))
        adapted()
    assert not [one for one in caught if "stacks of experts" in str(one.message)]
