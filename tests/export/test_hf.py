"""The format hf: models of timm and transformers come back bit for bit, and nothing in a folder of it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyra import PyraConfig, set_rate, wrap
from pyra.adapters import adapt
from pyra.backbones import wrapped_config, wrapped_schedule
from pyra.errors import ExportError
from pyra.export import export_model, load_exported, load_model
from pyra.tasks.data.decoding import squash

Images = Callable[[int], Tensor]

VIT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
DEMO_IMAGE = Path(__file__).parents[2] / "examples" / "demo.jpg"
PREPARATION = {"image_size": "16", "mean": "0.4 0.5 0.6", "std": "0.2 0.3 0.4", "interpolation": "bicubic"}
LABELS = {index: f"class {index}" for index in range(5)}


def transformers_model() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.ViTConfig(**VIT, image_size=16, patch_size=4, id2label=LABELS)
    model = wrap(transformers.ViTForImageClassification(config).eval(), PyraConfig(schedule=[4, 2]))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def logits(model: Any, pixel_values: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(pixel_values)
    found: Tensor = getattr(output, "logits", output)
    return found


def config_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return values


def change(folder: Path, **values: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **values}))


def rewrite(folder: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of the weights; None removes one."""
    state = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({key: value for key, value in state.items() if value is not None}, folder / "model.safetensors")


def python(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own, outside the source tree."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd="/",
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def of_timm(wrapped: nn.Module, images: Images, tmp_path: Path) -> Path:
    export_model(wrapped, tmp_path / "timm", "hf", example_input=images(2))
    return tmp_path / "timm"


@pytest.fixture
def of_transformers(images: Images, tmp_path: Path) -> Path:
    export_model(transformers_model(), tmp_path / "hf", "hf", example_input=images(2))
    return tmp_path / "hf"


def test_a_timm_model_comes_back_bit_for_bit(of_timm: Path, wrapped: nn.Module, images: Images) -> None:
    loaded = load_model(of_timm)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.state_dict().keys() == wrapped.state_dict().keys()
    assert all(torch.equal(value, wrapped.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(logits(loaded, images(5)), logits(wrapped, images(5)))
    assert torch.equal(load_exported(of_timm)(images(5)), logits(wrapped, images(5)))
    assert (wrapped_config(loaded), wrapped_schedule(loaded)) == (wrapped_config(wrapped), [4, 2])


def test_a_transformers_model_comes_back_bit_for_bit(of_transformers: Path, images: Images) -> None:
    model, loaded = transformers_model(), load_model(of_transformers)
    assert type(loaded).__name__ == "ViTForImageClassification" and loaded.config.id2label == LABELS
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded, images(5)), logits(model, images(5)))
    assert torch.equal(load_exported(of_transformers)(images(5)), logits(model, images(5)))
    assert wrapped_schedule(loaded) == [4, 2]


def prepared(image: Image.Image) -> Tensor:
    """The pixel values that pyra makes of an image."""
    pixels = torch.from_numpy(squash(image, 16, "bicubic")).float() / 255
    mean, std = (torch.tensor([float(x) for x in PREPARATION[key].split()]).view(3, 1, 1) for key in ("mean", "std"))
    return (pixels - mean) / std


def test_timm_prepares_images_as_pyra_does(wrapped: nn.Module, images: Images, tmp_path: Path) -> None:
    wrapped.pretrained_cfg |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4), "interpolation": "bilinear"}
    export_model(wrapped, tmp_path / "a", "hf", example_input=images(2), metadata=PREPARATION)
    config = timm.data.resolve_data_config(model=load_model(tmp_path / "a"))
    image = Image.open(DEMO_IMAGE).convert("RGB")
    found = timm.data.create_transform(**config)(image)
    assert (found - prepared(image)).abs().max() < 0.02  # a step of 8 bits


def test_transformers_prepares_images_as_pyra_does(images: Images, tmp_path: Path) -> None:
    export_model(transformers_model(), tmp_path / "a", "hf", example_input=images(2), metadata=PREPARATION)
    image = Image.open(DEMO_IMAGE).convert("RGB")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "a")
    found = processor(image, return_tensors="pt")["pixel_values"][0]
    assert (found - prepared(image)).abs().max() < 0.04  # torchvision's filter rounds twice
    classifier = transformers.pipeline("image-classification", model=str(tmp_path / "a"))
    (best, *_) = classifier(image)
    assert best["label"] == LABELS[int(logits(load_model(tmp_path / "a"), found[None]).argmax())]


@pytest.mark.parametrize("kind", ["of_timm", "of_transformers"])
def test_the_configuration_says_what_merges(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md", "config.json", "export.json", "model.safetensors",
    ]  # fmt: skip
    merging = config_of(folder)["pyra"]
    assert (merging["schedule"], merging["rate"], merging["solved_schedule"]) == ([4, 2], None, [4, 2])
    assert "Tokens removed in each layer: 4, 2" in (folder / "README.md").read_text()


def test_a_model_that_does_not_merge(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    export_model(tiny, tmp_path, "hf", example_input=images(2))
    assert "pyra" not in config_of(tmp_path) and wrapped_config(load_model(tmp_path)) is None
    assert torch.equal(logits(load_model(tmp_path), images(3)), logits(tiny, images(3)))


def test_an_adapter_is_folded(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    model: Any = adapt(tiny, pyra=PyraConfig(rate=0.3), peft=peft.LoraConfig(r=2, target_modules=["qkv"])).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "reactivation" in name:
            nn.init.normal_(parameter)
    export_model(model, tmp_path, "hf", example_input=images(2))
    loaded = load_model(tmp_path)
    assert not any("lora" in name for name, _ in loaded.named_modules())
    assert any("reactivation" in name for name in loaded.state_dict())
    torch.testing.assert_close(logits(loaded, images(4)), logits(model, images(4)), rtol=1e-4, atol=1e-5)
    assert config_of(tmp_path)["pyra"]["rate"] == 0.3
    assert config_of(tmp_path)["pyra"]["solved_schedule"] == wrapped_schedule(model)


@pytest.mark.parametrize("switched", [0.1, 0.43])
def test_a_model_of_many_rates_keeps_the_weights_of_all(
    switched: float, tiny: nn.Module, images: Images, tmp_path: Path
) -> None:
    model = wrap(tiny, PyraConfig(rate=0.3, rate_range=[0.1, 0.43]))
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    set_rate(model, switched)
    export_model(model, tmp_path, "hf", example_input=images(2))
    loaded = load_model(tmp_path)
    rows = {key: value.shape for key, value in model.state_dict().items() if key.endswith("pair_weight")}
    assert rows and {key: loaded.state_dict()[key].shape for key in rows} == rows
    assert wrapped_config(loaded) == wrapped_config(model)
    answers = []
    for rate in (switched, 0.1, 0.3, 0.43):
        if rate != switched:
            set_rate(model, rate)
            set_rate(loaded, rate)
        assert wrapped_schedule(loaded) == wrapped_schedule(model)
        assert torch.equal(logits(loaded, images(4)), logits(model, images(4)))
        answers.append(logits(model, images(4)))
    assert not torch.allclose(answers[1], answers[3], atol=1e-3)


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_half_precision_stays_half(kind: str, wrapped: nn.Module, images: Images, tmp_path: Path) -> None:
    model = (wrapped if kind == "timm" else transformers_model()).bfloat16()
    state = model.state_dict()
    export_model(model, tmp_path, "hf", example_input=images(2), tolerance=0.1)
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(value, state[key]) for key, value in stored.items())
    assert next(load_model(tmp_path).parameters()).dtype == torch.bfloat16
    assert next(load_model(tmp_path, dtype=torch.float32).parameters()).dtype == torch.float32
    assert load_exported(tmp_path)(images(2)).dtype == torch.float32


AUTO = """
import sys
import torch
for name in sys.argv[3].split(","):
    __import__(name)
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification
folder, images = sys.argv[1], torch.load(sys.argv[2])
config = AutoConfig.from_pretrained(folder)
assert config.model_type == "pyra" and config.id2label[4] == "class 4", config
model = AutoModelForImageClassification.from_pretrained(folder)
assert type(model).__name__ == "ViTForImageClassification", type(model)
with torch.no_grad():
    assert torch.equal(model(images["pixels"]).logits, images["logits"])
    features = AutoModel.from_pretrained(folder, dtype=torch.float64)
    assert type(features).__name__ == "ViTModel", type(features)
    assert features.dtype == torch.float64
    assert torch.equal(features(images["pixels"].double()).last_hidden_state, images["features"])
print("opened")
"""


@pytest.mark.parametrize(
    "order",
    [
        "pyra,transformers",
        pytest.param("transformers,pyra", marks=pytest.mark.slow),  # transformers is imported anew
        pytest.param("transformers.models.auto.modeling_auto,pyra", marks=pytest.mark.slow),
    ],
)
def test_the_auto_classes_of_transformers_open_it(
    order: str, of_transformers: Path, images: Images, tmp_path: Path
) -> None:
    pixels = images(3)
    model: Any = transformers_model()
    answers = {"pixels": pixels, "logits": logits(model, pixels)}
    with torch.no_grad():
        answers["features"] = model.double().vit(pixels.double()).last_hidden_state
    torch.save(answers, tmp_path / "images.pt")
    done = python(AUTO, of_transformers, tmp_path / "images.pt", order)
    assert done.stdout.strip() == "opened", done.stderr


def test_pyra_waits_for_transformers_without_importing_it() -> None:
    script = "import sys, pyra; print('transformers' in sys.modules)\n"
    script += "from transformers import AutoConfig; print(AutoConfig.for_model('vit').model_type)\n"
    script += "import transformers.models.auto.modeling_auto; print(AutoConfig.for_model('pyra').model_type)"
    done = python(script)
    assert done.stdout.split() == ["False", "vit", "pyra"], done.stderr


def test_it_opens_without_peft(of_timm: Path, of_transformers: Path) -> None:
    script = "import sys; sys.modules['peft'] = None; from pyra.export import load_model, load_exported\n"
    script += "for folder in sys.argv[1:]:\n    load_model(folder); load_exported(folder)\nprint('opened')"
    done = python(script, of_timm, of_transformers)
    assert done.stdout.strip() == "opened", done.stderr


@pytest.mark.parametrize("kind", ["of_timm", "of_transformers"])
@pytest.mark.parametrize("inside", [False, True])
def test_code_beside_the_weights_is_not_run(
    inside: bool, kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder, marker = request.getfixturevalue(kind), tmp_path / "ran"
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass Evil: pass\n")
    named = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForImageClassification"), "evil.Evil")
    evil = {"auto_map": named, "trust_remote_code": True, "custom_pipelines": {"x": {"impl": "evil.Evil"}}}
    change(folder, **evil)
    if inside and kind == "of_transformers":
        change(folder, backbone={**config_of(folder)["backbone"], **evil})
    load_model(folder)
    assert not marker.exists()
    if kind == "of_transformers":
        transformers.AutoConfig.from_pretrained(folder)
        transformers.AutoModelForImageClassification.from_pretrained(folder)
        assert not marker.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_no_kernel_is_fetched_for_attention(
    key: str, of_transformers: Path, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    for name in ("lazy_import_flash_attention", "is_kernel"):
        plain = getattr(transformers.modeling_utils, name)
        watched = lambda x, *rest, plain=plain, **more: (asked.append(x), plain(x, *rest, **more))[1]  # noqa: E731
        monkeypatch.setattr(transformers.modeling_utils, name, watched)
    change(of_transformers, backbone={**config_of(of_transformers)["backbone"], key: "somebody/kernel"})
    assert torch.equal(logits(load_model(of_transformers), images(2)), logits(transformers_model(), images(2)))
    assert "somebody/kernel" not in asked


@pytest.mark.parametrize("kind", ["of_timm", "of_transformers"])
def test_tensors_that_do_not_fit_are_named(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    names = [key for key, value in load_file(folder / "model.safetensors").items() if value.ndim == 1]
    missing, misshapen, broken, whole, *_ = names
    rewrite(
        folder,
        **{
            missing: None,
            misshapen: torch.zeros(3),
            broken: torch.full_like(load_file(folder / "model.safetensors")[broken], torch.nan),
            whole: torch.zeros_like(load_file(folder / "model.safetensors")[whole], dtype=torch.int64),
            "stranger": torch.zeros(2),
        },
    )
    with pytest.raises(ExportError) as caught:
        load_model(folder)
    said = str(caught.value)
    assert f"{folder / 'model.safetensors'} does not fit its config.json" in said and "\n" not in said
    assert f"{missing} is not in the file" in said and "stranger has no place in the model" in said
    assert f"{misshapen} is [3], the model has" in said and f"{broken} holds NaN or infinite values" in said
    assert f"{whole} is int64, not a float" in said


def test_weights_of_several_types_are_named(of_timm: Path) -> None:
    weight = load_file(of_timm / "model.safetensors")["head.weight"]
    rewrite(of_timm, **{"head.weight": weight.half()})
    with pytest.raises(ExportError, match="it mixes weights of float16 and float32"):
        load_model(of_timm)


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "header"])
def test_a_damaged_file_of_weights(damage: str, of_timm: Path) -> None:
    path = of_timm / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {
            "truncated": whole[: len(whole) // 2],
            "garbage": b"nothing of the kind",
            "empty": b"",
            "header": (2**62).to_bytes(8, "little") + whole[8:],
        }[damage]
    )
    with pytest.raises(ExportError, match=r"model\.safetensors: not a readable SAFETENSORS file") as caught:
        load_model(of_timm)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["of_timm", "of_transformers"])
@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", '"architecture"', '["architecture"]', '["model_type"]', '{"a": NaN}', "\ud83d",
        "[" * 100_000, "{}", '{"architecture": null}', '{"architecture": 3, "num_classes": 5}',
        '{"architecture": "no_such_model", "num_classes": 5}', '{"architecture": "resnet18", "num_classes": 5}',
        '{"architecture": "../../etc", "num_classes": 5}', '{"model_type": "pyra"}', '{"model_type": 3}',
        '{"model_type": "pyra", "backbone": {"model_type": "no_such"}}', '{"model_type": "bert"}',
        '{"model_type": "pyra", "backbone": {"model_type": "pyra"}}',
        '{"model_type": "pyra", "backbone": {"model_type": "vit", "hidden_size": "x"}}',
        '{"model_type": "pyra", "backbone": {"model_type": "vit", "num_hidden_layers": -1}}',
        '{"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": 7}',
        '{"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": {"block_fn": "os.system"}}',
        '{"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": {"checkpoint_path": "x"}}',
        '{"architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": "x"}',
        '{"architecture": "vit_tiny_patch16_224", "num_classes": -5}',
    ],
)  # fmt: skip
def test_a_configuration_that_is_none(text: str, kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    (folder / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for opener in (load_model, load_exported):
        with pytest.raises(ExportError) as caught:
            opener(folder)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "merging",
    [
        True, [], "x", {"rate": 2}, {"rate": 0.3, "unknown": 1}, {"schedule": [4]}, {"schedule": [100, 100]}, {},
        {"schedule": ["4", "2"]}, {"rate": 0.3, "matching": "evil"},
    ],
)  # fmt: skip
def test_merging_that_fits_no_model(merging: Any, of_timm: Path) -> None:
    change(of_timm, pyra=merging)
    with pytest.raises(ExportError) as caught:
        load_model(of_timm)
    assert str(of_timm) in str(caught.value) and "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(of_timm: Path) -> None:
    torch.save(load_file(of_timm / "model.safetensors"), of_timm / "pytorch_model.bin")
    (of_timm / "model.safetensors").unlink()
    with pytest.raises(ExportError, match=r"no model\.safetensors there; weights in other files are not read"):
        load_model(of_timm)
    with pytest.raises(ExportError, match=r"model\.safetensors is missing"):
        load_exported(of_timm)


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ExportError, match=r"no config\.json there; give a folder of the format hf"):
            load_model(folder)


class Unknown(nn.Module):
    """A classifier of neither library."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        logits: Tensor = self.head(pixel_values.mean((2, 3)))
        return logits


def test_a_model_of_neither_library(images: Images, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds models of timm and transformers, this is a Unknown: choose another"):
        export_model(Unknown(), tmp_path, "hf", example_input=images(2))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_its_configuration_does_not_describe(tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    tiny.head = nn.Sequential(nn.Linear(32, 7), nn.Linear(7, 5))
    with pytest.raises(ExportError, match=r"does not fit its config\.json"):
        export_model(tiny, tmp_path, "hf", example_input=images(2))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_weights_that_layers_share(kind: str, tiny: nn.Module, images: Images, tmp_path: Path) -> None:
    model: Any = tiny if kind == "timm" else transformers.ViTForImageClassification(
        transformers.ViTConfig(**VIT, image_size=16, patch_size=4, id2label=LABELS)
    ).eval()  # fmt: skip
    if kind == "timm":
        model.blocks[1].norm1 = model.blocks[0].norm1
    else:
        first, second = [m for m in model.modules() if type(m).__name__ == "ViTLayer"]
        second.layernorm_before = first.layernorm_before
    with pytest.raises(ExportError, match="weights that layers share"):
        export_model(model, tmp_path, "hf", example_input=images(2))
    assert list(tmp_path.iterdir()) == []
