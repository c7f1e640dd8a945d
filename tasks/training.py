"""Training on ``transformers.Trainer``: from options to a finished run folder."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from pyra.adapters import fold_adapter, save_adapter
from pyra.adapters.adalora import RankAllocation
from pyra.adapters.elastic import RateSampler, distillation_loss, uncompressed
from pyra.adapters.recipe import parameter_groups
from pyra.backbones import set_rate
from pyra.errors import OutputError, TrainingError
from pyra.files import write_json
from pyra.tasks.data import ImageDataset, Task
from pyra.tasks.evaluation import data_for, measure, score
from pyra.tasks.options import RunOptions
from pyra.tasks.output import staged_output
from pyra.tasks.probing import frozen_features, probe_of
from pyra.tasks.results import RunResult, environment
from pyra.tasks.runs import ADAPTER, DTYPES, new_model, resolve_device, save_run, task_for

PROTOCOL = "last epoch, test split scored once"


class ImageTrainer(Trainer):
    """Modifications against ``Trainer``: the loss of a model that maps images to logits, at the rate of the step."""

    sampler: RateSampler | None = None
    distill: bool = False
    ranks: RankAllocation | None = None

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of ``pixel_values`` [B, 3, S, S] against ``labels`` [B]; with a teacher, divergence from it."""
        teacher = None
        if self.sampler is not None:
            inner = self.accelerator.unwrap_model(model)
            self.sampler.apply(inner, self.state.global_step)
            if self.distill:
                with uncompressed(inner):
                    teacher = model(inputs["pixel_values"])
        logits = model(inputs["pixel_values"])
        if isinstance(logits, tuple):  # distilled models train both heads
            loss = torch.stack([F.cross_entropy(head, inputs["labels"]) for head in logits]).mean()
            logits = torch.stack(logits).mean(0)
        else:
            loss = F.cross_entropy(logits, inputs["labels"])
        if teacher is not None:
            loss = loss + distillation_loss(logits, teacher)
        if self.ranks is not None:
            loss = loss + self.ranks.penalty()
        return (loss, {"logits": logits}) if return_outputs else loss


class MovingRanks(TrainerCallback):
    """AdaLoRA's ranks move after each optimiser step."""

    def __init__(self, ranks: RankAllocation) -> None:
        self.ranks = ranks

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move them while the gradients are there."""
        self.ranks.update(state.global_step + 1)


class ProgressBar(TrainerCallback):
    """One tqdm bar a run, with the loss beside it."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.bar: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the bar."""
        self.bar = tqdm(total=state.max_steps, desc=self.description, unit="step", leave=False)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Advance by one step."""
        self.bar.update(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Show the newest loss, and stop where it is no number any more."""
        if logs and "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise TrainingError(
                    f"the loss is {logs['loss']} at step {state.global_step}: training diverged; lower --lr"
                    + (" or use --dtype bfloat16" if args.fp16 else "")
                )
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", epoch=f"{state.epoch:.1f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.bar.close()


def train(options: RunOptions) -> RunResult:
    """Train, score and time one run, and write its folder.

    All that can be wrong with the input is found before the output folder is touched, and an earlier run there is
    replaced when the new one is complete.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone or the output folder.
        TrainingError: where the loss stops being a number.
    """
    set_seed(options.seed)
    device = resolve_device(options.device)
    task = task_for(options)
    _refuse_output_in_data(options)
    model = new_model(options, len(task.labels))
    with staged_output(options.output, "run", options.overwrite) as folder:
        train_data, test_data = splits(options, task, model)
        return run(options, task, model, train_data, test_data, folder, device)


def _refuse_output_in_data(options: RunOptions) -> None:
    """A run written among the images would be read as a class next time."""
    if options.data is None:
        return
    data, output = Path(options.data).expanduser().resolve(), Path(options.output).expanduser().resolve()
    if output.is_relative_to(data):
        raise OutputError(f"--output {options.output} lies inside --data {options.data}: choose a folder outside")


def splits(options: RunOptions, task: Task, model: nn.Module) -> tuple[ImageDataset, ImageDataset]:
    """Decode the train and test split of a task for a model."""
    train_data, test_data = (
        data_for(model, task, split, skip_broken=options.skip_broken, limit=options.limit, cache=options.cache)
        for split in ("train", "test")
    )
    return train_data, test_data


def run(
    options: RunOptions,
    task: Task,
    model: nn.Module,
    train_data: ImageDataset,
    test_data: ImageDataset,
    folder: Path,
    device: torch.device,
) -> RunResult:
    """Train a model made by :func:`pyra.tasks.runs.new_model`, save it, then score and time what was saved."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    seconds = fit(model, train_data, options, folder, device)
    model.cpu().eval()
    save_adapter(model, folder / ADAPTER)
    save_run(folder, options, task)

    folded = fold_adapter(model).to(device).eval()
    value = score(
        folded,
        test_data,
        metric=task.metric,
        batch_size=options.batch_size,
        device=device,
        dtype=DTYPES[options.dtype],
        description=f"{options.label}: test",
    )
    batch = torch.stack([test_data[i]["pixel_values"] for i in range(min(options.batch_size, len(test_data)))])
    measured = measure(folded, batch.to(device))
    result = RunResult(
        task=task.name,
        method=options.label,
        metric=task.metric,
        value=value,
        trained_parameters=trained,
        seed=options.seed,
        backbone=options.backbone,
        image_size=test_data.image_size,
        batch_size=options.batch_size,
        throughput_batch_size=len(batch),
        epochs=options.epochs,
        train_seconds=seconds,
        num_test=len(test_data),
        skipped_images=len(train_data.broken) + len(test_data.broken),
        protocol=PROTOCOL,
        environment=environment(str(device)),
        **measured.columns(),
    )
    write_json(folder / "result.json", result)
    return result


def fit(model: nn.Module, data: ImageDataset, options: RunOptions, folder: Path, device: torch.device) -> float:
    """Train the weights that require gradients; returns the seconds it took.

    A linear probe is trained on features that are computed once: its backbone stays as it is, and images are not
    augmented.

    Raises:
        TrainingError: where the loss or a trained weight is NaN or infinite.
    """
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        dataloader_drop_last=len(data) >= options.batch_size,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.01},
        warmup_steps=0.1,
        logging_steps=10,
        logging_nan_inf_filter=False,  # a loss that is no number must be seen
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        label_names=["labels"],
        use_cpu=device.type == "cpu",
        bf16=options.dtype == "bfloat16",
        fp16=options.dtype == "float16",
        seed=options.seed,
        dataloader_pin_memory=device.type != "cpu",
    )
    start = time.perf_counter()
    trained: nn.Module = model
    examples: Dataset[dict[str, Any]] = data
    head = probe_of(model) if options.method == "linear" else None
    if head is not None:
        trained = head
        examples = frozen_features(
            model, data, batch_size=options.batch_size, device=device, dtype=DTYPES[options.dtype]
        )
    reactivation_lr = options.lr if options.reactivation_lr is None else options.reactivation_lr
    groups = parameter_groups(model, options.lr, reactivation_lr)
    optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)
    trainer = ImageTrainer(model=trained, args=arguments, train_dataset=examples, optimizers=(optimizer, None))
    if options.elastic:
        trainer.sampler, trainer.distill = RateSampler(options.rates(), seed=options.seed), options.distill
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar(f"{options.label}: training"))
    steps = math.ceil(options.epochs * len(trainer.get_train_dataloader()))
    trainer.ranks = RankAllocation.of(trained, steps)
    if trainer.ranks is not None:
        trainer.add_callback(MovingRanks(trainer.ranks))
    trainer.train()
    if options.elastic:
        set_rate(model, options.rates()[-1])
    seconds = time.perf_counter() - start
    broken = [name for name, p in model.named_parameters() if p.requires_grad and not p.isfinite().all()]
    if broken:
        raise TrainingError(f"{len(broken)} trained tensors hold NaN or infinities ({broken[0]}): lower --lr")
    with contextlib.suppress(OSError):  # nothing is saved in it: leave no empty folder
        (folder / "checkpoints").rmdir()
    return seconds
