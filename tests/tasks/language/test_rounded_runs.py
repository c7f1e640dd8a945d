"""``--qat int4``: runs that are trained and scored with the weights they will be rounded to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import mixture
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pyra.backbones import unwrap
from pyra.errors import ConfigError
from pyra.experts import quantising_config, undo_fake_quantise
from pyra.export import write_int4
from pyra.export.linear_training import trains_as_rounded
from pyra.export.quantised import quantise
from pyra.tasks.language.evaluation import Evaluation, evaluate_language_run
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.runs import load_language_run
from pyra.tasks.language.training import train_language
from pyra.tasks.results import read_result

pytestmark = pytest.mark.usefixtures("no_cuda_extension")
IDS = torch.randint(2, 400, (2, 12), generator=torch.Generator().manual_seed(1))


def options(backbone: Path, root: Path, output: Path, **changes: Any) -> LanguageOptions:
    settings = {"task": "sst2", "epochs": 1, "batch_size": 8, "device": "cpu", "lr": 3e-3, "answer": "scoring"}
    return LanguageOptions(
        backbone=str(backbone), root=str(root), output=str(output), qat="int4", **{**settings, **changes}
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize(("method", "width", "group"), [("full", 64, 64), ("lora", 64, 64), ("lora", 96, 32)])
def test_experts_are_scored_as_they_are_deployed(
    method: str, width: int, group: int, root: Path, tmp_path: Path
) -> None:
    backbone = mixture(tmp_path / "joyai", moe_intermediate_size=width)
    result, _ = train_language(options(backbone, root, tmp_path / "run", method=method, rank=2))
    assert result.method == f"{method}+int4" and read_result(tmp_path / "run") == result
    again, _, _ = evaluate_language_run(tmp_path / "run", Evaluation(device="cpu"))
    assert again.value == result.value
    model = load_language_run(tmp_path / "run")[0].model
    assert getattr(quantising_config(model), "group_size", None) == group
    found = logits(model)
    write_int4(model, tmp_path / "int4")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "int4").eval()), found)
    assert not torch.equal(logits(undo_fake_quantise(model)), found)


@pytest.mark.parametrize(
    ("kind", "answer", "how"),
    [
        ("llama", "scoring", {"method": "full"}),
        ("qwen", "scoring", {"method": "lora", "dropout": 0.0}),
        ("llama", "scoring", {"method": "pyra", "keep": "0:0.4", "dropout": 0.0, "targets": "q_proj,up_proj"}),
        ("bert", "head", {"method": "full"}),
    ],
    ids=lambda value: value.get("method") if isinstance(value, dict) else value,
)
def test_linear_layers_of_dense_models(
    kind: str, answer: str, how: dict[str, Any], backbones: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    pytest.importorskip("torchao", reason="the extra `torchao` is not installed")
    asked = options(backbones[kind], root, tmp_path / "run", answer=answer, **how)
    result, _ = train_language(asked)
    assert result.method == f"{how['method']}+int4"
    again, _, _ = evaluate_language_run(tmp_path / "run", Evaluation(device="cpu"))
    stored, predicted = (
        json.loads((tmp_path / "run" / name).read_text())["predictions"]
        for name in ("predictions.json", "predictions-evaluation.json")
    )
    assert again.value == pytest.approx(result.value) and predicted == stored
    model = unwrap(load_language_run(tmp_path / "run")[0].model)
    assert trains_as_rounded(model)
    head = model.get_output_embeddings() if answer == "scoring" else model.classifier
    assert not trains_as_rounded(head)
    found, weight = logits(model) if kind != "bert" else None, head.weight
    quantise(model, "torchao-int4")
    assert head.weight is weight
    assert found is None or torch.allclose(logits(model), found, atol=1e-5)


def test_what_cannot_be_trained_rounded_is_refused_before_training(
    backbones: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no routed experts, and --qat int4 of linear layers takes no dropout"):
        train_language(options(backbones["llama"], root, tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"goes with --method full, lora and rslora, .* what dora adds"):
        train_language(options(backbones["llama"], root, tmp_path / "run", method="dora", dropout=0.0))
    narrow = mixture(tmp_path / "joyai", moe_intermediate_size=36)
    with pytest.raises(ConfigError, match="groups of 64 do not divide 36 inputs"):
        train_language(options(narrow, root, tmp_path / "run"))
    rounded = mixture(tmp_path / "wide", moe_intermediate_size=64)
    with pytest.raises(ConfigError, match="must be one of int4"):
        LanguageOptions(backbone=str(rounded), qat="int3")
    assert not (tmp_path / "run").exists()
