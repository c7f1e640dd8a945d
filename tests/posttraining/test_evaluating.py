"""Runs of post-training, asked about a language task."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_language import write_sums

from pyra.errors import ConfigError
from pyra.scripts.main import main
from pyra.tasks.language.evaluation import Evaluation
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.posttraining.evaluating import evaluate_posttrained
from pyra.tasks.posttraining.sft import train_sft
from pyra.tasks.posttraining.sft_options import SftOptions
from pyra.tasks.results import read_result, read_result_file

pytestmark = pytest.mark.usefixtures("no_cuda_extension")


@pytest.fixture(scope="module")
def run(bare: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "sft"
    train_sft(SftOptions(backbone=str(bare), data=str(chats), output=str(folder), steps=1, batch_size=4, device="cpu"))
    return folder


def test_a_task_is_asked_through_the_runs_template(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_sums(tmp_path)
    before = (run / "result.json").read_bytes()
    given = ["evaluate", str(run), "--task", "gsm8k", "--root", str(root), "--max-new-tokens", "4", "--device", "cpu"]
    assert main([*given, "--limit", "3"]) == 0
    row = read_result_file(run / "evaluation-gsm8k-limit-3.json")
    said = json.loads((run / "predictions-evaluation-gsm8k-limit-3.json").read_text())
    assert row.task == "gsm8k" and row.method == "lora" and row.num_test == len(said["texts"]) == 3
    assert row.answer_nll is not None and 0 < (row.answer_tokens or 0) <= 4
    assert row.trained_parameters == read_result(run).trained_parameters > 0
    assert (run / "result.json").read_bytes() == before and "evaluation-gsm8k" in capsys.readouterr().out


def test_what_cannot_be_asked(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"was scored when it was trained .* --task asks it"):
        evaluate_posttrained(run, None, Evaluation())
    with pytest.raises(ConfigError, match="leave --no-chat out"):
        evaluate_posttrained(run, "gsm8k", Evaluation(chat=False))
    with pytest.raises(ConfigError, match="heeds neither"):
        evaluate_posttrained(run, "gsm8k", Evaluation(thinking="on", device="cpu"), root=str(write_sums(tmp_path)))
    assert main(["evaluate", str(run), "--lm-eval", "gsm8k"]) == 2
    assert "--lm-eval asks runs of pyra train" in capsys.readouterr().err


def test_an_answer_stands_where_the_template_writes_it(run: Path, bare: Path) -> None:
    from pyra.tasks.posttraining.runs import load_posttrained

    encoder: Encoder = load_posttrained(run)[0].encoder
    (row,) = encoder.answered("a fine film", ["a joy"])
    messages = [{"role": "user", "content": "a fine film"}, {"role": "assistant", "content": "a joy"}]
    whole = encoder.chat_text(messages)
    assert whole.startswith(encoder.tokenizer.decode(row.ids)) and "Assistant: a joy" in whole
