"""From options to a run folder and back, on tiny language models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_language import decoder, encoder_model, save, tokenizer, write_reviews

from pyra.errors import CheckpointError, ConfigError, DataError, PyraError
from pyra.scripts import evaluate as evaluate_verb
from pyra.scripts import train as train_verb
from pyra.scripts.main import main
from pyra.tasks.evaluation import evaluate_run
from pyra.tasks.fitting.trainer import KeepingTrainer
from pyra.tasks.language.data import load_text_task
from pyra.tasks.language.evaluation import Evaluation, evaluate_backbone, evaluate_language_run
from pyra.tasks.language.models import load_decoder, load_encoder, read_config
from pyra.tasks.language.options import METHODS, LanguageOptions
from pyra.tasks.language.runs import load_language_run
from pyra.tasks.language.training import train_language
from pyra.tasks.results import RunResult, read_result

pytestmark = pytest.mark.usefixtures("no_cuda_extension")


def options(backbone: Path, root: Path, output: Path, **changes: Any) -> LanguageOptions:
    settings = {"task": "sst2", "epochs": 1, "batch_size": 8, "device": "cpu", "lr": 3e-3, "max_new_tokens": 8}
    return LanguageOptions(backbone=str(backbone), root=str(root), output=str(output), **{**settings, **changes})


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", method) for method in METHODS] + [("bert", name) for name in ("linear", "full", "lora", "ln-tuning")],
)
def test_every_method_classifies(
    kind: str, method: str, backbones: dict[str, Path], root: Path, tmp_path: Path
) -> None:
    asked = {"rank": 4, "epochs": 2} | ({"targets": "query,value" if kind == "bert" else "q_proj,v_proj"})
    asked |= {"keep": "0:0.5"} if method in ("pyra", "tome") else {}
    if method == "ia3":
        asked["targets"] = "value" if kind == "bert" else "v_proj"
    result, notes = train_language(options(backbones[kind], root, tmp_path / "run", method=method, **asked))
    assert read_result(tmp_path / "run") == result and notes == []
    assert (result.method, result.metric, result.num_test) == (method, "accuracy", 16)
    assert (
        result.trained_parameters > 0
        and result.macs > 1000
        and (result.rate > 0) == any(result.schedule) == ("keep" in asked)
    )
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if not p.name.startswith(".")) == [
        "adapter",
        "backbone.json",
        "data.json",
        "labels.json",
        "options.json",
        "predictions.json",
        "result.json",
        "training.json",
    ]
    stored = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert stored["labels"] == [1, 0] * 8 and stored["split"] == "test" and len(stored["predictions"]) == 16
    right = sum(a == b for a, b in zip(stored["labels"], stored["predictions"], strict=True))
    assert right / 16 == result.value
    again, file, _ = evaluate_language_run(tmp_path / "run", Evaluation(device="cpu"))
    assert again.value == pytest.approx(result.value) and file.is_file()
    subject, _, _ = load_language_run(tmp_path / "run")
    assert not any("lora" in name for name, _ in subject.model.named_parameters())
    predicted = json.loads((tmp_path / "run" / "predictions-evaluation.json").read_text())["predictions"]
    assert predicted == stored["predictions"]


@pytest.mark.parametrize(("kind", "answer"), [("bert", "head"), ("llama", "head"), ("qwen", "scoring")])
def test_training_learns(kind: str, answer: str, backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    asked = {"method": "full", "answer": answer, "epochs": 12, "lr": 3e-3}
    result, _ = train_language(options(backbones[kind], root, tmp_path / "run", **asked))
    assert result.value >= 0.9


def test_a_decoder_learns_to_answer_by_words(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    asked = {"method": "full", "answer": "generation", "epochs": 16}
    result, _ = train_language(options(backbones["llama"], root, tmp_path / "run", **asked))
    texts = json.loads((tmp_path / "run" / "predictions.json").read_text())["texts"]
    assert result.value >= 0.9 and set(texts) <= {"positive", "negative"}, "the end of an answer is learnt, too"
    other, file, _ = evaluate_language_run(tmp_path / "run", Evaluation(answer="scoring", limit=8, device="cpu"))
    assert file.name == "evaluation-scoring-limit-8.json" and other.num_test == 8 and other.value >= 0.75


@pytest.mark.parametrize("method", ["lora", "adalora", "full"])
def test_sums_are_trained_and_answered(method: str, backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    asked = {"task": "gsm8k", "method": method, "rank": 2, "targets": "q_proj,v_proj", "dropout": 0.0}
    result, _ = train_language(options(backbones["qwen"], root, tmp_path / "run", **asked))
    stored = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert (result.metric, result.num_test) == ("exact_match", 6)
    assert stored["labels"] == ["100", "102", "104", "106", "104", "106"] and len(stored["texts"]) == 6
    assert json.loads((tmp_path / "run" / "labels.json").read_text()) == []
    again, _, _ = evaluate_language_run(tmp_path / "run", Evaluation(num_fewshot=1, device="cpu", max_new_tokens=4))
    assert again.num_test == 6 and again.trained_parameters == result.trained_parameters
    plain, _, _ = evaluate_language_run(tmp_path / "run", Evaluation(device="cpu"))
    predicted = json.loads((tmp_path / "run" / "predictions-evaluation.json").read_text())
    assert predicted["texts"] == stored["texts"] and plain.value == result.value


def test_a_run_is_the_same_with_the_same_seed_and_read_from_any_folder(
    backbones: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train_language(options(backbones["bert"], Path("."), tmp_path / name, seed=seed))
    files = [(tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    monkeypatch.chdir(tmp_path)
    evaluate_language_run(tmp_path / "a", Evaluation(device="cpu"))


def test_a_bare_backbone_answers_by_prompt(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    asked = Evaluation(device="cpu", num_fewshot=2, limit=6)
    result, _ = evaluate_backbone(str(backbones["llama"]), "sst2", asked, root=str(root), output=str(tmp_path / "zero"))
    assert (result.method, result.num_test, result.trained_parameters) == ("none", 6, 0)
    assert read_result(tmp_path / "zero") == result
    assert (tmp_path / "zero" / "predictions.json").is_file()
    result, _ = evaluate_backbone(
        str(backbones["qwen"]), "gsm8k", Evaluation(device="cpu", max_new_tokens=3, limit=2), root=str(root)
    )
    assert result.metric == "exact_match"


def nll(stored: dict[str, Any]) -> float:
    """Mean over the tokens of all answers that were scored, of what a file of predictions holds."""
    known = [value for value in stored["answer_nats"] if value is not None]
    return sum(known) / sum(value for value in stored["answer_tokens"] if value is not None)


@pytest.mark.parametrize("kind", ["llama", "qwen"])
def test_how_unlikely_the_right_answers_are(kind: str, backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    def asked(name: str, **how: Any) -> tuple[RunResult, dict[str, Any]]:
        place = tmp_path / f"{name}{len(list(tmp_path.iterdir()))}"
        wanted = Evaluation(device="cpu", max_new_tokens=4, **how)
        result, _ = evaluate_backbone(str(backbones[kind]), name, wanted, root=str(root), output=str(place))
        return result, json.loads((place / "predictions.json").read_text())

    encoder, model = load_encoder(str(backbones[kind])), load_decoder(str(backbones[kind]))
    task = load_text_task("gsm8k", str(root))
    rows = [encoder.answered(one.prompt, [one.answer])[0] for one in task.splits["test"]]
    exact = []
    with torch.no_grad():
        for row in rows:  # one after the other, without a batch
            scores: Any = model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
            exact.append(-sum(float(scores[i - 1][row.ids[i]]) for i in range(row.start, len(row.ids))))
    result, stored = asked("gsm8k")
    assert stored["answer_nats"] == pytest.approx(exact, abs=1e-3)
    assert stored["answer_tokens"] == [len(row.ids) - row.start for row in rows]
    assert result.answer_nll == pytest.approx(nll(stored)) and result.answer_nll > 1
    together, _ = asked("gsm8k", batch_size=1)
    assert together.answer_nll == pytest.approx(result.answer_nll, abs=1e-4)
    assert asked("gsm8k", num_fewshot=1)[0].answer_nll != pytest.approx(result.answer_nll, abs=1e-3)
    words, stored = asked("sst2", answer="scoring")
    generated, again = asked("sst2", answer="generation")
    assert len(stored["answer_nats"]) == 16
    assert again["answer_nats"] == pytest.approx(stored["answer_nats"], abs=1e-3), "of the right word, both times"
    assert words.answer_nll == pytest.approx(generated.answer_nll, abs=1e-4)


def test_answers_longer_than_what_is_read_have_no_likelihood(root: Path, tmp_path: Path) -> None:
    backbone = save(decoder(positions=40), tokenizer(), tmp_path / "backbone")
    data = tmp_path / "gsm8k"
    data.mkdir()
    rows = [{"question": "1 + 1 ?", "answer": "2"}, {"question": "1 + 1 ?", "answer": "2 " * 60}]
    for name in ("train", "test"):
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    asked = Evaluation(device="cpu", max_new_tokens=4)
    result, _ = evaluate_backbone(str(backbone), "gsm8k", asked, data=str(data), output=str(tmp_path / "zero"))
    stored = json.loads((tmp_path / "zero" / "predictions.json").read_text())
    assert stored["answer_nats"][0] > 0 and stored["answer_nats"][1] is None and stored["answer_tokens"][1] is None
    assert result.answer_nll == pytest.approx(nll(stored))


def test_a_head_has_no_likelihood_of_answers(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    result, _ = train_language(options(backbones["bert"], root, tmp_path / "run"))
    assert result.answer_nll is None
    assert "answer_nats" not in json.loads((tmp_path / "run" / "predictions.json").read_text())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0.5}, "--method lora merges no tokens: leave --rate out, or use tome or pyra"),
        ({"rule": "drop"}, "--method lora merges no tokens: leave --rule out"),
        ({"method": "pyra"}, "--method pyra needs --rate, such as 0.5"),
        ({"method": "pyra", "rate": 1.5}, r"rate must be a number in \[0, 1\), got 1.5"),
        ({"method": "pyra", "keep": "8"}, "--keep must be layers and shares such as 8:0.5,16:0.25, got '8'"),
        ({"method": "pyra", "keep": "8:2"}, r"keep of layer 8 must be a share in \(0, 1\], got 2.0"),
        ({"method": "pyra", "rate": 0.5, "keep": "8:0.5"}, "--rate finds the layers that --keep names"),
        (
            {"method": "pyra", "rate": 0.5, "rule": "drop"},
            "--rule drop merges nothing that could be re-activated",
        ),
        ({"method": "tome", "rate": 0.5, "rule": "dorp"}, "--rule must be one of .*got 'dorp'"),
        ({"method": "tome", "rate": 0.5, "peft": "bottleneck"}, "--peft bottleneck is none of lora, dora"),
        ({"method": "prompts"}, "made for images; one of pyra, tome, linear, full, lora"),
        ({"method": "lroa"}, "did you mean 'lora'"),
        ({"answer": "guess"}, "--answer must be one of head, scoring, generation"),
        ({"method": "linear", "answer": "scoring"}, "--method linear trains a head: --answer scoring has none"),
        ({"backbone": " "}, "--backbone is missing"),
        ({"max_length": 0, "rank": 0}, "--rank must be above 0.*--max-length must be above 0"),
        ({"epochs": float("nan")}, "--epochs must be above 0"),
        ({"seed": -1}, "--seed"),
        ({"device": "tpu"}, "--device"),
        ({"task": 3}, "task = 3 should be of type str"),
    ],
)
def test_options_that_cannot_be(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        LanguageOptions(**{"backbone": "x", **changes})


@pytest.fixture
def odd(backbones: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Backbone folders with something wrong."""

    def made(kind: str) -> Path:
        folder = tmp_path / kind
        if kind == "no tokenizer":
            decoder().save_pretrained(folder)
        elif kind == "no config":
            folder.mkdir()
        elif kind == "broken config":
            folder.mkdir()
            (folder / "config.json").write_text("{")
        elif kind == "timm":
            folder.mkdir()
            (folder / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
        elif kind == "vit":
            from transformers import ViTConfig, ViTForImageClassification

            sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
            ViTForImageClassification(ViTConfig(image_size=32, patch_size=16, **sizes)).save_pretrained(folder)
        elif kind == "pickled":
            shutil.copytree(backbones["llama"], folder)
            (folder / "model.safetensors").unlink()
            torch.save({}, folder / "pytorch_model.bin")
        elif kind == "other weights":
            shutil.copytree(backbones["llama"], folder)
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
        elif kind == "code":
            shutil.copytree(backbones["llama"], folder)
            config = json.loads((folder / "config.json").read_text())
            own = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": own}))
            (folder / "evil.py").write_text("raise SystemExit('code was run')")
        else:
            raise AssertionError(kind)
        return folder

    return made


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no tokenizer", "has no tokenizer that can be read"),
        ("no config", "no config.json there"),
        ("broken config", "cannot be had"),
        ("timm", "is a timm model, which reads images"),
        ("vit", r"\(vit\) reads no text"),
        ("pickled", "they must be safetensors files"),
        ("other weights", "are not those of its config.json: 9 tensors"),
        ("code", "cannot be had"),
    ],
)
def test_backbones_that_cannot_be(kind: str, message: str, odd: Callable[[str], Path], root: Path) -> None:
    with pytest.raises(PyraError, match=message) as error:
        evaluate_backbone(str(odd(kind)), "sst2", Evaluation(device="cpu"), root=str(root))
    assert "\n" not in str(error.value)


def test_names_that_are_no_backbone(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'vit_base_patch16_224' cannot be had"):
        train_language(options(Path("vit_base_patch16_224"), root, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_encoder_answers_no_prompt(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    with pytest.raises(PyraError, match=r"\(bert\) sees the tokens that come after"):
        evaluate_backbone(str(backbones["bert"]), "sst2", Evaluation(device="cpu"), root=str(root))
    with pytest.raises(PyraError, match="sees the tokens that come after"):
        train_language(options(backbones["bert"], root, tmp_path / "run", task="gsm8k"))


def test_answers_that_a_task_or_a_run_does_not_have(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--answer scoring: task gsm8k has no labels"):
        train_language(options(backbones["llama"], root, tmp_path / "run", task="gsm8k", answer="scoring"))
    with pytest.raises(ConfigError, match="trains a head, task gsm8k has no labels"):
        train_language(options(backbones["llama"], root, tmp_path / "run", task="gsm8k", method="linear"))
    with pytest.raises(ConfigError, match="a bare backbone has no head"):
        evaluate_backbone(str(backbones["llama"]), "sst2", Evaluation(answer="head"), root=str(root))
    train_language(options(backbones["bert"], root, tmp_path / "run"))
    with pytest.raises(ConfigError, match="was trained to answer by head"):
        evaluate_language_run(tmp_path / "run", Evaluation(answer="scoring"))
    with pytest.raises(ConfigError, match="--num-fewshot 2 goes with prompts"):
        evaluate_language_run(tmp_path / "run", Evaluation(num_fewshot=2))
    with pytest.raises(DataError, match="no split 'dev'"):
        evaluate_language_run(tmp_path / "run", Evaluation(split="dev"))
    assert evaluate_language_run(tmp_path / "run", Evaluation(split="validation"))[0].num_test == 8


def test_a_rank_above_the_width_is_refused(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--rank 100000000 is more than the 32 features"):
        train_language(options(backbones["llama"], root, tmp_path / "run", rank=10**8))


def test_lengths(backbones: dict[str, Path], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = backbones["llama"]
    with pytest.raises(ConfigError, match=r"--max-length 300: .* reads 256 tokens at most"):
        train_language(options(llama, root, tmp_path / "run", max_length=300))
    with pytest.raises(ConfigError, match="--max-length 10: every training example is longer"):
        train_language(options(llama, root, tmp_path / "run", task="gsm8k", max_length=10))
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="--max-new-tokens 256 leaves no room"):
        patch.setattr(KeepingTrainer, "train", lambda *_, **__: pytest.fail("trained first"))
        train_language(options(llama, root, tmp_path / "run", task="gsm8k", max_new_tokens=256))
    with pytest.raises(ConfigError, match="--max-new-tokens 256 leaves no room for a prompt"):
        evaluate_backbone(str(llama), "gsm8k", Evaluation(max_new_tokens=256), root=str(root))
    with pytest.raises(ConfigError, match="--max-length 1 leaves nothing of a prompt"):
        evaluate_backbone(str(llama), "sst2", Evaluation(max_length=1), root=str(root))
    _, notes = evaluate_backbone(str(llama), "sst2", Evaluation(max_length=20), root=str(root))
    assert notes == ["examples longer than what is read, cut: 16"]
    _, notes = train_language(options(llama, root, tmp_path / "run", max_length=4))
    assert notes == ["examples longer than what is read, cut: 16"]
    sums = write_reviews(tmp_path / "data", train=4)
    lines = (sums / "sst2" / "train.tsv").read_text() + "\n" + "long and dull " * 90 + "\t0"
    (sums / "sst2" / "train.tsv").write_text(lines)
    _, notes = train_language(options(llama, sums, tmp_path / "other", answer="scoring"))
    assert notes == ["training examples longer than 256 tokens, left out: 1"]


def test_chat_templates(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        evaluate_backbone(str(backbones["llama"]), "sst2", Evaluation(chat=True), root=str(root))
    words = tokenizer()
    words.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[a] "
    chat = save(decoder(), words, tmp_path / "chat")
    asked = options(chat, root, tmp_path / "run", answer="scoring", chat=True)
    train_language(asked)
    subject, _, task = load_language_run(tmp_path / "run")
    ids = subject.encoder.prompt(task.splits["test"][0].prompt)
    text = words.decode(ids)
    assert text.startswith("<s>[user] Review:") and text.endswith("[a] ") and ids.count(0) == 1
    (row,) = subject.encoder.answered("a", ["b"])
    assert words.decode(row.ids).endswith("[a] b")


@pytest.mark.parametrize("kind", ["no end", "no pad", "pad is end"])
def test_tokenizers_without_marks(kind: str, root: Path, tmp_path: Path) -> None:
    words = tokenizer(end=kind != "no end")
    if kind == "pad is end":
        words.pad_token = "</s>"
    folder = save(decoder(), words, tmp_path / "backbone")
    for name, asked in {"head": {}, "words": {"answer": "generation"}}.items():
        result, _ = train_language(options(folder, root, tmp_path / name, limit=8, **asked))
        again, _, _ = evaluate_language_run(tmp_path / name, Evaluation(batch_size=1, device="cpu"))
        assert again.value == result.value, "no batch changes an answer"


def test_what_changed_since_is_refused(backbones: dict[str, Path], tmp_path: Path) -> None:
    backbone, root = tmp_path / "backbone", write_reviews(tmp_path)
    shutil.copytree(backbones["llama"], backbone)
    train_language(options(backbone, root, tmp_path / "run"))
    save(decoder(seed=1), tokenizer(), backbone)
    with pytest.raises(CheckpointError, match="its weights have changed since"):
        load_language_run(tmp_path / "run")
    shutil.rmtree(backbone)
    with pytest.raises(CheckpointError, match="is not there any more"):
        load_language_run(tmp_path / "run")
    shutil.copytree(backbones["llama"], backbone)
    write_reviews(tmp_path, test=18)
    with pytest.raises(DataError, match=r"the test split of sst2 is not the one .*\(16 examples then, 18 now\)"):
        load_language_run(tmp_path / "run")


def test_runs_on_images_and_on_texts_are_told_apart(
    backbones: dict[str, Path], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_language(options(backbones["bert"], root, tmp_path / "run"))
    with pytest.raises(DataError, match="is a run on a language task"):
        evaluate_run(tmp_path / "run")
    assert evaluate_verb.main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "written to" in capsys.readouterr().out
    for flags, message in {
        ("--rate", "0.5"): "--rate is for runs on images",
        ("--skip-broken",): "--skip-broken is for runs on images",
        ("--task", "sst2"): "--task goes with --backbone",
        ("--max-length", "0"): "--max-length must be above 0",
    }.items():
        assert main(["evaluate", str(tmp_path / "run"), *flags]) == 2
        assert message in capsys.readouterr().err
    for given, message in {
        ("--backbone", "x"): "--backbone needs --task",
        ("--backbone", "x", "--task", "demo"): "'demo' is about images",
        ("run", "--backbone", "x"): "not both",
        (): "RUN is missing",
        (str(tmp_path), "--limit", "3"): "--limit is for language",
    }.items():
        assert main(["evaluate", *given]) == 2
        assert message in capsys.readouterr().err


def test_the_command_line_of_language_tasks(
    backbones: dict[str, Path], root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(f"task: sst2\nroot: {root}\nbackbone: {backbones['llama']}\nepochs: 1\n")
    assert train_verb.main(["--config", str(config), "--limit", "8", "--output", str(tmp_path / "run")]) == 0
    assert "top-1 (%)" in capsys.readouterr().out
    given = ["evaluate", "--backbone", str(backbones["llama"]), "--task", "sst2", "--root", str(root), "--limit", "4"]
    assert main([*given, "--output", str(tmp_path / "zero")]) == 0
    assert main([*given, "--output", str(tmp_path / "zero")]) == 2
    assert "already holds a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train_verb.main(["--task", "gsm8k", "--help"])
    assert "--max-new-tokens" in capsys.readouterr().out
    for flags, message in {
        ("--task", "sst2", "--image-size", "32"): "unknown flag '--image-size'",
        ("--task", "demo", "--max-length", "32"): "unknown flag '--max-length'",
        ("--task", "sst2"): "--backbone is missing",
        ("--task", "sst2", "--backbone", "x", "--seeds", "0"): "--seeds must be 1 to 1000, got 0",
        ("--task", "sst2", "--backbone", "x", "--tune", "lr=1:2"): "--tune is not for language tasks yet",
        ("--task", "sst3", "--max-length", "32"): "unknown task 'sst3' (did you mean 'sst2'",
        ("--task", "sst3", "--backbone", "x"): "unknown task 'sst3'",
        ("--task", "demo", "--method", "lora", "--backbone", str(backbones["llama"])): "is a language model",
    }.items():
        assert main(["train", *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_head_of_the_backbone_is_kept_where_it_fits(root: Path, tmp_path: Path) -> None:
    from pyra.tasks.language.models import load_classifier

    folder = save(encoder_model(), tokenizer("words"), tmp_path / "three")
    two = load_classifier(str(folder), ["a", "b"], 0)
    assert torch.equal(two.get_parameter("classifier.weight"), encoder_model().get_parameter("classifier.weight"))
    three = load_classifier(str(folder), ["a", "b", "c"], 0)
    assert three.get_parameter("classifier.weight").shape[0] == 3


@pytest.mark.parametrize("name", ["/no/such/folder", "./nowhere", "~/nowhere", "models/of/mine"])
def test_a_path_is_no_name_on_the_hub(name: str) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_config(name)
