"""A model with fewer experts, scored on the task that it was made for or on another one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from pyra.files import write_json
from pyra.tasks.language.answer_loss import answer_loss, answer_rows
from pyra.tasks.language.cards import find_text_card
from pyra.tasks.language.compression import Compression, read_compression
from pyra.tasks.language.evaluation import BareBackbone, Evaluation, bare_backbone
from pyra.tasks.results import RunResult


def evaluate_compression(
    folder: str | Path,
    asked: Evaluation,
    *,
    task: str | None = None,
    root: str | None = None,
    data: str | None = None,
) -> tuple[RunResult, Path, list[str]]:
    """Score a folder of ``pyra compress-experts``; writes the row and the answers into it.

    Args:
        folder: it wrote.
        asked: what is asked for.
        task: another one than that it was made for.
        root: folder with a folder of each task's files; with ``data`` None as it was made.
        data: folder with the task's files themselves, instead.

    Returns:
        The row, the file it was written to, and what is worth knowing.

    Raises:
        PyraError: for anything wrong with the folder, the options or the data.
    """
    folder = Path(folder).expanduser()
    record = read_compression(folder)
    made = record.options
    if root is None and data is None:
        root, data = made["root"], made["data"] if task in (None, made["task"]) else None
    bare = bare_backbone(str(folder), task or made["task"], asked, root=root, data=data)
    result, scored = bare.score()
    nll, tokens = _answers(bare)
    result = dataclasses.replace(
        result,
        method=record.method,
        settings={**(result.settings or {}), **_settings(record)},
        note=f"answers: {nll:.4f} nats a token ({tokens} tokens)",
    )
    other = "" if bare.task.name == find_text_card(made["task"])[0].name else f"-{bare.task.name}"
    file = folder / f"{asked.file}{other}.json"
    answers = scored.record(asked.split, bare.examples)
    write_json(folder / f"predictions-{asked.file}{other}.json", {**answers, "answer_nll": nll})
    write_json(file, result)
    return result, file, [*scored.notes(), str(result.note)]


def _answers(bare: BareBackbone) -> tuple[float, int]:
    """Return nats a token of the right answers, and their number of tokens."""
    subject = bare.subject
    rows, _, _ = answer_rows(subject.encoder, bare.examples, subject.max_length)
    loss = answer_loss(
        subject.model,
        rows,
        subject.encoder,
        batch_size=bare.options.batch_size,
        description=f"{bare.task.name}: answers",
    )
    return loss.mean, sum(loss.tokens)


def _settings(record: Compression) -> dict[str, Any]:
    whole, written = record.variants[0], record.variants[-1]
    return {
        "experts": written.experts,
        "experts_before": whole.experts,
        "active": written.active,
        "active_before": whole.active,
        "score": record.options["score"],
        "calibration_sha256": record.calibration["sha256"],
    }
