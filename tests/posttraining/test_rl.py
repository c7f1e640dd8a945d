"""``pyra rl``: options, data, runs of every algorithm, curves, going on, and prompts that merge."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import decoder, save, tokenizer

from pyra.errors import ConfigError, DataError
from pyra.files import read_json
from pyra.scripts.main import main
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.posttraining import rl
from pyra.tasks.posttraining.questions import encode_questions
from pyra.tasks.posttraining.rl import summary_of, train_rl
from pyra.tasks.posttraining.rl_options import RlOptions
from pyra.tasks.posttraining.rl_study import by_rollout, make_pupil, study_panels, study_table, teach
from pyra.tasks.posttraining.rl_trainer import curves_of, rollout_trainer
from pyra.tasks.posttraining.rows import Row
from pyra.tasks.posttraining.runs import load_posttrained
from pyra.tasks.posttraining.templates import plain_template
from pyra.tasks.reports.curves import mean_line
from pyra.tasks.results import read_result

FEW: dict[str, Any] = {
    "steps": 4,
    "updates": 2,
    "batch_size": 8,
    "group": 4,
    "max_new_tokens": 4,
    "problems": 30,
    "test_problems": 6,
    "targets": "q_proj,v_proj",
    "lr": 1e-2,
    "device": "cpu",
}

GROUPS: dict[str, Any] = {"group_c_plus": 0.08, "group_c_minus": 0.06, "group_eps": 0.02}


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save(decoder(spread=0.05), tokenizer(pad=True), tmp_path_factory.mktemp("rl") / "backbone"))


def options(backbone: str, output: Path, **changed: Any) -> RlOptions:
    task = {} if "data" in changed else {"task": "arithmetic"}
    return RlOptions(backbone=backbone, output=str(output), **{**task, **FEW, **changed})


def digits(completions: list[Any], **_: Any) -> list[float]:
    """A reward that answers of random weights differ in."""
    return [float(sum(map(ord, one[0]["content"])) % 5) for one in completions]


@pytest.mark.parametrize("algorithm", ["fiberpo", "grpo", "gspo"])
def test_a_run_is_trained_scored_and_written(backbone: str, tmp_path: Path, algorithm: str) -> None:
    chosen = options(backbone, tmp_path / "run", algorithm=algorithm)
    result, notes, curves = train_rl(chosen, {"digits": digits})
    folder = tmp_path / "run"
    assert json.dumps(read_result(folder).to_dict()) == json.dumps(result.to_dict())
    assert (result.task, result.metric, result.num_test) == ("arithmetic", "exact_match", 6)
    assert result.value_before is not None and result.settings is not None
    assert result.settings["algorithm"] == algorithm and result.settings["kind"] == "rl"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    generated = read_json(folder / "predictions.json")["generated_tokens"]
    assert len(generated) == 6 and result.answer_tokens == sum(generated) / 6 and 0 < max(generated) <= 4
    told = read_json(folder / "training.json")
    assert [entry["step"] for entry in told["losses"]] == [1, 2, 3, 4] and told["losses"] == curves
    assert told["held_out"]["accuracy_before"] == result.value_before
    for place, entry in enumerate(curves):
        assert ("reward" in entry) == ("length" in entry) == (place % 2 == 0)  # a rollout has two updates
        assert {"entropy", "clipped"} <= entry.keys()
        assert ("trajectories_passing" in entry) == (algorithm == "fiberpo")
    assert not list(folder.glob("checkpoint*")) and any("chat template" in note for note in notes)
    subject, stored = load_posttrained(folder)
    assert stored == replace(chosen, backbone=str(Path(backbone).resolve()))
    assert subject.encoder.tokenizer.chat_template


def test_a_run_with_budgets_of_prompts(backbone: str, tmp_path: Path) -> None:
    _, _, curves = train_rl(options(backbone, tmp_path / "run", **GROUPS), {"digits": digits})
    for place, entry in enumerate(curves):
        shares = [entry[f"groups_{name}"] for name in ("passing", "rolling_back", "zeroed")]
        assert sum(shares) == pytest.approx(1) and (shares[0] == 1 or place % 2 == 1)
        assert 0 <= entry["trajectories_clipped"] <= 1
    assert load_posttrained(tmp_path / "run")[1].group_eps == 0.02  # type: ignore[attr-defined]


def test_data_of_ones_own_is_read_and_held_out(backbone: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"How many are {count} apples ?", "answer": count} for count in range(12)]
    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    result, notes, _ = train_rl(options(backbone, tmp_path / "run", data=str(data), held_out=0.25), {"digits": digits})
    assert (result.task, result.num_test, result.data_source) == ("problems", 3, "problems.jsonl")
    assert any("3 of 12 rows" in note for note in notes)


def test_prompts_that_merge_are_trained_and_answered_merged(backbone: str, tmp_path: Path) -> None:
    text = " ".join(["a fine film"] * 12)
    rows = [{"prompt": f"{text} {count} ?", "answer": count} for count in range(12)]
    data = tmp_path / "problems.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    chosen = options(backbone, tmp_path / "run", data=str(data), method="pyra", keep="0:0.5")
    result, _, curves = train_rl(chosen, {"digits": digits})
    assert result.rate > 0.1 and result.macs < (result.plain_macs or 0)
    assert all(abs(entry["farthest_ratio"] - 1) < 1e-4 for entry in curves[::2])  # rollouts and losses agree
    assert any(entry["farthest_ratio"] > 1 + 1e-3 for entry in curves[1::2])
    assert result.adapter is not None and result.adapter["pyra"]["keep"] == {"0": 0.5}


def test_the_divergence_from_the_model_before_is_kept_small(backbone: str, tmp_path: Path) -> None:
    text = " ".join(["a fine film"] * 12)
    data = tmp_path / "problems.jsonl"
    data.write_text(
        "\n".join(json.dumps({"prompt": f"{text} {n} ?", "answer": n}) for n in range(12)), encoding="utf-8"
    )
    chosen = options(backbone, tmp_path / "run", data=str(data), method="pyra", keep="0:0.5", beta=0.5)
    _, _, curves = train_rl(chosen, {"digits": digits})
    assert abs(curves[0]["kl"]) < 1e-6 < curves[-1]["kl"]
    names = [path.name for path in (tmp_path / "run" / "adapter").rglob("*")]
    assert "adapter_model.safetensors" in names and "ref" not in names


def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: dict[str, Any] = {"steps": 6, "save_steps": 1}
    whole, *_ = train_rl(options(backbone, tmp_path / "whole", **changed), {"digits": digits})
    calls = 0

    def interrupts(completions: list[Any], **_: Any) -> list[float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return digits(completions)

    with pytest.raises(KeyboardInterrupt):
        train_rl(options(backbone, tmp_path / "run", **changed), {"digits": interrupts})
    resumed, _, curves = train_rl(options(backbone, tmp_path / "run", **changed, resume=True), {"digits": digits})
    assert calls == 3 and [entry["step"] for entry in curves] == [1, 2, 3, 4, 5, 6]
    weights = [load_posttrained(tmp_path / name)[0].model.state_dict() for name in ("whole", "run")]
    start = decoder(spread=0.05).state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(weights[0][name], weights[1][name], rtol=0, atol=1e-6)
    assert (weights[0][name] - start[name]).abs().max() > 1e-4
    assert resumed.value == whole.value
    again, *_ = train_rl(options(backbone, tmp_path / "run", **changed, resume=True))
    assert again.value == resumed.value and again.train_seconds == resumed.train_seconds


def test_the_prompt_of_a_rollout_is_that_of_the_score(backbone: str, tmp_path: Path) -> None:
    words = tokenizer(pad=True)
    words.chat_template = plain_template(words)
    encoder = Encoder(words, chat=True)
    rows = [Row({"prompt": "12 + 7 =", "answer": 19}, "row 1"), Row({"prompt": "1 + 1 =", "answer": "2"}, "row 2")]
    questions = encode_questions(rows, encoder, 100)
    trainer: Any = rollout_trainer(
        decoder(spread=0.05), encoder, questions, [rl.Guarded(digits)], lambda: None,  # type: ignore[arg-type, return-value]
        options(backbone, tmp_path, batch_size=4), {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False},
    )  # fmt: skip
    prompts = [row["prompt"] for row in trainer.train_dataset]
    assert trainer._tokenize_prompts(prompts)[0] == [question.ids for question in questions]
    assert [question.answer for question in questions] == ["19", "2"]


def test_a_reward_that_fails_is_counted_and_told(backbone: str, tmp_path: Path) -> None:
    def fails(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        if any(int(one) % 2 for one in answer):
            raise ValueError("odd")
        return digits(completions)

    with pytest.warns(UserWarning, match="'mine' raised ValueError: odd"):
        _, notes, curves = train_rl(options(backbone, tmp_path / "run"), {"mine": fails})
    assert any("reward mine: no number for" in note for note in notes)
    assert all(0 <= entry["rewards/mine/failed"] <= 1 for entry in curves[::2])


def test_nothing_to_learn_is_told(backbone: str, tmp_path: Path) -> None:
    _, notes, _ = train_rl(options(backbone, tmp_path / "run"), {"same": lambda completions, **_: [1.0] * 8})
    assert any("answers to one prompt were never rewarded differently" in note for note in notes)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (
            {"batch_size": 30},
            "--batch-size 30 must be a multiple of --group 4, the answers to each prompt: 32",
        ),
        ({"group": 1}, "--group must be 2 at least"),
        ({"c_minus": 0.5}, "--c-minus must be below --c-plus, got 0.5 and 0.15"),
        ({"fiber_eps": 0.2}, "--fiber-eps must be much smaller"),
        ({"group_eps": 0.01}, "--group-c-plus and --group-c-minus are missing"),
        ({**GROUPS, "group_c_minus": 0.09}, "--group-c-minus must be below --group-c-plus, got 0.09 and 0.08"),
        ({**GROUPS, "c_plus": 0.08, "c_minus": 0.07}, "--group-c-plus must be below that of an answer, 0.08, got 0.08"),
        ({"algorithm": "grpo", "group_eps": 0.01}, "--group-eps: of fiberpo alone, leave out with --algorithm grpo"),
        ({"clip": 0.1}, "--clip is of grpo and gspo"),
        ({"algorithm": "ppo"}, "--algorithm must be one of fiberpo, grpo, gspo, got 'ppo'"),
        ({"rewards": ("answer", "answer")}, "--rewards must be some of answer, form, length, each once"),
        ({"form": "("}, "--form '(' is no regular expression"),
        ({"digits": 0}, "--digits must be 1 to 9, got 0"),
        ({"task": None}, "--data is missing"),
        ({"task": "arithmetic", "data": "x.jsonl"}, "give --data or --task, not both"),
        ({"updates": 0}, "--updates must be above 0"),
        ({"beta": 0.1, "method": "full"}, "--beta needs an adapter"),
    ],
)
def test_options_that_cannot_be_used_are_named(
    backbone: str, tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        options(backbone, tmp_path, **changed)
    assert told in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"answer": 1}, "row 7: no prompt (it has answer)"),
        ({"prompt": [{"role": "user"}], "answer": 1}, "message 1 of prompt has no content"),
        ({"prompt": [{"role": "assistant", "content": "a"}], "answer": 1}, "ends with the assistant's turn"),
        ({"prompt": "a"}, "no answer (it has prompt)"),
        ({"prompt": "a", "answer": True}, "found True"),
        ({"prompt": "a", "answer": float("nan")}, "answer is nan, which nothing is equal to"),
        ({"prompt": [{"role": "usr", "content": "a"}], "answer": 1}, "did you mean 'user'?"),
        ({"prompt": "a", "answer": 1, "thinking": True}, "say it for all, with --thinking"),
    ],
)
def test_rows_that_are_no_questions_are_named(row: dict[str, Any], told: str) -> None:
    words = tokenizer(pad=True)
    words.chat_template = plain_template(words)
    with pytest.raises(DataError, match="row 7: ") as raised:
        encode_questions([Row(row, "row 7")], Encoder(words, chat=True), 100)
    assert told in str(raised.value)


def test_too_few_questions_and_too_long_ones_are_errors(backbone: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a rollout has 2 prompts .* and there are 1 to train on"):
        train_rl(options(backbone, tmp_path / "run", problems=1))
    with pytest.raises(ConfigError, match="every prompt is longer than 1 tokens"):
        train_rl(options(backbone, tmp_path / "run", max_length=5))
    assert not (tmp_path / "run").exists()


def test_a_batch_that_two_processes_cannot_share_is_an_error(
    backbone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--batch-size 9 cannot be shared by 2 processes: give a multiple of 2"):
        train_rl(options(backbone, tmp_path / "run", batch_size=9, group=3))


def test_the_verb_prints_the_row_and_how_it_went(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [part for name, value in FEW.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    where = ["--backbone", backbone, "--task", "arithmetic", "--output", str(tmp_path / "run")]
    assert main(["rl", *where, *flags, "--rewards", "answer,form,length"]) == 0
    said = capsys.readouterr().out
    assert "right before" in said and "rolling back" in said and "saved to" in said
    assert main(["rl", *where, "--batch-size", "30"]) == 2
    assert "must be a multiple of --group" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["rl", "--help"])
    assert "fiberpo" in capsys.readouterr().out


def test_curves_keep_numbers_alone() -> None:
    history = [
        {"loss": 1.0, "step": 1, "reward": 0.5, "kl": None, "entropy": float("nan"), "unknown": 3},
        {"step": 1, "train_runtime": 3.0},
    ]
    assert curves_of(history) == [{"step": 1, "loss": 1.0, "reward": 0.5}]
    steps = [{"step": n, "entropy": float(n), **({"reward": float(n)} if n % 2 else {})} for n in range(1, 9)]
    found = summary_of(steps)
    assert (found["first_reward"], found["last_reward"]) == (4.0, 4.0) and found["first_entropy"] == 4.0
    assert mean_line([[(1, 0.0), (2, 2.0)], [(2, 4.0)]]) == [(2, 3.0)]


# the study


def test_the_study_makes_a_pupil_and_teaches_it(tmp_path: Path) -> None:
    chosen = RlOptions(
        backbone=str(tmp_path / "pupil"), task="arithmetic", method="full", digits=1, operators="+", problems=60,
        test_problems=10, batch_size=8, group=4, updates=2, max_new_tokens=4, lr=1e-3, device="cpu",
    )  # fmt: skip
    losses = make_pupil(tmp_path / "pupil", chosen, 30)
    assert losses[-1] < 0.7 * losses[0]
    rows = [teach(replace(chosen, algorithm=one), one, rollouts=2) for one in ("fiberpo", "grpo")]
    assert rows[0]["weights_sha256"] == rows[1]["weights_sha256"] and rows[0]["test_sha256"] == rows[1]["test_sha256"]
    assert all(len(values) == 2 for row in rows for values in row["rollouts"].values())
    assert rows[0]["rollouts"]["reward"][0] == rows[1]["rollouts"]["reward"][0]  # equal seeds draw equal answers
    assert "fiberpo" in study_table(rows) and "grpo" in study_table(rows)
    assert {"fiberpo", "grpo"} == study_panels(rows)[0].lines.keys()


def test_a_value_a_rollout() -> None:
    steps = [
        {"reward": 1.0, "length": 3.0, "entropy": 1.0, "farthest_ratio": 1.0},
        {"entropy": 3.0, "farthest_ratio": 1.5},
    ]
    assert by_rollout(steps, 2) == {"reward": [1.0], "length": [3.0], "entropy": [2.0], "farthest_ratio": [1.5]}
