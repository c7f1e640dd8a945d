"""LoRA on routed experts: what it computes and what it trains."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from expert_models import IDS, SUBSET, adapted, apart, layers, logits, make, redrawn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from pyra.adapters import fold_adapter
from pyra.adapters.expert_lora import ExpertLoraLayer
from pyra.experts import choose_task_experts, score_experts


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


def test_experts_without_a_gate_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    model = redrawn(adapted())
    expected = logits(model)
    monkeypatch.delattr(type(layers(model)[0].base_layer), "_apply_gate")
    assert torch.equal(logits(model), expected)
