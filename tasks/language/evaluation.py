"""Scoring a run on a language task again, or a bare backbone on the task's prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pyra.errors import ConfigError
from pyra.files import write_json
from pyra.records import ABOVE_0, bound_problems, type_problems
from pyra.tasks.language.answering import Asking, answer
from pyra.tasks.language.data import Example, TextTask, examples_digest, load_text_task
from pyra.tasks.language.models import backbone_digest, load_decoder, load_encoder, longest, read_config
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.results import asked_settings, scored_columns, zero_shot_row
from pyra.tasks.language.runs import Subject, load_language_run, resolve_answer
from pyra.tasks.language.scored import Scored
from pyra.tasks.language.thinking import THINKING
from pyra.tasks.output import staged_output
from pyra.tasks.results import PREDICTIONS_FILE, RESULT_FILE, RunResult, read_result
from pyra.tasks.runs import DTYPES, resolve_device
from pyra.tasks.usage import Meter


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is asked for; what is None is as the run was trained, or as its options have it by default.

    Attributes:
        split: of the task.
        answer: ``scoring`` or ``generation``.
        batch_size: examples a forward.
        limit: examples of the split.
        max_length: tokens that are read.
        max_new_tokens: generated at most.
        num_fewshot: answered training examples before each prompt.
        chat: prompts through the chat template.
        thinking: what that is told: ``on``, ``off`` or ``auto``.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: precision of the forward.
    """

    split: str = "test"
    answer: str | None = None
    batch_size: int | None = None
    limit: int | None = None
    max_length: int | None = None
    max_new_tokens: int | None = None
    num_fewshot: int = 0
    chat: bool | None = None
    thinking: str | None = None
    device: str = "auto"
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Check what is asked for; raises :class:`ConfigError` with all problems."""
        problems = type_problems(Evaluation, dataclasses.asdict(self))
        if not problems:
            problems += bound_problems(self, ABOVE_0, ("batch_size", "limit", "max_length", "max_new_tokens"))
        if not problems and self.num_fewshot < 0:
            problems.append(f"--num-fewshot must be at least 0, got {self.num_fewshot}")
        if self.dtype is not None and self.dtype not in DTYPES:
            problems.append(f"--dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.thinking is not None and self.thinking not in THINKING:
            problems.append(f"--thinking must be one of {', '.join(THINKING)}, got {self.thinking!r}")
        if problems:
            raise ConfigError("; ".join(problems))

    def changed(self, options: LanguageOptions) -> LanguageOptions:
        """Return the options of a run with what is asked for in their place."""
        names = ("answer", "batch_size", "limit", "max_length", "max_new_tokens", "chat", "thinking", "dtype")
        asked = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(options, **asked)

    @property
    def file(self) -> str:
        """Name of the file without its ending: what differs from the plain evaluation stands in it."""
        parts = [
            "evaluation",
            self.split if self.split != "test" else "",
            self.answer or "",
            f"{self.num_fewshot}-shot" if self.num_fewshot else "",
            "chat" if self.chat else "",
            f"thinking-{self.thinking}" if self.thinking else "",
            f"limit-{self.limit}" if self.limit else "",
        ]
        return "-".join(filter(None, parts))


def evaluate_language_run(folder: str | Path, asked: Evaluation) -> tuple[RunResult, Path, list[str]]:
    """Score a run folder again, as it is deployed; writes the row and the answers into it.

    Returns:
        The row, the file it was written to, and what is worth knowing.

    Raises:
        ConfigError: for an answer the run was not trained for, or a device that is not there.
        DataError, CheckpointError: where the run, its data or its backbone cannot be read.
    """
    folder = Path(folder)
    device = resolve_device(asked.device)
    meter = Meter(device).start()
    subject, options, task = load_language_run(folder)
    trained_for = subject.answer
    if asked.answer is not None and asked.answer != trained_for:
        if "head" in (asked.answer, trained_for):
            raise ConfigError(f"--answer {asked.answer}: {folder} was trained to answer by {trained_for}")
        resolve_answer(task.card, asked.answer, head=False)
    changed = asked.changed(options)
    encoder = load_encoder(options.backbone, chat=changed.chat, thinking=changed.thinking)
    encoder = dataclasses.replace(encoder, kinds=subject.encoder.kinds)
    config = getattr(subject.model, "config", None)
    max_length = longest(options.backbone, config, encoder.tokenizer, changed.max_length, task.card.max_length)
    subject = Subject(subject.model.to(device), encoder, max_length, asked.answer or trained_for)
    examples = task.split(asked.split, changed.limit)
    scored = scored_on(subject, task, examples, changed, asked)
    before = read_result(folder)
    names = ("chat", "thinking", "dtype", "limit", "max_new_tokens")
    how = {**{name: getattr(changed, name) for name in names}, **asked_settings(subject, asked.num_fewshot)}
    result = dataclasses.replace(
        before,
        split=asked.split,
        test_sha256=examples_digest(examples),
        settings={**(before.settings or {}), **how},
        **scored_columns(task, scored, subject, changed),
        **meter.stop().columns(),
    )
    file = folder / f"{asked.file}.json"
    write_json(folder / f"predictions-{asked.file}.json", scored.record(asked.split, examples))
    write_json(file, result)
    return result, file, scored.notes()


def evaluate_backbone(
    backbone: str,
    task_name: str,
    asked: Evaluation,
    *,
    root: str | None = None,
    data: str | None = None,
    output: str | None = None,
    overwrite: bool = False,
) -> tuple[RunResult, list[str]]:
    """Score a backbone that nothing was trained for on a task's prompts.

    Args:
        backbone: folder or hub name of a decoder.
        task_name: a language task.
        asked: what is asked for.
        root: folder with a folder of each task's files.
        data: folder with the task's files themselves, instead.
        output: folder that the row and the answers are written to; None writes nothing.
        overwrite: replace an earlier one there.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone or the output folder.
    """
    bare = bare_backbone(backbone, task_name, asked, root=root, data=data)
    if output is None:
        result, scored = bare.score()
    else:
        with staged_output(output, "run", overwrite) as folder:
            result, scored = bare.score()
            write_json(folder / PREDICTIONS_FILE, scored.record(asked.split, bare.examples))
            write_json(folder / RESULT_FILE, result)
    return result, scored.notes()


@dataclass(frozen=True)
class BareBackbone:
    """A backbone that nothing was trained for, before it is asked.

    Attributes:
        subject: the model with its tokenizer.
        task: it is asked about.
        examples: of the split that was asked for.
        options: as of a run.
        asked: of the caller.
        weights: hash of the model.
        meter: that has begun.
    """

    subject: Subject
    task: TextTask
    examples: list[Example]
    options: LanguageOptions
    asked: Evaluation
    weights: str
    meter: Meter

    def score(self) -> tuple[RunResult, Scored]:
        """Ask, and return the row with the answers."""
        scored = scored_on(self.subject, self.task, self.examples, self.options, self.asked)
        columns = {
            "split": self.asked.split,
            "test_sha256": examples_digest(self.examples),
            "weights_sha256": self.weights,
            **self.meter.stop().columns(),
        }
        return zero_shot_row(self.task, scored, self.subject, self.options, self.asked.num_fewshot, **columns), scored


def bare_backbone(
    backbone: str, task_name: str, asked: Evaluation, *, root: str | None = None, data: str | None = None
) -> BareBackbone:
    """Load a backbone and what it is asked; arguments and errors as of :func:`evaluate_backbone`."""
    device = resolve_device(asked.device)
    meter = Meter(device).start()
    task = load_text_task(task_name, root, data)
    answered_by = resolve_answer(task.card, asked.answer, head=False)
    changed = asked.changed(LanguageOptions(backbone=backbone, task=task_name))
    config = read_config(backbone)
    encoder = load_encoder(backbone, chat=changed.chat, thinking=changed.thinking)
    max_length = longest(backbone, config, encoder.tokenizer, asked.max_length, task.card.max_length)
    model = load_decoder(backbone)
    weights = backbone_digest(model)
    subject = Subject(model.to(device), encoder, max_length, answered_by)
    return BareBackbone(subject, task, task.split(asked.split, changed.limit), changed, asked, weights, meter)


def scored_on(
    subject: Subject, task: TextTask, examples: Sequence[Example], options: LanguageOptions, asked: Evaluation
) -> Scored:
    """Ask a model about examples as options and evaluation say; raises :class:`ConfigError` for shots before a head."""
    if asked.num_fewshot and subject.answer == "head":
        raise ConfigError(f"--num-fewshot {asked.num_fewshot} goes with prompts: this run answers by its head")
    how = Asking(
        options.batch_size,
        DTYPES[options.dtype],
        options.max_new_tokens,
        shown=task.shown(asked.num_fewshot),
        label=f"{task.name}: {asked.split}",
    )
    return answer(subject, task, examples, how)
