"""From chats to a run folder and back, with and without prompts that merge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chats import TEMPLATE, as_rows, chat, write_lines
from tiny_language import decoder, tokenizer

from pyra.adapters import adapt
from pyra.config import PyraConfig
from pyra.errors import ConfigError, DataError, OutputError, TrainingError
from pyra.scripts.main import main
from pyra.tasks.fitting.callbacks import ProgressBar
from pyra.tasks.fitting.loop import training_values
from pyra.tasks.fitting.trainer import KeepingTrainer
from pyra.tasks.language.tokens import IGNORED, Encoder
from pyra.tasks.posttraining.chat import read_chats
from pyra.tasks.posttraining.encoding import encode_chats
from pyra.tasks.posttraining.rows import read_rows
from pyra.tasks.posttraining.runs import load_posttrained, run_kind
from pyra.tasks.posttraining.scoring import score_answers
from pyra.tasks.posttraining.sft import chat_trainer, encoded, train_sft, training_data
from pyra.tasks.posttraining.sft_options import SftOptions
from pyra.tasks.posttraining.trainer import checkpointing
from pyra.tasks.results import read_result
from pyra.tasks.runs import load_run


class Interruption(BaseException):
    """Stands for whatever ends a process from outside."""


def options(backbone: Path, data: Path, output: Path, **changes: Any) -> SftOptions:
    settings = {"epochs": 2, "batch_size": 8, "device": "cpu", "lr": 1e-2, "targets": "q_proj,v_proj", "rank": 4}
    return SftOptions(backbone=str(backbone), data=str(data), output=str(output), **{**settings, **changes})


def told(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "training.json").read_text())
    return found


def test_a_step_of_a_merging_decoder_is_one_made_by_hand(tmp_path: Path) -> None:
    """The loss is the model's own, and the step what its gradient says, with a learning rate of 0.1 and no momentum."""
    words = tokenizer()
    words.chat_template = TEMPLATE
    encoder = Encoder(words, chat=True)
    kept = encode_chats(read_chats(as_rows(map(chat, range(4))), None), encoder, 200).rows

    def fresh() -> Any:
        model = adapt(decoder(spread=0.1), pyra=PyraConfig(keep={0: 0.5}))
        return model.requires_grad_(True).train()

    hand = fresh()
    width = max(len(row.ids) for row in kept)
    ids = torch.tensor([row.ids + [encoder.pad_id] * (width - len(row.ids)) for row in kept])
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(kept):
        labels[place, row.start : len(row.ids)] = ids[place, row.start : len(row.ids)]
        mask[place, : len(row.ids)] = 1
    loss = hand(input_ids=ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    plain = decoder(spread=0.1)
    assert float(plain(input_ids=ids, attention_mask=mask, labels=labels).loss) != pytest.approx(float(loss), rel=1e-4)

    model = fresh()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    asked = options(tmp_path, tmp_path, tmp_path, batch_size=4)
    values = training_values(asked, tmp_path, torch.device("cpu"), 4) | checkpointing(asked)
    values |= {"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None, "warmup_steps": 0, "max_steps": 1}
    values |= {"max_grad_norm": 0.0, "save_strategy": "no"}
    trainer = chat_trainer(
        model, encoder, training_data(kept), lambda: torch.optim.SGD(model.parameters(), lr=0.1), values
    )
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(float(loss), rel=1e-5)
    moved = 0.0
    for name, parameter in hand.named_parameters():
        step = torch.zeros_like(parameter) if parameter.grad is None else 0.1 * parameter.grad
        now = model.get_parameter(name)
        torch.testing.assert_close(now.detach(), before[name] - step, rtol=1e-4, atol=1e-6, msg=name)
        moved = max(moved, float(step.abs().max()))
    assert moved > 1e-3
    assert any("reactivation" in name and p.grad is not None for name, p in hand.named_parameters())


CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"method": "pyra", "keep": "0:0.5"}),
    ("llama", {"method": "lora", "packing": True, "max_length": 128, "epochs": 6}),
    ("bare", {"method": "full", "lr": 1e-2, "accumulate": 2}),
    ("llama", {"method": "adalora", "gradient_checkpointing": True}),
    ("joyai", {"method": "pyra", "rate": 0.3, "targets": None, "thinking": "auto"}),
]


@pytest.mark.parametrize(("kind", "changes"), CASES, ids=[f"{kind}-{changes['method']}" for kind, changes in CASES])
def test_a_finished_run_is_read_again(
    kind: str, changes: dict[str, Any], chats: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    asked = options(request.getfixturevalue(kind), chats, tmp_path / "run", **changes)
    result, notes = train_sft(asked)
    assert read_result(tmp_path / "run") == result and run_kind(tmp_path / "run") == "sft"
    assert (result.task, result.metric, result.higher_is_better) == (chats.name, "answer_nll", False)
    assert result.value == result.answer_nll and result.num_test == 6 and (result.train_tokens or 0) > 24
    assert (result.rate > 0) == any(result.schedule) == ("pyra" in changes["method"])
    held = told(tmp_path / "run")["held_out"]
    assert held["answer_nll"] == result.value < held["answer_nll_before"]
    assert held["difference"] == pytest.approx(held["answer_nll"] - held["answer_nll_before"])
    assert any("has no chat template" in note for note in notes) == (kind != "llama")
    names = sorted(entry.name for entry in (tmp_path / "run").iterdir() if not entry.name.startswith("."))
    assert names == [
        "adapter", "backbone.json", "chat_template.jinja", "data.json", "options.json", "predictions.json",
        "result.json", "training.json",
    ]  # fmt: skip
    assert "trl" not in (tmp_path / "run" / "adapter" / "README.md").read_text()

    subject, again = load_posttrained(tmp_path / "run")
    assert isinstance(again, SftOptions) and again.method == asked.method
    with pytest.raises(DataError, match="run is a run of pyra sft: what is about images does not take it"):
        load_run(tmp_path / "run")
    assert not any("lora" in name for name, _ in subject.model.named_parameters())
    rows = read_rows(again.data).test
    loss = score_answers(subject, encoded(rows, subject, again).rows, again, torch.device("cpu"), "again")
    stored = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert loss.mean == pytest.approx(result.value, abs=1e-5)
    assert loss.nats == pytest.approx(stored["answer_nats"], abs=1e-3) and loss.tokens == stored["answer_tokens"]


def test_an_interrupted_run_goes_on_to_the_same_bits(
    llama: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"method": "pyra", "keep": "0:0.5"}
    train_sft(options(llama, chats, tmp_path / "whole", save_steps=2, **changes))
    wanted = options(llama, chats, tmp_path / "run", save_steps=2, **changes)
    plain = ProgressBar.on_step_end

    def end(self: ProgressBar, args: Any, state: Any, control: Any, **more: Any) -> None:
        plain(self, args, state, control, **more)
        if state.global_step == 5:  # three steps an epoch, checkpoints after 2, 3, 4
            raise Interruption

    with monkeypatch.context() as patch, pytest.raises(Interruption):
        patch.setattr(ProgressBar, "on_step_end", end)
        train_sft(wanted)
    assert not (tmp_path / "run" / "result.json").exists()
    with pytest.raises(OutputError, match=r"was begun with other options \(--lr\)"):
        train_sft(options(llama, chats, tmp_path / "run", **{**changes, "save_steps": 2, "lr": 1e-3, "resume": True}))
    wanted.resume = True
    result, _ = train_sft(wanted)
    whole, own = (tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "run"))
    assert own.read_bytes() == whole.read_bytes()
    assert told(tmp_path / "run")["losses"] == told(tmp_path / "whole")["losses"]
    monkeypatch.setattr(KeepingTrainer, "train", lambda *_, **__: pytest.fail("trained again"))
    assert train_sft(wanted) == (result, [])


def test_a_run_goes_on_from_another(llama: Path, chats: Path, tmp_path: Path) -> None:
    first, _ = train_sft(options(llama, chats, tmp_path / "first", method="pyra", keep="0:0.5", rank=2))
    own = {"data": str(chats), "output": str(tmp_path / "second"), "device": "cpu", "batch_size": 8, "steps": 3}
    asked = SftOptions(adapter=str(tmp_path / "first"), lr=1e-2, **own)
    second, _ = train_sft(asked)
    assert (second.method, second.rate, second.trained_parameters) == ("pyra", first.rate, first.trained_parameters)
    held = told(tmp_path / "second")["held_out"]
    assert held["answer_nll_before"] == pytest.approx(first.value, abs=1e-5)
    assert held["answer_nll"] < held["answer_nll_before"] and second.epochs is None
    assert load_posttrained(tmp_path / "second")[1].backbone == str(llama)
    with pytest.raises(ConfigError, match=r"--rank 4: .*first was trained with 2; leave it out"):
        train_sft(SftOptions(adapter=str(tmp_path / "first"), rank=4, **own))
    with pytest.raises(DataError, match="holds no finished run"):
        train_sft(SftOptions(adapter=str(tmp_path / "none"), **own))


def test_a_training_that_diverges_is_told(llama: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="lower --lr"):
        train_sft(options(llama, chats, tmp_path / "run", method="full", lr=1e8, epochs=8))
    assert not (tmp_path / "run").exists()


def test_thinking_reaches_the_template(llama: Path, tmp_path: Path) -> None:
    rows = [{**chat(number), **({} if number % 2 else {"thinking": number % 4 == 0})} for number in range(12)]
    data = write_lines(tmp_path / "mixed.jsonl", rows)
    asked = options(llama, data, tmp_path / "run", epochs=1, thinking="off", held_out=0.3)
    result, notes = train_sft(asked)
    assert result.num_test == 4 and "held out to be scored, by a fixed draw: 4 of 12 rows" in notes
    subject, _ = load_posttrained(tmp_path / "run")
    assert subject.encoder.values == {"thinking": False}
    empty = "<think></think>"
    for row in read_rows(str(data)).train:
        (found,) = encoded([row], subject, asked).rows
        text = subject.encoder.tokenizer.decode(found.ids[: found.start])
        assert text.endswith(empty) == (row.values.get("thinking") is not True)


def test_a_finished_run_of_other_rows_or_words_is_not_taken_for_this_one(llama: Path, tmp_path: Path) -> None:
    data, template = write_lines(tmp_path / "a.jsonl", map(chat, range(12))), tmp_path / "own.jinja"
    words = "{%- for m in messages -%}{{ '|' + m['content'] + eos_token }}{%- endfor -%}"
    template.write_text(words)
    asked = options(llama, data, tmp_path / "run", steps=1, resume=True, chat_template=str(template))
    first, _ = train_sft(asked)
    assert train_sft(asked)[0] == first
    template.write_text(words.replace("|", "/"))
    with pytest.raises(DataError, match="was made from other data of a"):
        train_sft(asked)
    template.write_text(words)
    write_lines(data, map(chat, range(1, 13)))
    with pytest.raises(DataError, match="was made from other data of a"):
        train_sft(asked)


def test_what_is_left_out_and_what_is_not_read(llama: Path, tmp_path: Path) -> None:
    long = {"messages": [{"role": "user", "content": "a fine film " * 60}, {"role": "assistant", "content": "no"}]}
    data = write_lines(
        tmp_path / "a.jsonl", [*({**chat(n), "id": n} for n in range(9)), long, *map(chat, range(9, 12))]
    )
    result, notes = train_sft(options(llama, data, tmp_path / "run", epochs=1, max_length=100, held_out=0.2))
    assert "examples longer than 100 tokens, left out: 1" in notes and "keys of the rows that are not read: id" in notes
    assert json.loads((tmp_path / "run" / "data.json").read_text())["left_out"] == 1
    assert result.num_test is not None and result.num_test <= 3


@pytest.fixture
def wrong(tmp_path: Path) -> dict[str, Path]:
    """Files with something wrong."""
    (tmp_path / "template.jinja").write_text("{%- for")
    (tmp_path / "empty.jinja").write_text(" ")
    return {
        "one": write_lines(tmp_path / "one.jsonl", [chat(1), {"messages": [{"role": "user", "content": "hi"}]}]),
        "none": write_lines(tmp_path / "none.jsonl", []),
        "template": tmp_path / "template.jinja",
        "blank": tmp_path / "empty.jinja",
    }


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data {one}", "one.jsonl, line 2: the last message is of user: a chat ends with the assistant's answer"),
        ("--data {none}", "none.jsonl holds no rows"),
        ("", "--data is missing: give a .jsonl file"),
        ("--data x --methd lora", "unknown flag '--methd' (did you mean '--method'"),
        ("--data x --method linear", "--method: 'linear' is not one of pyra, tome, full, lora"),
        ("--data x --method bottleneck", "--method: 'bottleneck' is not one of pyra, tome, full, lora"),
        ("--data x --method pyra", "--method pyra needs --rate"),
        ("--data {chats} --chat-template {template}", "template.jinja fails ("),
        ("--data {chats} --chat-template {blank}", "empty.jinja is empty: give a file with a Jinja chat template"),
        ("--data {chats} --chat-template none.jinja", "--chat-template none.jinja cannot be read: No such file"),
        ("--data {chats} --chat-template-kwargs 3", "--chat-template-kwargs must be a JSON object"),
        ("--data {chats} --chat-template-kwargs {{", "is not JSON"),
        ("--data {chats} --max-length 5", "--max-length 5: every example is longer"),
        ("--data {chats} --max-length 5000", "reads 256 tokens at most"),
        ("--data x --thinking maybe", "--thinking: 'maybe' is not one of auto, on, off"),
        ("--data x --held-out 1", "--held-out must be in (0, 1), got 1.0"),
        ("--data x --steps 0", "--steps must be above 0"),
        ("--data x --method tome --rate 0.5 --packing", "--packing: --method tome merges the tokens of one prompt"),
        ("--data {chats} --adapter {chats}", "holds no finished run"),
        ("--data {chats} --output {chats}/run", "lies inside --data"),
    ],
)
def test_wrong_input_is_one_line(
    flags: str,
    message: str,
    llama: Path,
    chats: Path,
    wrong: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = flags.format(**wrong, chats=chats).split()
    output = [] if "--output" in given else ["--output", str(tmp_path / "run")]
    assert main(["sft", "--backbone", str(llama), "--device", "cpu", *given, *output]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("pyra: error: ")
    assert not (tmp_path / "run").exists() and not (chats / "run").exists()


def test_no_switch_for_thinking(bare: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["sft", "--backbone", str(bare), "--data", str(chats), "--device", "cpu", "--output", str(tmp_path / "run")]
    assert main([*given, "--thinking", "on"]) == 2
    error = capsys.readouterr().err
    assert "--thinking on: the chat template of" in error and "heeds neither enable_thinking nor thinking" in error
    assert error.count("\n") == 1


def test_the_command(llama: Path, chats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "sft",
        "--backbone",
        str(llama),
        "--data",
        str(chats),
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main([*given, "--method", "pyra", "--keep", "0:0.5", "--steps", "2", "--batch-size", "8"]) == 0
    shown = capsys.readouterr().out
    assert "answer_nll" in shown and "pyra" in shown and "tokens of answers" in shown and "saved to" in shown
    assert main(["results", str(tmp_path)]) == 0
    assert chats.name in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main(["sft", "--help"])
    assert stopped.value.code == 0 and "pyra sft --backbone" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*given, "--print-config"])
    file = tmp_path / "run.yaml"
    file.write_text(capsys.readouterr().out)
    assert "packing: false" in file.read_text()
    assert main(["sft", "--config", str(file)]) == 2
    assert "already holds a run" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["sft", "dpo", "rl"])
def test_without_trl_the_command_says_what_to_install(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    assert main([verb, "--backbone", "x", "--data", "y"]) == 2
    assert f"pyra {verb} needs trl: pip install 'pyra-adapt[posttraining]'" in capsys.readouterr().err
