"""One set of weights at any rate: what a switched model computes is what a model made for that rate computes."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from backbone_families import FAMILIES, SCHEDULE, build, config, result, run, trained
from peft import LoraConfig
from torch import Tensor, nn

from pyra import PyraConfig, UnsupportedModelError, macs, set_rate, unwrap, wrap
from pyra.adapters import adapt, fold_adapter
from pyra.backbones import merging_layers, wrapped_config, wrapped_schedule
from pyra.errors import ConfigError, ScheduleError

RANGE = [0.1, 0.4]


def values(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return result(run(model, inputs))


def elastic(family: str, rate: float = 0.4) -> nn.Module:
    return trained(wrap(build(family), PyraConfig(rate=rate, rate_range=RANGE)))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_switched_model_is_a_model_of_that_rate(family: str) -> None:
    inputs, model = FAMILIES[family].inputs(), elastic(family)
    state = copy.deepcopy(model.state_dict())
    seen = []
    for rate in (0.1, 0.25, 0.4):
        fresh = wrap(build(family), PyraConfig(rate=rate))
        own = fresh.state_dict()
        for name, tensor in state.items():
            if name in own:  # a layer that does not merge at this rate has no re-activation weights
                own[name].copy_(tensor[: len(own[name])] if tensor.ndim else tensor)
        seen.append(values(set_rate(model, rate), inputs))
        assert wrapped_schedule(model) == wrapped_schedule(fresh) and macs(model) == macs(fresh)
        assert torch.equal(seen[-1], values(fresh, inputs))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(values(set_rate(model, 0.1), inputs), seen[0])


def test_rate_zero_is_the_plain_model_and_back() -> None:
    inputs, plain = FAMILIES["timm-vit"].inputs(), build("timm-vit")
    model = trained(wrap(copy.deepcopy(plain), config(reactivation=False)))
    merging = values(model, inputs)
    assert torch.equal(values(model.set_rate(0.0), inputs), values(plain, inputs))
    assert torch.equal(values(set_rate(model, schedule=SCHEDULE), inputs), merging)
    assert torch.equal(values(unwrap(model), inputs), values(plain, inputs))
    assert not hasattr(model, "set_rate")


def test_a_model_that_did_not_merge_starts_to() -> None:
    inputs = FAMILIES["timm-vit"].inputs()
    model = wrap(build("timm-vit"), PyraConfig(rate=0.0, reactivation=False))
    assert not list(merging_layers(model))
    expected = values(wrap(build("timm-vit"), config(reactivation=False)), inputs)
    assert torch.equal(values(set_rate(model, schedule=SCHEDULE), inputs), expected)


def test_a_layer_that_never_merged_merges_without_weights() -> None:
    model = trained(wrap(build("timm-vit"), PyraConfig(schedule=[0, 8, 5])))
    with pytest.warns(UserWarning, match=r"rate 0\.\d+ is outside what these weights are for \(rate 0\.\d+\)"):
        set_rate(model, schedule=[8, 8, 5])
    assert not hasattr(model.blocks[0], "reactivation") and model.blocks[1].reactivation.pair_weight.shape[0] == 8
    assert values(model, FAMILIES["timm-vit"].inputs()).isfinite().all()


def test_only_rates_outside_the_range_are_warned_of() -> None:
    model = elastic("timm-vit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for rate in (0.1, 0.3, 0.4):
            set_rate(model, rate)
    with pytest.warns(UserWarning, match=r"rate 0\.5\d is outside what these weights are for \(rates 0\.10 to 0\.40\)"):
        set_rate(model, 0.5)
    one = trained(wrap(build("timm-vit"), PyraConfig(rate=0.3)))
    with pytest.warns(UserWarning, match=r"\(rate 0\.3\d\)"):
        set_rate(one, 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        set_rate(one, 0.3)  # back to what it was made for


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({}, ConfigError, "give exactly one of schedule and rate"),
        ({"rate": 0.3, "schedule": SCHEDULE}, ConfigError, "give exactly one"),
        ({"rate": 1.5}, ConfigError, r"rate must be a number in \[0, 1\), got 1.5"),
        ({"rate": 0.99}, ScheduleError, "merging can save at most"),
        ({"schedule": [60, 0, 0]}, ScheduleError, "block 0 removes 60"),
    ],
)
def test_what_cannot_be_changes_nothing(arguments: dict, error: type[Exception], said: str) -> None:
    model, inputs = elastic("timm-vit"), FAMILIES["timm-vit"].inputs()
    before = values(model, inputs), wrapped_config(model), wrapped_schedule(model)
    with pytest.raises(error, match=said):
        model.set_rate(**arguments)
    assert torch.equal(values(model, inputs), before[0])
    assert (wrapped_config(model), wrapped_schedule(model)) == before[1:]


def test_a_plain_model_has_no_rate() -> None:
    with pytest.raises(ConfigError, match="wrap or adapt it first"):
        set_rate(build("timm-vit"), 0.3)


def test_layers_inside_other_modules_are_refused() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, inputs = elastic("timm-vit"), FAMILIES["timm-vit"].inputs()
    before = values(model, inputs)
    for index, block in enumerate(model.blocks):
        model.blocks[index] = checkpoint_wrapper(block)
    with pytest.raises(UnsupportedModelError, match="CheckpointWrapper"):
        set_rate(model, 0.1)
    assert torch.equal(values(model, inputs), before)


def test_copies_switch_alone() -> None:
    model, inputs = elastic("timm-vit"), FAMILIES["timm-vit"].inputs()
    before = values(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not torch.equal(values(copied.set_rate(0.1), inputs), before)
        assert torch.equal(values(model, inputs), before) and wrapped_config(model).rate == 0.4


def test_compiled_models_switch() -> None:
    model, inputs = elastic("timm-vit"), FAMILIES["timm-vit"].inputs()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rate in (0.4, 0.1, 0.4):
        set_rate(model, rate)
        torch.testing.assert_close(values(compiled, inputs), values(model, inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["timm-vit", "hf-clip-two-towers", "hf-siglip-classifier"])
def test_inside_peft_and_folded(family: str) -> None:
    inputs = FAMILIES[family].inputs()
    model = adapt(build(family), pyra=PyraConfig(rate=0.4, rate_range=RANGE), peft=LoraConfig(init_lora_weights=False))
    model.eval().set_rate(0.2)
    expected = values(model, inputs)
    folded = fold_adapter(model).eval()
    torch.testing.assert_close(values(folded, inputs), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(values(folded.set_rate(0.4), inputs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rates", "said"),
    [
        ([0.3], "rate_range must be two numbers"),
        (0.3, "rate_range must be two numbers"),
        ([0.8, 0.3], r"rate_range must rise within \[0, 1\)"),
        ([0.3, 1.0], r"rate_range must rise within \[0, 1\)"),
        ([0.3, "0.5"], "rate_range must be two numbers"),
    ],
)
def test_ranges_that_are_none(rates: object, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        PyraConfig(rate=0.3, rate_range=rates)  # type: ignore[arg-type]


def test_a_range_that_cannot_be_reached_is_refused_when_wrapping() -> None:
    model = build("timm-vit")
    with pytest.raises(ScheduleError, match="merging can save at most"):
        wrap(model, PyraConfig(rate=0.3, rate_range=[0.3, 0.95]))
    assert not hasattr(model, "pyra_config") and not list(merging_layers(model))
