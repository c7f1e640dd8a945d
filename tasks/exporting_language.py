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
from pyra.errors import ConfigError, DataError, OutputError
from pyra.experts.quantising import quantising_config, undo_fake_quantise
from pyra.export.engine_config import family_named
from pyra.export.engine_record import EngineRecord
from pyra.export.engine_tokenizer import PROBES
from pyra.export.language import LanguageModel, export_language_model
from pyra.export.language_formats import LANGUAGE_FORMATS, language_format
from pyra.export.linear_training import trains_as_rounded, undo_fake_quantise_linear
from pyra.tasks.language.adaptation import AdaptationOptions
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
from pyra.tasks.language.runs import (
    Subject,
    is_language_run,
    load_language_run,
    read_language_options,
    resolve_answer,
)
from pyra.tasks.language.thinking import thinking_switch
from pyra.tasks.language.tokens import Answered
from pyra.tasks.output import check_output, staged_output
from pyra.tasks.posttraining.chat import read_chats
from pyra.tasks.posttraining.encoding import encode_chats
from pyra.tasks.posttraining.options import PostTrainingOptions
from pyra.tasks.posttraining.preferences import encode_pairs, read_pairs
from pyra.tasks.posttraining.rows import read_rows
from pyra.tasks.posttraining.runs import load_posttrained, read_posttraining_options, run_kind
from pyra.tasks.runs import OPTIONS

_COMPARED, _LONGEST = 4, 256  # rows whose logits are compared, and how much of each
_MEASURED = 16  # examples that whole prompts are measured on, where the model was trained on shorter ones
_GENERATED = 16  # tokens of an answer that the model gives itself
_TOKENS = 1024  # a prompt that its rate is counted for

WHOLE_PROMPTS = (
    "engines compute whole prompts: nothing merges there, and the re-activation weights, which only merged tokens "
    "need, are left out"
)
_TRAINED_ROUNDED = (
    "{} were trained as INT4 rounds them: engine-int4 writes what was trained, other formats its float weights"
)


@dataclass(frozen=True)
class ExportedLanguage:
    """An exported language model: where it lies, and its record."""

    folder: Path
    record: EngineRecord


def is_language_source(folder: str | Path) -> bool:
    """Whether a folder holds a language model of any kind that :func:`language_subject` reads."""
    folder = Path(folder).expanduser()
    if is_language_run(folder) or run_kind(folder) is not None or is_compression(folder):
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
    if run_kind(folder) is not None:
        return _of_posttraining(folder)
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
    return _trained(folder, subject, options, rows)


def _of_posttraining(folder: Path) -> LanguageModel:
    family_named(read_config(read_posttraining_options(folder).backbone).model_type)
    subject, options = load_posttrained(folder)
    return _trained(folder, subject, options, answers_of(subject, options))


def answers_of(subject: Subject, options: PostTrainingOptions) -> list[Answered]:
    """Return held-out answers of a run of post-training, or else what the model itself answers to a few prompts.

    Its data may be gone, and the rows of reinforcement learning have no answers.
    """
    switch = thinking_switch(subject.encoder.tokenizer)
    try:
        rows = read_rows(options.data, options.held_out, options.limit).test[:_MEASURED]
        if options.kind == "sft":
            return encode_chats(read_chats(rows, switch), subject.encoder, subject.max_length, "last").rows
        if options.kind == "dpo":
            pairs = encode_pairs(read_pairs(rows, switch), subject.encoder, subject.max_length).pairs
            return [pair.chosen for pair in pairs]
    except (ConfigError, DataError):
        pass
    return [_generated(subject, subject.encoder.prompt(text)) for text in PROBES]


def _generated(subject: Subject, prompt: list[int]) -> Answered:
    model: Any = subject.model
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=_GENERATED,
            do_sample=False,
            pad_token_id=subject.encoder.pad_id,
        )
    return Answered(found[0].tolist(), len(prompt))


def _trained(folder: Path, subject: Subject, options: AdaptationOptions, rows: Sequence[Answered]) -> LanguageModel:
    """Return a trained model, nothing merging or rounded any more, with what that was."""
    rounding = quantising_config(subject.model)
    notes = [] if rounding is None else [_TRAINED_ROUNDED.format("experts")]
    notes += [_TRAINED_ROUNDED.format("linear layers")] if trains_as_rounded(subject.model) else []
    rounded = bool(notes)
    merging = whole_prompts(subject.model, rows)
    model = undo_fake_quantise_linear(undo_fake_quantise(subject.model))
    return LanguageModel(
        model,
        subject.encoder.tokenizer,
        [row.ids[:_LONGEST] for row in rows[:_COMPARED]],
        f"a run, {folder.name}: {options.label} of {Path(options.backbone).name}",
        rounded=rounded,
        group=None if rounding is None else rounding.group_size,
        merging=merging,
        notes=notes,
        **_told(options.backbone, model),
    )


def _told(backbone: str, model: Any) -> dict[str, Any]:
    """Say what the backbone's folder tells: its files, the precision of its weights, and where MTP layers may be."""
    folder = Path(backbone).expanduser()
    config = read_config(backbone)
    quantised = getattr(config, "quantization_config", None) is not None
    stored = str(config.dtype or (torch.bfloat16 if quantised else torch.float32)).removeprefix("torch.")
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


def output_folders(run: str | Path, formats: Sequence[str], output: str | None, overwrite: bool = False) -> list[Path]:
    """Return the folder of each format: ``output`` itself for one format, and a folder below it for each of several.

    Raises:
        OutputError: where there is no ``output`` and the model is no run, which has a place for exports; and where one
            of the folders could not be written to.
    """
    if output is None and not is_run(run):
        raise OutputError(f"{run} is no run, and exports would lie among its files: give --output FOLDER")
    if output is None:
        folders = [Path(run) / "export" / name for name in formats]
    else:
        folders = [Path(output)] if len(formats) == 1 else [Path(output) / name for name in formats]
    for folder in folders:
        check_output(folder, "export", overwrite)
    return folders


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
