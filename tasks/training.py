"""Training on ``transformers.Trainer``: from options to a finished run folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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
from pyra.adapters.adapt import REACTIVATION
from pyra.tasks.data import ImageDataset, Task, image_dataset, load_task
from pyra.tasks.evaluation import measure, score
from pyra.tasks.options import RunOptions
from pyra.tasks.results import RunResult, claim_output, environment, write_json
from pyra.tasks.runs import ADAPTER, new_model, preprocessing, resolve_device, save_run

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROTOCOL = "last epoch, test split scored once"


class ImageTrainer(Trainer):
    """Modifications against ``Trainer``: the loss of a model that maps images to logits."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of ``pixel_values`` [B, 3, S, S] against ``labels`` [B]."""
        logits = model(inputs["pixel_values"])
        if isinstance(logits, tuple):  # distilled models train both heads
            loss = torch.stack([F.cross_entropy(head, inputs["labels"]) for head in logits]).mean()
            logits = torch.stack(logits).mean(0)
        else:
            loss = F.cross_entropy(logits, inputs["labels"])
        return (loss, {"logits": logits}) if return_outputs else loss


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
        """Show the newest loss."""
        if logs and "loss" in logs:
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", epoch=f"{state.epoch:.1f}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Close the bar."""
        self.bar.close()


def train(options: RunOptions) -> RunResult:
    """Train, score and time one run, and write its folder.

    All that can be wrong with the input is found before the output folder is touched.

    Raises:
        PyraError: for anything wrong with the options, the data, the backbone or the output folder.
    """
    set_seed(options.seed)
    device = resolve_device(options.device)
    task = load_task(options.task, options.data)
    model = new_model(options, len(task.labels))
    train_data, test_data = splits(options, task, model)
    folder = claim_output(options.output, options.overwrite)
    result = fit(options, task, model, train_data, test_data, folder, device)
    save_adapter(model, folder / ADAPTER)
    save_run(folder, options, task.labels)
    result = finish(options, task, model, test_data, device, result)
    write_json(folder / "result.json", result)
    return result
