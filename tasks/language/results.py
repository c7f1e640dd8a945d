"""The result of a language task as a row of every table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pyra.backbones import macs, wrapped_schedule
from pyra.tasks.language.data import Example, TextTask, examples_digest
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.runs import Subject
from pyra.tasks.language.scored import Scored
from pyra.tasks.provenance import adapter_settings, majority, settings
from pyra.tasks.results import RunResult, environment

ZERO_SHOT = "none"
"""Method of a backbone that nothing was trained for."""

UNIT, PREPROCESSING = "examples", "text"


def trained_row(
    task: TextTask, scored: Scored, subject: Subject, options: LanguageOptions, train: Sequence[Example], **more: Any
) -> RunResult:
    """Return the row of a run.

    Args:
        task: it was trained for.
        scored: on its test split.
        subject: the trained model.
        options: of the run.
        train: examples it was trained on.
        more: columns that were measured.
    """
    return RunResult(
        task=task.name,
        method=options.label,
        metric=task.card.metric,
        seed=options.seed,
        backbone=options.backbone,
        batch_size=options.batch_size,
        epochs=options.epochs,
        train_sha256=examples_digest(train),
        adapter=adapter_settings(options),
        settings={**settings(options), **asked_settings(subject)},
        **_shared(task),
        **scored_columns(task, scored, subject, options),
        **more,
    )


def zero_shot_row(
    task: TextTask, scored: Scored, subject: Subject, options: LanguageOptions, shots: int, **more: Any
) -> RunResult:
    """Return the row of a backbone that nothing was trained for; arguments as of :func:`trained_row`."""
    names = ("chat", "thinking", "dtype", "limit", "max_new_tokens")
    return RunResult(
        task=task.name,
        method=ZERO_SHOT,
        metric=task.card.metric,
        seed=options.seed,
        backbone=options.backbone,
        trained_parameters=0,
        settings={**{name: getattr(options, name) for name in names}, **asked_settings(subject, shots)},
        **_shared(task),
        **scored_columns(task, scored, subject, options),
        **more,
    )


def asked_settings(subject: Subject, shots: int = 0) -> dict[str, Any]:
    """Return how a model is asked: what the options leave to the task and the backbone is said."""
    return {"answer": subject.answer, "max_length": subject.max_length, "num_fewshot": shots}


def scored_columns(task: TextTask, scored: Scored, subject: Subject, options: LanguageOptions) -> dict[str, Any]:
    """Return the columns that belong to the examples that were scored.

    MACs are those of one forward over an example of average length. Rate and schedule are those of a prompt of 1024
    tokens: shorter ones save less. The speed is that of scoring, generation included.
    """
    layers = int(getattr(getattr(subject.model, "config", None), "num_hidden_layers", 0))
    schedule = wrapped_schedule(subject.model) or [0] * layers
    merges = any(schedule)
    saved = 1 - macs(subject.model) / macs(subject.model, [0] * layers) if merges else 0.0
    train = [example.label for example in task.splits["train"]]
    references: Any = scored.references
    return {
        "value": scored.value,
        "answer_nll": scored.nll,
        "answer_tokens": scored.answer_tokens,
        "macs": scored.macs,
        "plain_macs": scored.plain_macs,
        "schedule": schedule,
        "rate": round(saved, 4),
        "images_per_second": len(scored.references) / scored.seconds,
        "throughput_batch_size": options.batch_size,
        "num_test": len(scored.references),
        "majority_value": majority(train, references) if task.labels else None,
        "environment": environment(str(next(subject.model.parameters()).device)),
    }


def _shared(task: TextTask) -> dict[str, Any]:
    return {
        "unit": UNIT,
        "higher_is_better": task.card.higher_is_better,
        "task_version": task.card.version,
        "preprocessing": PREPROCESSING,
        "data_source": _source(task),
        "protocol": "fixed",
        "selection": "none: the last epoch of the given options",
    }


def _source(task: TextTask) -> str:
    """Say where the texts came from without naming this machine's folders."""
    kind, _, name = task.source.partition(":")
    if kind == "hub":
        return name
    return "/".join(Path(task.source).expanduser().resolve().parts[-2 if task.card.folder else -1 :])
