"""A mixture cut down to the experts of a task: what is written, what is measured, what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import decoder, mixture, save, tokenizer
from transformers import DeepseekV3ForCausalLM

from pyra.backbones.joyai_checkpoint import load_model
from pyra.errors import CheckpointError, ConfigError, DataError, ExportError, OutputError, PyraError
from pyra.experts import only_experts, prune_experts
from pyra.tasks.language import compressing
from pyra.tasks.language.answer_loss import AnswerLoss, answer_loss, answer_rows
from pyra.tasks.language.compress_options import CompressOptions
from pyra.tasks.language.compressed import evaluate_compression
from pyra.tasks.language.compressing import compress_experts
from pyra.tasks.language.compression import Compression, costs, is_compression, read_compression
from pyra.tasks.language.data import load_text_task
from pyra.tasks.language.evaluation import Evaluation
from pyra.tasks.language.models import load_encoder
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.training import train_language

IDS = torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(0))


def options(backbone: Path, root: Path, output: Path, /, **changes: Any) -> CompressOptions:
    told: dict[str, Any] = {"backbone": str(backbone), "root": str(root), "output": str(output), "device": "cpu"}
    return CompressOptions(**told | changes)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("mixtures") / "tiny")


@pytest.fixture(scope="module")
def compressed(backbone: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Compression, Path]:
    """Half of the experts, compared with all that can be compared."""
    folder = tmp_path_factory.mktemp("compressed") / "half"
    asked = options(backbone, root, folder, keep=0.5, compare_active=[2, 1], baseline=True)
    return compress_experts(asked), folder


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(IDS).logits
    return found


def test_the_folder_opens_in_stock_classes_with_the_logits_of_the_pruned_model(
    backbone: Path, compressed: tuple[Compression, Path]
) -> None:
    record, folder = compressed
    stock = DeepseekV3ForCausalLM.from_pretrained(folder)
    whole = load_model(backbone)
    before = logits(whole)
    kept = torch.tensor([layer.kept for layer in record.layers])
    assert kept.shape == (3, 4) and stock.config.n_routed_experts == 4 and stock.config.num_experts_per_tok == 2
    expected = logits(prune_experts(whole, kept))
    assert torch.equal(logits(stock), expected) and not torch.allclose(expected, before)
    assert tokenizer()("a joy")["input_ids"] == load_encoder(str(folder)).tokenizer("a joy")["input_ids"]
    assert record.written["opened_with"] == "DeepseekV3ForCausalLM" and record.written["largest_difference"] == 0
    assert record.written["compared"] > 1000 and record.written["bytes"] == sum(
        file.stat().st_size for file in folder.glob("*.safetensors")
    )


def test_the_record_says_what_was_kept_and_why(compressed: tuple[Compression, Path], root: Path) -> None:
    record, folder = compressed
    assert is_compression(folder) and read_compression(folder) == record
    assert record.method == "experts-reap" and record.options["root"] == str(root.resolve())
    assert record.options["backbone"] == "tiny" and record.calibration["examples"] == 24
    for layer in record.layers:
        best = sorted(sorted(range(8), key=lambda expert: -layer.reap[expert])[:4])
        assert layer.kept == best
        assert sum(layer.tokens) == 2 * record.calibration["tokens"]  # two experts a token
    assert str(folder.parent) not in json.dumps(record.options)


def test_the_table_holds_what_the_models_measure(
    backbone: Path, compressed: tuple[Compression, Path], root: Path
) -> None:
    record, folder = compressed
    names = ["original", "original, 2 active", "original, 1 active", "by frequency", "by reap, written"]
    assert [variant.name for variant in record.variants] == names
    whole, same, one, other, written = record.variants
    assert (same.nll, same.difference, same.error) == (whole.nll, 0, 0) and one.nll != whole.nll
    assert whole.difference is None and other.experts == written.experts == 4
    encoder = load_encoder(str(folder))
    rows, _, left_out = answer_rows(encoder, load_text_task("gsm8k", str(root)).split("test"), 512)
    told = {"batch_size": 2, "description": ""}
    before = answer_loss(load_model(backbone).eval(), rows, encoder, **told)
    after = answer_loss(load_model(folder).eval(), rows, encoder, **told)
    assert left_out == 0 and whole.nll == pytest.approx(before.mean, rel=1e-5)
    assert written.nll == pytest.approx(after.mean, rel=1e-5)
    assert written.difference == pytest.approx(after.mean - before.mean, rel=1e-3)
    plain = load_model(folder)
    assert written.parameters == sum(p.numel() for p in plain.parameters()) < whole.parameters
    assert written.bytes == 4 * written.parameters
    # A token passes two of the experts of a layer, whatever their number: only rows of the router differ.
    assert whole.active_parameters - written.active_parameters == 3 * 4 * 64
    assert whole.active_parameters - one.active_parameters == 3 * 3 * 64 * 32


def test_active_experts_cost_what_they_multiply(backbone: Path) -> None:
    model = load_model(backbone)
    found = costs(model, 8, 8)
    assert found["parameters"] == found["active_parameters"] == sum(p.numel() for p in model.parameters())
    matrices = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert found["macs"] == matrices - model.get_input_embeddings().weight.numel()


def test_the_error_of_a_difference_is_over_examples() -> None:
    first, second = AnswerLoss([2.0, 4.0], [2, 2]), AnswerLoss([1.0, 3.0], [2, 2])
    assert first.mean == 1.5 and first.difference(second) == (0.5, 0)  # the same difference in each
    mean, error = first.difference(AnswerLoss([2.0, 2.0], [2, 2]))
    assert mean == 0.5 and error == pytest.approx(math.sqrt(2) / 4)


def test_fewer_active_experts_alone_and_the_joyai_format(backbone: Path, root: Path, tmp_path: Path) -> None:
    asked = options(backbone, root, tmp_path / "out", keep=1, active=1, format="joyai", baseline=True)
    record = compress_experts(asked)
    assert [one.name for one in record.variants] == ["original", "all experts, 1 active, written"]
    assert record.method == "experts-active" and record.written["opened_with"] == "JoyAIForCausalLM"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "joyai_llm_flash"
    with only_experts(load_model(backbone), active=1) as fewer:
        assert torch.equal(logits(load_model(tmp_path / "out")), logits(fewer))


def test_half_precision_stays(root: Path, tmp_path: Path) -> None:
    half = mixture(tmp_path / "half")
    whole = load_file(half / "model.safetensors")
    values = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(values | {"dtype": "bfloat16"}))
    rounded = {n: value if n.endswith("correction_bias") else value.bfloat16() for n, value in whole.items()}
    save_file(rounded, half / "model.safetensors", {"format": "pt"})
    record = compress_experts(options(half, root, tmp_path / "out"))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert record.variants[0].bytes == 2 * record.variants[0].parameters and record.written["largest_difference"] == 0
    assert torch.equal(written["lm_head.weight"], whole["lm_head.weight"].bfloat16())
    expert = record.layers[0].kept[3]
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    assert torch.equal(written[name.format(3)], whole[name.format(expert)].bfloat16())


def test_groups_of_a_router_keep_as_many_each(root: Path, tmp_path: Path) -> None:
    grouped = mixture(tmp_path / "grouped", kind="deepseek_v3", n_group=2, topk_group=1)
    record = compress_experts(options(grouped, root, tmp_path / "out", keep=4, score="frequency"))
    assert all(sum(expert < 4 for expert in layer.kept) == 2 for layer in record.layers)
    assert record.source["model_type"] == "deepseek_v3" and record.method == "experts-frequency"
    with pytest.raises(ConfigError, match=r"3 of 8 experts .* fits: 4 to 8 in steps of 2 \(the router's groups\)"):
        compress_experts(options(grouped, root, tmp_path / "none", keep=3))


def test_the_layer_that_drafts_goes_along_where_it_can_be_opened(root: Path, tmp_path: Path) -> None:
    drafts = mixture(tmp_path / "drafts", num_nextn_predict_layers=1)
    weights = load_file(drafts / "model.safetensors")
    values = json.loads((drafts / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (drafts / "config.json").write_text(json.dumps(values))
    save_file(
        {**weights, "model.layers.4.enorm.weight": torch.ones(64)}, drafts / "model.safetensors", {"format": "pt"}
    )
    with_it = compress_experts(options(drafts, root, tmp_path / "with", format="joyai"))
    assert with_it.written["left_out"] == [] and (tmp_path / "with" / "model-mtp.safetensors").is_file()
    without = compress_experts(options(drafts, root, tmp_path / "without"))
    assert without.written["left_out"] == ["the layer for multi-token prediction"]
    assert not (tmp_path / "without" / "model-mtp.safetensors").exists()


def test_a_folder_is_scored_on_its_task(compressed: tuple[Compression, Path], root: Path) -> None:
    record, folder = compressed
    result, file, notes = evaluate_compression(folder, Evaluation(device="cpu", max_new_tokens=4))
    assert (result.method, result.task, result.metric, result.num_test) == ("experts-reap", "gsm8k", "exact_match", 6)
    assert result.settings is not None and result.settings["experts"] == 4 and result.settings["active"] == 2
    assert file == folder / "evaluation.json" and result.note is not None and notes[-1] == result.note
    stored = json.loads((folder / "predictions-evaluation.json").read_text())
    assert stored["answer_nll"] == pytest.approx(record.variants[-1].nll, rel=1e-5) and len(stored["predictions"]) == 6
    other, file, _ = evaluate_compression(folder, Evaluation(device="cpu"), task="sst2")
    assert file.name == "evaluation-sst2.json" and other.settings is not None and other.settings["answer"] == "scoring"
    with pytest.raises(DataError, match="nowhere is not there"):
        evaluate_compression(folder, Evaluation(), data="nowhere")


def test_a_folder_is_trained_further(compressed: tuple[Compression, Path], root: Path, tmp_path: Path) -> None:
    """LoRA reaches the attention of a pruned model, and the experts come from the folder."""
    _, folder = compressed
    told = {"task": "gsm8k", "root": str(root), "max_new_tokens": 4, "epochs": 1, "device": "cpu"}
    result, _ = train_language(LanguageOptions(backbone=str(folder), output=str(tmp_path / "run"), **told))
    adapter = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    expected = ["kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj"]
    assert sorted(adapter["target_modules"]) == expected and result.trained_parameters > 0
    losses = json.loads((tmp_path / "run" / "training.json").read_text())["losses"]
    assert all(math.isfinite(loss["loss"]) for loss in losses)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"keep": 0}, "--keep must be a share"),
        ({"keep": -1}, "--keep must be a share"),
        ({"keep": 2.5}, "--keep must be a share"),
        ({"keep": float("nan")}, "--keep must be a share"),
        ({"keep": 0.1}, "--keep 0.1 is 1 of 8 experts a layer, 2 of which .* what fits: 2 to 8"),
        ({"keep": 9}, "--keep 9 is 9 of 8 experts"),
        ({"active": 3}, "--active 3: a token is sent to 2 experts; give 2 at most"),
        ({"active": 0}, "--active must be above 0"),
        ({"compare_active": [1, 9]}, "--compare-active 9: a layer has 8 experts"),
        ({"compare_active": [0]}, "--compare-active must be above 0"),
        ({"score": "reapp"}, r"--score must be one of reap, frequency, got 'reapp' \(did you mean 'reap'\?\)"),
        ({"format": "gguf"}, "--format must be one of deepseek_v3, joyai"),
        ({"data": "x"}, "give --root or --data, not both"),
        ({"device": "tpu"}, "--device must be"),
        ({"output": " "}, "--output is empty"),
        ({"max_length": 4}, "--max-length 4: every example is longer"),
        ({"task": "gsm9k"}, "gsm8k"),
    ],
)
def test_wrong_options(changes: dict[str, Any], said: str, backbone: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(PyraError, match=said):
        compress_experts(options(backbone, root, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


def broken(kind: str, backbone: Path, folder: Path) -> Path:
    """Copy a backbone, with something wrong with it."""
    if kind in ("llama", "dense", "no tokenizer"):
        if kind == "llama":
            return save(decoder(), tokenizer(), folder)
        return mixture(folder, **({"first_k_dense_replace": 4} if kind == "dense" else {"words": False}))
    shutil.copytree(backbone, folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if kind == "count":
        (folder / "config.json").write_text(json.dumps(config | {"n_routed_experts": 6}))
    elif kind == "quantised":
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    elif kind == "cut off":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif kind == "missing shard":
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "model-1.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        weights.unlink()
    elif kind == "no BOS":
        text = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps(text | {"post_processor": None}))
    return folder


@pytest.mark.parametrize(
    ("kind", "error", "said"),
    [
        ("llama", CheckpointError, "model_type is 'llama', not one of joyai_llm_flash, deepseek_v3"),
        ("dense", ConfigError, "has no layer with experts: all 4 are dense"),
        ("count", CheckpointError, "layer 1 has 8 experts, not 6"),
        ("quantised", ConfigError, "is quantised: give the checkpoint with the plain weights"),
        ("cut off", CheckpointError, "download it again"),
        ("missing shard", CheckpointError, "model-1.safetensors is missing: download again"),
        ("no BOS", ConfigError, "does not begin a text with BOS"),
        ("no tokenizer", ConfigError, "has no tokenizer that can be read"),
    ],
)
def test_backbones_that_cannot_be_taken(
    kind: str, error: type[Exception], said: str, backbone: Path, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=said):
        compress_experts(options(broken(kind, backbone, tmp_path / "broken"), root, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_outputs_and_data_that_cannot_be_taken(
    backbone: Path, compressed: tuple[Compression, Path], root: Path
) -> None:
    _, folder = compressed
    with pytest.raises(OutputError, match="already holds a compression: pass --overwrite"):
        compress_experts(options(backbone, root, folder))
    with pytest.raises(ConfigError, match="is the backbone itself"):
        options(backbone, root, backbone)
    empty = folder.parent / "empty"
    empty.mkdir()
    for name in ("train", "test"):
        (empty / f"{name}.jsonl").write_text("")
    with pytest.raises(DataError, match=r"train.jsonl holds no rows"):
        compress_experts(options(backbone, root, folder.parent / "out", root=None, data=str(empty)))


def test_a_folder_that_differs_is_not_left_behind(
    backbone: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*arguments: Any, **told: Any) -> None:
        model, folder = arguments
        model.lm_head.weight.data[5] += 1
        original(model, folder, **told)

    original = compressing.save_checkpoint
    monkeypatch.setattr(compressing, "save_checkpoint", spoil)
    with pytest.raises(ExportError, match="the written model is not the one in memory: its logits differ by"):
        compress_experts(options(backbone, root, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    record = compress_experts(options(backbone, root, tmp_path / "out", verify=False))
    assert record.written["opened_with"] is None


def test_a_broken_record(compressed: tuple[Compression, Path], tmp_path: Path) -> None:
    _, folder = compressed
    values = json.loads((folder / "compression.json").read_text())
    for change, said in (({"version": 2}, "version 2"), ({"layers": [{}]}, "key 'name' is missing"), ({"x": 1}, "'x'")):
        (tmp_path / "compression.json").write_text(json.dumps(values | change))
        with pytest.raises(DataError, match=said):
            read_compression(tmp_path)
    (tmp_path / "compression.json").write_text("{")
    assert not is_compression(tmp_path)
