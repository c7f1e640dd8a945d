"""The MTP layer trained on texts of a task, the folder that is written, and the study of what it drafts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_language import mixture
from torch import Tensor

from pyra.backbones.joyai_checkpoint import MTP, load_model
from pyra.backbones.joyai_mtp import IGNORED, attach_mtp, mtp_loss
from pyra.errors import ConfigError
from pyra.scripts import study_mtp, train_mtp
from pyra.tasks.language.calibration import encoded
from pyra.tasks.language.data import load_text_task
from pyra.tasks.language.models import load_encoder
from pyra.tasks.language.mtp_training import MtpObjective, MtpRecipe, held_out_mtp

IDS = torch.randint(3, 400, (2, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture(tmp_path_factory.mktemp("mixtures") / "tiny", initializer_range=0.05)


@pytest.fixture(scope="module")
def trained(backbone: Path, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "mtp"
    assert train_mtp.main(arguments(backbone, root, folder, "--steps", "30")) == 0
    return folder


def arguments(backbone: Path, root: Path, output: Path, *more: str) -> list[str]:
    told = {"--backbone": backbone, "--root": root, "--output": output, "--lr": "3e-3", "--batch-size": 4}
    return [*(str(part) for pair in told.items() for part in pair), "--device", "cpu", *more]


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_the_decoder_stays_to_the_bit_and_the_layer_learns(backbone: Path, trained: Path) -> None:
    before, after = stored(backbone), stored(trained)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert {name.split(".")[2] for name in after.keys() - before.keys()} == {"4"} and (trained / MTP).is_file()
    assert json.loads((trained / "config.json").read_text())["num_nextn_predict_layers"] == 1
    told = json.loads((trained / "training.json").read_text())
    assert told["losses"][-1] < told["losses"][0] - 0.3
    assert told["score"]["tokens"] > 0 and "root" not in told["options"] and str(backbone) not in json.dumps(told)
    fresh = attach_mtp(load_model(backbone))
    assert not torch.equal(load_model(trained, mtp=True).mtp.eh_proj.weight, fresh.mtp.eh_proj.weight)  # type: ignore[union-attr]


def test_a_layer_is_trained_further(root: Path, trained: Path, tmp_path: Path) -> None:
    assert train_mtp.main(arguments(trained, root, tmp_path / "more", "--steps", "1")) == 0
    first, more = (json.loads((folder / "training.json").read_text()) for folder in (trained, tmp_path / "more"))
    assert more["losses"][0] < first["losses"][0] - 0.3  # begins where the first one ended
    assert load_encoder(str(tmp_path / "more")).prompt("Tom") == load_encoder(str(trained)).prompt("Tom")


def test_an_adapter_trains_along_and_is_folded_in(backbone: Path, root: Path, tmp_path: Path) -> None:
    more = ("--steps", "3", "--trunk", "lora", "--rank", "2", "--answers-only")
    assert train_mtp.main(arguments(backbone, root, tmp_path / "a", *more)) == 0
    before, after = stored(backbone), stored(tmp_path / "a")
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert before.keys() < after.keys() and changed and all(".self_attn." in name for name in changed)


def test_what_is_minimised_is_the_loss_of_both() -> None:
    from expert_models import make

    model = attach_mtp(make())
    labels = IDS.clone()
    labels[:, :5] = IGNORED
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}
    outputs = model(IDS, labels=labels, output_hidden_states=True)
    drafts = mtp_loss(model, outputs.hidden_states[-1], IDS, labels)
    alone, joint = (MtpObjective(model, weight)(**batch)["loss"] for weight in (None, 0.1))
    torch.testing.assert_close(alone, drafts)
    torch.testing.assert_close(joint, outputs.loss + 0.1 * drafts)
    alone.backward()
    assert model.model.layers[1].mlp.gate.weight.grad is None and model.mtp.eh_proj.weight.grad is not None


def test_held_out_answers_are_measured_as_they_are_trained_on(root: Path, trained: Path) -> None:
    model, encoder = load_model(trained, mtp=True).eval(), load_encoder(str(trained))
    rows = encoded(load_text_task("gsm8k", str(root)), encoder, "test", None, 512).rows
    expected = []
    for row in rows:
        ids, labels = torch.tensor([row.ids]), torch.tensor([[IGNORED] * row.start + row.ids[row.start :]])
        with torch.no_grad():
            hidden = model.model(ids).last_hidden_state
            expected.append(float(mtp_loss(model, hidden, ids, labels, num_items=1)))
    for size in (1, 4):
        score = held_out_mtp(model, rows, encoder, size)
        assert score["mtp"] == pytest.approx(sum(expected) / score["tokens"], rel=1e-5)
        assert score["tokens"] == sum(len(row.ids) - row.start for row in rows) and 0 <= score["agree"] <= 1


@pytest.mark.parametrize("rate", [None, 0.3])
def test_the_study_writes_what_it_measured(rate: float | None, root: Path, trained: Path, tmp_path: Path) -> None:
    sizes = ["--limit", "2", "--rounds", "1", "--max-new-tokens", "8", "--draft-tokens", "1,3"]
    told = ["--backbone", str(trained), "--root", str(root), "--output", str(tmp_path / "a.json"), "--device", "cpu"]
    assert study_mtp.main([*told, *sizes, *([] if rate is None else ["--rate", str(rate)])]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert [row["draft_tokens"] for row in found["rows"]] == [0, 1, 3]
    for row in found["rows"]:
        assert row["tokens"] == 14 and 1 <= row["tokens_a_forward"] <= 1 + row["draft_tokens"]
        assert row["decoder_forwards"] <= 14 and row["speedup"] > 0
    assert found["rows"][0]["decoder_forwards"] == 14 and found["rows"][0]["speedup"] == 1
    assert str(root) not in json.dumps(found) and found["mtp_training"]["options"]["steps"] == 30


REFUSED: dict[str, tuple[list[str], str]] = {
    "no output": (["--output", " "], "--output is missing"),
    "another trunk": (["--trunk", "full"], "--trunk must be one of frozen, lora, got 'full'"),
    "several at once": (["--steps", "0", "--lr", "0"], "--steps must be above 0; --lr must be above 0"),
    "a weight that is no number": (["--weight", "nan"], "--weight must be above 0"),
    "too long": (["--max-length", "9999"], "reads 2048 tokens at most"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_options_that_do_not_fit(case: str, backbone: Path, root: Path, tmp_path: Path) -> None:
    more, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said) as caught:
        train_mtp.main(arguments(backbone, root, tmp_path / "a", *more))
    assert "\n" not in str(caught.value) and not (tmp_path / "a").exists()


def test_folders_that_do_not_fit(backbone: Path, root: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is there already: choose another --output"):
        train_mtp.main(arguments(backbone, root, trained))
    told: list[Any] = ["--backbone", str(backbone), "--root", str(root), "--output", str(tmp_path / "a.json")]
    with pytest.raises(ConfigError, match="holds no MTP weights: train them with"):
        study_mtp.main(told)
    for more in (["--rounds", "0"], ["--draft-tokens", "0,1"], ["--max-new-tokens", "1"]):
        with pytest.raises(ConfigError, match="must be 1 at least"):
            study_mtp.main([*told, *more])


def test_a_recipe_has_the_weight_of_the_report() -> None:
    assert MtpRecipe().weight == 0.1 and MtpRecipe().trunk == "frozen"
