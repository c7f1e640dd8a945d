"""A run of post-training, asked about a language task through its chat template."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from pyra.errors import ConfigError
from pyra.files import write_json
from pyra.tasks.language.data import examples_digest, load_text_task
from pyra.tasks.language.evaluation import Evaluation, scored_on
from pyra.tasks.language.models import longest
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.results import zero_shot_row
from pyra.tasks.language.runs import Subject, resolve_answer
from pyra.tasks.posttraining.runs import load_posttrained
from pyra.tasks.posttraining.templates import encoder_of
from pyra.tasks.results import RunResult, read_result
from pyra.tasks.runs import resolve_device
from pyra.tasks.usage import Meter


def evaluate_posttrained(
    folder: str | Path, task_name: str | None, asked: Evaluation, *, root: str | None = None, data: str | None = None
) -> tuple[RunResult, Path, list[str]]:
    """Score a run folder on a task, as it is deployed; writes the row and the answers into it.

    Args:
        folder: of ``pyra sft``, ``dpo`` or ``rl``.
        task_name: a language task.
        asked: what is asked for.
        root: folder with a folder of each task's files.
        data: folder with the task's files themselves, instead.

    Returns:
        The row, the file it was written to, and what is worth knowing.

    Raises:
        ConfigError: where no task is named, or for prompts that are no chats.
        DataError, CheckpointError: where the run, its backbone or the task cannot be read.
    """
    folder = Path(folder).expanduser()
    if task_name is None:
        raise ConfigError(
            f"{folder} was scored when it was trained (result.json): --task asks it about a language task"
        )
    if asked.chat is False:
        raise ConfigError(f"{folder} answers chats: leave --no-chat out")
    device = resolve_device(asked.device)
    meter = Meter(device).start()
    task = load_text_task(task_name, root, data)
    answered_by = resolve_answer(task.card, asked.answer, head=False)
    found, trained = load_posttrained(folder)
    trained = dataclasses.replace(trained, thinking=asked.thinking or trained.thinking)
    how = LanguageOptions(backbone=trained.backbone, task=task.name, chat=True, thinking=trained.thinking)
    how = asked.changed(dataclasses.replace(how, batch_size=trained.batch_size, dtype=trained.dtype))
    tokenizer = found.encoder.tokenizer
    config = getattr(found.model, "config", None)
    length = longest(trained.backbone, config, tokenizer, asked.max_length, task.card.max_length)
    subject = Subject(found.model.to(device), encoder_of(tokenizer, trained), length, answered_by)
    examples = task.split(asked.split, how.limit)
    scored = scored_on(subject, task, examples, how, asked)
    before = read_result(folder)
    kept = ("method", "seed", "trained_parameters", "adapter", "weights_sha256")
    row = zero_shot_row(
        task,
        scored,
        subject,
        how,
        asked.num_fewshot,
        split=asked.split,
        test_sha256=examples_digest(examples),
        **meter.stop().columns(),
    )
    result = dataclasses.replace(row, **{name: getattr(before, name) for name in kept})
    name = asked.file.replace("evaluation", f"evaluation-{task.name}", 1)
    write_json(folder / f"predictions-{name}.json", scored.record(asked.split, examples))
    write_json(folder / f"{name}.json", result)
    return result, folder / f"{name}.json", scored.notes()
