"""What training LoRA on routed experts costs: factored, and PEFT's, which makes whole stacks anew in every forward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftConfig
from torch import Tensor, nn

from pyra.adapters import ExpertLoraConfig, adapt
from pyra.backbones import joyai
from pyra.errors import ConfigError
from pyra.tasks.benchmarks.processes import in_fresh_process, peak_above_loaded
from pyra.tasks.benchmarks.rows import Row
from pyra.tasks.timing import Spread, spreads

SPEED_GOAL = 3.0
MEMORY_GOAL = 0.4
_STACKS = ("gate_up_proj", "down_proj")
_OURS = {"pyra": True, "pyra, an eighth of the experts": False}  # whether it is held against a goal
_WAYS = (*_OURS, "peft")
_AGREE = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}  # of the largest logit


@dataclass(frozen=True)
class Mixture:
    """A JoyAI decoder with one layer, whose feed-forward part is a mixture; weights are random.

    Attributes:
        hidden, intermediate: channels of the model and of an expert.
        experts: of the layer.
        active: experts a token.
        tokens: of a training step, in one text.
        rank: of the factors.
        device, dtype: of the model; factors are float32, as PEFT trains them.
    """

    hidden: int
    intermediate: int
    experts: int
    active: int
    tokens: int
    rank: int
    device: str = "cpu"
    dtype: str = "float32"

    def make(self) -> nn.Module:
        """Return the model, with the same weights each time.

        Raises:
            ConfigError: for sizes that do not fit each other.
        """
        torch.manual_seed(0)
        configuration = joyai.tiny_config(
            hidden_size=self.hidden,
            moe_intermediate_size=self.intermediate,
            n_routed_experts=self.experts,
            num_experts_per_tok=self.active,
            num_hidden_layers=1,
            first_k_dense_replace=0,
            max_position_embeddings=max(self.tokens, 2048),
        )
        return joyai.JoyAIForCausalLM(configuration).to(self.device, getattr(torch, self.dtype))

    def text(self) -> Tensor:
        """Return [1, T] tokens."""
        drawn = torch.randint(2, 512, (1, self.tokens), generator=torch.Generator().manual_seed(1))
        return drawn.to(self.device)

    def config(self, name: str) -> PeftConfig:
        """Return the configuration of ``"pyra"``, ``"pyra, an eighth of the experts"`` or ``"peft"``."""
        if name == "peft":
            parameters = [f"mlp.experts.{stack}" for stack in _STACKS]
            return LoraConfig(r=self.rank, lora_alpha=16, target_modules=[], target_parameters=parameters)
        some = None if name == "pyra" else list(range(max(self.experts // 8, 1)))
        return ExpertLoraConfig(r=self.rank, lora_alpha=16, experts=some)


def check(mixture: Mixture) -> None:
    """Compare the logits of both with equal factors.

    Raises:
        ConfigError: where they differ; nothing is worth timing then.
    """
    ours, theirs = (_adapted(mixture, name) for name in ("pyra", "peft"))
    copy_factors(ours, theirs)
    with torch.no_grad():
        start, found, expected = (
            model(mixture.text()).logits.float() for model in (_adapted(mixture, "peft"), ours, theirs)
        )
    scale = expected.abs().max()
    if (found - expected).abs().max() > _AGREE[mixture.dtype] * scale or torch.equal(start, expected):
        raise ConfigError("the two ways to adapt experts do not agree: there is nothing to compare")


def copy_factors(ours: nn.Module, theirs: nn.Module) -> None:
    """Draw new factors of all experts, and give both models the same ones, each in its own layout.

    PEFT nests a layer for each stack, and keeps ``A`` as [E r, in] and ``B`` as [out, r E].
    """
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, factor in ours.named_parameters():
            if ".lora_experts." not in name:
                continue
            drawn = torch.randn(factor.shape, generator=generator) * factor.shape[2] ** -0.5
            factor.copy_(drawn)
            at, _, key = name.partition(".lora_experts.default.")
            wrapper = theirs.get_submodule(at)
            while wrapper.parameter_name != f"{key[:-2]}_proj":
                wrapper = wrapper.get_submodule("base_layer")
            layout = drawn.flatten(0, 1) if key.endswith("A") else drawn.permute(1, 2, 0).flatten(1)
            (target,) = wrapper.get_submodule(f"lora_{key[-1]}.default").parameters()
            target.copy_(layout)


def step_rows(mixture: Mixture, rounds: int) -> list[Row]:
    """Time a forward with its backward, in turns."""
    found = spreads({name: _step(mixture, name) for name in _WAYS}, rounds, device=mixture.device)
    theirs = found["peft"].p50
    rows = []
    for name, goal in _OURS.items():
        spread = Spread(*(1e3 * seconds for seconds in found[name]))
        ratios = {"peft": theirs / found[name].p50}
        rows.append(_row(mixture, "training step", name, "ms", spread, ratios, SPEED_GOAL if goal else None))
    return rows


def memory_rows(mixture: Mixture) -> list[Row]:
    """Measure the peak memory of a step above the loaded model, each in a process of its own."""
    peaks = {name: in_fresh_process(_peak, mixture, name) / 1e9 for name in _WAYS}
    rows = []
    for name, goal in _OURS.items():
        spread, ratios = Spread(*3 * (peaks[name],)), {"peft share": peaks[name] / peaks["peft"]}
        rows.append(_row(mixture, "peak memory", name, "GB", spread, ratios, MEMORY_GOAL if goal else None))
    return rows


def _adapted(mixture: Mixture, name: str) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):  # what PEFT's way costs is what is measured
        return adapt(mixture.make(), peft=mixture.config(name)).train()


def _step(mixture: Mixture, name: str) -> Callable[[], None]:
    model, text = _adapted(mixture, name), mixture.text()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run() -> None:
        model(input_ids=text, labels=text).loss.backward()
        for parameter in trained:
            parameter.grad = None

    return run


def _peak(mixture: Mixture, name: str) -> int:
    step = _step(mixture, name)
    return peak_above_loaded(lambda: (step(), step()), mixture.device)


def _row(
    mixture: Mixture,
    measured: str,
    name: str,
    unit: str,
    spread: Spread,
    ratios: dict[str, float],
    goal: float | None,
) -> Row:
    ((compared, ratio),) = ratios.items()
    share = compared.endswith("share")
    theirs = spread.p50 / ratio if share else spread.p50 * ratio
    return Row(
        measured=measured,
        implementation=name,
        backbone=f"{mixture.experts} experts of {mixture.hidden} x {mixture.intermediate}, {mixture.active} a token",
        image_size=0,
        batch_size=mixture.tokens,
        dtype=mixture.dtype,
        unit=unit,
        **spread._asdict(),
        ratios=ratios,
        goal=goal,
        reached=None if goal is None else ratio <= goal if share else ratio >= goal,
        detail=f"peft {theirs:.3g} {unit}{', above the loaded model' if share else ''}",
    )
