"""From a language model to a folder that engines read: written, held against their lists, reloaded, compared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyra.backbones import wrapped_config
from pyra.checkpoints import file_digest
from pyra.errors import ConfigError, ExportError
from pyra.experts.quantising import quantising_config
from pyra.export.engine_config import family_of
from pyra.export.engine_record import RECORD, EngineRecord
from pyra.export.engine_rounding import int4_rounding, rounded_weights
from pyra.export.exporting import versions
from pyra.export.language_formats import TOLERANCES, LanguageFormat, language_format
from pyra.export.report import Comparison, compare
from pyra.files import write_json

_RANDOM, _LENGTH = 2, 48  # rows of random ids that are compared besides, and their tokens


@dataclass(frozen=True)
class LanguageModel:
    """A language model ready to be exported in any format.

    Attributes:
        model: folded in float32, nothing merging, in evaluation mode.
        tokenizer: of transformers, that it was trained with.
        rows: token ids that the reloaded model is compared on.
        source: what it was made of, for the record.
        files: folder its tokenizer's files are in; None where there is none.
        dtype: that the backbone's own weights are stored in, such as ``bfloat16``.
        mtp: checkpoint folder that may hold weights of MTP layers.
        rounded: whether it was trained as INT4 rounds it; what rounding changes is told of others.
        group: inputs that share a scale, where its experts were trained so.
        merging: where its prompts merge, what that is and what whole prompts change.
        notes: what a user should know.
    """

    model: nn.Module
    tokenizer: Any
    rows: Sequence[Sequence[int]]
    source: str
    files: Path | None = None
    dtype: str = "float32"
    mtp: Path | None = None
    rounded: bool = False
    group: int | None = None
    merging: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Written:
    """What a format wrote and found.

    Attributes:
        model_type: that engines know the model by.
        parameters: numbers in the model's tensors.
        engines: rows of the record.
        mtp: of the record.
        tokenizer: of the record.
        notes: what a user should know.
    """

    model_type: str
    parameters: int
    engines: list[dict[str, Any]]
    mtp: dict[str, Any]
    tokenizer: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Reloaded:
    """A written model, opened again: by what, its logits, and how far its weights are from the rounded ones."""

    opened_with: str
    logits: Tensor
    weight_difference: float


def export_language_model(
    subject: LanguageModel,
    folder: str | Path,
    format: str = "engine",
    *,
    verify: bool = True,
    tolerance: float | None = None,
) -> EngineRecord:
    """Write a language model, hold it against what engines read, reload it, compare its logits, and write the record.

    Args:
        subject: what to write.
        folder: empty, or not there yet.
        format: a name of :data:`~pyra.export.language_formats.LANGUAGE_FORMATS`.
        verify: reload and compare.
        tolerance: largest difference of a token's logits, as a share of the largest one; by default that of what the
            weights are cast to. INT4 is held against the model with its weights rounded, so what rounding itself
            changes is told in the record, and nothing to tolerate.

    Returns:
        What stands in ``engine.json``.

    Raises:
        ConfigError: for an unknown format, a missing library, a tolerance that is none, or weights that are quantised.
        UnsupportedModelError: for a model that engines have no reader of here.
        ExportError: where the folder would not be what engines read, or the reloaded model differs. What was written
            until then is the caller's to remove: there is no record beside it.
    """
    start = time.perf_counter()
    chosen = language_format(format)
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ConfigError(f"the tolerance must be a number of at least 0, got {tolerance}")
    family_of(subject.model)
    if quantising_config(subject.model) is not None:
        raise ExportError("the model's experts are rounded in each forward: undo_fake_quantise it, and give its group")
    if wrapped_config(subject.model) is not None:
        raise ExportError("the model merges prompts, and engines keep one number of keys for all layers: unwrap it")
    if getattr(subject.model, "hf_quantizer", None) is not None:
        raise ConfigError("transformers holds this model quantised: export the float model that it was made from")
    weights = chosen.weights or subject.dtype
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = compared_rows(subject)
    rounding = int4_rounding(subject.model, subject.group) if weights == "int4" else None
    kind = weights if rounding is None else subject.dtype  # of the floats beside the integers
    with nullcontext() if rounding is None else rounded_weights(subject.model, rounding):
        expected = row_logits(subject.model, rows)
    if not expected.isfinite().all():
        raise ExportError("the model returns NaN or infinite logits: there is nothing to compare an export with")
    writer = _writer(chosen)
    written: Written = writer.write(subject, folder, weights)
    reloaded = None
    if verify:
        tolerance = TOLERANCES[kind] if tolerance is None else tolerance
        found: Reloaded = writer.reload(subject, folder, weights, rows)
        comparison = compare(
            found.opened_with,
            expected,
            found.logits,
            tolerance=tolerance,
            merges=kind != "float32",  # rounding sends some tokens to other experts
        )
        reloaded = _reloaded(found, comparison, tolerance)
        if rounding is not None and not subject.rounded:
            reloaded["rounding"] = _moved(row_logits(subject.model, rows), expected)
    record = _record(subject, folder, chosen, weights, written, reloaded, time.perf_counter() - start)
    write_json(folder / RECORD, record)
    return record


def _writer(format: LanguageFormat) -> Any:
    if format.gguf:
        from pyra.export import gguf_file  # which needs the gguf library

        return gguf_file
    from pyra.export import engine

    return engine


def compared_rows(subject: LanguageModel) -> list[list[int]]:
    """Return the rows that models are compared on: those of the subject, and random ids.

    Raises:
        ConfigError: where the tokenizer has tokens that the model has no weights for.
    """
    config: Any = subject.model.config
    beyond = [token for row in subject.rows for token in row if not 0 <= token < config.vocab_size]
    if beyond:
        raise ConfigError(f"the tokenizer has token {beyond[0]}, the model {config.vocab_size}: it is another model's")
    length = min(_LENGTH, config.max_position_embeddings)
    drawn = torch.randint(config.vocab_size, (_RANDOM, length), generator=torch.Generator().manual_seed(0))
    return [*map(list, subject.rows), *drawn.tolist()]


def row_logits(model: Any, rows: Sequence[Sequence[int]]) -> Tensor:
    """Return the logits of every token of every row, [T, V], in float32."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        found = [model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0] for row in rows]
    return torch.cat(found).float().cpu()


def _reloaded(found: Reloaded, comparison: Comparison, tolerance: float) -> dict[str, Any]:
    return {
        "with": found.opened_with,
        "weight_difference": found.weight_difference,
        "tolerance": tolerance,
        "largest_difference": comparison.max_difference,
        "relative_difference": comparison.relative_difference,
        "tokens": comparison.compared,
        "differing": comparison.differing,
        "top1_agreement": comparison.top1_agreement,
    }


def _moved(floats: Tensor, rounded: Tensor) -> dict[str, Any]:
    """Return how far the logits [T, V] of rounded weights are from those of the float ones."""
    largest = float((floats - rounded).abs().max() / floats.abs().max().clamp(min=1e-12))
    same = (floats.argmax(-1) == rounded.argmax(-1)).double().mean()
    return {"relative_difference": largest, "top1_agreement": float(same)}


def _record(
    subject: LanguageModel,
    folder: Path,
    format: LanguageFormat,
    weights: str,
    written: Written,
    reloaded: dict[str, Any] | None,
    seconds: float,
) -> EngineRecord:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name[:1] != "."}
    return EngineRecord(
        format=format.name,
        model_type=written.model_type,
        weights=weights,
        parameters=written.parameters,
        files=files,
        sha256={name: file_digest(folder / name) for name in files},
        megabytes=sum(files.values()) / 1e6,
        seconds=seconds,
        source=subject.source,
        engines=written.engines,
        mtp=written.mtp,
        tokenizer=written.tokenizer,
        reloaded=reloaded,
        merging=subject.merging,
        notes=[*subject.notes, *written.notes],
        environment=versions(("gguf", "compressed-tensors", "safetensors") if format.gguf else ("safetensors",)),
    )
