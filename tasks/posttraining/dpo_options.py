"""What ``pyra dpo`` is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pyra.records import ABOVE_0, BELOW_1, bound_problems, option
from pyra.tasks.posttraining.options import PostTrainingOptions

LOSSES = (
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "exo_pair", "nca_pair", "sppo_hard", "apo_zero", "apo_down",
    "discopop",
)  # fmt: skip
_SMOOTHED = ("sigmoid", "robust", "exo_pair")


@dataclass(kw_only=True)
class DpoOptions(PostTrainingOptions):
    """One run of direct preference optimisation (arXiv 2305.18290)."""

    kind: ClassVar[str] = "dpo"

    epochs: float = option(1.0, "passes over the training pairs")
    batch_size: int = option(16, "pairs a step, and answers a scored forward")
    lr: float | None = option(None, "peak learning rate of AdamW; by default 1e-6 (full), 2e-5 (others)")
    beta: float = option(0.1, "how much the model may move away from the reference: less for larger values")
    loss: str = option("sigmoid", "loss of a pair, by trl's name (sigmoid is DPO)", choices=LOSSES, metavar="NAME")
    label_smoothing: float = option(0.0, "share of pairs that may be the wrong way round (sigmoid, robust, exo_pair)")
    reference: str | None = option(
        None,
        "folder or hub name of another model, or a run folder, to stay close to; by default the model as it starts: "
        "a new adapter switched off, or that of --adapter",
    )

    def _usual_learning_rate(self) -> float:
        return 1e-6 if self.method == "full" else 2e-5

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += bound_problems(self, ABOVE_0, ("beta",))
        problems += bound_problems(self, BELOW_1, ("label_smoothing",))
        if self.label_smoothing and self.loss not in _SMOOTHED:
            problems.append(f"--label-smoothing goes with --loss {', '.join(_SMOOTHED)}, not with {self.loss}")
        if self.loss == "robust" and self.label_smoothing >= 0.5:
            problems.append(f"--label-smoothing must be below 0.5 with --loss robust, got {self.label_smoothing}")
        if self.loss == "exo_pair" and self.label_smoothing == 0:
            problems.append("--loss exo_pair needs --label-smoothing above 0, such as 1e-3")
        if self.dropout:
            problems.append("--dropout: trl switches it off for preferences; leave it out")
        if self.reference == "":
            problems.append("--reference is empty; give a folder or a hub name")
        return problems
