"""From options to a language model, and from a run folder back to it.

The layout is that of runs on images (:mod:`pyra.tasks.runs`); ``options.json`` says ``"kind": "language"``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from pyra.adapters import adapt, fold_adapter, load_adapter
from pyra.adapters.methods import refuse_rank, rounding_problem
from pyra.adapters.targets import trained_modules
from pyra.errors import CheckpointError, ConfigError, DataError
from pyra.experts import QuantisingConfig, fake_quantise
from pyra.experts.layers import has_experts
from pyra.experts.quantising import fitting_group
from pyra.export.linear_training import fake_quantise_linear
from pyra.files import read_json, write_json
from pyra.records import record_problems
from pyra.tasks.language.adaptation import AdaptationOptions
from pyra.tasks.language.cards import TextCard
from pyra.tasks.language.data import TextTask, examples_digest, load_text_task
from pyra.tasks.language.models import (
    load_classifier,
    load_decoder,
    load_encoder,
    longest,
    read_config,
    weights_record,
)
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.resuming import Begin
from pyra.tasks.runs import ADAPTER, DATA, OPTIONS, no_run

KIND = "language"
_LABELS, _BACKBONE = "labels.json", "backbone.json"


@dataclass(frozen=True)
class Subject:
    """A model with what it takes to ask it.

    Attributes:
        model: in evaluation mode.
        encoder: its tokenizer.
        max_length: tokens that are read.
        answer: ``head``, ``scoring`` or ``generation``.
    """

    model: nn.Module
    encoder: Encoder
    max_length: int
    answer: str


def resolve_answer(card: TextCard, asked: str | None, *, head: bool) -> str:
    """Return how a task is answered.

    Args:
        card: of the task.
        asked: ``--answer``; None takes a head where one is possible, and else what the card says.
        head: whether there is a head, or one may be trained.

    Raises:
        ConfigError: for an answer that the task does not have.
    """
    if asked is None:
        return "head" if head and card.labels else card.answer
    if asked != "generation" and not card.labels:
        raise ConfigError(f"--answer {asked}: task {card.name} has no labels; it is answered by generation")
    if asked == "head" and not head:
        raise ConfigError("--answer head needs a run that was trained so: a bare backbone has no head yet")
    return asked


def new_subject(options: LanguageOptions, task: TextTask) -> Subject:
    """Load the backbone of a run with its tokenizer, with a new head where the task is answered by one.

    Where ``--qat`` says so, it works with the weights that it will be rounded to from here on.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: where it cannot be had, or cannot answer so.
    """
    answer = resolve_answer(task.card, options.answer, head=True)
    if options.method == "linear" and answer != "head":
        raise ConfigError(f"--method linear trains a head, task {task.name} has no labels: take lora")
    config = read_config(options.backbone)
    encoder = load_encoder(options.backbone, chat=options.chat, thinking=options.thinking)
    max_length = longest(options.backbone, config, encoder.tokenizer, options.max_length, task.card.max_length)
    if answer == "head":
        model = load_classifier(options.backbone, list(task.labels), encoder.pad_id, options.seed)
        kinds = "token_type_ids" in inspect.signature(model.forward).parameters
        encoder = replace(encoder, kinds=kinds)
    else:
        model = load_decoder(options.backbone)
    if options.qat is not None:
        train_as_rounded(model, options)
    return Subject(model, encoder, max_length, answer)


def train_as_rounded(model: nn.Module, options: AdaptationOptions) -> None:
    """Have the routed experts of a backbone, or else its linear layers but the head, work as INT4, in place.

    Raises:
        ConfigError: for experts that cannot be rounded so, or an adapter that is not rounded with linear layers.
        UnsupportedModelError: for a model that has neither.
    """
    if has_experts(model):
        fake_quantise(model, QuantisingConfig(group_size=fitting_group(model)))
        return
    if unfit := rounding_problem(options.trained, options.dropout):
        raise ConfigError(f"{options.backbone} has no routed experts, and --qat {options.qat} of linear layers {unfit}")
    heads = [model.get_submodule(name) for name in trained_modules(model)]
    output: Any = getattr(model, "get_output_embeddings", lambda: None)()
    fake_quantise_linear(model, [part for head in [*heads, output] if head is not None for part in head.modules()])


def adapted(model: nn.Module, options: AdaptationOptions) -> nn.Module:
    """Adapt a model as the options say."""
    width = getattr(getattr(model, "config", None), "hidden_size", None)
    if width is not None:
        refuse_rank(options.trained, options.rank, width)
    if options.method == "full":
        return model
    return adapt(model, pyra=options.pyra_config(), peft=options.peft_config())


def save_language_run(folder: Path, begin: Begin, labels: Sequence[str]) -> None:
    """Write what is needed to make the model again (the adapter is saved beside it), and on what it was made.

    Args:
        folder: of the run.
        begin: what it is begun with, of :func:`begin_run`.
        labels: of its task.
    """
    save_begin(folder, begin)
    write_json(folder / _LABELS, list(labels))


def save_begin(folder: Path, begin: Begin) -> None:
    """Write the options of a run, on what data it is made, and of which weights."""
    write_json(folder / DATA, begin.data)
    weights = weights_record(begin.options["backbone"])
    if weights is not None:
        write_json(folder / _BACKBONE, {"files": weights})
    write_json(folder / OPTIONS, begin.options)


def begin_run(options: LanguageOptions, task: TextTask | None = None, left_out: int | None = None) -> Begin:
    """Return what a run is begun with, as it is stored: a run is read from any folder, so paths are absolute.

    Args:
        options: it is made with.
        task: it is made for.
        left_out: training examples that are too long; None where that is not known.
    """
    values = asdict(options)
    for name in ("backbone", "task", "root", "data"):
        path = Path(values[name]).expanduser() if values[name] else None
        if path is not None and path.exists() and (name != "task" or path.is_file()):
            values[name] = str(path.resolve())
    more = {} if left_out is None else {"left_out": left_out}
    data = None if task is None else {**_record(task), **more}
    name = "" if task is None else task.name
    return Begin(options.output, {"kind": KIND, **values}, name, data, options.resume, options.overwrite)


def is_language_run(folder: str | Path) -> bool:
    """Whether a folder holds a run on a language task."""
    try:
        values = read_json(Path(folder) / OPTIONS)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("kind") == KIND


def read_language_options(folder: str | Path) -> LanguageOptions:
    """Read the options of a run.

    Raises:
        DataError: where the folder holds no finished run on a language task.
    """
    folder = Path(folder)
    values = _read(folder, OPTIONS)
    if not isinstance(values, dict) or values.pop("kind", None) != KIND:
        raise DataError(f"{folder} is no run on a language task")
    problems = record_problems(LanguageOptions, values)
    if problems:
        raise DataError(f"{folder / OPTIONS} holds no options of a run: {'; '.join(problems)}")
    try:
        return LanguageOptions(**values)
    except ConfigError as error:
        raise DataError(f"{folder / OPTIONS}: {error}") from None


def load_language_run(folder: str | Path) -> tuple[Subject, LanguageOptions, TextTask]:
    """Read a run folder: the trained model with its PEFT layers folded, its options and its task.

    Raises:
        DataError: where the folder holds no finished run, or its data is not what it was made with.
        CheckpointError: where the backbone's weights have changed, or the adapter does not fit them.
    """
    folder = Path(folder)
    options = read_language_options(folder)
    check_same_weights(folder, options)
    task = load_text_task(options.task, options.root, options.data)
    _check_same_data(folder, task)
    subject = new_subject(options, task)
    model = fold_adapter(load_adapter(subject.model, folder / ADAPTER)).eval().requires_grad_(False)
    return Subject(model, subject.encoder, subject.max_length, subject.answer), options, task


def check_same_weights(folder: Path, options: AdaptationOptions) -> None:
    """Raise :class:`CheckpointError` where the backbone of a run is gone, or has other weights than it had then."""
    if not (folder / _BACKBONE).is_file():
        return
    stored = _read(folder, _BACKBONE)
    now = weights_record(options.backbone)
    if now is None:
        raise CheckpointError(f"{options.backbone} is not there any more: {folder} was trained on its weights")
    if not isinstance(stored, dict) or stored.get("files") != now:
        raise CheckpointError(f"{options.backbone} is not what {folder} was trained on: its weights have changed since")


def _check_same_data(folder: Path, task: TextTask) -> None:
    labels, stored, now = _read(folder, _LABELS), _read(folder, DATA), _record(task)
    if labels != list(task.labels):
        raise DataError(f"{folder} was trained on other labels than {task.name} has now: the data or the run changed")
    if not isinstance(stored, dict) or not isinstance(stored.get("splits"), dict):
        raise DataError(f"{folder / DATA} holds no record of splits")
    if stored.get("version") != now["version"]:
        raise DataError(
            f"{folder} was trained on version {stored.get('version')} of {task.name}, here is version "
            f"{now['version']}: their scores cannot be compared; train again"
        )
    changed = [name for name, record in stored["splits"].items() if now["splits"].get(name) != record]
    if changed:
        then, here = (record["splits"].get(changed[0], {}).get("examples", 0) for record in (stored, now))
        raise DataError(
            f"the {changed[0]} split of {task.name} is not the one {folder} was made with ({then} examples then, "
            f"{here} now): put the data back, or train again"
        )


def _record(task: TextTask) -> dict[str, Any]:
    splits = {
        name: {"examples": len(examples), "sha256": examples_digest(examples)} for name, examples in task.splits.items()
    }
    return {"task": task.name, "version": task.card.version, "source": task.source, "splits": splits}


def _read(folder: Path, name: str) -> Any:
    try:
        return read_json(folder / name)
    except FileNotFoundError:
        raise DataError(no_run(folder, name)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / name} cannot be read: {error}") from None
