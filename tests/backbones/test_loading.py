"""Backbones by name or folder, checkpoints from files, and every file that must be refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf
from torch import Tensor, nn

from pyra.backbones.loading import create_backbone, load_backbone_checkpoint, preprocessing
from pyra.checkpoints import read_state_dict
from pyra.errors import CheckpointError, ConfigError

NAME = "vit_tiny_patch16_224"
SIZE = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
State = dict[str, Tensor]


def tiny(num_classes: int = 5, **kwargs: object) -> nn.Module:
    return timm.create_model(NAME, num_classes=num_classes, **{**SIZE, **kwargs}).eval()


def random_state(seed: int = 0, **kwargs: object) -> State:
    """Weights of no fresh model."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in tiny(**kwargs).state_dict().items()}


def save_safetensors(state: State, path: Path) -> Path:
    save_file(state, path)
    return path


def augreg(state: State) -> dict[str, np.ndarray]:
    """A timm state in the names and layouts of the AugReg files."""
    heads, width = SIZE["num_heads"], SIZE["embed_dim"]
    names = {
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "cls": state["cls_token"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for layer in range(sum(name.endswith("attn.qkv.weight") for name in state)):
        own, theirs = f"blocks.{layer}", f"Transformer/encoderblock_{layer}"
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(part * width, (part + 1) * width)
            names[f"{attention}/{name}/kernel"] = state[f"{own}.attn.qkv.weight"][rows].T.reshape(width, heads, -1)
            names[f"{attention}/{name}/bias"] = state[f"{own}.attn.qkv.bias"][rows].reshape(heads, -1)
        names[f"{attention}/out/kernel"] = state[f"{own}.attn.proj.weight"].T.reshape(heads, -1, width)
        names[f"{attention}/out/bias"] = state[f"{own}.attn.proj.bias"]
        for norm, number in (("norm1", 0), ("norm2", 2)):
            names[f"{theirs}/LayerNorm_{number}/scale"] = state[f"{own}.{norm}.weight"]
            names[f"{theirs}/LayerNorm_{number}/bias"] = state[f"{own}.{norm}.bias"]
        for number in range(2):
            names[f"{theirs}/MlpBlock_3/Dense_{number}/kernel"] = state[f"{own}.mlp.fc{number + 1}.weight"].T
            names[f"{theirs}/MlpBlock_3/Dense_{number}/bias"] = state[f"{own}.mlp.fc{number + 1}.bias"]
    return {name: value.numpy() for name, value in names.items()}


def assert_same(model: nn.Module, state: State, but: tuple[str, ...] = ()) -> None:
    for name, value in model.state_dict().items():
        if not name.startswith(but or ("-",)):
            assert torch.equal(value, state[name]), name


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [
        ("vit_tiny_patch16_244", "did you mean 'vit_tiny_patch16_224'"),
        ("vit_tiny_patch16_24.augreg_in21k", "did you mean 'vit_tiny_patch16_224'"),
        ("qqqqqqqq", r"unknown backbone 'qqqqqqqq'; give a timm name \(timm.list_models\(\)\) or a folder"),
    ],
)
def test_unknown_name(name: str, suggestion: str) -> None:
    with pytest.raises(ConfigError, match=suggestion):
        create_backbone(name, num_classes=3, pretrained=False)


@pytest.mark.parametrize("checkpoint", [None, "weights.safetensors"])
def test_unknown_tag(checkpoint: str | None, tmp_path: Path) -> None:
    if checkpoint:
        checkpoint = str(save_safetensors(random_state(), tmp_path / checkpoint))
    with pytest.raises(ConfigError, match=rf"{NAME}\.no_such_tag"):
        create_backbone(f"{NAME}.no_such_tag", num_classes=3, pretrained=False, checkpoint=checkpoint, **SIZE)


def test_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timm.create_model

    def offline(*args: object, pretrained: bool, **kwargs: object) -> nn.Module:
        if pretrained:
            raise OSError("cannot reach\nthe hub")
        return real(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ConfigError, match=rf"weights of '{NAME}' could not be had \(cannot reach the hub\)"):
        create_backbone(NAME, num_classes=3)
    with pytest.raises(ConfigError, match="image size 1 is not a multiple of the patch size 16"):
        create_backbone(NAME, num_classes=3, image_size=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": 3}, "timm cannot create"),
        ({"architecture": "vit_enormous"}, "timm cannot create"),
        ({"pretrained_cfg": []}, "timm cannot create"),
        ({"model_args": {"embed_dim": 33}}, r"qkv\.bias is \[72\], the model has \[99\]"),
        ("{", "timm cannot create"),
        ("[]", "timm cannot create"),
    ],
)
def test_a_backbone_folder_that_cannot_be_read(change: dict[str, object] | str, message: str, tmp_path: Path) -> None:
    save_for_hf(tiny(), str(tmp_path), safe_serialization=True)
    file = tmp_path / "config.json"
    file.write_text(change if isinstance(change, str) else json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises((ConfigError, CheckpointError), match=message):
        create_backbone(str(tmp_path), num_classes=3)


def test_a_normalisation_that_divides_by_zero() -> None:
    model = tiny()
    model.pretrained_cfg["std"] = (0.5, 0.0, 0.5)
    with pytest.raises(ConfigError, match="std"):
        preprocessing(model)


def test_weights_that_are_no_numbers(tmp_path: Path) -> None:
    state = tiny().state_dict()
    state["blocks.1.mlp.fc1.bias"][2] = float("nan")
    save_file(state, tmp_path / "WEIGHTS.SAFETENSORS")
    with pytest.raises(CheckpointError, match=r"blocks\.1\.mlp\.fc1\.bias holds NaN"):
        load_backbone_checkpoint(tiny(), tmp_path / "WEIGHTS.SAFETENSORS")


def test_a_backbone_folder_whose_weights_do_not_fit(tmp_path: Path) -> None:
    """timm leaves out what does not fit as soon as the head has another size, and goes on with random weights."""
    save_for_hf(tiny(), str(tmp_path), model_args=SIZE, safe_serialization=True)
    file = tmp_path / "model.safetensors"
    save_file({f"backbone.{key}": value for key, value in load_file(file).items()}, file)
    with pytest.raises(CheckpointError, match=r"cls_token is not in the file"):
        create_backbone(str(tmp_path), num_classes=3)
    file.unlink()
    with pytest.raises(ConfigError, match=r"no model\.safetensors there"):
        create_backbone(str(tmp_path), num_classes=3)


def test_settings_that_timm_refuses() -> None:
    with pytest.raises(ConfigError, match=r"timm cannot create 'resnet18' with \{'img_size': 64\}"):
        create_backbone("resnet18", num_classes=3, image_size=64, pretrained=False)
    with pytest.raises(ConfigError, match=f"timm cannot create '{NAME}'.*no_such_setting"):
        create_backbone(NAME, num_classes=3, pretrained=False, no_such_setting=1)


@pytest.mark.parametrize("num_classes", [5, 7])
def test_folder(num_classes: int, tmp_path: Path) -> None:
    state = random_state()
    model = tiny()
    model.load_state_dict(state)
    save_for_hf(model, tmp_path / "saved", model_args=SIZE)
    loaded = create_backbone(str(tmp_path / "saved"), num_classes=num_classes)
    assert_same(loaded, state, but=() if num_classes == 5 else ("head.",))
    assert loaded.head.out_features == num_classes


def test_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.json there; a backbone folder is one that timm has saved"):
        create_backbone(str(tmp_path), num_classes=3)


def safetensors_file(state: State, folder: Path) -> Path:
    return save_safetensors(state, folder / "weights.safetensors")


def torch_file(wrap: Callable[[State], object], suffix: str = ".pth") -> Callable[[State, Path], Path]:
    def save(state: State, folder: Path) -> Path:
        torch.save(wrap(state), folder / f"weights{suffix}")
        return folder / f"weights{suffix}"

    return save


def npz_file(state: State, folder: Path) -> Path:
    np.savez(folder / "weights.npz", **augreg(state))
    return folder / "weights.npz"


FILES: dict[str, Callable[[State, Path], Path]] = {
    "safetensors": safetensors_file,
    "pth": torch_file(lambda state: state),
    "pt": torch_file(lambda state: state, ".pt"),
    "bin": torch_file(lambda state: state, ".bin"),
    "state_dict": torch_file(lambda state: {"epoch": 3, "state_dict": state}),
    "model": torch_file(lambda state: {"model": state, "optimizer": {"lr": 0.1}}),
    "data_parallel": torch_file(lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}}),
    "npz": npz_file,
}


@pytest.mark.parametrize("kind", FILES)
def test_checkpoint(kind: str, tmp_path: Path) -> None:
    state = random_state()
    path = FILES[kind](state, tmp_path)
    assert_same(create_backbone(NAME, num_classes=5, checkpoint=path, **SIZE), state)
    other = create_backbone(NAME, num_classes=9, checkpoint=path, **SIZE)
    assert_same(other, state, but=("head.",))
    assert other.head.out_features == 9 and other(torch.zeros(1, 3, 16, 16)).shape == (1, 9)


@pytest.mark.parametrize("kind", ["safetensors", "pth", "npz"])
def test_position_embeddings_are_resampled(kind: str, tmp_path: Path) -> None:
    state = random_state()
    state["pos_embed"] = torch.arange(17.0)[:, None].expand(1, 17, 24).contiguous()
    path = FILES[kind](state, tmp_path)
    model = create_backbone(NAME, num_classes=5, image_size=32, checkpoint=path, **SIZE)
    assert_same(model, state, but=("pos_embed",))
    grid = model.pos_embed[0, 1:, 0].reshape(8, 8)
    assert torch.equal(model.pos_embed[:, :1], state["pos_embed"][:, :1])
    assert (grid.diff(dim=0) > 0).all() and (grid.diff(dim=1) > 0).all()
    torch.testing.assert_close(grid.mean(), state["pos_embed"][0, 1:, 0].mean())


def test_half_precision_weights(tmp_path: Path) -> None:
    state = {name: value.half() for name, value in random_state().items()}
    model = create_backbone(NAME, num_classes=5, checkpoint=save_safetensors(state, tmp_path / "w.safetensors"), **SIZE)
    assert_same(model, {name: value.float() for name, value in state.items()})


def test_a_head_is_not_needed(tmp_path: Path) -> None:
    state = {name: value for name, value in random_state().items() if not name.startswith("head.")}
    model = create_backbone(NAME, num_classes=3, checkpoint=save_safetensors(state, tmp_path / "w.safetensors"), **SIZE)
    assert_same(model, state, but=("head.",))


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".npz"])
@pytest.mark.parametrize("bare", [True, False], ids=["pickle", "archive"])
def test_no_code_is_run(suffix: str, bare: bool, tmp_path: Path) -> None:
    trace, path = tmp_path / "code_has_run", tmp_path / f"weights{suffix}"
    value = {"head.weight": Malicious(trace)}
    if bare:
        path.write_bytes(pickle.dumps(value, protocol=2))
    elif suffix == ".npz":
        np.savez(path, **{"embedding/kernel": np.array([Malicious(trace)], dtype=object)})
    else:
        torch.save(value, path)
    for read in (lambda: read_state_dict(path), lambda: load_backbone_checkpoint(tiny(), path)):
        with pytest.raises(CheckpointError, match=rf"weights\{suffix}: "):
            read()
        assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))
    assert trace.exists()  # it would have


def test_refused_pickle_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"weight": Malicious(tmp_path / "trace")}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"cannot be read without running code.*convert it to \.safetensors"):
        read_state_dict(tmp_path / "weights.pth")


@pytest.mark.parametrize("kind", ["safetensors", "pth", "npz"])
def test_truncated_file(kind: str, tmp_path: Path) -> None:
    path = FILES[kind](random_state(), tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=rf"weights\.{kind}: not a readable \.{kind} file"):
        load_backbone_checkpoint(model, path)
    assert_same(model, before)


def test_missing_file(tmp_path: Path) -> None:
    for name in ("a.safetensors", "a.npz", "a.pth"):
        with pytest.raises(CheckpointError, match=f"{name}: no such file"):
            create_backbone(NAME, num_classes=5, checkpoint=tmp_path / name, **SIZE)


def test_every_tensor_that_does_not_fit_is_named(tmp_path: Path) -> None:
    state = random_state()
    state["norm.weight"] = torch.zeros(25)
    state["blocks.9.norm1.weight"] = torch.zeros(24)
    del state["blocks.1.mlp.fc1.bias"]
    path = save_safetensors(state, tmp_path / "w.safetensors")
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_backbone_checkpoint(model, path)
    assert str(caught.value) == (
        f"{path} does not fit VisionTransformer: norm.weight is [25], the model has [24]; "
        "blocks.1.mlp.fc1.bias is not in the file; blocks.9.norm1.weight has no place in the model"
    )
    assert_same(model, before)  # nothing was loaded


def test_a_long_list_of_problems_is_cut(tmp_path: Path) -> None:
    path = save_safetensors(random_state(embed_dim=48), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"proj\.bias is \[48\], the model has \[24\];.*; and \d+ more$"):
        create_backbone(NAME, num_classes=5, checkpoint=path, **SIZE)


@pytest.mark.parametrize(
    "settings", [{"embed_dim": 48}, {"depth": 3}, {"depth": 1}], ids=["wider", "deeper", "shallower"]
)
def test_npz_that_does_not_fit(settings: dict[str, int], tmp_path: Path) -> None:
    path = npz_file(random_state(), tmp_path)
    with pytest.raises(CheckpointError, match=r"weights\.npz does not fit VisionTransformer"):
        create_backbone(NAME, num_classes=5, checkpoint=path, **{**SIZE, **settings})


def test_npz_for_another_architecture(tmp_path: Path) -> None:
    path = npz_file(random_state(), tmp_path)
    with pytest.raises(CheckpointError, match=r"AugReg\) fit timm's VisionTransformer only"):
        load_backbone_checkpoint(nn.Linear(2, 2), path)


def test_other_models_load_too(tmp_path: Path) -> None:
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    path = save_safetensors(source.state_dict(), tmp_path / "w.safetensors")
    load_backbone_checkpoint(target, path)
    assert torch.equal(source.weight, target.weight)
