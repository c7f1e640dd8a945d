"""Training with less memory: bf16, gradient checkpointing, and frozen backbones of 8 and 4 bits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from backbone_families import build, config, images, result, run
from torch import Tensor, nn

from pyra import PyraConfig, wrap
from pyra.adapters import (
    BottleneckConfig,
    VisualPromptsConfig,
    adapt,
    fold_adapter,
    load_adapter,
    quantize_backbone,
    save_adapter,
)
from pyra.adapters.methods import PEFT_METHODS, peft_config
from pyra.errors import ConfigError, UnsupportedModelError
from pyra.tasks.data.task import load_task
from pyra.tasks.evaluation import data_for
from pyra.tasks.options import RunOptions
from pyra.tasks.runs import new_backbone

METHODS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(),
    "bottleneck": lambda: BottleneckConfig(width=4),
    "prompts": lambda: VisualPromptsConfig(num_prompts=3),
}
KINDS = ("timm-vit", "hf-vit")


def wide(kind: str) -> nn.Module:
    """A model of 64 channels: as many as bitsandbytes takes together."""
    return build(kind, **({"embed_dim": 64} if kind == "timm-vit" else {"hidden_size": 64, "intermediate_size": 128}))


def adapted(kind: str, method: str, base: Callable[[str], nn.Module] = build) -> nn.Module:
    torch.manual_seed(3)
    model = adapt(base(kind), pyra=config(), peft=METHODS[method]())
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():  # what starts at zero hides what lies behind it
            nn.init.normal_(parameter, std=0.02)
    return model.train()


def loss(model: nn.Module) -> Tensor:
    return result(run(model, images())).float().square().mean()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def checkpointed(model: nn.Module) -> nn.Module:
    base = model.get_base_model()
    if hasattr(base, "set_grad_checkpointing"):
        base.set_grad_checkpointing()
    else:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def kept_bytes(model: nn.Module) -> int:
    """Bytes that the forward keeps for the backward, parameters apart."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = loss(model)  # alive until the sum: addresses are not used twice
    assert value.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_bf16_mixed_precision(kind: str, method: str) -> None:
    """Weights stay float32, and gradients are those of float32 to within bf16's rounding."""
    exact = gradients(adapted(kind, method))
    model = adapted(kind, method)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = gradients(model)
    assert set(mixed) == set(exact) and mixed
    assert all(p.dtype == torch.float32 for p in model.parameters())
    for name, gradient in mixed.items():
        assert gradient.dtype == torch.float32 and gradient.isfinite().all(), name
    whole, half = (torch.cat([found[name].flatten() for name in sorted(exact)]) for found in (exact, mixed))
    assert torch.cosine_similarity(whole, half, dim=0) > 0.98
    assert not torch.equal(whole, half)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing(kind: str, method: str) -> None:
    """The same gradients, from less memory."""
    exact, found = gradients(adapted(kind, method)), gradients(checkpointed(adapted(kind, method)))
    assert set(found) == set(exact) and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, exact[name], msg=lambda text, name=name: f"{name}: {text}")
    assert kept_bytes(checkpointed(adapted(kind, method))) < 0.5 * kept_bytes(adapted(kind, method))


def test_checkpointing_through_peft() -> None:
    """The switch of transformers on the adapted model, as its Trainer turns it on."""
    model = adapted("hf-vit", "lora")
    exact = gradients(model)
    model = adapted("hf-vit", "lora")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, exact[name])


quantised = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture
def bits_and_bytes() -> None:
    pytest.importorskip("bitsandbytes", reason="the extra 'quantised' is not installed")


@quantised
@pytest.mark.usefixtures("bits_and_bytes")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["lora", "ia3", "bottleneck", "prompts"])
def test_quantised_backbones(kind: str, bits: int, method: str, tmp_path: Path) -> None:
    """Train in few bits, save, load into few bits and into full precision."""

    def few(kind: str) -> nn.Module:
        return quantize_backbone(wide(kind), bits, torch.float32)

    sizes = [sum(p.numel() * p.element_size() for p in base(kind).parameters()) for base in (wide, few)]
    assert sizes[1] < (0.5 if bits == 8 else 0.4) * sizes[0]
    model = adapted(kind, method, few)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert any(p.dtype in (torch.int8, torch.uint8) for p in frozen.values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.005)
    first = loss(model).item()
    for _ in range(6):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    assert loss(model).item() < first
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)

    with torch.no_grad():
        expected = result(run(model.eval(), images()))
        save_adapter(model, tmp_path)
        again = result(run(load_adapter(few(kind), tmp_path), images()))
        whole = load_adapter(wide(kind), tmp_path)
        unfolded = result(run(whole, images()))
        folded = result(run(fold_adapter(whole), images()))
    torch.testing.assert_close(again, expected)
    torch.testing.assert_close(folded, unfolded, atol=1e-5, rtol=1e-4)
    if bits == 8:  # random weights of 64 channels in 4 bits are other weights: see the test on trained ones
        assert torch.cosine_similarity(unfolded.flatten(), expected.flatten(), dim=0) > 0.98


@quantised
@pytest.mark.usefixtures("bits_and_bytes")
@pytest.mark.parametrize(("bits", "least"), [(8, 0.995), (4, 0.9)])
@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_features_of_trained_weights(bits: int, least: float, rate: float) -> None:
    """The shipped backbone on photographs, plain and merging."""
    options = RunOptions(method="tome", rate=rate)
    exact, few = new_backbone(options, 10).eval(), quantize_backbone(new_backbone(options, 10), bits).eval()
    data = data_for(exact, load_task("demo"), "test", limit=8)
    pixels = torch.stack([item["pixel_values"] for item in data])
    for model in (exact, few):
        model.reset_classifier(0)
        wrap(model, PyraConfig(rate=rate, reactivation=False))
    with torch.no_grad():
        similar = torch.cosine_similarity(exact(pixels), few(pixels))
    assert least < similar.mean() < 1


@quantised
@pytest.mark.usefixtures("bits_and_bytes", "no_cuda_extension")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("width", [64, 96])
@pytest.mark.parametrize("method", [name for name in PEFT_METHODS if name != "adalora"])
def test_every_method_on_few_bits(method: str, width: int, bits: int) -> None:
    """It runs, trained after an evaluation and the other way round, or it says that it cannot."""
    model = quantize_backbone(build("timm-vit", embed_dim=width), bits, torch.float32)
    try:
        model = adapt(model, pyra=config(), peft=peft_config(method, 8, targets=["qkv"]))
    except ConfigError as error:
        assert method == "pissa" or (method, bits) in (("dora", 8), ("loha", 4), ("lokr", 4)), error
        return
    with torch.no_grad():
        start = result(run(model.eval(), images()))
    trained = gradients(model.train())
    assert set(trained) == {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        torch.testing.assert_close(result(run(model.eval(), images())), start)


@quantised
@pytest.mark.usefixtures("bits_and_bytes")
@pytest.mark.parametrize("bits", [8, 4])
def test_folding_into_few_bits_rounds_again(bits: int) -> None:
    """After a forward in evaluation mode, too: bitsandbytes would pack 4 bits otherwise then."""
    model = adapt(quantize_backbone(wide("timm-vit"), bits), peft=peft.LoraConfig(r=2)).eval()
    with torch.no_grad():
        before = result(run(model, images()))
        after = result(run(fold_adapter(model), images()))
    assert (after - before).abs().max() < 0.03 * before.abs().max()


@pytest.mark.usefixtures("bits_and_bytes")
def test_what_cannot_be_quantised_says_why() -> None:
    with pytest.raises(ConfigError, match="compute_dtype must be a floating dtype"):
        quantize_backbone(build("timm-vit"), 4, "bf16")  # type: ignore[arg-type]
    for bits in (2, 16, None, 8.0):
        with pytest.raises(ConfigError, match=f"bits must be 8 or 4, got {bits}"):
            quantize_backbone(build("timm-vit"), bits)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="quantise the backbone first"):
        quantize_backbone(adapted("timm-vit", "lora"))
    with pytest.raises(ConfigError, match="quantise the backbone first"):
        quantize_backbone(adapt(build("timm-vit"), pyra=PyraConfig(rate=0.2)))
    with pytest.raises(ConfigError, match="quantised already"):
        quantize_backbone(quantize_backbone(build("timm-vit")))
    with pytest.raises(UnsupportedModelError):
        quantize_backbone(nn.Linear(3, 3))


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=re.escape("pip install 'pyra-adapt[quantised]'")):
        quantize_backbone(build("timm-vit"))


@quantised
@pytest.mark.usefixtures("bits_and_bytes")
@pytest.mark.parametrize("bits", [8, 4])
def test_transformers_own_loading(bits: int, tmp_path: Path) -> None:
    """A model that transformers loaded in few bits merges, adapts and trains; a head in few bits cannot."""
    wide("hf-vit").save_pretrained(tmp_path)

    def loaded(**options: list[str]) -> nn.Module:
        how = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, **options)
        return transformers.ViTForImageClassification.from_pretrained(tmp_path, quantization_config=how)

    model = adapt(loaded(llm_int8_skip_modules=["classifier"]), pyra=config(), peft=peft.LoraConfig(r=2))
    assert gradients(model.train())
    with pytest.raises(ConfigError, match=r"classifier is quantised and cannot train: .*llm_int8_skip_modules="):
        adapt(loaded(), pyra=config(), peft=peft.LoraConfig(r=2))
