"""Runs whose prompts merge: trained, scored, read back, and told apart in tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_language import decoder
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from pyra import PyraConfig, wrap
from pyra.scripts.main import main
from pyra.tasks.language.adaptation import parse_keep
from pyra.tasks.language.evaluation import Evaluation, evaluate_language_run
from pyra.tasks.language.models import _ON_A_CPU, count_macs, count_plain_macs
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.runs import load_language_run
from pyra.tasks.language.scoring import log_likelihoods
from pyra.tasks.language.tokens import Answered
from pyra.tasks.language.training import train_language
from pyra.tasks.results import read_result


def ids(count: int, seed: int = 0) -> list[int]:
    return torch.randint(5, 60, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_answers_of_a_batch_are_scored_as_alone_behind_their_own_prompts() -> None:
    model = wrap(decoder(spread=0.5), PyraConfig(keep={0: 0.4}, size_bias=True))
    rows = [Answered(ids(count, count), count - 3) for count in (60, 41, 25)]
    together = log_likelihoods(model, rows, pad_id=0, batch_size=3)
    alone = [log_likelihoods(model, [row], pad_id=0, batch_size=1)[0] for row in rows]
    assert together == pytest.approx(alone, abs=1e-4)
    stock = log_likelihoods(decoder(spread=0.5), rows, pad_id=0, batch_size=3)
    assert all(abs(one - other) > 1e-4 for one, other in zip(together, stock, strict=True))


def test_prompts_are_counted_as_they_are_read() -> None:
    """What PyTorch counts of the products is what is promised, and the importance of tokens besides."""
    model = decoder()
    head = model.config.vocab_size * model.config.hidden_size  # type: ignore[union-attr, operator]

    def counted(**more: torch.Tensor) -> int:
        tokens = torch.zeros(1, 100, dtype=torch.long)
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ON_A_CPU) as counter:
            model(tokens, **more)
        return counter.get_total_flops() // 2 - 100 * head

    plain = counted()
    assert count_macs(model, 100) == count_plain_macs(model, 100) == plain
    wrap(model, PyraConfig(keep={0: 0.4}, size_bias=False, reactivation=False))
    importance = 4 * 16 * 100 * 8  # heads, tokens that are asked, keys, channels
    assert count_macs(model, 100) == counted(prompt_mask=torch.ones(1, 100, dtype=torch.bool)) - importance < plain
    assert count_plain_macs(model, 100) == plain


def test_heads_are_not_counted_of_other_decoders_either() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50))
    assert count_macs(model, 10) == 10 * 2 * (4 + 8) * 16 * 16 + 2 * 2 * 10 * 10 * 16


@pytest.mark.parametrize("rule", ["importance", "drop"])
def test_a_run_merges_and_comes_back(rule: str, backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    method = "pyra" if rule == "importance" else "tome"
    options = LanguageOptions(
        backbone=str(backbones["llama"]), task="gsm8k", root=str(root), method=method, keep="0:0.4", rule=rule,
        epochs=1, batch_size=4, max_new_tokens=4, limit=6, output=str(tmp_path / "run"), device="cpu",
    )  # fmt: skip
    result, _ = train_language(options)
    assert result.method == ("pyra" if rule == "importance" else "drop")
    assert result.rate > 0 and result.schedule[0] == 614 and result.answer_nll is not None
    again, _, _ = evaluate_language_run(tmp_path / "run", Evaluation(device="cpu"))
    assert again.answer_nll == pytest.approx(result.answer_nll, abs=1e-5)
    subject, _, _ = load_language_run(tmp_path / "run")
    names = [name for name, _ in subject.model.named_parameters() if "reactivation" in name]
    assert bool(names) == (rule == "importance")


def test_a_head_reads_merged_texts(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    given = ["train", "--task", "sst2", "--root", str(root), "--backbone", str(backbones["llama"]), "--method", "pyra"]
    given += ["--keep", "0:0.5", "--epochs", "1", "--limit", "8", "--device", "cpu", "--output", str(folder)]
    assert main(given) == 0
    assert read_result(folder).method == "pyra" and main(["evaluate", str(folder), "--device", "cpu"]) == 0


def test_shares_are_read() -> None:
    assert parse_keep("8:0.5,16:0.25") == {8: 0.5, 16: 0.25}


def test_a_model_is_no_run(backbones: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(backbones["llama"]), "--limit", "4"]) == 2
    assert "is a model, not a run: pyra evaluate --backbone" in capsys.readouterr().err
