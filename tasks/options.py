"""What a run is: every option with its default, checked together, and what it turns into."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from pyra.adapters.methods import PEFT_METHODS, peft_config, rounding_problem
from pyra.errors import ConfigError, did_you_mean
from pyra.records import ABOVE_0, AT_LEAST_0, BELOW_1, SEED, bound_problems, choice_problems, option, type_problems
from pyra.tasks.schedules.record import image_size_for, parse_schedule

if TYPE_CHECKING:
    from pyra.config import PyraConfig

METHODS = {
    "linear": "train a new head on the frozen backbone",
    "full": "train all weights",
    **PEFT_METHODS,
    "adapter": "the same as bottleneck",
    "tome": "tokens merged, beside --peft",
    "pyra": "tokens merged and re-activated, beside --peft",
}
MERGING = ("tome", "pyra")
QAT = ("int4",)
TRACKERS = ("tensorboard", "wandb", "trackio")
DEVICES = r"auto|cpu|cuda(:\d+)?"


@dataclass(kw_only=True)
class RunOptions:
    """One training run. Defaults of the optimiser are the paper's (arXiv 2403.09192, section 4) but for the epochs."""

    backbone: str = option("demo", "timm name, folder of a timm model, or 'demo' (the small ViT that ships with pyra)")
    checkpoint: str | None = option(None, "weights from a .safetensors, .npz or .pth file instead of the hub's")
    pretrained: bool = option(True, "start from pretrained weights")
    image_size: int | None = option(None, "image side in pixels; the backbone's own by default")
    task: str | None = option(None, "a shipped task by name ('demo' unless --data is given)")
    data: str | None = option(
        None, "your data: a folder of images in class folders or of parquet files, or owner/name[@revision] on the hub"
    )
    image_column: str | None = option(None, "column of --data with the images, where type and name do not tell")
    label_column: str | None = option(None, "column of --data with the labels, the same")
    root: str | None = option(None, "folder with the data of shipped tasks that bring none (PYRA_DATA by default)")
    shots: int | None = option(None, "train on this many images of each class only (few-shot: 1, 2, 4, 8, 16)")
    shots_seed: int = option(0, "seed of the draw of --shots, apart from --seed")
    skip_broken: bool = option(False, "leave unreadable images out instead of stopping")
    cache: bool = option(True, "keep decoded images on disk for later runs (in PYRA_CACHE, else ~/.cache/pyra)")
    method: str = option("pyra", "how to adapt: see above", choices=tuple(METHODS), metavar="NAME")
    peft: str | None = option(
        None,
        "PEFT method that tome and pyra train beside the merging ('lora' unless given)",
        choices=tuple(PEFT_METHODS),
        metavar="NAME",
    )
    rate: float | str | None = option(
        None, "share of the MACs to save by merging tokens, in [0, 1); with --elastic a range such as 0.3:0.8"
    )
    schedule: list[int] | str | None = option(  # noqa: RUF009 - a dataclass field
        None, "tokens removed in each block, instead of --rate: 16,16,16,... or a JSON file of pyra schedule"
    )
    elastic: bool = option(False, "train one adapter for every rate of the range")
    scaled_gates: bool = option(False, "divide the sum that gates the channels by the root of its pairs (pyra)")
    distill: bool = option(False, "let compressed passes learn from the uncompressed one, too (with --elastic)")
    rank: int = option(8, "rank of LoRA and its kin, width of a bottleneck, number of prompts")
    targets: str = option(
        "qkv", "modules that LoRA and its kin adapt, such as qkv,proj,fc1,fc2 (the others have their own places)"
    )
    dropout: float = option(0.1, "dropout in the adapter")
    qat: str | None = option(
        None,
        "train as the weights will be rounded: int4 (exported as torchao-int4), with all weights or with LoRA and "
        "--dropout 0",
        choices=QAT,
    )
    drop_path: float = option(0.1, "stochastic depth rate of the backbone")
    epochs: float = option(10.0, "passes over the training images (the paper: 100)")
    batch_size: int = option(32, "images a step, and a measured forward")
    lr: float = option(1e-3, "peak learning rate of AdamW (cosine, 10 % warm-up)")
    reactivation_lr: float | None = option(None, "peak learning rate of the re-activation weights; --lr by default")
    head_lr: float | None = option(None, "peak learning rate of the task head; --lr by default")
    layer_decay: float = option(1.0, "factor of the learning rate from a layer to the one before it (0.65 to 1)")
    weight_decay: float = option(1e-4, "decoupled weight decay")
    ema: float | None = option(None, "score and save an exponential moving average of the weights: its decay, 0.999")
    mixup: float = option(0.0, "alpha of mixup, 0 for none (timm's)")
    cutmix: float = option(0.0, "alpha of CutMix, 0 for none (timm's)")
    smoothing: float = option(0.0, "label smoothing")
    randaugment: str | None = option(None, "RandAugment in timm's words, such as rand-m9-mstd0.5-inc1")
    accumulate: int = option(1, "parts a step's images are forwarded in: less memory, the same step")
    gradient_checkpointing: bool = option(False, "recompute activations: less memory, slower steps")
    track: tuple[str, ...] = option(
        (), "trackers that must be installed (tensorboard writes into RUN/logs)", choices=TRACKERS
    )
    save_steps: int = option(500, "steps between checkpoints, besides one at the end of each epoch")
    seed: int = option(0, "random seed")
    device: str = option("auto", "auto, cpu or cuda")
    dtype: str = option("float32", "precision of the forward", choices=("float32", "bfloat16", "float16"))
    limit: int | None = option(None, "use this many images of each split only (a fixed draw), to try things out")
    output: str = option("runs/latest", "folder of the run")
    overwrite: bool = option(False, "replace the run in --output")
    resume: bool = option(False, "go on with what was interrupted in --output; a finished run is left as it is")

    def __post_init__(self) -> None:
        """Check all options together; raises :class:`ConfigError` with every problem."""
        if self.task is None and self.data is None:
            self.task = "demo"
        if isinstance(self.track, list):  # from JSON
            self.track = tuple(self.track)
        if isinstance(self.rate, (int, float)) and not isinstance(self.rate, bool):
            self.rate = str(self.rate)
        if isinstance(self.schedule, str):  # a run keeps the list: the file may change
            self.image_size = image_size_for(self.schedule, self.image_size)
            self.schedule = parse_schedule(self.schedule)
        problems = type_problems(type(self), {f.name: getattr(self, f.name) for f in fields(self)})
        if problems:
            raise ConfigError("; ".join(problems))
        if self.task is not None and self.data is not None:
            problems.append("give --task or --data, not both")
        for name in ("image_column", "label_column"):
            if getattr(self, name) is not None and self.data is None:
                problems.append(f"--{name.replace('_', '-')} goes with --data")
        if self.method not in METHODS:
            problems.append(
                f"unknown method {self.method!r}{did_you_mean(self.method, METHODS)}; one of {', '.join(METHODS)}"
            )
        problems += choice_problems(self, leave_out=("method",))
        if not self.output.strip():
            problems.append("--output is empty; give a folder")
        given = [name for name in ("rate", "schedule") if getattr(self, name) is not None]
        if self.method in MERGING and len(given) != 1:
            hint = "" if given else ", such as --rate 0.5 for half of the multiply-accumulates"
            problems.append(f"--method {self.method} needs exactly one of --rate and --schedule{hint}")
        if self.method not in MERGING and given:
            problems.append(f"--method {self.method} merges no tokens: leave --{given[0]} out, or use tome or pyra")
        if self.method not in MERGING and self.peft is not None:
            problems.append(f"--peft goes with --method tome or pyra; without merging give --method {self.peft}")
        if self.qat is not None and (unfit := rounding_problem(self.peft_method or self.method, self.dropout)):
            problems.append(f"--qat {self.qat} {unfit}")
        if self.scaled_gates and self.method != "pyra":
            problems.append("--scaled-gates goes with --method pyra")
        of_rates = self._rate_problems()
        problems += of_rates
        numbers = ("rank", "epochs", "batch_size", "lr", "accumulate", "save_steps", "image_size", "reactivation_lr",
                   "head_lr", "limit", "shots")  # fmt: skip
        problems += bound_problems(self, ABOVE_0, numbers)
        problems += bound_problems(self, BELOW_1, ("dropout", "drop_path", "smoothing"))
        problems += bound_problems(self, AT_LEAST_0, ("weight_decay", "mixup", "cutmix"))
        problems += self._augmentation_problems()
        problems += bound_problems(self, SEED, ("seed", "shots_seed"))
        if self.shots_seed and self.shots is None:
            problems.append("--shots-seed goes with --shots")
        if re.fullmatch(DEVICES, self.device) is None:
            problems.append(f"--device must be auto, cpu, cuda or cuda:NUMBER, got {self.device!r}")
        if self.method in MERGING and len(given) == 1 and not of_rates:
            try:
                self.pyra_config()
            except ConfigError as error:
                problems.append(str(error).removeprefix("PyraConfig: "))
        if problems:
            raise ConfigError("; ".join(problems))

    def pyra_config(self) -> PyraConfig | None:
        """Return what to merge, or None."""
        if self.method not in MERGING:
            return None
        from pyra.config import PyraConfig  # with torch: help and lists of tasks answer without it

        rates = self.rates()
        return PyraConfig(
            rate=rates[-1] if rates else None,
            rate_range=rates if self.elastic else None,
            schedule=parse_schedule(self.schedule) if isinstance(self.schedule, str) else self.schedule,
            reactivation=self.method == "pyra",
            scaled_gates=self.scaled_gates,
        )

    def rates(self) -> list[float]:
        """Return the rate, or the lowest and the highest of a range; nothing without one."""
        try:
            return [] if self.rate is None else [float(part) for part in str(self.rate).split(":")]
        except ValueError:
            raise ConfigError(f"--rate must be a number, or two as in 0.3:0.8, got {self.rate!r}") from None

    def _rate_problems(self) -> list[str]:
        try:
            rates = self.rates()
        except ConfigError as error:
            return [str(error)]
        problems = []
        if len(rates) > 2 or (len(rates) == 2 and not 0 <= rates[0] < rates[1] < 1):
            problems.append(
                f"--rate must be a number, or two that rise within [0, 1), as in 0.3:0.8, got {self.rate!r}"
            )
        if len(rates) == 2 and not self.elastic:
            problems.append(f"--rate {self.rate} is a range: add --elastic to train one adapter for all of it")
        if self.elastic and len(rates) != 2:
            problems.append("--elastic needs a range of rates, such as --rate 0.3:0.8")
        if self.distill and not self.elastic:
            problems.append("--distill goes with --elastic")
        return problems

    def _augmentation_problems(self) -> list[str]:
        problems = []
        if not 0 < self.layer_decay <= 1:
            problems.append(f"--layer-decay must be above 0 and at most 1, got {self.layer_decay}")
        if self.ema is not None and not 0 < self.ema < 1:
            problems.append(f"--ema must be between 0 and 1, such as 0.999, got {self.ema}")
        if self.ema is not None and self.method == "linear":
            problems.append("--ema goes with every method but linear")
        changed = [name for name in ("mixup", "cutmix", "randaugment") if getattr(self, name)]
        if changed and self.method == "linear":
            problems.append(f"--{changed[0]}: a linear probe trains on stored features, its images stay as they are")
        if self.gradient_checkpointing and self.method == "linear":
            problems.append("--gradient-checkpointing: a linear probe has no backward pass through its backbone")
        return problems

    @property
    def peft_method(self) -> str | None:
        """Name of the PEFT method, or None."""
        if self.method in MERGING:
            return self.peft or "lora"
        named = {"adapter": "bottleneck"}.get(self.method, self.method)
        return named if named in PEFT_METHODS else None

    def peft_config(self) -> Any:
        """Return the PEFT method, or None."""
        if self.peft_method is None:
            return None
        targets = [target.strip() for target in self.targets.split(",")]
        return peft_config(self.peft_method, self.rank, self.dropout, targets)

    @property
    def label(self) -> str:
        """What tables call the method: ``pyra``, ``pyra+dora`` beside another PEFT method than LoRA, ``full+int4``."""
        return "+".join([self.method, *(more for more in (self.peft, self.qat) if more not in (None, "lora"))])
