"""A mixture cut down to the experts that a task uses: scored on its text, written, opened again and compared."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from pyra.backbones.joyai import JoyAIForCausalLM
from pyra.backbones.joyai_checkpoint import (
    CONFIG,
    Checkpoint,
    check_checkpoint,
    check_tokenizer,
    load_model,
    save_checkpoint,
)
from pyra.errors import CheckpointError, ExportError
from pyra.experts import ExpertScores, choose_experts, prune_experts, score_experts, set_active_experts
from pyra.experts.scoring import METHODS
from pyra.files import read_object, write_json
from pyra.tasks.language.calibration import Losses, batches, encoded
from pyra.tasks.language.compress_options import FORMATS, CompressOptions, active_number, kept_number
from pyra.tasks.language.compression import RECORD, Compression, Layer, Variant
from pyra.tasks.language.data import load_text_task
from pyra.tasks.language.models import load_encoder, longest, weights_record
from pyra.tasks.language.tokens import Answered
from pyra.tasks.output import WRITTEN, staged_output
from pyra.tasks.results import environment
from pyra.tasks.runs import resolve_device

_COMPARED = 4  # examples whose logits the reloaded model is held against
_TOLERANCE = 1e-4  # of the largest logit


def compress_experts(options: CompressOptions) -> Compression:
    """Score the experts of a checkpoint on a task, drop the others, and write what is left with its record.

    All that can be wrong with the input is found before weights are read.

    Raises:
        PyraError: for anything wrong with the options, the checkpoint, its tokenizer, the data or the output folder.
        ExportError: where the written folder does not give the logits of the model in memory.
    """
    device = resolve_device(options.device)
    checkpoint = check_checkpoint(options.backbone)
    config, told = checkpoint.config, read_object(checkpoint.folder / CONFIG, CheckpointError, "")
    keep, active = kept_number(options, config), active_number(options, config)
    task = load_text_task(options.task, options.root, options.data)
    encoder = load_encoder(options.backbone)
    check_tokenizer(encoder.tokenizer, config)
    length = longest(options.backbone, config, encoder.tokenizer, options.max_length)
    train, test = (encoded(task, encoder, split, options.limit, length) for split in ("train", "test"))
    with staged_output(options.output, "compression", options.overwrite) as folder:
        model = load_model(options.backbone).to(device).eval().requires_grad_(False)
        scores = score_experts(model, batches(train.rows, encoder, options.batch_size, device))
        kept = choose_experts(scores, keep, options.score, config.n_group or 1)
        losses = Losses(model, test.rows, encoder, options.batch_size)
        variants = _compared(losses, scores, options, keep)
        pruned = keep < config.n_routed_experts
        method = f"experts-{options.score}" if pruned else "experts-active"
        set_active_experts(model, active)
        prune_experts(model, kept)
        variants.append(losses.variant(_written_name(options.score, pruned, active, config), keep, active))
        expected = _logits(model, train.rows)
        written = _write(model, checkpoint, folder, options)
        del model, losses.model
        if options.verify:
            written |= verify(folder, options.format, train.rows, expected, device)
        record = Compression(
            options=options.stored(),
            method=method,
            layers=_layers(scores, kept),
            variants=variants,
            calibration=train.told,
            test=test.told,
            source={"model_type": told["model_type"], "files": weights_record(options.backbone)},
            written=written,
            environment=environment(str(device)),
        )
        write_json(folder / RECORD, record)
    return record


def _compared(losses: Losses, scores: ExpertScores, options: CompressOptions, keep: int) -> list[Variant]:
    """Measure what the written model is compared with: the whole one, fewer active experts, the other ranking."""
    config = losses.model.config
    variants = [losses.masked("original")]
    variants += [losses.masked(f"original, {n} active", active=n) for n in options.compare_active or []]
    if options.baseline and keep < config.n_routed_experts:
        other = next(method for method in METHODS if method != options.score)
        kept = choose_experts(scores, keep, other, config.n_group or 1)
        variants.append(losses.masked(f"by {other}", kept, options.active))
    return variants


def _written_name(score: str, pruned: bool, active: int, config: Any) -> str:
    by = f"by {score}" if pruned else "all experts"
    return f"{by}, written" if active == config.num_experts_per_tok else f"{by}, {active} active, written"


def _layers(scores: ExpertScores, kept: Tensor) -> list[Layer]:
    columns = zip(scores.layers, kept.tolist(), scores.saliency.tolist(), scores.tokens.tolist(), strict=True)
    return [Layer(name=name, kept=own, reap=reap, tokens=tokens) for name, own, reap, tokens in columns]


def _write(model: JoyAIForCausalLM, checkpoint: Checkpoint, folder: Path, options: CompressOptions) -> dict[str, Any]:
    """Write the weights, and copy the tokenizer's files beside them."""
    # Stock classes have a mixture for the layer that drafts; JoyAI's is dense and goes along where they open it.
    drafts = bool(checkpoint.mtp) and not any(".experts." in name for name in checkpoint.mtp)
    along = drafts and options.format == "joyai"
    inside = folder / "weights"
    save_checkpoint(model, inside, mtp=checkpoint.folder if along else None, model_type=FORMATS[options.format])
    for file in inside.iterdir():
        file.chmod(0o644)
        file.replace(folder / file.name)
    inside.rmdir()
    for pattern in WRITTEN["compression"]:
        if pattern.startswith(("tokenizer", "special", "added", "chat", "vocab", "merges")):
            for file in checkpoint.folder.glob(pattern):
                if file.is_file() and file.suffix != ".py":  # code is never carried along
                    shutil.copyfile(file, folder / file.name)
    return {
        "model_type": FORMATS[options.format],
        "bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
        "left_out": ["the layer for multi-token prediction"] if checkpoint.mtp and not along else [],
        "opened_with": None,
        "largest_difference": None,
        "compared": None,
    }


def verify(
    folder: Path, format: str, rows: Sequence[Answered], expected: Sequence[Tensor], device: torch.device
) -> dict[str, Any]:
    """Open a written folder, in transformers' own class where that knows it, and compare its logits.

    Raises:
        ExportError: where they differ.
    """
    if format == "joyai":
        model: Any = load_model(folder)
    else:
        model = DeepseekV3ForCausalLM.from_pretrained(folder, dtype="auto", use_safetensors=True)
    found = _logits(model.to(device).eval(), rows)
    largest = max(float((own - theirs).abs().max()) for own, theirs in zip(found, expected, strict=True))
    most = max(float(one.abs().max()) for one in expected)
    if not largest <= _TOLERANCE * most:
        raise ExportError(
            f"the written model is not the one in memory: its logits differ by {largest:.2g}, the largest is {most:.2g}"
        )
    compared = sum(one.numel() for one in expected)
    return {"opened_with": type(model).__name__, "largest_difference": largest, "compared": compared}


def _logits(model: Any, rows: Sequence[Answered]) -> list[Tensor]:
    device = next(model.parameters()).device
    with torch.inference_mode():
        return [
            model(input_ids=torch.tensor([row.ids], device=device), use_cache=False).logits.float().cpu()
            for row in rows[:_COMPARED]
        ]
