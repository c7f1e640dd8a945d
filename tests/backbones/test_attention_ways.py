"""Proportional attention without a mask, in every family: the mask's numbers, and a clear word where it cannot be."""

from __future__ import annotations

import pytest
import torch
from backbone_families import FAMILIES, build, config, result, run, trained
from timm.layers import set_fused_attn
from torch import Tensor, nn
from torch.nn import functional as F

from pyra import PyraConfig, UnsupportedModelError, wrap
from pyra.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
WAYS = ("augmented", "flex")


def values(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return result(run(model, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_computes_as_with_a_mask(family: str) -> None:
    inputs = FAMILIES[family].inputs()
    expected = values(trained(wrap(build(family), config(attention="mask"))), inputs)
    without = values(trained(wrap(build(family), config(proportional_attention=False))), inputs)
    for way in WAYS:
        found = values(trained(wrap(build(family), config(attention=way))), inputs)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, without, rtol=1e-4, atol=1e-5)


@pytest.mark.slow  # compiles and exports each way
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", ["timm-vit", "timm-eva-dinov3", "hf-dinov2"])
def test_compiled_and_exported(family: str, way: str) -> None:
    inputs = FAMILIES[family].inputs()
    model = trained(wrap(build(family), config(attention=way)))
    expected = values(model, inputs)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(values(compiled, inputs), expected, rtol=1e-4, atol=1e-5)
    program = torch.export.export(model, tuple(inputs.values()))
    names = {str(node.target) for node in program.graph.nodes}
    assert any("scaled_dot_product_attention" in name for name in names) and not any("flex" in name for name in names)
    assert not any("pyra" in name for name in names)
    torch.testing.assert_close(result(program.module()(*inputs.values())), expected, rtol=1e-4, atol=1e-5)


def test_no_call_of_attention_has_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, masks = F.scaled_dot_product_attention, []

    def watched(*args, attn_mask=None, **kwargs):  # type: ignore[no-untyped-def]
        masks.append(type(attn_mask).__name__ if attn_mask is not None else None)
        return plain(*args, attn_mask=attn_mask, **kwargs)

    inputs = FAMILIES["timm-vit"].inputs()
    # Tokens merge after the second attention; the third is called with the bias, which calls again, without a mask.
    for way, expected in (("mask", ["Tensor"]), ("augmented", ["SizeBias", None])):
        masks.clear()
        model = wrap(build("timm-vit"), config(attention=way))
        monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
        values(model, inputs)
        monkeypatch.setattr(F, "scaled_dot_product_attention", plain)
        assert masks == [None, None, *expected]


def test_gradients_are_those_of_the_mask() -> None:
    inputs, found = FAMILIES["timm-vit"].inputs(), []
    for way in ("mask", "augmented"):
        model = trained(wrap(build("timm-vit"), config(attention=way))).double()
        result(run(model, {name: value.double() for name, value in inputs.items()})).square().sum().backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    assert len(found[0]) > 10
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_attention_that_is_not_fused_is_refused(way: str) -> None:
    set_fused_attn(False)
    try:
        model = wrap(build("timm-vit"), config(attention=way))
    finally:
        set_fused_attn(True)
    with pytest.raises(UnsupportedModelError, match=f"attention='{way}' takes the place of scaled_dot_product"):
        values(model, FAMILIES["timm-vit"].inputs())
    eager = wrap(build("hf-vit", attn_implementation="eager"), config(attention=way))
    with pytest.raises(UnsupportedModelError, match="attn_implementation='sdpa'"):
        values(eager, FAMILIES["hf-vit"].inputs())


def test_flex_cannot_train_on_a_cpu() -> None:
    model = wrap(build("timm-vit"), config(attention="flex"))
    with pytest.raises(UnsupportedModelError, match="no gradients on a CPU: use attention='mask'"):
        run(model, FAMILIES["timm-vit"].inputs())


def test_flex_has_no_dropout() -> None:
    model = wrap(build("timm-vit", attn_drop_rate=0.1), config(attention="flex")).train()
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"this model drops 0\.1"):
        run(model, FAMILIES["timm-vit"].inputs())


def test_configurations() -> None:
    with pytest.raises(ConfigError, match="attention must be one of auto, mask, fused, augmented, flex, got 'flash'"):
        PyraConfig(rate=0.5, attention="flash")
    with pytest.raises(ConfigError, match="carries the sizes that proportional_attention=False leaves out"):
        PyraConfig(rate=0.5, attention="flex", proportional_attention=False)
    assert PyraConfig.from_dict(PyraConfig(rate=0.5, attention="flex").to_dict()).attention == "flex"
