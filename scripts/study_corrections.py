"""What each fault of the published code costs in accuracy; ``python -m pyra.scripts.study_corrections``.

Each is put back on purpose, alone, and compared with the run without it: same seeds, same test images.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse
from pyra.tasks.options import RunOptions

if TYPE_CHECKING:
    from torch import nn

    from pyra.tasks.data.task import ImageDataset


@dataclass(kw_only=True)
class CorrectionOptions:
    """Options of the study; the training settings are the demonstration's."""

    rate: float = option(0.706, "share of the MACs to save (0.706: the published high level)")
    seeds: int = option(3, "runs of each")
    epochs: float = option(3.0, "passes over the training images")
    device: str = option("auto", "as for pyra train")
    limit: int | None = option(None, "as for pyra train")
    runs: str = option("runs/corrections-study", "folder of the runs; one that is there is not trained again")
    output: str = option("results/corrections-demo.json", "file to write the rows to")

    def run(self, name: str, seed: int, changes: dict[str, Any]) -> RunOptions:
        """Return the options of one run."""
        settings = {
            "epochs": self.epochs,
            "device": self.device,
            "limit": self.limit,
            "batch_size": 16,
            "lr": 4e-3,
            "reactivation_lr": 4e-4,
            "targets": "qkv,proj,fc1,fc2",
            "dropout": 0.0,
            "drop_path": 0.0,
        }
        output = str(Path(self.runs) / f"{name}-{seed}")
        return RunOptions(**{**settings, **changes}, rate=self.rate, seed=seed, output=output)


def as_it_is(options: RunOptions, num_classes: int) -> nn.Module:
    """Make the model as ``pyra train`` does."""
    from pyra.tasks.runs import new_model

    return new_model(options, num_classes)


def with_random_lora(options: RunOptions, num_classes: int) -> nn.Module:
    """Fault 4: a late initialisation overwrites the zeros in LoRA's B."""
    from torch import nn

    model = as_it_is(options, num_classes)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.trunc_normal_(parameter, std=0.02)
    return model


def distilled(options: RunOptions, num_classes: int) -> nn.Module:
    """Make the demo backbone with a second class token, a copy of the first, and a second head."""
    import torch

    from pyra.adapters import adapt
    from pyra.backbones.loading import create_backbone
    from pyra.files import read_json
    from pyra.tasks.runs import DEMO_BACKBONE, new_backbone

    state = new_backbone(options, num_classes).state_dict()
    state["dist_token"] = state["cls_token"]
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], state["pos_embed"]], dim=1)
    sizes = {**read_json(DEMO_BACKBONE / "config.json")["model_args"], "num_classes": num_classes}
    model = create_backbone("deit_tiny_distilled_patch16_224", pretrained=False, **sizes)
    missing = model.load_state_dict(state, strict=False)
    assert set(missing.missing_keys) == {"head_dist.weight", "head_dist.bias"} and not missing.unexpected_keys
    return adapt(model, pyra=options.pyra_config(), peft=options.peft_config())


def distilled_with_one_head(options: RunOptions, num_classes: int) -> nn.Module:
    """Fault 5: the second head never trains, and is averaged in at evaluation."""
    model = distilled(options, num_classes)
    inner: Any = model.get_base_model()  # type: ignore[operator]
    inner.set_distilled_training(True)
    inner.register_forward_hook(lambda _module, _inputs, output: output[0] if isinstance(output, tuple) else output)
    return model


def with_merging_prompts(options: RunOptions, num_classes: int) -> nn.Module:
    """Fault 8: prompt tokens merge as any other."""
    from pyra.backbones.layers import merging_layers

    model = as_it_is(options, num_classes)
    for layer in merging_layers(model):
        layer.step = dataclasses.replace(layer.step, prefix=1)
    return model


def as_jpeg(data: ImageDataset) -> ImageDataset:
    """Fault 11: evaluation images are saved as JPEG in the size that the model takes (Pillow's quality 75)."""
    import copy
    import io

    import numpy as np
    import torch
    from PIL import Image

    assert data.pixels is not None
    saved = copy.copy(data)
    pixels = []
    for image in data.pixels:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "jpeg")
        pixels.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    saved.pixels = torch.stack(pixels)
    return saved


@dataclass(frozen=True)
class Variant:
    """One way to train or to score: options, model, test images."""

    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    build: Callable[[RunOptions, int], nn.Module] = as_it_is
    view: Callable[[ImageDataset], ImageDataset] | None = None


_PROMPTS = {"peft": "prompts-shallow"}
VARIANTS = {
    "pyra": Variant(),
    "one-learning-rate": Variant({"reactivation_lr": None}),
    "scaled-gates": Variant({"scaled_gates": True}),
    "random-lora": Variant(build=with_random_lora),
    "two-heads": Variant(build=distilled),
    "one-of-two-heads": Variant(build=distilled_with_one_head),
    "prompts": Variant(_PROMPTS),
    "merging-prompts": Variant(_PROMPTS, with_merging_prompts),
    "jpeg": Variant(view=as_jpeg),
}
PAIRS = {
    "1: re-activation has its own learning rate": ("pyra", "one-learning-rate"),
    "3: gates divided by the root of r": ("scaled-gates", "pyra"),
    "4: LoRA starts at zero": ("pyra", "random-lora"),
    "5: both heads of a distilled model train": ("two-heads", "one-of-two-heads"),
    "8: prompts do not merge": ("prompts", "merging-prompts"),
    "11: evaluation images are not lossy": ("pyra", "jpeg"),
}
"""Number and name of a fault (results/README.md), and what is compared: without it, and with it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, score everything, print a table and write the rows."""
    options = parse(
        CorrectionOptions,
        argv,
        prog="python -m pyra.scripts.study_corrections",
        description="Put the faults of the published code back, one at a time, and measure what each costs.",
        example="python -m pyra.scripts.study_corrections --seeds 3 --output results/corrections-demo.json",
    )
    if options.seeds < 1:
        raise ConfigError("--seeds must be at least 1")
    from tabulate import tabulate

    from pyra.files import write_json
    from pyra.tasks.comparison import Right, paired_difference
    from pyra.tasks.outcomes import outcomes
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.results import environment
    from pyra.tasks.runs import resolve_device

    quiet_libraries()
    right: dict[str, list[Right]] = {name: [] for name in VARIANTS}
    for seed in range(options.seeds):
        for name, variant in VARIANTS.items():
            print(f"seed {seed}, {name}", file=sys.stderr, flush=True)
            run = options.run(name, seed, variant.changes)
            right[name].append(outcomes(run, [], variant.build, variant.view)[0.0])
    rows = []
    for label, (corrected, faulty) in PAIRS.items():
        found = paired_difference(right[corrected], right[faulty])
        rows.append({"correction": label, **found.points(), "images": len(right[corrected][0])})
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    settings = {name: value for name, value in dataclasses.asdict(options).items() if name not in ("runs", "output")}
    device = str(resolve_device(options.device))
    write_json(options.output, {"options": settings, "rows": rows, "environment": environment(device)})
    print(f"written to {options.output} (percentage points, {options.seeds} seeds; ours: corrected, theirs: faulty)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
