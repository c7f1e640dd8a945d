"""What every post-training run does around its training: its input checked, its folder filled, its score written."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from pyra.adapters import fold_adapter
from pyra.errors import TrainingError
from pyra.files import write_json
from pyra.tasks.fitting import processes
from pyra.tasks.fitting.fit import Fitted, forget_checkpoints
from pyra.tasks.language.models import backbone_digest
from pyra.tasks.language.runs import Subject
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.posttraining.options import PostTrainingOptions
from pyra.tasks.posttraining.rows import Rows, data_record, rows_digest
from pyra.tasks.posttraining.runs import adapted_policy, begin_run, save_run
from pyra.tasks.posttraining.templates import chat_encoder
from pyra.tasks.provenance import adapter_settings, settings
from pyra.tasks.results import PREDICTIONS_FILE, RESULT_FILE, RunResult, environment, read_result
from pyra.tasks.resuming import finished_as, shared_folder
from pyra.tasks.training import TRAINING, card_info, save_trained, write_card
from pyra.tasks.usage import Meter

UNIT, PREPROCESSING = "examples", "chat"
_NO_SETTINGS = ("adapter", "reference", "chat_template")
"""Options that name places; what they hold is told by hashes and by the files of the run."""


@dataclass(frozen=True)
class Score:
    """What a trained model is worth.

    Attributes:
        metric: name of what ``value`` is.
        value: on the held-out rows.
        higher_is_better: its direction.
        columns: more columns of the result.
        predictions: what is written of every held-out row.
        held_out: what is told of the held-out rows as a whole, in ``training.json``.
    """

    metric: str
    value: float
    higher_is_better: bool
    columns: dict[str, Any]
    predictions: dict[str, Any]
    held_out: dict[str, Any] = field(default_factory=dict)


class Work(Protocol):
    """How one verb trains and scores."""

    def fit(self, model: nn.Module, folder: Path) -> Fitted:
        """Train an adapted model, with checkpoints in the folder."""

    def score(self, subject: Subject) -> Score:
        """Score the folded model, which is on the device of the run."""


def finished_run(options: PostTrainingOptions, rows: Rows) -> RunResult | None:
    """Return the result of a finished run that ``--resume`` leaves as it is, or None.

    Raises:
        DataError: where it was made of other rows, or with another chat template.
    """
    if not options.resume:
        return None
    encoder, _ = chat_encoder(options)
    begin = begin_run(options, _record(rows, encoder), rows.name)
    return processes.on_main(lambda: finished_as(begin))


def _record(rows: Rows, encoder: Encoder) -> dict[str, Any]:
    """Return what a run keeps of its data: size and hash of each split, and the hash of the chat template."""
    template = str(encoder.tokenizer.chat_template)
    return {**data_record(rows), "chat_template": hashlib.sha256(template.encode()).hexdigest()}


def carry_out(
    options: PostTrainingOptions, rows: Rows, subject: Subject, device: torch.device, left_out: int, work: Work
) -> RunResult:
    """Adapt, train, save, fold and score; the folder appears when all of it is done.

    Args:
        options: of :func:`pyra.tasks.posttraining.runs.continued`.
        rows: the data.
        subject: the decoder before it is adapted, with its encoder.
        device: to train on.
        left_out: examples that were too long.
        work: what the verb does.

    Raises:
        PyraError: for anything wrong with the method, the adapter or the output folder.
        TrainingError: where the loss stops being a number.
    """
    weights = backbone_digest(subject.model)
    subject = dataclasses.replace(subject, model=adapted_policy(subject.model, options))
    begin = begin_run(options, {**_record(rows, subject.encoder), "left_out": left_out}, rows.name)
    with shared_folder(begin) as folder:
        if (folder / RESULT_FILE).exists():  # the process was killed between its last file and the swap
            return read_result(folder)
        processes.on_main(lambda: save_run(folder, begin, subject))
        return _in_folder(options, rows, subject, device, work, folder, weights)


def _in_folder(
    options: PostTrainingOptions,
    rows: Rows,
    subject: Subject,
    device: torch.device,
    work: Work,
    folder: Path,
    weights: str,
) -> RunResult:
    model = subject.model
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    meter = Meter(device).start()
    try:
        fitted = work.fit(model, folder)
    except TrainingError:  # its checkpoints lead to the same end
        processes.on_main(lambda: forget_checkpoints(folder))
        raise
    model.cpu().eval()
    info = card_info(options.backbone, rows.name)
    described = processes.on_main(lambda: save_trained(model, folder, info))
    score = work.score(dataclasses.replace(subject, model=fold_adapter(model).to(device).eval()))

    def finish() -> RunResult:
        result = RunResult(
            task=rows.name,
            method=options.label,
            metric=score.metric,
            value=score.value,
            higher_is_better=score.higher_is_better,
            trained_parameters=trained,
            weights_sha256=weights,
            train_seconds=fitted.seconds,
            **_of_options(options, rows),
            **score.columns,
            **meter.stop().columns(),
            environment=environment(str(device)),
        )
        write_json(folder / TRAINING, {"losses": fitted.losses, "scores": [], "held_out": score.held_out})
        write_json(folder / PREDICTIONS_FILE, {"split": "test", "sha256": result.test_sha256, **score.predictions})
        write_card(folder, described, info, result)
        write_json(folder / RESULT_FILE, result)
        forget_checkpoints(folder)
        return result

    return processes.on_main(finish)


def _of_options(options: PostTrainingOptions, rows: Rows) -> dict[str, Any]:
    told = {name: value for name, value in settings(options).items() if name not in _NO_SETTINGS}
    return {
        "seed": options.seed,
        "backbone": options.backbone,
        "batch_size": options.batch_size,
        "epochs": options.epochs if options.steps is None else None,
        "unit": UNIT,
        "preprocessing": PREPROCESSING,
        "data_source": rows.source.removeprefix("hub:") if rows.source.startswith("hub:") else Path(rows.source).name,
        "train_sha256": rows_digest(rows.train),
        "test_sha256": rows_digest(rows.test),
        "adapter": adapter_settings(options),
        "settings": {"kind": options.kind, **told},
        "protocol": "fixed",
        "selection": "none: the last step of the given options",
    }


def told_of_rows(rows: Rows, left_out: int, length: int) -> list[str]:
    """Return what is worth knowing of the data."""
    notes = []
    if rows.drawn:
        notes.append(
            f"held out to be scored, by a fixed draw: {len(rows.test)} of {len(rows.train) + len(rows.test)} rows"
        )
    if left_out:
        notes.append(f"examples longer than {length} tokens, left out: {left_out}")
    return notes


def unread_keys(rows: Rows, read: Sequence[str]) -> list[str]:
    """Say which keys of the rows are not read, if there are any."""
    found = dict.fromkeys(key for row in [*rows.train, *rows.test] for key in row.values if key not in read)
    return [f"keys of the rows that are not read: {', '.join(list(found)[:8])}"] if found else []
