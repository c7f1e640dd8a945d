"""Adapters that do not fit; folders that are damaged, incomplete or too new: what is said, and what stays intact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import transformers
from backbone_families import build, config, images, result, run
from safetensors.torch import load_file, save_file
from torch import nn

from pyra import PyraConfig, wrap
from pyra.adapters import BottleneckConfig, VisualPromptsConfig, adapt, fold_adapter, load_adapter, save_adapter
from pyra.backbones.layers import merging_layers
from pyra.errors import CheckpointError, ConfigError, PyraError, ScheduleError, UnsupportedModelError

INTACT = r"\(the backbone is as it was\)$"
WEIGHTS, PEFT_FILE, PYRA_FILE = "adapter_model.safetensors", "adapter_config.json", "pyra_config.json"

METHODS: dict[str, Callable[[], peft.PeftConfig | None]] = {
    "lora": lambda: peft.LoraConfig(r=2),
    "ln_tuning": lambda: peft.LNTuningConfig(),
    "bottleneck": lambda: BottleneckConfig(width=2),
    "prompts": lambda: VisualPromptsConfig(num_prompts=2),
    "none": lambda: None,
}


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 6}
    return timm.create_model("vit_tiny_patch16_224", **{**sizes, **options})


def look(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that an adapter could leave behind: values last."""
    return {
        "modules": {name: (id(module), type(module)) for name, module in model.named_modules()},
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "flags": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
    }


@contextmanager
def refused(base: nn.Module, error: type[PyraError], match: str) -> Iterator[None]:
    """The block must raise ``error``, and ``base`` must be as it was in every respect."""
    before = look(base)
    with pytest.raises(error, match=match):
        yield
    after = look(base)
    old, new = before.pop("values"), after.pop("values")
    assert before == after
    assert old.keys() == new.keys()
    assert all(torch.equal(value, new[name]) for name, value in old.items())


def saved(folder: Path, method: str = "lora", pyra: PyraConfig | None = None, base: nn.Module | None = None) -> Path:
    save_adapter(adapt(base if base is not None else vit(), pyra=pyra, peft=METHODS[method]()), folder)
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


MERGING = {"schedule": PyraConfig(schedule=[0, 8, 5]), "rate": PyraConfig(rate=0.4), "plain": None}


@pytest.mark.parametrize("merging", MERGING)
@pytest.mark.parametrize("method", ["lora", "ln_tuning", "bottleneck", "prompts"])
def test_another_width_or_depth_is_named(method: str, merging: str, tmp_path: Path) -> None:
    saved(tmp_path, method, MERGING[merging])
    for options, difference in (
        ({"embed_dim": 48}, "of width 32, this one has width 48"),
        ({"depth": 2}, "of depth 3, this one has depth 2"),
        ({"depth": 4}, "of depth 3, this one has depth 4"),
    ):
        base = vit(**options)
        with refused(base, CheckpointError, rf"does not fit this backbone: it was saved from .*{difference}.*{INTACT}"):
            load_adapter(base, tmp_path)


def test_another_width_and_depth_of_re_activation_alone(tmp_path: Path) -> None:
    saved(tmp_path, "none", MERGING["rate"])
    base = vit(embed_dim=48, depth=2)
    with refused(base, CheckpointError, "depth 3, this one has depth 2 and .*width 32, this one has width 48"):
        load_adapter(base, tmp_path)


def test_another_number_of_classes_is_no_other_width(tmp_path: Path) -> None:
    saved(tmp_path, "lora", MERGING["rate"])
    base = vit(num_classes=5)
    with refused(base, CheckpointError, rf"head.weight is \[6, 32\], the model has \[5, 32\].*{INTACT}"):
        load_adapter(base, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_adapter(vit(num_classes=5), tmp_path)
    assert "width" not in str(caught.value)


def test_a_decoder_of_another_width(tmp_path: Path) -> None:
    def decoder(width: int, depth: int) -> nn.Module:
        sizes = {"hidden_size": width, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 50}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_hidden_layers=depth))

    saved(tmp_path, base=decoder(32, 2))
    for base, difference in ((decoder(48, 2), "width 32, .* width 48"), (decoder(32, 3), "depth 2, .* depth 3")):
        with refused(base, CheckpointError, difference):
            load_adapter(base, tmp_path)


def test_another_family(tmp_path: Path) -> None:
    saved(tmp_path)
    base = build("hf-vit")
    with refused(base, CheckpointError, rf"does not fit this backbone: .*qkv.*{INTACT}"):
        load_adapter(base, tmp_path)
    saved(tmp_path, pyra=MERGING["rate"])
    base = timm.create_model("resnet18", num_classes=6)
    with refused(base, UnsupportedModelError, rf"cannot be merged.*{INTACT}"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("method", ["lora", "none"])
def test_other_token_counts(method: str, tmp_path: Path) -> None:
    """A rate is solved anew; a schedule fits a larger input and says where it does not fit a smaller one."""
    saved(tmp_path / "rate", method, MERGING["rate"])
    for side in (24, 48):
        assert load_adapter(vit(img_size=side), tmp_path / "rate")(torch.randn(2, 3, side, side)).shape == (2, 6)
    saved(tmp_path / "schedule", method, PyraConfig(schedule=[20, 10, 5]))
    assert load_adapter(vit(img_size=48), tmp_path / "schedule")(torch.randn(2, 3, 48, 48)).shape == (2, 6)
    base = vit(img_size=16)
    with refused(base, ScheduleError, rf"another token count: the schedule \[20, 10, 5\] does not fit.*{INTACT}"):
        load_adapter(base, tmp_path / "schedule")


def test_blocks_without_stored_weights_merge_plainly_at_another_token_count(tmp_path: Path) -> None:
    """So small a rate takes a token from no more than a few blocks: from others at another token count."""
    saved(tmp_path, "none", PyraConfig(rate=0.01))
    with pytest.warns(UserWarning, match=r"no re-activation weights for layers \d.*they merge plainly"):
        model = load_adapter(vit(img_size=64), tmp_path)
    stored = {key.split(".")[1] for key in load_file(tmp_path / WEIGHTS) if key.startswith("blocks.")}
    there = {name.split(".")[1] for name, _ in model.named_modules() if name.endswith(".reactivation")}
    merging = {str(layer.step.layer) for layer in merging_layers(model) if layer.step.removed}
    assert there <= stored and merging - stored
    with torch.no_grad():
        assert model(torch.randn(2, 3, 64, 64)).isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_a_missing_file_is_named(method: str, tmp_path: Path) -> None:
    saved(tmp_path, method, MERGING["schedule"])
    base = vit()
    for name, problem in (
        (PYRA_FILE, rf"{PYRA_FILE} is missing, but re-activation weights are there"),
        (PEFT_FILE, rf"{PEFT_FILE} is missing, but {WEIGHTS} holds weights of a PEFT method"),
        (WEIGHTS, rf"no {WEIGHTS} there; give a folder"),
    ):
        if not (tmp_path / name).exists():
            assert (name, method) == (PEFT_FILE, "none")
            continue
        (tmp_path / name).rename(tmp_path / "aside")
        with refused(base, CheckpointError, f"{problem}.*{INTACT}"):
            load_adapter(base, tmp_path)
        (tmp_path / "aside").rename(tmp_path / name)
    with refused(base, CheckpointError, "nowhere: no adapter_model"):
        load_adapter(base, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        (PYRA_FILE, "{", "not a readable JSON file"),
        (PYRA_FILE, "[" * 100_000, "not a readable JSON file .nested too deeply"),
        (PYRA_FILE, "[]", "expected a JSON object, found list"),
        (PYRA_FILE, '{"rate": NaN}', "NaN is no JSON number"),
        (PYRA_FILE, '{"rate": 0.4, "solved_schedule": [1, "2", 3]}', "solved_schedule should be a list of whole"),
        (PEFT_FILE, "", "not a readable JSON file"),
        (PEFT_FILE, "\udcff", "not a readable JSON file"),
        (PEFT_FILE, "3", "expected a JSON object, found int"),
        (PEFT_FILE, "{}", "peft_type None, which peft .* does not know"),
        (PEFT_FILE, '{"peft_type": ["LORA"]}', r"peft_type \['LORA'\], which peft .* does not know"),
        (PEFT_FILE, '{"peft_type": "LORO"}', r"'LORO', which peft .* does not know \(did you mean 'LOR"),
        (PEFT_FILE, '{"peft_type": "BOTTLENECK", "width": 0}', "not a usable configuration .*width must be positive"),
        (PEFT_FILE, '{"peft_type": "BOTTLENECK", "width": "4"}', "not a usable configuration"),
    ],
)
def test_a_damaged_file_is_named(name: str, content: str, problem: str, tmp_path: Path) -> None:
    saved(tmp_path, "lora", MERGING["schedule"])
    (tmp_path / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    base = vit()
    with refused(base, CheckpointError, rf"{name}: .*{problem}.*{INTACT}"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_damaged_weights(method: str, tmp_path: Path) -> None:
    saved(tmp_path, method, MERGING["schedule"])
    file, base = tmp_path / WEIGHTS, vit()
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"\x80\x04\x95 a pickle", whole[:7]):
        file.write_bytes(content)
        with refused(base, CheckpointError, rf"{WEIGHTS}: not a readable safetensors file.*{INTACT}"):
            load_adapter(base, tmp_path)
    file.write_bytes(whole)
    state = load_file(file)
    for key in state:
        save_file({name: value for name, value in state.items() if name != key}, file)
        with refused(base, PyraError, INTACT):
            load_adapter(base, tmp_path)
        save_file(state | {key: torch.full_like(state[key], float("inf"))}, file)
        with refused(base, CheckpointError, rf"{key} holds NaN or infinite values.*{INTACT}"):
            load_adapter(base, tmp_path)
        save_file(state | {key: state[key].flatten()[:-1]}, file)
        with refused(base, PyraError, INTACT):
            load_adapter(base, tmp_path)
    save_file(state | {"one.more": torch.ones(1)}, file)
    with refused(base, CheckpointError, rf"one\.more is not in the model.*{INTACT}"):
        load_adapter(base, tmp_path)
    save_file(state, file)
    load_adapter(base, tmp_path)


def test_a_newer_version_is_told_by_its_unknown_keys(tmp_path: Path) -> None:
    saved(tmp_path, "lora", MERGING["schedule"])
    ours, theirs, base = (tmp_path / PYRA_FILE).read_text(), (tmp_path / PEFT_FILE).read_text(), vit()
    change(tmp_path / PYRA_FILE, version=7, focus=0.5, lens="wide")
    with refused(base, CheckpointError, rf"{PYRA_FILE}: .*'focus'.*'lens'.*version 7 is newer .*upgrade.*{INTACT}"):
        load_adapter(base, tmp_path)
    (tmp_path / PYRA_FILE).write_text(ours)
    change(tmp_path / PEFT_FILE, peft_version="9.1", use_qora=True, gain=3)
    with refused(base, CheckpointError, rf"{PEFT_FILE}: written by peft 9.1 with gain, use_qora, which LORA of .*upgr"):
        load_adapter(base, tmp_path)
    (tmp_path / PEFT_FILE).write_text(theirs)
    change(tmp_path / PEFT_FILE, peft_version="9.1", use_qora=False, gain=None, gains={}, more=[])
    load_adapter(base, tmp_path)  # options that are off change nothing


def test_a_backbone_that_carries_an_adapter(tmp_path: Path) -> None:
    saved(tmp_path)
    model = load_adapter(vit(), tmp_path)
    with refused(model, ConfigError, "already carries an adapter"):
        load_adapter(model, tmp_path)


def test_a_backbone_that_merges_keeps_its_own_way_of_merging(tmp_path: Path) -> None:
    saved(tmp_path, "lora", MERGING["schedule"])
    (tmp_path / PEFT_FILE).write_text("{")
    base = wrap(vit(), PyraConfig(rate=0.2))
    with refused(base, CheckpointError, INTACT):
        load_adapter(base, tmp_path)
    with torch.no_grad():
        assert base(images()["pixel_values"]).shape == (3, 6)
    saved(tmp_path, "lora", MERGING["schedule"])
    state = load_file(tmp_path / WEIGHTS)
    save_file({key: value for key, value in state.items() if "lora_B" not in key}, tmp_path / WEIGHTS)
    with refused(base, CheckpointError, "lora_B.* is not in the file"):  # after it was wrapped anew
        load_adapter(base, tmp_path)
    with torch.no_grad():
        assert base(images()["pixel_values"]).shape == (3, 6)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_weights_that_stock_peft_would_decompose_come_back(start: str, tmp_path: Path) -> None:
    settings = peft.LoraConfig(r=2, init_lora_weights=start, target_modules=["qkv"], modules_to_save=["head"])
    stock = peft.get_peft_model(vit(), settings).eval()
    stock.save_pretrained(str(tmp_path))
    with torch.no_grad():
        expected = result(run(stock, images()))
        loaded = result(run(load_adapter(vit(), tmp_path), images()))
    torch.testing.assert_close(loaded, expected, atol=1e-5, rtol=1e-4)
    state = load_file(tmp_path / WEIGHTS)
    save_file({key: value for key, value in state.items() if "lora_B" not in key}, tmp_path / WEIGHTS)
    base = vit()
    with refused(base, CheckpointError, "lora_B.* is not in the file"):
        load_adapter(base, tmp_path)


@pytest.mark.parametrize(
    "call",
    [
        lambda model: adapt(model, pyra=PyraConfig(rate=0.4), peft=peft.LoraConfig(target_modules=["nothing"])),
        lambda model: adapt(model, pyra=PyraConfig(rate=0.4), peft=peft.LoraConfig(target_modules=["qkv", "norm2"])),
        lambda model: adapt(model, peft=peft.AdaLoraConfig(total_step=9, target_modules=["norm2"])),
        lambda model: adapt(model, pyra=PyraConfig(rate=0.4), peft=peft.BOFTConfig(boft_block_size=7)),
        lambda model: adapt(model, pyra=PyraConfig(rate=0.4), peft=BottleneckConfig(target_modules=["mlp", "act"])),
    ],
)
def test_adapt_leaves_nothing_behind_either(call: Callable[[nn.Module], nn.Module]) -> None:
    model = vit()
    with refused(model, ConfigError, "peft cannot attach"):
        call(model)


def test_folding_a_damaged_model_again_and_again(tmp_path: Path) -> None:
    """What is folded is a plain backbone: it can be adapted anew, and folding it is no error."""
    saved(tmp_path, "lora", MERGING["schedule"])
    folded = fold_adapter(fold_adapter(load_adapter(vit(), tmp_path)))
    assert not hasattr(folded, "peft_config")
    again = adapt(folded, peft=peft.LoraConfig(r=2))
    with torch.no_grad():
        expected = result(run(again.eval(), images()))
        torch.testing.assert_close(result(run(fold_adapter(again), images())), expected, atol=1e-5, rtol=1e-4)


def test_the_families_take_back_what_failed(tmp_path: Path) -> None:
    """Merging leaves hooks and attributes elsewhere in transformers' models."""
    for family in ("hf-vit", "hf-clip-two-towers", "hf-timm-wrapper", "timm-eva02"):
        saved(tmp_path, "lora", config(), build(family))
        state = load_file(tmp_path / WEIGHTS)
        save_file(dict(list(state.items())[1:]), tmp_path / WEIGHTS)
        base = build(family)
        with refused(base, CheckpointError, "is not in the file"):
            load_adapter(base, tmp_path)
