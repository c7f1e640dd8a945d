"""Which rate a step runs at, and the uncompressed pass of the same weights."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from backbone_families import FAMILIES, build, result, run, trained
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F

from pyra import PyraConfig, unwrap, wrap
from pyra.adapters import adapt, load_adapter, save_adapter
from pyra.adapters.elastic import RateSampler, distillation_loss, uncompressed
from pyra.backbones import wrapped_config, wrapped_schedule
from pyra.errors import ConfigError

RANGE = [0.1, 0.4]


def rates_of(sampler: RateSampler, steps: int) -> list[list[float]]:
    return [[part.rate for part in sampler.parts(step)] for step in range(steps)]


def test_a_sandwich_is_the_lowest_and_the_highest_or_one_between() -> None:
    rates = rates_of(RateSampler(RANGE), 60)
    assert [first for first, _ in rates] == [0.1] * 60
    assert [other for _, other in rates[1::2]] == [0.4] * 30
    between = [other for _, other in rates[0::2]]
    assert all(0.1 < rate < 0.4 for rate in between) and len(set(between)) > 5


@pytest.mark.parametrize("rule", ["sandwich", "uniform"])
@pytest.mark.parametrize("images", [1, 2, 3, 7, 32])
def test_every_image_of_a_step_is_seen(rule: str, images: int) -> None:
    for step in range(2):
        parts = RateSampler(RANGE, rule).parts(step)
        taken = [list(range(images))[part.rows(images)] for part in parts]
        assert {image for rows in taken for image in rows} == set(range(images)) and all(taken)
        assert sum(part.weight for part in parts) == 1
        assert sum(len(rows) for rows in taken) <= 1.25 * images + 2 * len(parts)


def test_uniform_draws_all_of_the_range() -> None:
    rates = [rate for (rate,) in rates_of(RateSampler(RANGE, "uniform"), 400)]
    assert (min(rates), max(rates)) == (0.1, 0.4) and len(set(rates)) == 17
    assert sum(rates) / 400 == pytest.approx(0.25, abs=0.02)


def test_a_draw_depends_on_seed_and_step_alone() -> None:
    one, other = RateSampler(RANGE, seed=1), RateSampler(RANGE, seed=1)
    forwards, backwards = rates_of(one, 30), [other.parts(s) for s in reversed(range(30))]
    assert forwards == [[part.rate for part in parts] for parts in backwards[::-1]]
    assert forwards != rates_of(RateSampler(RANGE, seed=2), 30)


@pytest.mark.parametrize(
    ("rates", "rule", "said"),
    [
        (RANGE, "random", "one of sandwich, uniform"),
        ([0.3, 0.3], "uniform", "higher rate"),
        ([0.1, 0.2, 0.4], "uniform", "higher rate"),
    ],
)
def test_what_cannot_be_drawn(rates: list[float], rule: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        RateSampler(rates, rule)


def values(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return result(run(model, inputs))


@pytest.mark.parametrize("family", ["timm-vit", "timm-eva-dinov3", "hf-siglip"])
def test_the_uncompressed_pass_is_that_of_the_unwrapped_model(family: str) -> None:
    inputs = FAMILIES[family].inputs()
    model = trained(wrap(build(family), PyraConfig(rate=0.4, rate_range=RANGE))).train()
    model.blocks[0].eval() if hasattr(model, "blocks") else None
    modes = [module.training for module in model.modules()]
    before = wrapped_config(model), wrapped_schedule(model)
    expected = values(unwrap(copy.deepcopy(model)).eval(), inputs)
    with uncompressed(model):
        assert torch.equal(result(run(model, inputs)), expected) and not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == modes
    assert (wrapped_config(model), wrapped_schedule(model)) == before and torch.is_grad_enabled()
    assert not torch.equal(values(model.eval(), inputs), expected)


def test_an_error_inside_brings_merging_back() -> None:
    model = wrap(build("timm-vit"), PyraConfig(rate=0.4))
    schedule = wrapped_schedule(model)
    with pytest.raises(ZeroDivisionError), uncompressed(model):
        _ = 1 / 0
    assert wrapped_schedule(model) == schedule and torch.is_grad_enabled()
    with pytest.raises(ConfigError, match="wrap or adapt it first"), uncompressed(build("timm-vit")):
        pass


def test_the_divergence_is_that_of_its_definition() -> None:
    student, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    p, q = teacher.double().softmax(1), student.double().softmax(1)
    expected = (p * (p.log() - q.log())).sum(1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher).double(), expected, rtol=1e-5, atol=1e-6)
    assert distillation_loss(teacher, teacher).abs() < 1e-6


def test_a_part_switches_the_model_as_set_rate_does() -> None:
    model, other = (wrap(build("timm-vit"), PyraConfig(rate=0.4, rate_range=RANGE)) for _ in range(2))
    sampler = RateSampler(RANGE)
    for rate in (0.1, 0.4, 0.25, 0.3, 0.25):
        sampler.apply(model, rate)
        other.set_rate(rate)
        assert wrapped_schedule(model) == wrapped_schedule(other) and wrapped_config(model) == wrapped_config(other)
    with pytest.raises(ConfigError, match="wrap or adapt it first"):
        sampler.apply(build("timm-vit"), 0.1)


def test_weights_of_every_rank_are_trained() -> None:
    """At the lowest rate few pairs merge; over the range every row of W_r has seen a gradient.

    The model averages its tokens: a class token alone would not see what merges in the last layer.
    """
    model = adapt(build("timm-average"), pyra=PyraConfig(rate=0.4, rate_range=RANGE), peft=LoraConfig())
    for parameter in (p for n, p in model.named_parameters() if "channel_weight" in n and p.requires_grad):
        nn.init.normal_(parameter)
    inputs, labels, seen = FAMILIES["timm-average"].inputs(), torch.tensor([0, 1, 2]), {}
    sampler = RateSampler(RANGE)
    for step in range(150):
        for part in sampler.parts(step):
            sampler.apply(model, part.rate)
            F.cross_entropy(result(run(model, inputs)), labels).backward()
    for name, parameter in model.named_parameters():
        if "pair_weight" in name and parameter.requires_grad:
            seen[name] = parameter.grad
    assert len(seen) == 3 and all((gradient != 0).all() for gradient in seen.values())


@pytest.mark.parametrize(
    "pyra", [PyraConfig(schedule=[0, 0, 9]), PyraConfig(schedule=[16, 0, 0]), PyraConfig(rate=0.3)]
)
@pytest.mark.parametrize("rate", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("peft", [LoraConfig(r=3, init_lora_weights=False), None])
@pytest.mark.filterwarnings("ignore:rate .* is outside what these weights are for:UserWarning")
def test_a_model_that_was_switched_is_saved_and_loaded(
    pyra: PyraConfig, rate: float, peft: LoraConfig | None, tmp_path: Path
) -> None:
    model, inputs = (
        trained(adapt(build("timm-average"), pyra=pyra, peft=peft)).eval(),
        FAMILIES["timm-average"].inputs(),
    )
    model.set_rate(rate)
    save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that merge now and did not when it was trained
        again = load_adapter(build("timm-average"), tmp_path)
    torch.testing.assert_close(values(again, inputs), values(model, inputs), rtol=1e-5, atol=1e-5)


def test_wrapping_again_after_a_switch_there_and_back_changes_nothing() -> None:
    asked, inputs = PyraConfig(rate=0.3), FAMILIES["timm-vit"].inputs()
    model = trained(wrap(build("timm-vit"), asked))
    expected = values(model, inputs)
    with pytest.warns(UserWarning, match="outside"):
        model.set_rate(0.1)
    model.set_rate(0.3)
    assert torch.equal(values(wrap(model, asked), inputs), expected)
