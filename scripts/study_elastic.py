"""Compare one elastic adapter with adapters trained at each rate alone; ``python -m pyra.scripts.study_elastic``.

All are scored on the same test images; differences are bootstrapped over images and seeds together, in pairs.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyra.errors import ConfigError
from pyra.records import option
from pyra.scripts.cli import parse
from pyra.tasks.options import RunOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pyra.backbones.layers import MergingLayer

KINDS = {
    "elastic": "re-activation weights of the first r ranks",
    "resampled": "the same weights stretched over r ranks",
    "distilled": "elastic, and learning from the uncompressed pass, too",
}


@dataclass(kw_only=True)
class StudyOptions:
    """Options of the study; the training settings are the demonstration's."""

    task: str | None = option(None, "a shipped task by name ('demo' unless --data is given)")
    data: str | None = option(None, "your data instead, as for pyra train")
    backbone: str = option("demo", "as for pyra train")
    checkpoint: str | None = option(None, "as for pyra train")
    image_size: int | None = option(None, "as for pyra train")
    method: str = option("pyra", "pyra or tome", choices=("pyra", "tome"))
    kinds: tuple[str, ...] = option(("elastic",), "elastic adapters to train", choices=tuple(KINDS))
    rates: tuple[float, ...] = option(
        (0.3, 0.5, 0.7), "rates of the grid; the elastic run covers the lowest to the highest"
    )
    seeds: int = option(3, "runs of each")
    epochs: float = option(3.0, "passes over the training images, the same for every run")
    batch_size: int = option(16, "images a step")
    lr: float = option(4e-3, "peak learning rate")
    reactivation_lr: float = option(4e-4, "peak learning rate of the re-activation weights")
    rank: int = option(8, "rank of LoRA")
    targets: str = option("qkv,proj,fc1,fc2", "modules that LoRA adapts")
    dtype: str = option("float32", "as for pyra train", choices=("float32", "bfloat16"))
    device: str = option("auto", "as for pyra train")
    limit: int | None = option(None, "as for pyra train")
    runs: str = option("runs/elastic-study", "folder of the runs; one that is there is not trained again")
    output: str = option("results/elastic-demo.json", "file to write the rows to")

    def run(self, rate: str, seed: int, kind: str) -> RunOptions:
        """Return the options of one run."""
        shared = {f.name for f in dataclasses.fields(RunOptions)} & {f.name for f in dataclasses.fields(self)}
        elastic = kind != "fixed"
        return RunOptions(
            **{name: getattr(self, name) for name in shared - {"output"}},
            rate=rate,
            elastic=elastic,
            distill=kind == "distilled",
            dropout=0.0,
            drop_path=0.0,
            seed=seed,
            output=str(Path(self.runs) / f"{self.method}-{kind}-{rate.replace(':', '-')}-{seed}"),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is missing, score everything, print a table and write the rows."""
    options = parse(
        StudyOptions,
        argv,
        prog="python -m pyra.scripts.study_elastic",
        description="Compare elastic adapters with adapters trained at each rate alone.",
        example="python -m pyra.scripts.study_elastic --seeds 3 --output results/elastic-demo.json",
    )
    from tabulate import tabulate

    from pyra.files import write_json
    from pyra.tasks.comparison import Right, paired_difference
    from pyra.tasks.outcomes import outcomes
    from pyra.tasks.quiet import quiet_libraries
    from pyra.tasks.results import environment
    from pyra.tasks.runs import new_model, resolve_device

    quiet_libraries()
    device = str(resolve_device(options.device))
    rates = options.rates
    if len(set(rates)) < 2 or options.seeds < 1 or not options.kinds:
        raise ConfigError("--rates must be at least two different rates, --seeds at least 1, --kinds at least one")
    whole = f"{min(rates)}:{max(rates)}"
    planned = [(kind, whole, rates) for kind in options.kinds] + [("fixed", str(rate), (rate,)) for rate in rates]
    right: dict[tuple[str, float], list[Right]] = {}
    for seed in range(options.seeds):
        for kind, rate, scored in planned:
            print(f"seed {seed}, {kind}, rate {rate}", file=sys.stderr, flush=True)
            build = resampled_model if kind == "resampled" else new_model
            for each, values in outcomes(options.run(rate, seed, kind), scored, build).items():
                right.setdefault((kind, each), []).append(values)
    rows = []
    for kind in options.kinds:
        for at in rates:
            found = paired_difference(right[kind, at], right["fixed", at])
            rows.append({"kind": kind, "rate": at, **found.points(), "images": len(right[kind, at][0])})
    print(tabulate(rows, headers="keys", floatfmt=".2f"))
    settings = {name: value for name, value in asdict(options).items() if name not in ("runs", "output")}
    for name in ("data", "checkpoint"):  # the record names what was read, not where it lay
        settings[name] = settings[name] and Path(settings[name]).name
    write_json(options.output, {"options": settings, "rows": rows, "environment": environment(device)})
    print(f"written to {options.output} (percentage points, {options.seeds} seeds; ours: elastic, theirs: one rate)")
    return 0


def resampled_model(options: RunOptions, num_classes: int) -> nn.Module:
    """Make a model whose re-activation weights are stretched over the pairs of the moment, linearly."""
    import torch
    from torch.nn import functional as F
    from torch.nn.utils import parametrize

    from pyra.backbones.layers import merging_layers
    from pyra.tasks.runs import new_model

    class Stretched(torch.nn.Module):
        def __init__(self, layer: MergingLayer) -> None:
            super().__init__()
            self.layer = (layer,)  # in a tuple: no child

        def forward(self, weight: Tensor) -> Tensor:
            pairs = self.layer[0].step.removed
            if not pairs:
                return weight
            return F.interpolate(weight.T[None], size=pairs, mode="linear", align_corners=True)[0].T

    model = new_model(options, num_classes)
    for layer in merging_layers(model):
        if hasattr(layer, "reactivation"):
            wrapper: Any = layer.reactivation
            active = wrapper.modules_to_save[wrapper.active_adapters[0]]
            parametrize.register_parametrization(active, "pair_weight", Stretched(layer), unsafe=True)  # of other shape
    return model


if __name__ == "__main__":
    sys.exit(main())
