"""LoRA on routed experts: what it computes, what it trains, and what becomes of it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from pyra.adapters import ExpertLoraConfig, adapt, add_adapter, fold_adapter, load_adapter, save_adapter
from pyra.adapters.expert_lora import ExpertLoraLayer, advice
from pyra.backbones import joyai
from pyra.backbones.joyai_checkpoint import save_checkpoint
from pyra.errors import ConfigError, PyraError, UnsupportedModelError
from pyra.experts import choose_task_experts, score_experts

IDS = torch.randint(2, 512, (2, 12), generator=torch.Generator().manual_seed(1))
SUBSET = {1: [0, 2, 5], 3: [7]}


def make(**changes: Any) -> joyai.JoyAIForCausalLM:
    torch.manual_seed(0)
    return joyai.JoyAIForCausalLM(joyai.tiny_config(initializer_range=0.1, **changes)).eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


def redrawn(model: nn.Module, std: float = 0.1, adapter: str = "default") -> nn.Module:
    """Give the factors of all adapters new values: they start without an effect."""
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}" in name:
            nn.init.normal_(parameter, std=std)
    return model


def adapted(base: nn.Module | None = None, **options: Any) -> nn.Module:
    return adapt(make() if base is None else base, peft=ExpertLoraConfig(**{"r": 4, **options})).eval()


def layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, ExpertLoraLayer)]


def of_peft(ours: nn.Module, parameters: list[str]) -> nn.Module:
    """PEFT's own model with the factors of ours: A as [E r, in], B as [out, r E], a layer around another a stack."""
    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=[], target_parameters=parameters)
    theirs = peft.get_peft_model(make(), config).eval()
    with torch.no_grad():
        for name, factor in ours.named_parameters():
            if ".lora_experts." in name:
                paired(theirs, name).copy_(theirs_of(factor, name))
    return theirs


def paired(theirs: nn.Module, name: str) -> Tensor:
    at, _, key = name.partition(".lora_experts.default.")
    wrapper: Any = theirs.get_submodule(at)
    while wrapper.parameter_name != f"{key[:-2]}_proj":
        wrapper = wrapper.base_layer
    weight: Tensor = wrapper.get_submodule(f"lora_{key[-1]}.default").weight
    return weight


def theirs_of(factor: Tensor, name: str) -> Tensor:
    return factor.flatten(0, 1) if name.endswith("A") else factor.permute(1, 2, 0).flatten(1)


@pytest.mark.parametrize("projections", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
def test_it_is_what_peft_computes_from_whole_stacks(projections: list[str]) -> None:
    ours = redrawn(adapted(projections=projections))
    theirs = of_peft(ours, [f"mlp.experts.{name}" for name in projections])
    found, expected = ours(IDS, labels=IDS), theirs(IDS, labels=IDS)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert (found.logits - logits(make())).abs().max() > 0.1
    found.loss.backward()
    expected.loss.backward()
    compared = 0
    for name, factor in ours.named_parameters():
        if factor.requires_grad:
            torch.testing.assert_close(theirs_of(factor.grad, name), paired(theirs, name).grad, rtol=1e-3, atol=1e-6)
            compared += 1
    assert compared == 3 * 2 * len(projections)


def test_it_starts_as_the_identity_and_trains_the_factors_alone() -> None:
    model = adapted()
    assert torch.equal(logits(model), logits(make()))
    trained = {name.rpartition(".")[2]: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {
        "gate_up_A": (8, 4, 64),
        "gate_up_B": (8, 64, 4),
        "down_A": (8, 4, 32),
        "down_B": (8, 64, 4),
    }
    assert all("lora_experts" in name for name, p in model.named_parameters() if p.requires_grad)


def apart(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def reference(layer: ExpertLoraLayer, x: Tensor, chosen: Tensor, gates: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The definition in float64, token by token, and its factors."""
    factors = layer.lora_experts["default"]
    double = {name: p.detach().double().requires_grad_() for name, p in factors.named_parameters()}
    places = {expert: place for place, expert in enumerate(factors.index.tolist())}
    stacks = {"gate_up": layer.base_layer.gate_up_proj.double(), "down": layer.base_layer.down_proj.double()}

    def product(stack: str, expert: int, row: Tensor) -> Tensor:
        weight = stacks[stack][expert]
        if expert in places:
            first, second = (double[f"{stack}_{factor}"][places[expert]] for factor in "AB")
            weight = weight + factors.scaling * second @ first
        return weight @ row

    out = []
    for row, experts, shares in zip(x, chosen.tolist(), gates.double(), strict=True):
        added = torch.zeros_like(row)
        for expert, share in zip(experts, shares, strict=True):
            gate, up = product("gate_up", expert, row).chunk(2)
            added = added + share * product("down", expert, F.silu(gate) * up)
        out.append(added)
    return torch.stack(out), double


@pytest.mark.parametrize("experts", [None, [1, 4, 6], [3]])
@pytest.mark.parametrize("rank", [1, 4, 5])
def test_values_and_gradients_are_those_of_the_definition(experts: list[int] | None, rank: int) -> None:
    layer = layers(redrawn(adapted(experts=experts, r=rank, use_rslora=rank == 5), std=0.3))[0]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(21, 64, generator=generator).requires_grad_()
    chosen = torch.rand(21, 8, generator=generator).topk(2).indices
    gates = torch.rand(21, 2, generator=generator)
    exact = x.detach().double().requires_grad_()
    expected, double = reference(layer, exact, chosen, gates)
    found = layer(x, chosen, gates)
    assert apart(found, expected) < 5e-6
    weights = torch.randn(found.shape, generator=generator)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert apart(x.grad, exact.grad) < 5e-6
    for name, factor in layer.lora_experts["default"].named_parameters():
        assert apart(factor.grad, double[name].grad) < 5e-6, name
        assert factor.grad.abs().max() > 0.01, name


def test_a_subset_reaches_its_own_tokens_alone() -> None:
    model = redrawn(adapted(experts=SUBSET))
    assert [list(layer.lora_experts["default"].index) for layer in layers(model)] == [[0, 2, 5], [7]]
    layer = layers(model)[0]
    x, gates = torch.randn(6, 64), torch.rand(6, 2)
    with torch.no_grad():
        others = layer(x, torch.tensor([[1, 3]] * 6), gates)
        assert torch.equal(others, layer.base_layer(x, torch.tensor([[1, 3]] * 6), gates))
        own = torch.tensor([[1, 5]] * 6)
        assert (layer(x, own, gates) - layer.base_layer(x, own, gates)).abs().max() > 0.01
    layer(x, torch.tensor([[1, 3]] * 6), gates).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.lora_experts.parameters())  # as DDP wants it


def test_the_experts_of_a_task_are_chosen_and_adapted() -> None:
    base = make()
    chosen = choose_task_experts(score_experts(base, [{"input_ids": IDS}]), share=0.4)
    model = adapted(base, experts=chosen, layers=[1, 3])
    found = {
        number: layer.lora_experts["default"].index.tolist()
        for number, layer in zip((1, 3), layers(model), strict=True)
    }
    assert found == {number: chosen[f"model.layers.{number}.mlp"] for number in (1, 3)}
    assert all(0 < len(experts) < 8 for experts in found.values())


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


def test_checkpointed_gradients_are_equal() -> None:
    found = []
    for checkpointing in (False, True):
        model = redrawn(adapted(target_modules=["o_proj"])).train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) == 3 * 4 + 4 * 2
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_16_bit_weights_and_autocast_train_float32_factors() -> None:
    exact = redrawn(adapted(r=3))
    expected = logits(exact)
    half = adapted(make().to(torch.bfloat16), r=3)
    half.load_state_dict({k: v for k, v in exact.state_dict().items() if "lora_" in k}, strict=False)
    plain = make().to(torch.bfloat16)
    for name, stack in fold_adapter(copy.deepcopy(exact)).state_dict().items():  # the same model in bfloat16, folded
        plain.state_dict()[name].copy_(stack)
    eager = (logits(plain).float() - expected).abs().mean()
    assert 0 < (logits(half).float() - expected).abs().mean() <= 2 * eager
    half(IDS, labels=IDS).loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = exact(IDS, labels=IDS).loss
    loss.backward()
    for model in (half, exact):
        grads = [p.grad for name, p in model.named_parameters() if "lora_" in name]
        assert all(grad.dtype == torch.float32 and grad.isfinite().all() and grad.any() for grad in grads)


def test_dropout_is_for_training() -> None:
    model = redrawn(adapted(lora_dropout=0.5))
    assert torch.equal(logits(model), logits(redrawn(adapted())))
    model.train()
    assert not torch.equal(logits(model), logits(model))


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


def test_other_mixtures_of_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(
        **sizes, head_dim=16, moe_intermediate_size=16, num_experts=8, num_experts_per_tok=2, vocab_size=512
    )
    base = Qwen3MoeForCausalLM(config).eval()
    start = logits(base)
    model = redrawn(adapted(base), std=0.3)
    before = logits(model)
    assert (before - start).abs().max() > 1e-3
    torch.testing.assert_close(logits(fold_adapter(model)), before, rtol=1e-4, atol=1e-5)


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
        ({"target_modules": "all-line"}, None),
    ],
)
def test_what_a_model_does_not_have(wrong: dict[str, Any], said: str | None) -> None:
    base = make()
    before, names = logits(base), [name for name, _ in base.named_modules()]
    if said is None:  # experts are adapted all the same, as PEFT does where some of several targets exist
        assert len(layers(adapted(base, **wrong))) == 3
        return
    with pytest.raises(ConfigError, match=said):
        adapted(base, **wrong)
    assert torch.equal(logits(base), before) and [name for name, _ in base.named_modules()] == names
    assert all(parameter.requires_grad for parameter in base.parameters())


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
