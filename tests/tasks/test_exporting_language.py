"""``pyra export`` of language models: runs that merge, runs of post-training, fewer experts, and plain folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import decoder, mixture, save, tokenizer, write_reviews, write_sums
from transformers import AutoModelForCausalLM

from pyra.backbones import unwrap
from pyra.errors import ConfigError
from pyra.export.engine_record import RECORD
from pyra.scripts.main import main
from pyra.tasks.exporting_language import WHOLE_PROMPTS, is_language_source, language_subject
from pyra.tasks.language.answer_loss import answer_loss, answer_rows
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.runs import load_language_run
from pyra.tasks.language.training import train_language
from pyra.tasks.output import CLAIM_FILE


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_reviews(folder)
    return write_sums(folder)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("backbones") / "tiny")


@pytest.fixture(scope="module")
def run(backbone: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose prompts merge; nobody writes to its own files."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_language(options(backbone, root, folder))
    return folder


def options(backbone: Path, root: Path, output: Path, **changes: Any) -> LanguageOptions:
    settings = {"task": "gsm8k", "method": "pyra", "keep": "1:0.4", "epochs": 2, "lr": 1e-2, "batch_size": 4}
    settings |= {"max_new_tokens": 4, "limit": 6, "device": "cpu", **changes}
    return LanguageOptions(backbone=str(backbone), root=str(root), output=str(output), **settings)


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RECORD).read_text())
    return found


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("pyra: error: ") and shown.err.count("\n") == 1, shown
    return shown.err


def test_a_run_that_merges_goes_whole_and_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--format", "engine", "--output", str(tmp_path / "engine")]) == 0
    said = capsys.readouterr().out
    assert WHOLE_PROMPTS in said and "nats a token" in said and f"vllm serve {tmp_path / 'engine'}" in said
    found = record(tmp_path / "engine")["merging"]
    assert found["text"] == WHOLE_PROMPTS and found["rate"] > 0.1 and any(found["schedule"])
    assert found["difference"] == pytest.approx(found["whole"] - found["merging"])
    assert found["largest_difference"] > 1e-3 and found["merging"] != found["whole"]
    assert not any(
        "reactivation" in name for name in AutoModelForCausalLM.from_pretrained(tmp_path / "engine").state_dict()
    )
    assert json.loads((tmp_path / "engine" / CLAIM_FILE).read_text())["kind"] == "export"


def test_what_is_measured_is_the_loss_of_the_right_answers(run: Path) -> None:
    measured = language_subject(run).merging
    subject, _, task = load_language_run(run)
    rows, _, _ = answer_rows(subject.encoder, task.split("test", 16), subject.max_length)
    merging = answer_loss(subject.model, rows, subject.encoder, batch_size=4, description="")
    whole = answer_loss(unwrap(subject.model), rows, subject.encoder, batch_size=4, description="")
    assert measured is not None and (measured["answers"], measured["tokens"]) == (len(rows), sum(whole.tokens))
    expected = (merging.mean, whole.mean, *whole.difference(merging))
    found = tuple(measured[name] for name in ("merging", "whole", "difference", "error"))
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_adapter_is_in_the_weights(run: Path, backbone: Path, tmp_path: Path) -> None:
    assert main(["export", str(run), "--output", str(tmp_path / "engine")]) == 0
    ids = torch.randint(2, 400, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, plain = (
            AutoModelForCausalLM.from_pretrained(f).eval()(ids).logits for f in (tmp_path / "engine", backbone)
        )
    assert (found - plain).abs().max() > 0.01


def test_several_formats_lie_beside_each_other_in_the_run(run: Path) -> None:
    pytest.importorskip("gguf")
    assert main(["export", str(run), "--format", "engine-bf16,gguf-q8_0", "--no-verify"]) == 0
    assert record(run / "export" / "engine-bf16")["reloaded"] is None
    assert (run / "export" / "gguf-q8_0" / "model.gguf").is_file()


def test_a_run_of_post_training_takes_its_chat_template_along(backbone: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"How many are {i} apples ?", "completion": f"{i} apples"} for i in range(12)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = [
        "--backbone",
        str(backbone),
        "--data",
        str(tmp_path / "chats.jsonl"),
        "--method",
        "pyra",
        "--keep",
        "1:0.4",
    ]
    assert main(["sft", *given, "--epochs", "1", "--device", "cpu", "--output", str(tmp_path / "sft")]) == 0
    assert main(["export", str(tmp_path / "sft"), "--format", "engine", "--output", str(tmp_path / "engine")]) == 0
    template = (tmp_path / "engine" / "chat_template.jinja").read_text()
    assert template == (tmp_path / "sft" / "chat_template.jinja").read_text() and "Assistant" in template
    assert record(tmp_path / "engine")["merging"]["answers"] >= 1
    (tmp_path / "chats.jsonl").unlink()  # what the model says itself is measured instead
    assert language_subject(tmp_path / "sft").merging["answers"] == 3  # type: ignore[index]


@pytest.mark.parametrize("mixes", [True, False], ids=["experts", "linear layers"])
def test_runs_that_were_trained_as_rounded(
    mixes: bool, root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = {"hidden_size": 64, "moe_intermediate_size": 64}
    start = mixture(tmp_path / "wide", **wide) if mixes else save(decoder(), tokenizer(), tmp_path / "dense")
    plain = {"method": "full", "keep": None, "qat": "int4", "lr": 1e-3}
    train_language(options(start, root, tmp_path / "run", **plain))
    capsys.readouterr()
    assert main(["export", str(tmp_path / "run"), "--format", "engine-fp32", "--output", str(tmp_path / "engine")]) == 0
    said = f"{'experts' if mixes else 'linear layers'} were trained as INT4 rounds them: engine-int4 writes what was"
    assert said in capsys.readouterr().out
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "engine").state_dict()
    trained = load_language_run(tmp_path / "run")[0].model
    name = "model.layers.1.mlp.experts.down_proj" if mixes else "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[name], trained.state_dict()[name])
    assert main(["export", str(tmp_path / "run"), "--format", "engine-int4", "--output", str(tmp_path / "int4")]) == 0
    assert record(tmp_path / "int4")["reloaded"]["largest_difference"] == 0
    shown = capsys.readouterr()
    assert "Compressing" not in shown.err and "Dispatching" not in shown.err
    ids = torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        served = AutoModelForCausalLM.from_pretrained(tmp_path / "int4").eval()(ids).logits
        assert torch.equal(served, trained(ids).logits)


def test_fewer_experts_and_plain_folders(backbone: Path, root: Path, tmp_path: Path) -> None:
    given = ["--backbone", str(backbone), "--root", str(root), "--keep", "4", "--limit", "4", "--device", "cpu"]
    assert main(["compress-experts", *given, "--output", str(tmp_path / "pruned")]) == 0
    assert main(["export", str(tmp_path / "pruned"), "--output", str(tmp_path / "engine")]) == 0
    found = json.loads((tmp_path / "engine" / "config.json").read_text())
    assert found["n_routed_experts"] == 4 and record(tmp_path / "engine")["source"] == "fewer experts, pruned"
    assert main(["export", str(backbone), "--output", str(tmp_path / "plain")]) == 0
    assert record(tmp_path / "plain")["merging"] is None
    again = ["export", str(tmp_path / "plain"), "--output", str(tmp_path / "again")]  # what an export wrote is a model
    assert main(again) == 0 and record(tmp_path / "again")["reloaded"]["largest_difference"] == 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--format", "onnx"], "--format onnx is for image models; a language model is written as engine"),
        (["--format", "engin"], "unknown --format 'engin' (did you mean 'engine'"),
        (["--format", "engine,engine"], "names something twice"),
        (["--format", "engine", "--rate", "0.3"], "--rate is for image models"),
        (["--format", "engine", "--images", "3"], "--images is for image models"),
        (["--format", "engine", "--tolerance", "-1"], "the tolerance must be a number of at least 0"),
    ],
)
def test_wrong_input_is_one_line(
    given: list[str], said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), *given, "--output", str(tmp_path / "out")]) == 2
    assert said in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_folders_that_are_none_of_its_own(
    run: Path, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(backbone)]) == 2
    assert "is no run, and exports would lie among its files: give --output FOLDER" in one_line(capsys)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert main(["export", str(run), "--output", str(tmp_path / "mine"), "--overwrite"]) == 2
    assert "holds files that are not from pyra (notes.txt)" in one_line(capsys)
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--no-verify"]) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert main(["export", str(run), "--output", str(tmp_path / "out")]) == 2
    assert "already holds an export: pass --overwrite" in one_line(capsys)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert main(["export", str(run), "--output", str(tmp_path / "out"), "--overwrite", "--format", "engine-bf16"]) == 0
    assert record(tmp_path / "out")["format"] == "engine-bf16"


@pytest.mark.parametrize("name", ["engine", "gguf"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    name: str, backbone: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_disk: None
) -> None:
    assert main(["export", str(backbone), "--format", name, "--output", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("pyra: error: cannot write ") and "model." in said
    assert not (tmp_path / "out").exists()


def test_heads_and_encoders_are_not_for_engines(root: Path, tmp_path: Path) -> None:
    llama = save(decoder(spread=0.05), tokenizer(), tmp_path / "llama")
    train_language(options(llama, root, tmp_path / "run", task="sst2", method="lora", keep=None, epochs=1))
    with pytest.raises(ConfigError, match="answers by a head, and engines serve what a decoder says"):
        language_subject(tmp_path / "run")


def test_what_is_a_language_model(run: Path, backbone: Path, tmp_path: Path) -> None:
    assert is_language_source(run) and is_language_source(backbone)
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    assert not is_language_source(tmp_path) and not is_language_source(tmp_path / "none")
    (tmp_path / "config.json").write_text("{")
    assert not is_language_source(tmp_path)
