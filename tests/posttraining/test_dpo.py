"""Preferences: the reference, the loss, what is learnt, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_chats import pair, write_lines
from tiny_language import decoder, save, tokenizer
from torch.nn import functional as F

from pyra.errors import ConfigError, OutputError
from pyra.scripts.main import main
from pyra.tasks.fitting.callbacks import ProgressBar
from pyra.tasks.fitting.loop import training_values
from pyra.tasks.language.runs import Subject
from pyra.tasks.posttraining.dpo import (
    PreferenceTrainer,
    encoded,
    likelihoods,
    preference_trainer,
    train_dpo,
    training_data,
)
from pyra.tasks.posttraining.dpo_options import LOSSES, DpoOptions
from pyra.tasks.posttraining.preferences import KeptPairs
from pyra.tasks.posttraining.rows import read_rows
from pyra.tasks.posttraining.runs import adapted_policy, load_posttrained, new_start
from pyra.tasks.posttraining.sft import train_sft
from pyra.tasks.posttraining.sft_options import SftOptions
from pyra.tasks.posttraining.trainer import checkpointing, own_forward

CPU = torch.device("cpu")


class Interruption(BaseException):
    """Stands for whatever ends a process from outside."""


def options(backbone: Path, data: Path, output: Path, **changes: Any) -> DpoOptions:
    settings = {"epochs": 3, "batch_size": 8, "device": "cpu", "lr": 2e-2, "targets": "q_proj,v_proj", "rank": 4}
    return DpoOptions(backbone=str(backbone), data=str(data), output=str(output), **{**settings, **changes})


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return found


def begun(asked: DpoOptions) -> tuple[Subject, Any, KeptPairs]:
    """Return what a run begins with: the subject, its adapted model and the training pairs."""
    subject = new_start(asked).subject
    kept = encoded(read_rows(asked.data).train, subject)
    return subject, adapted_policy(subject.model, asked).eval(), kept


def log_probability(model: Any, ids: list[int], start: int) -> torch.Tensor:
    labels = torch.tensor([[-100] * start + ids[start:]])
    return -model(input_ids=torch.tensor([ids]), labels=labels, use_cache=False).loss * (len(ids) - start)


def sgd(model: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters())


MERGING = {"method": "pyra", "keep": "0:0.5"}


@pytest.mark.parametrize("changes", [{"method": "lora"}, MERGING], ids=["lora", "pyra"])
def test_the_reference_is_the_adapter_switched_off(
    changes: dict[str, Any], llama: Path, pairs: Path, tmp_path: Path
) -> None:
    asked = options(llama, pairs, tmp_path, **changes)
    subject, model, kept = begun(asked)
    start = Subject(model, subject.encoder, subject.max_length, "generation")
    found = likelihoods(start, kept.pairs, asked, CPU, "reference")
    assert isinstance(model, PeftModel)
    with torch.no_grad(), model.disable_adapter():
        for (chosen, rejected), one in zip(found, kept.pairs, strict=True):
            for value, row in ((chosen, one.chosen), (rejected, one.rejected)):
                assert value == pytest.approx(float(log_probability(model, row.ids, row.start)), abs=1e-3)
    spread = [chosen - rejected for chosen, rejected in found]
    assert max(spread) - min(spread) > 0.1


def test_the_loss_is_one_made_by_hand(llama: Path, pairs: Path, tmp_path: Path) -> None:
    """On a merging decoder whose adapter has moved: -log sigmoid of beta times the difference of log-ratios."""
    asked = options(llama, pairs, tmp_path, beta=0.3, batch_size=4, **MERGING)
    subject, model, kept = begun(asked)
    few = kept.pairs[:4]
    start = Subject(model, subject.encoder, subject.max_length, "generation")
    reference = likelihoods(start, few, asked, CPU, "reference")
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    expected = []
    for one, (chosen, rejected) in zip(few, reference, strict=True):
        gained = log_probability(model, one.chosen.ids, one.chosen.start) - chosen
        lost = log_probability(model, one.rejected.ids, one.rejected.start) - rejected
        expected.append(-F.logsigmoid(0.3 * (gained - lost)))
    mean = torch.stack(expected).mean()
    assert abs(float(mean) - math.log(2)) > 1e-2
    mean.backward()
    trained = {name: p for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    model.zero_grad()

    values = training_values(asked, tmp_path, CPU, 4) | checkpointing(asked)
    with own_forward(model):
        trainer = preference_trainer(
            model,
            subject.encoder,
            training_data(few, reference),
            lambda: torch.optim.SGD(model.parameters()),
            values,
            asked,
        )
        (batch,) = list(trainer.get_train_dataloader())
        loss = trainer.compute_loss(trainer.model.train(), batch)
        loss.backward()
    torch.testing.assert_close(loss, mean, rtol=1e-5, atol=1e-6)
    assert any("reactivation" in name for name in trained) and any("lora_A" in name for name in trained)
    largest = max(float(one.abs().max()) for one in gradients.values())
    for name, parameter in trained.items():
        assert float((parameter.grad - gradients[name]).abs().max()) <= 1e-4 * largest, name
    assert "forward" not in model.get_base_model().__dict__


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", MERGING),
    ("bare", {"method": "full", "loss": "ipo"}),
    ("llama", {"method": "dora", "loss": "apo_zero"}),
    ("joyai", {"method": "pyra", "rate": 0.3, "targets": None, "loss": "robust", "label_smoothing": 0.1}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=[f"{kind}-{changes['method']}" for kind, changes in CASES])
def test_a_finished_run(
    kind: str, changes: dict[str, Any], pairs: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    asked = options(request.getfixturevalue(kind), pairs, tmp_path / "run", **changes)
    result, _ = train_dpo(asked)
    assert (result.metric, result.higher_is_better, result.num_test) == ("preference_accuracy", True, 6)
    record = told(tmp_path / "run")
    held, logged = record["held_out"], record["losses"]
    assert held["accuracy"] == result.value and held["margin"] > 0 and result.value >= 0.5
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"} <= set(logged[0])
    assert logged[0]["rewards/margins"] == pytest.approx(0, abs=1e-4) and logged[-1]["rewards/margins"] > 1e-3
    stored = json.loads((tmp_path / "run" / "predictions.json").read_text())
    right = sum(a > b for a, b in zip(stored["rewards_chosen"], stored["rewards_rejected"], strict=True))
    assert right / 6 == result.value

    subject, again = load_posttrained(tmp_path / "run")
    assert isinstance(again, DpoOptions)
    kept = encoded(read_rows(again.data).test, subject)
    found = likelihoods(subject, kept.pairs, again, CPU, "again")
    fresh = load_start(asked)
    reference = likelihoods(fresh, kept.pairs, again, CPU, "start")
    rewards = [again.beta * (own[0] - other[0]) for own, other in zip(found, reference, strict=True)]
    assert rewards == pytest.approx(stored["rewards_chosen"], abs=1e-3)


def load_start(asked: DpoOptions) -> Subject:
    torch.manual_seed(asked.seed)
    subject, model, _ = begun(asked)
    return Subject(model, subject.encoder, subject.max_length, "generation")


def test_after_supervised_training_the_reference_is_its_outcome(
    llama: Path, chats: Path, pairs: Path, tmp_path: Path
) -> None:
    own = {"device": "cpu", "batch_size": 8, "lr": 1e-2}
    train_sft(
        SftOptions(backbone=str(llama), data=str(chats), output=str(tmp_path / "sft"), epochs=1, **MERGING, **own)
    )
    asked = DpoOptions(adapter=str(tmp_path / "sft"), data=str(pairs), output=str(tmp_path / "dpo"), steps=3, **own)
    result, _ = train_dpo(asked)
    assert (result.method, result.epochs) == ("pyra", None)
    assert told(tmp_path / "dpo")["losses"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    shutil.rmtree(tmp_path / "sft")  # the run holds all that it needs
    assert load_posttrained(tmp_path / "dpo")[1].method == "pyra"


def test_another_model_as_reference(llama: Path, bare: Path, pairs: Path, tmp_path: Path) -> None:
    other = save(decoder(seed=5, spread=0.3), tokenizer(), tmp_path / "other")
    result, _ = train_dpo(options(llama, pairs, tmp_path / "run", reference=str(other), steps=1))
    first = told(tmp_path / "run")["losses"][0]
    assert abs(first["loss"] - math.log(2)) > 1e-3 and abs(first["rewards/margins"]) > 1e-3
    assert result.settings is not None and "reference" not in result.settings
    words = tokenizer(pad=True)
    words.add_tokens(["<more>"])
    strange = save(decoder(vocab=401), words, tmp_path / "strange")
    with pytest.raises(ConfigError, match=r"--reference .*strange has another vocabulary \(\d+ tokens, the backbone"):
        train_dpo(options(llama, pairs, tmp_path / "no", reference=str(strange)))
    narrow = save(decoder(vocab=300), tokenizer(), tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"--reference .*narrow has weights of 300 tokens"):
        train_dpo(options(llama, pairs, tmp_path / "no", reference=str(narrow)))
    with pytest.raises(ConfigError, match=r"--reference .*pairs.*no config.json there"):
        train_dpo(options(llama, pairs, tmp_path / "no", reference=str(pairs)))
    assert not (tmp_path / "no").exists()


def test_an_interrupted_run_goes_on_to_the_same_bits(
    llama: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"save_steps": 2, "beta": 0.3, **MERGING}  # two steps an epoch, six in all
    train_dpo(options(llama, pairs, tmp_path / "whole", **changes))
    wanted = options(llama, pairs, tmp_path / "run", **changes)
    plain = ProgressBar.on_step_end

    def end(self: ProgressBar, args: Any, state: Any, control: Any, **more: Any) -> None:
        plain(self, args, state, control, **more)
        if state.global_step == 3:
            raise Interruption

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(ProgressBar, "on_step_end", end)
        train_dpo(wanted)
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(OutputError, match=r"was begun with other options \(--beta\)"):
        train_dpo(options(llama, pairs, tmp_path / "run", **{**changes, "beta": 0.1, "resume": True}))
    wanted.resume = True
    result, _ = train_dpo(wanted)
    whole, own = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "run"))
    assert own.read_bytes() == whole.read_bytes()
    for name in ("losses", "held_out"):
        assert told(tmp_path / "run")[name] == told(tmp_path / "whole")[name]
    monkeypatch.setattr(PreferenceTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert train_dpo(wanted) == (result, [])


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss(loss: str, llama: Path, pairs: Path, tmp_path: Path) -> None:
    smoothing = 1e-3 if loss == "exo_pair" else 0.0
    asked = options(llama, pairs, tmp_path, loss=loss, label_smoothing=smoothing, batch_size=2)
    subject, model, kept = begun(asked)
    values = training_values(asked, tmp_path, CPU, 2) | checkpointing(asked)
    data = training_data(kept.pairs[:2], [(-1.0, -2.0)] * 2)
    trainer = preference_trainer(
        model, subject.encoder, data, lambda: torch.optim.SGD(model.parameters()), values, asked
    )
    (batch,) = list(trainer.get_train_dataloader())
    assert trainer.compute_loss(trainer.model.train(), batch).isfinite()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data {equal}", "equal.jsonl, line 2: chosen and rejected are the same, there is nothing to prefer"),
        ("--data {blank}", "blank.jsonl, line 1: rejected is empty"),
        ("--data {pairs} --loss kto", "--loss: 'kto' is not one of sigmoid, sigmoid_norm"),
        ("--data {pairs} --beta 0", "--beta must be above 0"),
        ("--data {pairs} --loss hinge --label-smoothing 0.1", "--label-smoothing goes with --loss sigmoid, robust"),
        ("--data {pairs} --loss robust --label-smoothing 0.6", "--label-smoothing must be below 0.5"),
        ("--data {pairs} --loss exo_pair", "--loss exo_pair needs --label-smoothing above 0"),
        ("--data {pairs} --dropout 0.1", "--dropout: trl switches it off for preferences"),
        ("--data {pairs} --max-length 4", "--max-length 4: every pair is longer"),
        ("--data {pairs} --packing", "unknown flag '--packing'"),
        ("--data {pairs} --reference no/such/folder", "--reference no/such/folder: no such folder"),
    ],
)
def test_wrong_input_is_one_line(
    flags: str, message: str, llama: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    equal = write_lines(tmp_path / "equal.jsonl", [pair(1), {**pair(2), "rejected": pair(2)["chosen"]}])
    blank = write_lines(tmp_path / "blank.jsonl", [{**pair(2), "rejected": " "}, pair(3)])
    given = flags.format(equal=equal, blank=blank, pairs=pairs).split()
    places = ["--backbone", str(llama), "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main(["dpo", *places, *given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_command(llama: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = ["--backbone", str(llama), "--data", str(pairs), "--output", str(tmp_path / "run")]
    assert main(["dpo", *places, "--device", "cpu", "--steps", "2", "--batch-size", "4"]) == 0
    shown = capsys.readouterr().out
    assert "preferred (%)" in shown and "of 6 preferred (standard error" in shown and "saved to" in shown
    with pytest.raises(SystemExit) as stopped:
        main(["dpo", "--help"])
    assert stopped.value.code == 0 and "pyra dpo --adapter runs/sft" in capsys.readouterr().out
