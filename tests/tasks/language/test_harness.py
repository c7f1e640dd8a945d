"""lm-evaluation-harness on tiny models, with task files and data of a folder, offline."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_language import decoder, tokenizer

from pyra.errors import ConfigError, DataError
from pyra.scripts.main import main
from pyra.tasks.language.evaluation import Evaluation
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.scoring import log_likelihoods
from pyra.tasks.language.task_files import check_task_files
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.language.training import train_language
from pyra.tasks.results import read_result, read_result_file

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")

TASK: dict[str, Any] = {
    "task": "tiny_reviews",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"train": "rows.jsonl", "test": "rows.jsonl"}},
    "output_type": "multiple_choice",
    "training_split": "train",
    "test_split": "test",
    "doc_to_text": "Review: {{text | regex_replace('  +', ' ')}}\nSentiment:",
    "doc_to_target": "label",
    "doc_to_choice": ["negative", "positive"],
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}
ROWS = [
    ("a fine film 20", 1),
    ("a dull film 21", 0),
    ("bad and cold 3", 0),
    ("great fun  and warm 14", 1),
    ("a joy to watch 5", 1),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a task file, with changes, beside its data."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def written(**changes: Any) -> Path:
        place = tmp_path / "tasks"
        place.mkdir(exist_ok=True)
        (place / "tiny.yaml").write_text(yaml.safe_dump({**TASK, **changes}))
        (place / "rows.jsonl").write_text("\n".join(json.dumps({"text": t, "label": label}) for t, label in ROWS))
        return place

    return written


@needs_harness
def test_the_harness_and_pyra_agree_on_every_log_likelihood() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [(f"Review: {text}\nSentiment:", word) for text, _ in ROWS for word in ("negative", "positive")]
    theirs = HFLM(pretrained=decoder(), tokenizer=tokenizer(), batch_size=3, max_length=64)
    asked = [Instance("loglikelihood", {}, (prompt, f" {word}"), index) for index, (prompt, word) in enumerate(pairs)]
    expected = [value for value, _ in theirs.loglikelihood(asked)]
    encoder = Encoder(tokenizer())
    rows = [encoder.answered(prompt, [word])[0] for prompt, word in pairs]
    found = log_likelihoods(decoder(), rows, pad_id=encoder.pad_id, batch_size=4)
    assert found == pytest.approx(expected, abs=1e-3) and max(found) - min(found) > 1


@needs_harness
def test_a_run_and_a_bare_backbone(
    folder: Callable[..., Path],
    backbones: dict[str, Path],
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = folder()
    options = {"method": "full", "answer": "scoring", "epochs": 12, "lr": 3e-3, "batch_size": 8, "device": "cpu"}
    run = tmp_path / "run"
    train_language(LanguageOptions(backbone=str(backbones["llama"]), root=str(root), output=str(run), **options))
    asked = ["--lm-eval", "tiny_reviews", "--lm-eval-tasks", str(place), "--device", "cpu"]
    assert main(["evaluate", str(run), *asked]) == 0
    assert "tiny_reviews" in capsys.readouterr().out
    row = read_result_file(run / "evaluation-lm-eval-tiny_reviews-acc.json")
    assert (row.task, row.metric, row.method, row.num_test) == ("tiny_reviews", "acc", "full", 5)
    assert (row.task_version, row.split, row.data_source, row.unit) == ("1.0", "test", "json", "examples")
    assert row.higher_is_better and row.settings is not None and row.settings["num_fewshot"] == 0
    trained = read_result(run)
    assert row.trained_parameters == trained.trained_parameters > 1000 and row.environment["lm_eval"]
    assert row.weights_sha256 == trained.weights_sha256 is not None and row.settings["lr"] == 3e-3
    assert row.test_sha256 and row.macs > 10_000
    assert row.value == 1.0, "what was trained is what is asked"
    own = json.loads((run / "lm-eval.json").read_text())
    assert "samples" not in own
    assert own["results"]["tiny_reviews"]["acc,none"] == 1.0
    bare = ["evaluate", "--backbone", str(backbones["llama"]), *asked, "--limit", "3", "--num-fewshot", "1", "--output"]
    assert main([*bare, str(tmp_path / "zero")]) == 0
    row = read_result_file(tmp_path / "zero" / "evaluation-lm-eval-tiny_reviews-acc.json")
    assert row.settings is not None and (row.method, row.num_test, row.settings["num_fewshot"]) == ("none", 3, 1)
    capsys.readouterr()
    assert main(["results", str(tmp_path), "--evaluations"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\ntiny_reviews ") == 2 and "sst2" in shown and "skipped" not in shown


@needs_harness
def test_generated_answers_and_several_filters(
    folder: Callable[..., Path], backbones: dict[str, Path], tmp_path: Path
) -> None:
    from pyra.tasks.language.harness import Harness, harness_on_backbone

    place = folder(
        output_type="generate_until",
        doc_to_choice=None,
        doc_to_target="{{label}}",
        generation_kwargs={"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        filter_list=[
            {
                "name": "number",
                "filter": [{"function": "regex", "regex_pattern": "(\\d+)"}, {"function": "take_first"}],
            },
            {"name": "whole", "filter": [{"function": "take_first"}]},
        ],
    )
    asked = Harness(tasks=["tiny_reviews"], folder=str(place), how=Evaluation(device="cpu", limit=2))
    found = harness_on_backbone(str(backbones["qwen"]), asked)
    assert [row.metric for row in found.rows] == ["exact_match (number)", "exact_match (whole)"]


@needs_harness
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_to_text": "{{ text.__class__.__mro__ }}"}, "access to attribute '__class__' .* is unsafe"),
        ({"doc_to_text": "{{ text['__cl' ~ 'ass__'].__mro__ }}"}, "is unsafe|is undefined"),
        ({"dataset_path": "openai/gsm8k", "dataset_kwargs": None}, "its own tasks take their data from the hub"),
        ({"dataset_kwargs": {"data_files": {"test": "none.jsonl"}}}, "lm-eval cannot run tiny_reviews"),
    ],
)
def test_tasks_that_cannot_run(
    changes: dict[str, Any], message: str, folder: Callable[..., Path], backbones: dict[str, Path]
) -> None:
    from pyra.tasks.language.harness import Harness, harness_on_backbone

    asked = Harness(tasks=["tiny_reviews"], folder=str(folder(**changes)), how=Evaluation(device="cpu"))
    with pytest.raises(DataError, match=message) as error:
        harness_on_backbone(str(backbones["llama"]), asked)
    assert "\n" not in str(error.value)


CODE = "import pathlib\npathlib.Path(__file__).with_name('ran').touch()\ndef docs(rows):\n    return rows\n"


@needs_harness
def test_code_runs_only_where_it_is_trusted(folder: Callable[..., Path], backbones: dict[str, Path]) -> None:
    from pyra.tasks.language.harness import Harness, harness_on_backbone

    place = folder()
    (place / "own.py").write_text(CODE)
    file = place / "tiny.yaml"
    file.write_text(file.read_text() + "process_docs: !function own.docs\n")
    asked = Harness(tasks=["tiny_reviews"], folder=str(place), how=Evaluation(device="cpu", limit=2))
    with pytest.raises(ConfigError, match=r"!function names Python code.*--trust-task-code"):
        harness_on_backbone(str(backbones["llama"]), asked)
    assert not (place / "ran").exists()
    trusted = Harness(tasks=["tiny_reviews"], folder=str(place), trust=True, how=Evaluation(device="cpu", limit=2))
    harness_on_backbone(str(backbones["llama"]), trusted)
    assert (place / "ran").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: a\nprocess_docs: !function evil.run\n", "!function names Python code"),
        ("task: a\nx: !!python/object/apply:os.getcwd []\n", "names Python code"),
        ("task: a\nclass: evil.Task\n", "class may run code"),
        ("task: a\ndataset_path: pandas\n", "dataset_path pandas may unpickle"),
        ("task: a\nunsafe_code: true\n", "unsafe_code may run code"),
        ("task: a\nmetric_list:\n  - metric: ./evil\n", "metric './evil' is none of the harness's own"),
        ("task: a\nmetric_list:\n  - {metric: acc, hf_evaluate: true}\n", "hf_evaluate may run code"),
        ("task: a\nmetric_list: [{metric: accc}]\n", "did you mean 'acc'"),
        ("task: a\ngeneration_kwargs: {custom_generate: me/evil}\n", "custom_generate may run code"),
        ("task: a\ndataset_kwargs: {trust_remote_code: true}\n", "trust_remote_code may run code"),
        ("task: a\ninclude: ../../other.yaml\n", r"includes \.\./\.\./other.yaml, which lies outside"),
        ("task: a\ninclude: part.txt\n", r"part.txt: !function names Python code"),
        ("group: g\ntask: [{task: a, process_docs: !function evil.run}]\n", "!function names Python code"),
        ("task: [\n", "not readable"),
    ],
)
def test_task_files_that_run_code(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "tasks" / "deep").mkdir(parents=True)
    (tmp_path / "tasks" / "deep" / "a.yaml").write_text(text)
    (tmp_path / "tasks" / "deep" / "part.txt").write_text("x: !function evil.run\n")
    (tmp_path / "other.yaml").write_text("task: b\n")
    with pytest.raises(ConfigError, match=message) as error:
        check_task_files(tmp_path / "tasks", ["acc", "exact_match"])
    assert "\n" not in str(error.value)


def test_task_files_that_run_none(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: a\ninclude: b.yaml\nunsafe_code: false\nmetric_list: [{metric: acc}]\n")
    (tmp_path / "b.yaml").write_text("include: a.yaml\n")  # in a circle: lm-eval tells
    check_task_files(tmp_path, ["acc"])
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match=r"holds no \.yaml file"):
        check_task_files(tmp_path / "none", [])
    with pytest.raises(ConfigError, match="is no folder"):
        check_task_files(tmp_path / "missing", [])


@needs_harness
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        pytest.param(  # the harness looks through the thousands of files it ships
            ["--lm-eval", "tiny_review"],
            "no task 'tiny_review' .did you mean 'tiny_reviews'",
            marks=pytest.mark.slow,
        ),
        (["--lm-eval", ","], "--lm-eval is empty"),
        (["--lm-eval", "tasks/tiny.yaml"], "give the name of a task"),
        (["--lm-eval", "tiny_reviews", "--task", "sst2"], "--task is not for --lm-eval"),
        (["--lm-eval", "tiny_reviews", "--rate", "0.5"], "--rate is for runs on images"),
        (["--lm-eval", "tiny_reviews", "--num-fewshot", "-1"], "--num-fewshot must be at least 0"),
        (["--lm-eval", "tiny_reviews", "--chat"], "has no chat template"),
        (["--trust-task-code", "--task", "sst2"], "--trust-task-code goes with --lm-eval"),
    ],
)
def test_flags(
    flags: list[str],
    message: str,
    folder: Callable[..., Path],
    backbones: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    place = [] if "--lm-eval" not in flags else ["--lm-eval-tasks", str(folder())]
    assert main(["evaluate", "--backbone", str(backbones["llama"]), "--device", "cpu", *flags, *place]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)


def test_without_the_harness_the_extra_is_named(
    backbones: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "lm_eval" else found(name, *a))
    assert main(["evaluate", "--backbone", str(backbones["llama"]), "--lm-eval", "gsm8k"]) == 2
    assert "pip install 'pyra-adapt[lm-eval]'" in capsys.readouterr().err


@needs_harness
def test_a_run_with_a_head_is_not_asked(backbones: dict[str, Path], root: Path, tmp_path: Path) -> None:
    from pyra.tasks.language.harness import Harness, harness_on_run

    options = {"epochs": 1, "limit": 8, "device": "cpu", "output": str(tmp_path / "run")}
    train_language(LanguageOptions(backbone=str(backbones["bert"]), root=str(root), **options))
    with pytest.raises(ConfigError, match="answers by a head; train with --answer scoring"):
        harness_on_run(tmp_path / "run", Harness(tasks=["gsm8k"]))
