"""From options to a run folder and back, on a tiny backbone and real pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pyra.adapters.adalora import RankAllocation
from pyra.adapters.methods import PEFT_METHODS
from pyra.backbones.loading import create_backbone
from pyra.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    OutputError,
    ScheduleError,
    TrainingError,
    UnsupportedModelError,
)
from pyra.scripts.main import main
from pyra.tasks import training
from pyra.tasks.evaluation import evaluate_run
from pyra.tasks.fitting.trainer import ImageTrainer
from pyra.tasks.options import METHODS, RunOptions
from pyra.tasks.results import read_result
from pyra.tasks.runs import load_run, new_model
from pyra.tasks.scoring import score
from pyra.tasks.training import train

pytestmark = pytest.mark.usefixtures("no_cuda_extension")


def options(backbone: Path, output: Path, **changes: Any) -> RunOptions:
    settings = {"method": "pyra", "epochs": 1, "limit": 40, "batch_size": 8, "device": "cpu", **changes}
    if settings["method"] in ("tome", "pyra") and "schedule" not in settings:
        settings.setdefault("rate", 0.5)
    return RunOptions(backbone=str(backbone), output=str(output), **settings)


@pytest.mark.parametrize("method", METHODS)
def test_run_and_evaluate(method: str, tiny_backbone: Path, tmp_path: Path) -> None:
    result = train(options(tiny_backbone, tmp_path / "run", method=method))
    assert read_result(tmp_path / "run") == result
    assert result.method == method
    assert result.num_test == 40
    assert 0 <= result.value <= 1
    merges = method in ("tome", "pyra")
    assert (result.rate > 0.49) == merges
    assert any(result.schedule) == merges
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")) == [
        "adapter",
        "backbone.json",
        "data.json",
        "labels.json",
        "options.json",
        "predictions.json",
        "result.json",
        "training.json",
    ]
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "| task | demo |" in card and f"| accuracy | {result.value:g} |" in card
    assert f"| backbone | {tiny_backbone.name} |" in card and str(tiny_backbone) not in card
    again = evaluate_run(tmp_path / "run", device="cpu")
    assert again.value == pytest.approx(result.value)
    assert (tmp_path / "run" / "evaluation.json").is_file()
    model, _, labels = load_run(tmp_path / "run")
    assert len(labels) == 10
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("peft", PEFT_METHODS)
def test_every_peft_method_trains_beside_merging(peft: str, tiny_backbone: Path, tmp_path: Path) -> None:
    result = train(options(tiny_backbone, tmp_path / "run", peft=peft))
    assert result.method == ("pyra" if peft == "lora" else f"pyra+{peft}")
    assert result.rate > 0.49
    stored = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    own = [key for key in stored if "reactivation" not in key and "head" not in key]
    assert own and any("reactivation" in key for key in stored)
    assert evaluate_run(tmp_path / "run", device="cpu").value == pytest.approx(result.value)


def test_ranks_of_adalora_reach_their_target(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    penalties, plain = [], RankAllocation.penalty

    def watched(self: RankAllocation) -> Any:
        penalties.append(plain(self))
        return penalties[-1]

    monkeypatch.setattr(RankAllocation, "penalty", watched)
    train(options(tiny_backbone, tmp_path / "run", peft="adalora", epochs=6, rank=4, targets="qkv,proj,fc1,fc2"))
    config = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    kept = config["rank_pattern"].values()
    assert config["total_step"] == len(penalties) == 30
    assert sum(map(sum, kept)) == 4 * len(kept) and len(set(map(sum, kept))) > 1, "ranks differ between modules"
    assert all(penalty > 0 and penalty.requires_grad for penalty in penalties)


def test_same_seed_same_weights(tiny_backbone: Path, tmp_path: Path) -> None:
    weights = []
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        train(options(tiny_backbone, tmp_path / name, seed=seed))
        weights.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert not all(torch.equal(weights[0][key], weights[2][key]) for key in weights[0])


def test_reactivation_learning_rate_applies(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published code filters on a wrong name, so that its option never applies: this looks at the optimiser."""
    found: dict[Any, set[str]] = {}
    plain = ImageTrainer.create_optimizer

    def watched(self: ImageTrainer, *arguments: Any) -> Any:
        plain(self, *arguments)
        names = {id(p): name for name, p in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            found[group["lr"]] = {names[id(p)] for p in group["params"]}
        found["all"] = {name for name, p in self.model.named_parameters() if p.requires_grad}
        return self.optimizer

    monkeypatch.setattr(ImageTrainer, "create_optimizer", watched)
    train(options(tiny_backbone, tmp_path / "run", lr=1e-3, reactivation_lr=7e-2))
    fast, slow = found[7e-2], found[1e-3]
    assert fast
    assert all("reactivation" in name for name in fast)
    assert not any("reactivation" in name for name in slow)
    assert fast | slow == found["all"]


def test_training_lowers_the_loss(tiny_backbone: Path, tmp_path: Path) -> None:
    """Thirty epochs on forty pictures: the training pictures are told apart far above chance."""
    train(options(tiny_backbone, tmp_path / "run", epochs=30, lr=1e-2, dropout=0.0, drop_path=0.0))
    tested = evaluate_run(tmp_path / "run", device="cpu")
    assert evaluate_run(tmp_path / "run", split="train", device="cpu").value > 0.5
    written = {p.name: json.loads(p.read_text())["value"] for p in (tmp_path / "run").glob("evaluation*.json")}
    assert written["evaluation.json"] == tested.value != written["evaluation-train.json"]


def test_an_earlier_run_is_kept(tiny_backbone: Path, tmp_path: Path) -> None:
    train(options(tiny_backbone, tmp_path / "run"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(OutputError, match="--overwrite"):
        train(options(tiny_backbone, tmp_path / "run"))
    with pytest.raises(ScheduleError, match="block 0 removes 60"):
        train(options(tiny_backbone, tmp_path / "run", schedule=[60, 0, 0], overwrite=True))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    train(options(tiny_backbone, tmp_path / "run", overwrite=True, method="linear"))
    assert read_result(tmp_path / "run").method == "linear"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"task": "demmo"}, DataError, "did you mean 'demo'"),
        ({"backbone": "vit_bas_patch16_224"}, ConfigError, "did you mean 'vit_base_patch16_224'"),
        ({"rate": 0.99}, ScheduleError, "can save at most"),
        ({"schedule": [1, 1]}, ScheduleError, "2 entries, the model has 3 blocks"),
        ({"image_size": 30}, ConfigError, "30 is not a multiple of the patch size 4"),
        ({"backbone": "resnet18", "method": "linear", "pretrained": False}, UnsupportedModelError, "ResNet"),
        (
            {"backbone": "beit_base_patch16_224", "method": "lora", "pretrained": False},
            UnsupportedModelError,
            "relative position bias",
        ),
        ({"device": "cuda:99"}, ConfigError, "cuda:99 was asked for"),
        ({"peft": "lorra"}, ConfigError, "did you mean 'lora'"),
        ({"peft": "dora", "method": "lora"}, ConfigError, "without merging give --method dora"),
        ({"method": "tome", "scaled_gates": True}, ConfigError, "--scaled-gates goes with --method pyra"),
        ({"dtype": "int8"}, ConfigError, "--dtype must be one of float32"),
    ],
)
def test_wrong_input_touches_nothing(
    changes: dict[str, Any], error: type[Exception], message: str, tiny_backbone: Path, tmp_path: Path
) -> None:
    backbone = Path(changes.pop("backbone", tiny_backbone))
    with pytest.raises(error, match=message):
        train(options(backbone, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_all_option_problems_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        RunOptions(method="lora", rate=0.5, epochs=0, lr=-1, device="tpu", task="demo", data="x")
    for part in ("merges no tokens", "--epochs", "--lr", "'tpu'", "not both"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match=r"exactly one of --rate and --schedule, such as --rate 0\.5"):
        RunOptions(method="pyra")


@pytest.mark.parametrize("method", ["lora", "pyra", "bottleneck"])
def test_a_rank_above_the_width_is_refused(method: str, tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rank 100000000 is more than the 32 features"):
        new_model(options(tiny_backbone, tmp_path, method=method, rank=10**8), 10)


def test_unfinished_or_foreign_folders(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no finished run"):
        evaluate_run(tmp_path)
    train(options(tiny_backbone, tmp_path / "run"))
    stored = json.loads((tmp_path / "run" / "options.json").read_text())
    (tmp_path / "run" / "options.json").write_text(json.dumps({**stored, "epoch": 3}))
    with pytest.raises(DataError, match="'epoch' \\(did you mean 'epochs'"):
        evaluate_run(tmp_path / "run")
    for changed, message in (
        ({"rate": "half"}, "--rate must be a number"),
        ({"device": "cpu:-1"}, "--device"),
        ([1], "list"),
    ):
        values = {**stored, **changed} if isinstance(changed, dict) else changed
        (tmp_path / "run" / "options.json").write_text(json.dumps(values))
        with pytest.raises(DataError, match=message):
            evaluate_run(tmp_path / "run")
    (tmp_path / "run" / "options.json").write_text(json.dumps(stored))
    (tmp_path / "run" / "labels.json").write_text("{}")
    with pytest.raises(DataError, match="no list of class names"):
        evaluate_run(tmp_path / "run")


def pictures(folder: Path, count: int) -> str:
    for number in range(count):
        file = folder / ("red", "blue")[number % 2] / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (number, 0, 200) if number % 2 else (200, 0, number)).save(file)
    return str(folder)


def test_data_that_changed_since_is_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    """One more picture divides a folder without splits anew: training images would be tested on."""
    data = pictures(tmp_path / "data", 20)
    result = train(options(tiny_backbone, tmp_path / "run", data=data))
    assert evaluate_run(tmp_path / "run", device="cpu").value == result.value
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    assert {name: split["images"] for name, split in record["splits"].items()} == {"train": 16, "test": 4}
    pictures(tmp_path / "data", 30)
    with pytest.raises(
        DataError, match=r"train split of data is not the one .* \(16 images then, 24 now\): put the data"
    ):
        evaluate_run(tmp_path / "run", device="cpu")
    for number in range(20, 30):
        (tmp_path / "data" / ("red", "blue")[number % 2] / f"{number:03}.png").unlink()
    assert evaluate_run(tmp_path / "run", device="cpu").value == result.value
    (tmp_path / "data").rename(tmp_path / "moved")
    stored = json.loads((tmp_path / "run" / "options.json").read_text())
    (tmp_path / "run" / "options.json").write_text(json.dumps({**stored, "data": str(tmp_path / "moved")}))
    assert evaluate_run(tmp_path / "run", device="cpu").value == result.value, "the same pictures elsewhere"
    for wrong, said in (
        ({**record, "version": "0"}, "version 0 of moved, here is version 1"),
        ([], "holds no record of splits"),
    ):
        (tmp_path / "run" / "data.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match=said):
            evaluate_run(tmp_path / "run", device="cpu")


def test_wrong_arguments_of_an_evaluation(tiny_backbone: Path, tmp_path: Path) -> None:
    for arguments, message in (({"batch_size": -1}, "--batch-size"), ({"device": "cud"}, "--device")):
        with pytest.raises(ConfigError, match=message):
            evaluate_run(tmp_path, **arguments)


@pytest.mark.parametrize(("epochs", "what"), [(1, "trained tensors|loss is"), (20, "loss is nan at step")])
def test_a_training_that_diverges_stops_and_loses_nothing(
    epochs: int, what: str, tiny_backbone: Path, tmp_path: Path
) -> None:
    train(options(tiny_backbone, tmp_path / "run"))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(TrainingError, match=what):
        train(options(tiny_backbone, tmp_path / "run", epochs=epochs, lr=1e8, overwrite=True))
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_logits_that_are_no_numbers_are_not_scored() -> None:
    data = [{"pixel_values": torch.zeros(3, 4, 4), "labels": 0}]
    with pytest.raises(TrainingError, match="NaN or infinite"):
        score(lambda x: torch.full((len(x), 2), float("nan")), data)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["linear", "pyra"])
def test_a_run_on_random_weights_comes_back(method: str, tiny_backbone: Path, tmp_path: Path) -> None:
    train(options(tiny_backbone, tmp_path / "run", method=method, pretrained=False, seed=3))
    torch.manual_seed(99)
    first, second = load_run(tmp_path / "run")[0], load_run(tmp_path / "run")[0]
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(images), second(images))
    own = create_backbone(str(tiny_backbone), num_classes=10)
    assert not torch.equal(first.patch_embed.proj.weight, own.patch_embed.proj.weight)
    assert evaluate_run(tmp_path / "run", device="cpu").value == read_result(tmp_path / "run").value


def test_changed_weights_are_noticed(tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tmp_path / "weights.safetensors"
    state = load_file(tiny_backbone / "model.safetensors")
    save_file(state, checkpoint)
    monkeypatch.chdir(tmp_path)
    train(options(tiny_backbone, tmp_path / "run", checkpoint="weights.safetensors"))
    monkeypatch.chdir("/")
    load_run(tmp_path / "run")
    save_file({**state, "norm.bias": state["norm.bias"] + 1}, checkpoint)
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is not what .*run was trained on"):
        load_run(tmp_path / "run")


def test_a_run_is_not_written_among_the_images(tiny_backbone: Path, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for number in range(3):
            Image.new("RGB", (8, 8), (number * 9, 0, 0)).save(tmp_path / name / f"{number}.png")
    with pytest.raises(OutputError, match="inside --data"):
        train(options(tiny_backbone, tmp_path / "runs" / "a", data=str(tmp_path), limit=None))
    with pytest.raises(OutputError, match=r"--data .* or inside it"):
        train(options(tiny_backbone, tmp_path, data=str(tmp_path / "cat"), limit=None))
    with pytest.raises(OutputError, match=r"--root .* or inside it"):
        train(options(tiny_backbone, tmp_path, root=str(tmp_path)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat", "dog"]


def test_results_with_no_numbers_are_refused(tiny_backbone: Path, tmp_path: Path) -> None:
    train(options(tiny_backbone, tmp_path / "run", method="linear"))
    file = tmp_path / "run" / "result.json"
    file.write_text(file.read_text().replace('"seed": 0', '"seed": NaN'))
    with pytest.raises(DataError, match="NaN is no JSON number"):
        evaluate_run(tmp_path / "run", device="cpu")


def test_a_probe_on_stored_features_is_the_probe_on_images(
    tiny_backbone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for name in ("features", "images"):
        if name == "images":
            monkeypatch.setattr("pyra.tasks.fitting.fit.probe_of", lambda model: None)
        train(options(tiny_backbone, tmp_path / name, method="linear", epochs=3, lr=0.1, drop_path=0.3))
        weights.append(load_file(tmp_path / name / "adapter" / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    fresh = new_model(options(tiny_backbone, tmp_path, method="linear"), 10).state_dict()
    for key, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][key])
        assert not torch.allclose(tensor, fresh[key])


def test_distilled_models_probe_both_heads(tmp_path: Path) -> None:
    changes = {"backbone": "deit_tiny_distilled_patch16_224", "pretrained": False, "limit": 4, "batch_size": 4}
    result = train(RunOptions(method="linear", epochs=1, device="cpu", output=str(tmp_path / "run"), **changes))
    assert result.trained_parameters == 2 * (192 * 10 + 10)


def test_a_folder_called_demo_is_not_the_demo_backbone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    train(RunOptions(method="linear", epochs=1, limit=4, batch_size=4, device="cpu", output="run"))
    assert load_run("run")[1].backbone == "demo"


@pytest.mark.parametrize("save_adapter_alone", [False, True])
def test_a_full_disk_is_told_in_a_line(
    save_adapter_alone: bool,
    tiny_backbone: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Once while the adapter is written, once while a checkpoint is."""
    plain = training.save_trained

    def save(*arguments: Any) -> Any:
        request.getfixturevalue("tiny_disk")
        return plain(*arguments)

    if save_adapter_alone:
        monkeypatch.setattr(training, "save_trained", save)
    else:
        request.getfixturevalue("tiny_disk")
    flags = f"--task demo --method full --epochs 1 --limit 32 --device cpu --output {tmp_path / 'a'}".split()
    assert main(["train", "--backbone", str(tiny_backbone), *flags]) == 2
    error = capsys.readouterr().err
    assert f"cannot write {tmp_path / 'a'}/.partial-" in error and "File too large; free some space" in error
    assert ("--resume goes on" in error) == save_adapter_alone
