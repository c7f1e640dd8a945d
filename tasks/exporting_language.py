"""A language model exported for engines: a run, what ``pyra compress-experts`` wrote, or a folder of transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyra.backbones import unwrap, wrapped_schedule
from pyra.backbones.joyai import MODEL_TYPES
from pyra.errors import ConfigError, OutputError
from pyra.export.engine_config import family_named
from pyra.export.engine_record import EngineRecord
from pyra.export.engine_tokenizer import PROBES
from pyra.export.language import LanguageModel, export_language_model
from pyra.export.language_formats import LANGUAGE_FORMATS, language_format
from pyra.tasks.language.answer_loss import AnswerLoss, answer_rows
from pyra.tasks.language.compression import is_compression
from pyra.tasks.language.data import load_text_task
from pyra.tasks.language.models import (
    count_macs,
    count_plain_macs,
    load_decoder,
    load_tokenizer,
    prompt_masks,
    read_config,
)
from pyra.tasks.language.runs import is_language_run, load_language_run, read_language_options, resolve_answer
from pyra.tasks.language.tokens import Answered
from pyra.tasks.output import staged_output
from pyra.tasks.runs import OPTIONS

_COMPARED, _LONGEST = 4, 256  # rows whose logits are compared, and how much of each
_MEASURED = 16  # examples that whole prompts are measured on, where the model was trained on shorter ones
_TOKENS = 1024  # a prompt that its rate is counted for

WHOLE_PROMPTS = (
    "engines compute whole prompts: nothing merges there, and the re-activation weights, which only merged tokens "
    "need, are left out"
)


@dataclass(frozen=True)
class ExportedLanguage:
    """An exported language model: where it lies, and its record."""

    folder: Path
    record: EngineRecord


def is_language_source(folder: str | Path) -> bool:
    """Whether a folder holds a language model of any kind that :func:`language_subject` reads."""
    folder = Path(folder).expanduser()
    if is_language_run(folder) or is_compression(folder):
        return True
    if (folder / OPTIONS).is_file() or not (folder / "config.json").is_file():
        return False
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "vocab_size" in values


def language_subject(folder: str | Path) -> LanguageModel:
    """Read a language model of any kind, folded in float32, with what its export is compared on.

    Raises:
        ConfigError, DataError, CheckpointError, UnsupportedModelError: where it cannot be read, or engines have no
            reader of its family.
    """
    folder = Path(folder).expanduser()
    if is_language_run(folder):
        return _of_run(folder)
    family_named(read_config(str(folder)).model_type)
    tokenizer = load_tokenizer(str(folder))
    model = load_decoder(str(folder)).requires_grad_(False)
    rows = [tokenizer(text)["input_ids"] for text in PROBES]
    kind = "fewer experts" if is_compression(folder) else "a model"
    return LanguageModel(model, tokenizer, rows, f"{kind}, {folder.name}", **_told(str(folder), model))


def _of_run(folder: Path) -> LanguageModel:
    options = read_language_options(folder)
    family_named(read_config(options.backbone).model_type)
    card = load_text_task(options.task, options.root, options.data).card
    if resolve_answer(card, options.answer, head=True) == "head":
        raise ConfigError(
            f"{folder} answers by a head, and engines serve what a decoder says: train with --answer scoring or "
            "generation"
        )
    subject, _, task = load_language_run(folder)
    rows, _, _ = answer_rows(subject.encoder, task.split("test", _MEASURED), subject.max_length)
    merging = whole_prompts(subject.model, rows)
    source = f"a run, {folder.name}: {options.label} of {Path(options.backbone).name}"
    return LanguageModel(
        subject.model,
        subject.encoder.tokenizer,
        [row.ids[:_LONGEST] for row in rows[:_COMPARED]],
        source,
        merging=merging,
        **_told(options.backbone, subject.model),
    )


def _told(backbone: str, model: Any) -> dict[str, Any]:
    """Say what the backbone's folder tells: its files, the precision of its weights, and where MTP layers may be."""
    folder = Path(backbone).expanduser()
    config = read_config(backbone)
    quantised = getattr(config, "quantization_config", None) is not None
    stored = "bfloat16" if quantised else str(config.dtype or torch.float32).removeprefix("torch.")
    mixture = folder.is_dir() and model.config.model_type in MODEL_TYPES
    return {
        "files": folder if folder.is_dir() else None,
        "dtype": stored if stored in ("float32", "float16", "bfloat16") else "float32",
        "mtp": folder if mixture else None,
    }


def whole_prompts(model: nn.Module, rows: Sequence[Answered]) -> dict[str, Any] | None:
    """Take the merging off a model, in place, and measure on answers what that changes; None where nothing merges.

    Args:
        model: folded, in evaluation mode.
        rows: prompts with the right answers.

    Returns:
        ``schedule`` and ``rate`` of the model, the ``answers`` and ``tokens`` that were measured, nats a token
        ``merging`` and ``whole``, their ``difference`` (whole less merging) with its standard ``error``,
        ``largest_difference`` of a logit, ``top1_agreement`` and ``text``.
    """
    schedule = wrapped_schedule(model)
    if schedule is None:
        return None
    rate = 1 - count_macs(model, _TOKENS) / count_plain_macs(model, _TOKENS)
    rows = rows[:_MEASURED]
    shorter = [_answer_logits(model, row) for row in rows]
    unwrap(model)
    whole = [_answer_logits(model, row) for row in rows]
    losses = [_loss(found, rows) for found in (shorter, whole)]
    difference, error = losses[1].difference(losses[0])
    pairs = list(zip(shorter, whole, strict=True))
    tokens = sum(losses[0].tokens)
    return {
        "schedule": list(schedule),
        "rate": rate,
        "answers": len(rows),
        "tokens": tokens,
        "merging": losses[0].mean,
        "whole": losses[1].mean,
        "difference": difference,
        "error": error,
        "largest_difference": max(float((own - theirs).abs().max()) for own, theirs in pairs),
        "top1_agreement": sum(int((own.argmax(-1) == theirs.argmax(-1)).sum()) for own, theirs in pairs) / tokens,
        "text": WHOLE_PROMPTS,
    }


def _answer_logits(model: Any, row: Answered) -> Tensor:
    """Return the logits that each token of the answer is expected by, [A, V]."""
    ids = torch.tensor([row.ids])
    with torch.inference_mode():
        found = model(input_ids=ids, use_cache=False, **prompt_masks(model, ids, [row.start])).logits
    return found[0, row.start - 1 : -1].float()


def _loss(found: Sequence[Tensor], rows: Sequence[Answered]) -> AnswerLoss:
    nats = []
    for logits, row in zip(found, rows, strict=True):
        answer = torch.tensor(row.ids[row.start :])
        nats.append(-float(logits.double().log_softmax(-1).gather(1, answer[:, None]).sum()))
    return AnswerLoss(nats, [len(row.ids) - row.start for row in rows])


def export_language(
    subject: LanguageModel,
    folder: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    verify: bool = True,
    tolerance: float | None = None,
) -> ExportedLanguage:
    """Export to a folder, which is there as a whole or not at all.

    Raises:
        OutputError: where ``folder`` holds an export and ``overwrite`` is false, or something else.
        PyraError: as of :func:`pyra.export.language.export_language_model`; an earlier export stays.
    """
    with staged_output(folder, "export", overwrite) as staging:
        record = export_language_model(subject, staging, format, verify=verify, tolerance=tolerance)
    return ExportedLanguage(Path(folder), record)


def output_folders(run: str | Path, formats: Sequence[str], output: str | None) -> list[Path]:
    """Return the folder of each format: ``output`` itself for one format, and a folder below it for each of several.

    Raises:
        OutputError: where there is no ``output`` and the model is no run, which has a place for exports.
    """
    if output is None and not is_run(run):
        raise OutputError(f"{run} is no run, and exports would lie among its files: give --output FOLDER")
    if output is None:
        return [Path(run) / "export" / name for name in formats]
    return [Path(output)] if len(formats) == 1 else [Path(output) / name for name in formats]


def is_run(folder: str | Path) -> bool:
    """Whether a folder holds a run, not a model alone."""
    return (Path(folder).expanduser() / OPTIONS).is_file()


def check_language_formats(names: Sequence[str]) -> None:
    """Refuse what a language model cannot be written as, before anything is read.

    Raises:
        ConfigError: unknown or repeated formats, a missing library (names the extra).
    """
    if not names:
        raise ConfigError(f"--format is empty: give one or more of {', '.join(LANGUAGE_FORMATS)}")
    for name in names:
        language_format(name)
    if len(set(names)) < len(names):
        raise ConfigError(f"--format names something twice: {', '.join(names)}")
