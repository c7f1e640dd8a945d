"""The benchmark of decoders that merge their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import SENTENCES, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from pyra.backbones import joyai
from pyra.errors import ConfigError, PyraError
from pyra.scripts import benchmark
from pyra.tasks.benchmarks import decoder, decoder_subject
from pyra.tasks.benchmarks.decoder_options import PUBLISHED, DecoderOptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("llama") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


def run(folder: Path | str, output: Path, *more: str) -> list[dict[str, Any]]:
    base = ["decoder", "--backbone", str(folder), "--rounds", "1", "--new-tokens", "3", "--output", str(output)]
    assert benchmark.main([*base, *more]) == 0
    rows: list[dict[str, Any]] = json.loads(output.read_text())["rows"]
    return rows


def test_rows_of_a_decoder(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[str] = []

    def here(job: Any, options: DecoderOptions, name: str, ids: list[list[int]]) -> int:
        asked.append(f"{name} {len(ids)} x {len(ids[0])}")
        assert job(options, name, ids) >= 0
        return 1000 * len(asked)

    monkeypatch.setattr(decoder, "in_fresh_process", here)
    more = ["--prompt-tokens", "64,100", "--rate", "0,0.5", "--batch-size", "2"]
    rows = run(folder, tmp_path / "rows.json", *more)
    said = capsys.readouterr().out
    assert (
        "first token" in said
        and "MACs" in said
        and len([line for line in said.splitlines() if "rate 0.5" in line]) == 2
    )
    assert asked == ["rate 0 2 x 64", "rate 0.5 2 x 64", "rate 0 2 x 100", "rate 0.5 2 x 100"]
    assert [(row["measured"], row["unit"]) for row in rows[:5]] == [
        ("prefill, 64 tokens", "ms"),
        ("first token, 64 tokens", "ms"),
        ("answer, 64 tokens", "tokens/s"),
        ("key-value cache, 64 tokens", "MB"),
        ("peak of a prefill, 64 tokens", "MB"),
    ]
    assert {row["implementation"] for row in rows} == {"rate 0", "rate 0.5"} and len(rows) == 20
    merged = {row["measured"]: row for row in rows if row["implementation"] == "rate 0.5"}
    assert 0.4 < merged["key-value cache, 100 tokens"]["ratios"]["rate 0 share"] < 0.8
    assert merged["peak of a prefill, 64 tokens"]["ratios"] == {"rate 0 share": 2.0}
    assert merged["prefill, 64 tokens"]["goal"] is None, "promised of 1k to 8k tokens only"
    assert "random tokens" in merged["prefill, 64 tokens"]["detail"] and rows[0]["backbone"] == "tiny-llama"
    assert rows[0]["environment"]["torch"] and rows[0]["dtype"] == "float32"


def test_text_rules_and_bfloat16(folder: Path, tmp_path: Path) -> None:
    text, lines = tmp_path / "text.txt", tmp_path / "lines.jsonl"
    text.write_text("\n".join(SENTENCES * 10), encoding="utf-8")
    lines.write_text("\n".join(json.dumps({"a": s, "b": 1}) for s in SENTENCES * 10), encoding="utf-8")
    usual = ["--prompt-tokens", "64", "--no-memory"]
    rows = run(folder, tmp_path / "a.json", *usual, "--data", str(text), "--dtype", "bfloat16", "--rule", "truncate")
    assert rows[0]["detail"].endswith("text of text.txt") and len(rows) == 12
    assert (
        str(tmp_path) not in (tmp_path / "a.json").read_text()
        and str(folder.parent) not in (tmp_path / "a.json").read_text()
    )
    assert [row["implementation"] for row in rows[::4]] == ["rate 0", "rate 0.5, truncate", "rate 0.75, truncate"]
    rows = run(
        folder, tmp_path / "b.json", *usual, "--data", str(lines), "--keep", "2:0.7,3:0.5", "--rule", "bipartite"
    )
    assert [row["implementation"] for row in rows[::4]] == ["rate 0", "keep 2:0.7,3:0.5, bipartite"]
    with pytest.raises(PyraError, match="2 prompts of 200 need 400"):
        short = tmp_path / "short.txt"
        short.write_text("a fine film", encoding="utf-8")
        run(folder, tmp_path / "c.json", "--data", str(short), "--prompt-tokens", "200", "--batch-size", "2")
    assert not (tmp_path / "c.json").exists()


@pytest.mark.parametrize("spoilt", ["cache", "stock"])
def test_nothing_is_timed_where_answers_differ(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spoilt: str
) -> None:
    said = "from those of one forward"
    if spoilt == "stock":
        said, wrapped = "does not answer as the stock model", decoder.wrap

        def wrongly(model: Any, config: Any) -> Any:
            model.get_input_embeddings().weight = torch.nn.Parameter(2 * model.get_input_embeddings().weight)
            return wrapped(model, config)

        monkeypatch.setattr(decoder, "wrap", wrongly)
    else:
        generated = decoder._generate

        def unlike(model: Any, ids: Any, *args: Any, **told: Any) -> Any:
            found = generated(model, ids, *args, **told)
            found.logits = tuple(-logits for logits in found.logits)
            return found

        monkeypatch.setattr(decoder, "_generate", unlike)
    with pytest.raises(ConfigError, match=said):
        run(folder, tmp_path / "rows.json", "--prompt-tokens", "64", "--no-memory")
    assert not list(tmp_path.iterdir())


def test_the_published_shape_is_made_where_it_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny = joyai.tiny_config().to_dict()
    monkeypatch.setattr(joyai, "PUBLISHED", {name: tiny.get(name, value) for name, value in joyai.PUBLISHED.items()})
    usual = ["--prompt-tokens", "64", "--no-memory", "--rate", "0.4"]
    rows = run(PUBLISHED, tmp_path / "rows.json", *usual, "--layers", "3", "--dtype", "bfloat16")
    assert rows[0]["backbone"] == f"{PUBLISHED}, 3 layers" and rows[0]["dtype"] == "bfloat16"
    model = decoder_subject.random_model(joyai.tiny_config(), "cpu", torch.bfloat16)
    for name, value in model.named_parameters():
        assert value.dtype == torch.bfloat16 and value.abs().sum() > 0, name
        if not name.endswith("norm.weight"):
            assert 0.015 < value.float().std() < 0.025, name
    fresh = joyai.JoyAIModel(joyai.tiny_config()).rotary_emb.inv_freq
    assert torch.equal(model.model.rotary_emb.inv_freq, fresh)
    monkeypatch.setattr(decoder_subject.os, "sysconf", lambda _: 100)
    with pytest.raises(ConfigError, match=r"cpu: the weights take .* or fewer --layers"):
        run(PUBLISHED, tmp_path / "none.json", *usual)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "0,1.5"], r"--rate must be in \[0, 1\), got 0,1.5"),
        (["--rate", "0.99"], "can save at most"),
        (["--preset", "safe", "--rate", "0.75"], "preset='fast' merges earlier"),
        (["--prompt-tokens", "17"], "--prompt-tokens must be above 17"),
        (["--prompt-tokens", "18", "--keep", "2:0.95"], "removes nothing of a prompt of 18 tokens"),
        (["--prompt-tokens", "254"], "reads 256 tokens at most"),
        (["--promt-tokens", "64"], "--prompt-tokens"),
        (["--dtype", "float16"], "'float16' is not one of float32, bfloat16"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["--layers", "2"], "--layers goes with --backbone joyai-llm-flash"),
        (["--keep", "1:0.5", "--rate", "0.5"], "give --rate or --keep, not both"),
        (["--keep", "9:0.5"], "keep names layer 9"),
        (["--rule", "importanc"], "did you mean 'importance'"),
    ],
)
def test_wrong_options_of_a_decoder(folder: Path, tmp_path: Path, arguments: list[str], said: str) -> None:
    tail = [] if "--prompt-tokens" in arguments else ["--prompt-tokens", "64"]
    with pytest.raises(PyraError, match=said) as told:
        run(folder, tmp_path / "rows.json", "--no-memory", *tail, *arguments)
    assert "\n" not in str(told.value) and not list(tmp_path.iterdir())


def test_what_is_no_decoder(tiny_backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(PyraError, match="is a timm model, which reads images"):
        run(tiny_backbone, tmp_path / "rows.json")
    with pytest.raises(PyraError, match="--backbone is missing"):
        run("", tmp_path / "rows.json")
