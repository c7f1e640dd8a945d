"""``engine.json``: what an export of a language model holds, and what it was held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

RECORD = "engine.json"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What stands in ``engine.json``.

    Attributes:
        format: one of :data:`~pyra.export.language_formats.LANGUAGE_FORMATS`.
        model_type: that engines know the model by; of a GGUF file its architecture.
        weights: what they are rounded to.
        parameters: numbers in all tensors of the model.
        files: names and sizes in bytes.
        sha256: of each file.
        megabytes: of all files.
        seconds: taken to write, reload and compare.
        source: what it was made of.
        engines: a row an engine whose names the folder was held against; of a GGUF file its own library.
        mtp: ``layers`` that are written for multi-token prediction and, where there are none or they may not fit,
            ``note``.
        tokenizer: its files, and whether they give the ids that the model was trained with.
        reloaded: ``with`` what, the largest difference of a ``weight`` from the model's rounded one, and
            comparison of logits with the model in float32, of INT4 with its weights rounded (``rounding`` tells how
            far those are from the float ones, of a model that was not trained rounded); None where that was skipped.
        merging: of a model whose prompts merge: its schedule, and what computing whole prompts changes; None of others.
        notes: what a user should know.
        environment: versions that wrote it.
        kind: of the record.
        version: of its schema.
    """

    format: str
    model_type: str
    weights: str
    parameters: int
    files: dict[str, int]
    sha256: dict[str, str]
    megabytes: float
    seconds: float
    source: str
    engines: list[dict[str, Any]]
    mtp: dict[str, Any]
    tokenizer: dict[str, Any]
    reloaded: dict[str, Any] | None
    merging: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    kind: str = "engine"
    version: int = VERSION
