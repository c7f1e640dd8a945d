"""Experts that train as they will be rounded: the rounding, its gradient, and a model that stays itself."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize, quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from expert_models import IDS, adapted, layers, logits, make, redrawn
from peft import LoraConfig
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from pyra.adapters import adapt, fold_adapter
from pyra.backbones.joyai_checkpoint import load_model, save_checkpoint
from pyra.errors import ConfigError, UnsupportedModelError
from pyra.experts import QuantisingConfig, fake_quantise, quantising_config, undo_fake_quantise
from pyra.experts.quantising import fitting_group, quantise, rounded, straight_through
from pyra.export.engine_weights import pack

SMALL = {"moe_intermediate_size": 64}
CONFIG = QuantisingConfig()


def tiny(**changes: Any) -> nn.Module:
    return make(**{**SMALL, **changes})


def weights(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scheme(bits: int, group: int) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="group", group_size=group)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "columns", "group"), [(1, 64, 64), (5, 128, 64), (3, 96, 32), (2, 24, 8)])
def test_it_rounds_as_compressed_tensors_does_to_the_bit(bits: int, rows: int, columns: int, group: int) -> None:
    weight = weights(rows, columns)
    weight[0, :group] = 0  # a group of zeros
    weight[-1, -1] = weight[-1].abs().max() * 3  # a positive largest value
    args = scheme(bits, group)
    scale, zero = compute_dynamic_scales_and_zp(weight, args, nn.Module())
    values, own = quantise(weight, QuantisingConfig(bits, group))
    assert torch.equal(own, scale) and own.dtype == torch.float32
    assert torch.equal(values, quantize(weight, scale, zero, args, dtype=torch.int8))
    assert torch.equal(rounded(weight, QuantisingConfig(bits, group)), fake_quantize(weight, scale, zero, args))
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")
    stored = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
    packed = compressor.compress(stored, QuantizationScheme(targets=["Linear"], weights=args))
    if bits == 4:
        assert torch.equal(pack(values), packed["weight_packed"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_value_moves_by_more_than_half_a_step(bits: int, dtype: torch.dtype) -> None:
    config = QuantisingConfig(bits)
    weight = weights(40, 256).to(dtype)
    values, scale = quantise(weight, config)
    assert int(values.min()) >= config.lowest and int(values.max()) <= -config.lowest - 1
    moved = (values.double().unflatten(-1, (-1, 64)) * scale.double()[..., None]).flatten(-2) - weight.double()
    steps = (moved.unflatten(-1, (-1, 64)) / scale.double()[..., None]).abs()
    assert 0.45 < steps.max() <= 0.5 + 1e-5
    found = rounded(weight, config)
    assert found.dtype == dtype
    assert torch.equal(found, (weight.double() + moved).to(torch.float32).to(dtype))


def test_zeros_stay_zeros_and_a_single_value_is_kept_within_half_a_step() -> None:
    weight = torch.zeros(2, 64)
    weight[1, 7] = -3.0
    values, scale = quantise(weight, CONFIG)
    assert not values[0].any() and scale.isfinite().all() and (scale > 0).all()
    assert torch.equal(rounded(weight, CONFIG)[0], torch.zeros(64))
    assert values[1, 7] == -8 and values[1].count_nonzero() == 1


@pytest.mark.parametrize("shape", [(1, 64, 64), (3, 2, 128), (300, 8, 64)])
def test_the_gradient_is_straight_through(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyra.experts.quantising._AT_ONCE", 1000)  # in several parts
    stack = weights(*shape).requires_grad_()
    found = straight_through(stack, CONFIG)
    assert torch.equal(found, rounded(stack.detach(), CONFIG)) and not torch.equal(found, stack)
    pulled = weights(*shape, seed=1)
    found.backward(pulled)
    assert stack.grad is not None and torch.equal(stack.grad, pulled)


def overwritten(model: nn.Module) -> nn.Module:
    """The same model with its experts' weights replaced by rounded ones: the definition."""
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            parameter.data = torch.stack([rounded(one, CONFIG) for one in parameter.data])
    return model


@pytest.mark.parametrize("way", ["grouped_mm", "batched_mm", "eager"])
def test_the_forward_is_that_of_rounded_weights(way: str) -> None:
    model, expected = tiny(experts_implementation=way), overwritten(tiny(experts_implementation=way))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits(model)
    assert fake_quantise(model) is model
    assert torch.equal(logits(model), logits(expected)) and (logits(model) - plain).abs().max() > 0.01
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())  # the master stays


def test_gradients_are_those_of_rounded_weights_with_checkpoints_too() -> None:
    expected = overwritten(tiny()).train()
    expected(IDS, labels=IDS).loss.backward()
    for checkpointing in (False, True):
        model = fake_quantise(tiny()).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        named = dict(expected.named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            torch.testing.assert_close(parameter.grad, named[name].grad)
        assert named["model.layers.1.mlp.experts.gate_up_proj"].grad.abs().max() > 0


def test_it_is_one_instance_that_copies_pickles_and_goes_back(tmp_path: Path) -> None:
    model, other = tiny(), tiny()
    experts = model.model.layers[1].mlp.experts
    plain = logits(model)
    parameters = list(model.named_parameters())
    fake_quantise(fake_quantise(model))
    found = logits(model)
    standing = model.model.layers[1].mlp.experts
    assert isinstance(standing, type(experts)) and type(standing) is not type(experts)
    assert [(name, id(value)) for name, value in model.named_parameters()] == [(n, id(v)) for n, v in parameters]
    assert torch.equal(logits(other), plain)  # no class was changed
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(logits(copied), found) and torch.equal(logits(pickled), found)
    with torch.no_grad():
        copied.model.layers[1].mlp.experts.gate_up_proj.mul_(-1)
    assert torch.equal(logits(model), found) and not torch.equal(logits(copied), found)
    save_checkpoint(model, tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")), plain)  # the float weights
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(fake_quantise(other)), found)
    assert quantising_config(model) == CONFIG and quantising_config(undo_fake_quantise(model)) is None
    assert model.model.layers[1].mlp.experts is experts and torch.equal(logits(model), plain)
    assert undo_fake_quantise(model) is model


def test_going_back_keeps_what_training_and_moving_changed() -> None:
    model = fake_quantise(tiny()).to(torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    changed = {name: value.clone() for name, value in model.state_dict().items()}
    undo_fake_quantise(model).eval()
    assert model.model.layers[1].mlp.experts.gate_up_proj.dtype == torch.float64
    assert all(torch.equal(value, changed[name]) for name, value in model.state_dict().items())


def test_another_configuration_takes_the_place_of_the_first() -> None:
    model = fake_quantise(tiny())
    four = logits(model)
    fake_quantise(model, QuantisingConfig(bits=2, group_size=32))
    assert quantising_config(model) == QuantisingConfig(2, 32)
    assert (logits(model) - logits(tiny())).abs().mean() > 2 * (four - logits(tiny())).abs().mean()


def test_it_compiles_in_one_graph() -> None:
    model = fake_quantise(tiny(num_hidden_layers=2))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(logits(compiled), logits(model))


@pytest.mark.parametrize("order", ["round first", "adapt first"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_on_experts_is_rounded_with_the_weights_it_is_folded_into(order: str, dtype: torch.dtype) -> None:
    base = tiny()
    base = base if dtype == torch.float32 else base.to(dtype)
    if order == "round first":
        model = redrawn(adapted(fake_quantise(base), experts=[1, 4, 6], r=3))
    else:
        model = fake_quantise(redrawn(adapted(base, experts=[1, 4, 6], r=3)))
    trained = logits(model)
    model(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert len(grads) == 3 * 4 and all(grad is not None and grad.any() for grad in grads.values())
    with model.disable_adapter():
        without = logits(model)
    folded = fold_adapter(model)
    assert torch.equal(logits(folded), trained) and not torch.equal(trained, without)
    assert torch.equal(without, logits(fake_quantise(tiny() if dtype == torch.float32 else tiny().to(dtype))))
    assert torch.equal(logits(overwritten(undo_fake_quantise(folded))), trained)


def test_gradients_of_the_factors_are_those_of_the_rounded_sum() -> None:
    model = fake_quantise(redrawn(adapted(tiny())))
    layer = layers(model)[0]
    hidden, chosen, gates = weights(20, 64), torch.randint(0, 8, (20, 2)), torch.rand(20, 2)
    layer(hidden, chosen, gates).square().sum().backward()
    factors = layer.lora_experts["default"]
    stacks = {name: torch.nn.Parameter(stack.detach()) for name, stack in layer.folded_stacks(["default"]).items()}
    layer.base_layer.run(stacks, hidden, chosen, gates).square().sum().backward()
    for name in ("gate_up", "down"):
        first, second = getattr(factors, f"{name}_A"), getattr(factors, f"{name}_B")
        whole = stacks[f"{name}_proj"].grad
        torch.testing.assert_close(first.grad, factors.scaling * second.mT @ whole, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(second.grad, factors.scaling * whole @ first.mT, rtol=1e-4, atol=1e-3)


def test_lora_elsewhere_leaves_the_rounded_experts_alone() -> None:
    model = adapt(fake_quantise(tiny()), peft=LoraConfig(r=2, target_modules=["o_proj"]))
    redrawn(model)
    trained = logits(model.eval())
    assert torch.allclose(logits(fold_adapter(model)), trained, atol=1e-5)
    assert quantising_config(model) == CONFIG


def test_dropout_on_what_enters_the_factors_is_refused_in_training() -> None:
    model = fake_quantise(adapted(tiny(), lora_dropout=0.1))
    assert logits(model).isfinite().all()
    with pytest.raises(ConfigError, match="lora_dropout: set it to 0"):
        model.train()(IDS)


def test_other_mixtures_of_transformers() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Qwen3MoeConfig(
        **sizes, head_dim=16, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, vocab_size=512
    )
    model = Qwen3MoeForCausalLM(config).eval()
    plain = logits(model)
    found = logits(fake_quantise(model, QuantisingConfig(group_size=32)))
    assert 0 < (found - plain).abs().max() < plain.abs().max()


def test_what_cannot_be_rounded_is_refused_and_nothing_changes() -> None:
    model = make()  # 32 wide inside
    with pytest.raises(ConfigError, match=r"groups of 64 do not divide 32 inputs; .* such as 32"):
        fake_quantise(model)
    assert quantising_config(model) is None
    with pytest.raises(UnsupportedModelError, match="no layer with stacked experts"):
        fake_quantise(nn.Sequential(nn.Linear(4, 4)))
    stock = adapt(tiny(), peft=LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    with pytest.raises(UnsupportedModelError, match="adapt experts with ExpertLoraConfig"):
        fake_quantise(stock)
    own = tiny()
    own.model.layers[2].mlp.experts.forward = lambda *_: None
    with pytest.raises(UnsupportedModelError, match="a forward of its own"):
        fake_quantise(own)


@pytest.mark.parametrize("values", [{"bits": 5}, {"bits": 4.0}, {"group_size": 0}, {"group_size": 12}])
def test_values_that_are_none(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="must be"):
        QuantisingConfig(**values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_were_rounded_are_not_rounded_again(dtype: torch.dtype) -> None:
    weight = weights(4, 128)
    once = rounded(weight, CONFIG)
    assert not torch.equal(rounded(once, CONFIG), once)  # why it is refused
    model = overwritten(tiny())
    model = model if dtype == torch.float32 else model.to(dtype)
    with pytest.raises(ConfigError, match="rounded to 4 bits already"):
        fake_quantise(model)
    fake_quantise(tiny().to(dtype))  # and floats are not taken for it


def test_the_group_that_fits_all_experts() -> None:
    assert [fitting_group(tiny(moe_intermediate_size=width)) for width in (64, 96, 40, 36)] == [64, 32, 8, 64]
    with pytest.raises(ConfigError, match=r"groups of 64 do not divide 96 inputs; .* such as 32"):
        fake_quantise(tiny(moe_intermediate_size=96))
    fake_quantise(tiny(moe_intermediate_size=96), QuantisingConfig(group_size=32))
