"""From options to a decoder that is trained further, and from a run folder back to it.

The layout is that of runs on language tasks (:mod:`pyra.tasks.language.runs`), with the chat template beside it;
``options.json`` says which verb made the run: ``"kind": "sft"``, ``"dpo"`` or ``"rl"``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from pyra.adapters import fold_adapter, load_adapter
from pyra.errors import ConfigError, DataError
from pyra.files import read_json, write_text
from pyra.records import record_problems
from pyra.tasks.language.adaptation import AdaptationOptions
from pyra.tasks.language.models import load_decoder, load_tokenizer, longest, read_config
from pyra.tasks.language.runs import (
    Subject,
    adapted,
    check_same_weights,
    read_language_options,
    save_begin,
    train_as_rounded,
)
from pyra.tasks.language.runs import is_language_run as _is_language_run
from pyra.tasks.posttraining.options import CONTINUED, PostTrainingOptions, contradictions
from pyra.tasks.posttraining.templates import chat_encoder, encoder_of
from pyra.tasks.resuming import Begin
from pyra.tasks.runs import ADAPTER, OPTIONS, no_run

TEMPLATE = "chat_template.jinja"
LONGEST = 1024
"""Tokens that are read where ``--max-length`` says nothing; fewer where the backbone reads fewer."""

# kind -> where its options are; a kind is imported only when one of its runs turns up
_KINDS: Mapping[str, tuple[str, str]] = {
    "sft": ("pyra.tasks.posttraining.sft_options", "SftOptions"),
    "dpo": ("pyra.tasks.posttraining.dpo_options", "DpoOptions"),
    "rl": ("pyra.tasks.posttraining.rl_options", "RlOptions"),
}
_PLACES = ("backbone", "data", "adapter", "chat_template", "reference", "task", "root")
Options = TypeVar("Options", bound=PostTrainingOptions)


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        subject: the decoder, not adapted yet, with its encoder.
        notes: what is worth knowing.
    """

    subject: Subject
    notes: list[str]


def continued(options: Options) -> Options:
    """Return the options with backbone and method of the run that ``--adapter`` names; as they are without one.

    Raises:
        ConfigError: where options contradict that run.
        DataError: where the folder holds no finished run of a decoder.
    """
    if options.adapter is None:
        return options
    folder = Path(options.adapter).expanduser()
    earlier = _read_any(folder)
    if problems := contradictions(options, earlier):
        raise ConfigError("; ".join(problems))
    values = {name: getattr(earlier, name) for name in CONTINUED}
    if options.backbone.strip():  # it may have moved; its weights are compared
        values["backbone"] = options.backbone
    options = replace(options, **values)
    check_same_weights(folder, options)
    return options


def new_start(options: PostTrainingOptions) -> Start:
    """Load the decoder and the tokenizer of a run, with its chat template.

    Args:
        options: of :func:`continued`.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: where they cannot be had.
    """
    config = read_config(options.backbone)
    encoder, note = chat_encoder(options)
    length = longest(options.backbone, config, encoder.tokenizer, options.max_length, LONGEST)
    return Start(Subject(_decoder(options), encoder, length, "generation"), [note] if note else [])


def adapted_policy(model: nn.Module, options: PostTrainingOptions) -> nn.Module:
    """Adapt the decoder of a run as the options say, or attach the adapter it goes on from; what trains is trainable.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError, ScheduleError: as of :func:`pyra.adapters.adapt` and
            :func:`pyra.adapters.load_adapter`.
    """
    if options.adapter is None:
        return adapted(model, options)
    model = load_adapter(model, Path(options.adapter).expanduser() / ADAPTER, is_trainable=True)
    return model.requires_grad_(True) if options.method == "full" else model


def begin_run(options: PostTrainingOptions, record: dict[str, Any] | None = None, name: str = "") -> Begin:
    """Return what a run is begun with, as it is stored: a run is read from any folder, so paths are absolute.

    Args:
        options: of :func:`continued`.
        record: of its data; None where nothing is gone on with.
        name: of its data.
    """
    values = asdict(options)
    for place in [place for place in _PLACES if values.get(place)]:
        path = Path(values[place]).expanduser()
        if path.exists() and (place != "task" or path.is_file()):
            values[place] = str(path.resolve())
    return Begin(options.output, {"kind": options.kind, **values}, name, record, options.resume, options.overwrite)


def save_run(folder: Path, begin: Begin, subject: Subject) -> None:
    """Write what is needed to make the model again (the adapter is saved beside it), and on what it was made."""
    save_begin(folder, begin)
    write_text(folder / TEMPLATE, str(subject.encoder.tokenizer.chat_template))


def run_kind(folder: str | Path) -> str | None:
    """Return which verb of post-training made a run folder, or None."""
    try:
        values = read_json(Path(folder) / OPTIONS)
    except (OSError, ValueError):
        return None
    kind = values.get("kind") if isinstance(values, dict) else None
    return kind if isinstance(kind, str) and kind in _KINDS else None


def read_posttraining_options(folder: str | Path) -> PostTrainingOptions:
    """Read the options of a run of post-training.

    Raises:
        DataError: where the folder holds none that is finished.
    """
    folder = Path(folder).expanduser()
    try:
        values = read_json(folder / OPTIONS)
    except FileNotFoundError:
        raise DataError(no_run(folder, OPTIONS)) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{folder / OPTIONS} cannot be read: {error}") from None
    kind = values.pop("kind", None) if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in _KINDS:
        raise DataError(f"{folder} is no run of post-training")
    module, name = _KINDS[kind]
    record = getattr(importlib.import_module(module), name)
    if problems := record_problems(record, values):
        raise DataError(f"{folder / OPTIONS} holds no options of a run: {'; '.join(problems)}")
    try:
        options: PostTrainingOptions = record(**values)
    except ConfigError as error:
        raise DataError(f"{folder / OPTIONS}: {error}") from None
    return options


def load_posttrained(folder: str | Path) -> tuple[Subject, PostTrainingOptions]:
    """Read a run folder: the trained decoder with its PEFT layers folded and its encoder, and the options.

    The encoder gives prompts through the chat template of the run, with its switch for thinking. The data is not
    needed, nor the run that this one went on from.

    Raises:
        DataError: where the folder holds no finished run.
        CheckpointError: where the backbone's weights have changed, or the adapter does not fit them.
    """
    folder = Path(folder).expanduser()
    options = read_posttraining_options(folder)
    check_same_weights(folder, options)
    tokenizer = load_tokenizer(options.backbone)
    try:
        tokenizer.chat_template = (folder / TEMPLATE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / TEMPLATE} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    encoder = encoder_of(tokenizer, options, f"{folder / TEMPLATE}: the run's chat template")
    config = read_config(options.backbone)
    length = longest(options.backbone, config, tokenizer, options.max_length, LONGEST)
    model = load_adapter(_decoder(options), folder / ADAPTER)
    return Subject(fold_adapter(model).eval().requires_grad_(False), encoder, length, "generation"), options


def _decoder(options: PostTrainingOptions) -> nn.Module:
    """Load the decoder of a run; where ``--qat`` says so, it works with the weights that it will be rounded to."""
    model = load_decoder(options.backbone)
    if options.qat is not None:
        train_as_rounded(model, options)
    return model


def _read_any(folder: Path) -> AdaptationOptions:
    """Read the options of any run whose adapter a decoder takes."""
    if not _is_language_run(folder):
        return read_posttraining_options(folder)
    earlier = read_language_options(folder)
    if earlier.method == "linear" or not (folder / ADAPTER).is_dir():
        raise DataError(f"--adapter {folder} has a head for labels: give a run that answers by text")
    return earlier
