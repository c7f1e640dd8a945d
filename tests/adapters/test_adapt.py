"""adapt -> train -> save -> load -> fold, on small timm models."""

from __future__ import annotations

import json
import re
from pathlib import Path

import peft
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import pyra
from pyra import PyraConfig
from pyra.adapters import BottleneckConfig, adapt, fold_adapter, load_adapter, save_adapter
from pyra.backbones import wrapped_config
from pyra.errors import CheckpointError, ConfigError

METHODS = {
    "lora": lambda: peft.LoraConfig(r=4),
    "dora": lambda: peft.LoraConfig(r=4, use_dora=True),
    "ia3": lambda: peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(r=2, target_modules=["qkv", "fc1"]),
    "ln_tuning": lambda: peft.LNTuningConfig(target_modules=["norm1"]),
    "bottleneck": lambda: BottleneckConfig(width=4),
    "none": lambda: None,
}


def backbone(image_size: int = 32, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": image_size, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 4, "num_classes": 10}
    return timm.create_model("vit_tiny_patch16_224", **{**settings, **kwargs})


def train(model: nn.Module, steps: int = 3) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 32, 32)), torch.randint(0, 10, (8,)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("merging", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_round_trip(method: str, merging: bool, images: torch.Tensor, tmp_path: Path) -> None:
    config = PyraConfig(rate=0.5) if merging else None
    start = adapt(backbone(), pyra=config, peft=None).eval()(images)
    model = adapt(backbone(), pyra=config, peft=METHODS[method]())
    frozen = {k: v.clone() for k, v in model.named_parameters() if not v.requires_grad}
    train(model)
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter, frozen[name]), name
    expected = model(images)
    assert not torch.allclose(expected, start, atol=1e-3)

    save_adapter(model, tmp_path)
    assert (tmp_path / "adapter_config.json").exists() == (method != "none")
    assert (tmp_path / "pyra_config.json").exists() == merging
    loaded = load_adapter(backbone(), tmp_path)
    torch.testing.assert_close(loaded(images), expected, atol=1e-5, rtol=1e-4)

    folded = fold_adapter(loaded)
    torch.testing.assert_close(folded(images), expected, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer) for m in folded.modules())
    if merging:
        assert folded.pyra_config == config


def test_reactivation_and_head_are_trained() -> None:
    model = adapt(backbone(), pyra=PyraConfig(rate=0.5), peft=peft.LoraConfig(r=4))
    before = {k: v.detach().clone() for k, v in model.named_parameters() if v.requires_grad}
    assert sum("pair_weight" in k for k in before) == 4
    assert any(".head." in k for k in before)
    train(model)
    after = dict(model.named_parameters())
    for key, value in before.items():
        if "blocks.3.reactivation" in key:
            continue  # what merges after the last attention no longer reaches the class token
        assert not torch.equal(after[key], value), f"{key} did not move"


def test_users_config_is_left_alone() -> None:
    config = peft.LoraConfig(r=4)
    adapt(backbone(), pyra=PyraConfig(rate=0.3), peft=config)
    assert config.target_modules is None
    assert config.modules_to_save is None


def test_linear_probe_trains_the_head_alone() -> None:
    model = adapt(backbone())
    assert {k for k, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_distilled_trains_both_heads() -> None:
    torch.manual_seed(0)
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=4, num_classes=10
    )
    model = adapt(model, pyra=PyraConfig(rate=0.2), peft=peft.LoraConfig(r=2))
    trained = {k for k, p in model.named_parameters() if p.requires_grad}
    assert any("head_dist" in k for k in trained)
    assert any(".head." in k for k in trained)


def test_other_token_count(images: torch.Tensor, tmp_path: Path) -> None:
    """An adapter trained at 32 px serves a backbone at 48 px: the rate is solved anew."""
    model = adapt(backbone(), pyra=PyraConfig(rate=0.5), peft=peft.LoraConfig(r=4))
    train(model)
    save_adapter(model, tmp_path)
    larger = load_adapter(backbone(48), tmp_path)
    assert larger(torch.randn(2, 3, 48, 48)).shape == (2, 10)
    stored = model.get_base_model().blocks[0].reactivation.pair_weight
    assert torch.equal(larger.get_base_model().blocks[0].reactivation.pair_weight, stored)


def test_stock_peft_reads_the_folder(images: torch.Tensor, tmp_path: Path) -> None:
    model = adapt(backbone(), peft=peft.LoraConfig(r=4))
    train(model)
    save_adapter(model, tmp_path)
    stock = peft.PeftModel.from_pretrained(backbone(), str(tmp_path)).eval()
    torch.testing.assert_close(stock(images), model(images))


def test_saving_again_leaves_nothing_of_the_older_adapter(tmp_path: Path) -> None:
    save_adapter(adapt(backbone(), pyra=PyraConfig(rate=0.3), peft=peft.LoraConfig(r=4)), tmp_path)
    save_adapter(adapt(backbone()), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix != ".md") == ["adapter_model.safetensors"]


def test_wrong_input(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        adapt(backbone(), peft=peft.LoraConfig(target_modules=["nonsense"]))
    with pytest.raises(CheckpointError, match="no adapter_model"):
        load_adapter(backbone(), tmp_path)
    save_adapter(adapt(backbone(), peft=peft.LoraConfig(r=4)), tmp_path)
    with pytest.raises(CheckpointError, match=r"head.*\[5, 48\]|size mismatch"):
        load_adapter(backbone(num_classes=5), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not a file")
    with pytest.raises(CheckpointError, match="not a readable safetensors"):
        load_adapter(backbone(), tmp_path)
    probe = tmp_path / "probe"
    save_adapter(adapt(backbone()), probe)
    with pytest.raises(CheckpointError, match=r"head\.weight is \[10, 48\], the model has \[5, 48\]"):
        load_adapter(backbone(num_classes=5), probe)
    (probe / "pyra_config.json").write_text(json.dumps({"rate": 2}))
    with pytest.raises(CheckpointError, match=r"pyra_config\.json: .*rate must be"):
        load_adapter(backbone(), probe)


def test_merging_is_never_lost_in_silence(tmp_path: Path) -> None:
    model = adapt(backbone(), pyra=PyraConfig(rate=0.5), peft=peft.LoraConfig(r=4))
    save_adapter(model, tmp_path)
    with pytest.raises(ConfigError, match="already carries an adapter"):
        adapt(model, peft=peft.LoraConfig(r=4))
    (tmp_path / "pyra_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"pyra_config\.json is missing"):
        load_adapter(backbone(), tmp_path)


@pytest.mark.parametrize("method", ["lora", "none"])
def test_tensors_missing_left_over_or_no_numbers(method: str, tmp_path: Path) -> None:
    def reload(weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, tmp_path / "adapter_model.safetensors")
        load_adapter(base, tmp_path)

    save_adapter(adapt(backbone(), pyra=PyraConfig(rate=0.5), peft=METHODS[method]()), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    base = backbone()
    for key in (next(k for k in weights if "reactivation" in k), next(k for k in weights if "head" in k)):
        with pytest.raises(CheckpointError, match=f"{re.escape(key)} is not in the file"):
            reload({k: v for k, v in weights.items() if k != key})
        assert wrapped_config(base) is None, "a failed load leaves the backbone as it was"
        base = backbone()
        with pytest.raises(CheckpointError, match=f"{re.escape(key)} holds NaN"):
            reload(weights | {key: weights[key] * float("nan")})
        base = backbone()
    with pytest.raises(CheckpointError, match=r"head\.extra is not in the model|size mismatch|unexpected"):
        reload(weights | {"head.extra": torch.ones(1)})
    reload(weights)


def test_weights_that_peft_would_not_save_are_named(tmp_path: Path) -> None:
    model = adapt(backbone(), peft=peft.LoraConfig(r=4))
    model.get_base_model().norm.requires_grad_(True)
    with pytest.raises(ConfigError, match=r"norm\.weight.*modules_to_save"):
        save_adapter(model, tmp_path)
    save_adapter(adapt(backbone(), peft=peft.LoraConfig(r=4, modules_to_save=["norm"])), tmp_path)
    assert any(".norm." in key for key in load_file(tmp_path / "adapter_model.safetensors"))


def test_one_adapter_of_any_name_is_saved(images: torch.Tensor, tmp_path: Path) -> None:
    model = peft.get_peft_model(
        pyra.wrap(backbone(), PyraConfig(rate=0.5, reactivation=False)),
        peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"]),
        adapter_name="mine",
    )
    train(model)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(backbone(), tmp_path)(images), model(images))
    model.add_adapter("other", peft.LoraConfig(r=4, target_modules=["qkv"]))
    with pytest.raises(ConfigError, match=r"2 adapters \(mine, other\)"):
        save_adapter(model, tmp_path)


def test_peft_names_that_reach_into_the_reactivation(images: torch.Tensor, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"modules_to_save norm: PEFT would also take .*reactivation\.norm"):
        adapt(backbone(), pyra=PyraConfig(rate=0.5), peft=peft.LoraConfig(r=4, modules_to_save=["norm"]))
    with pytest.raises(ConfigError, match="has no weights"):  # timm's Identity modules are called norm as well
        adapt(backbone(), pyra=PyraConfig(rate=0.5), peft=peft.LNTuningConfig(target_modules=["norm"]))
    targets = r".*blocks\.\d+\.(norm1|reactivation\.norm)"
    model = adapt(backbone(), pyra=PyraConfig(rate=0.5), peft=peft.LNTuningConfig(target_modules=targets))
    train(model)
    save_adapter(model, tmp_path)
    torch.testing.assert_close(load_adapter(backbone(), tmp_path)(images), model(images))


def test_a_failed_call_leaves_the_backbone_as_it_was(tmp_path: Path) -> None:
    model = backbone()
    for targets in (["nonsense"], ["norm1"], ["attn"]):
        with pytest.raises(ConfigError, match="target_modules"):
            adapt(model, pyra=PyraConfig(rate=0.5), peft=peft.LoraConfig(target_modules=targets))
        assert wrapped_config(model) is None
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "peft_config")
    save_adapter(adapt(backbone(), pyra=PyraConfig(rate=0.5), peft=peft.LoraConfig(r=4)), tmp_path)
    file = tmp_path / "adapter_config.json"
    good = json.loads(file.read_text())
    for change, problem in (
        ({"target_modules": "(["}, "does not fit this backbone"),
        ({"peft_type": "PROMPT_TUNING"}, "r, target_modules.*, which PROMPT_TUNING of peft .* does not know"),
        ({"r": -1}, "does not fit this backbone"),
    ):
        file.write_text(json.dumps(good | change))
        with pytest.raises(CheckpointError, match=problem):
            load_adapter(model, tmp_path)
        assert wrapped_config(model) is None
        assert all(p.requires_grad for p in model.parameters())
    file.write_text(json.dumps(good))
    for content in ("[]", "{", '{"version": -1, "rate": 0.5}'):
        (tmp_path / "pyra_config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"pyra_config\.json: .*(a JSON object|readable JSON|format version)"):
            load_adapter(model, tmp_path)


def test_saving_keeps_foreign_files_and_refuses_no_numbers(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    model = adapt(backbone(), peft=peft.LoraConfig(r=4))
    save_adapter(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with torch.no_grad():
        model.get_base_model().head.modules_to_save["default"].bias[0] = float("nan")
    with pytest.raises(CheckpointError, match=r"head\.bias holds NaN"):
        save_adapter(model, tmp_path)
    assert before == {p: p.read_bytes() for p in tmp_path.iterdir()}
