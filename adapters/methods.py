"""The PEFT methods that runs are made with, by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pyra.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from peft import PeftConfig

# peft is imported where a configuration is made: the names of the methods are needed without it.
_Make = Callable[[int, float, "list[str] | None"], "PeftConfig"]


def _of_peft(kind: str, **changes: Any) -> _Make:
    """Make a configuration of peft; the names of its options for size, dropout and targets are given as values."""

    def make(rank: int, dropout: float, targets: list[str] | None) -> PeftConfig:
        import peft

        values = {"rank": rank, "dropout": dropout, "targets": targets}
        options = {key: values.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
        made: PeftConfig = getattr(peft, kind)(**options)
        return made

    return make


_LORA = {"r": "rank", "lora_alpha": "rank", "lora_dropout": "dropout", "target_modules": "targets"}
_KRONECKER = {"r": "rank", "alpha": "rank", "module_dropout": "dropout", "target_modules": "targets"}


def _lora(**changes: Any) -> _Make:
    """LoRA whose update is not scaled, as the paper has it."""
    return _of_peft("LoraConfig", **_LORA, **changes)


def _adalora(rank: int, dropout: float, targets: list[str] | None) -> PeftConfig:
    # The number of steps is known where the training begins (pyra.adapters.adalora).
    made = _of_peft("AdaLoraConfig", **_LORA, init_r=max(rank * 3 // 2, rank + 1), target_r=rank, total_step=1)
    return made(rank, dropout, targets)


def _ia3(rank: int, dropout: float, targets: list[str] | None) -> PeftConfig:
    made = _of_peft("IA3Config", target_modules="targets", feedforward_modules=None if targets is None else [])
    return made(rank, dropout, targets)


def _bottleneck(**changes: Any) -> _Make:
    def make(rank: int, dropout: float, targets: list[str] | None) -> PeftConfig:
        from pyra.adapters.bottleneck import BottleneckConfig

        return BottleneckConfig(width=rank, dropout=dropout, **changes)

    return make


def _prompts(deep: bool) -> _Make:
    def make(rank: int, dropout: float, targets: list[str] | None) -> PeftConfig:
        from pyra.adapters.prompts import VisualPromptsConfig

        return VisualPromptsConfig(num_prompts=rank, dropout=dropout, deep=deep)

    return make


def _fourierft(rank: int, dropout: float, targets: list[str] | None) -> PeftConfig:
    made = _of_peft("FourierFTConfig", n_frequency=125 * rank, scaling=300.0, target_modules="targets")
    return made(rank, dropout, targets)


_VERA = {"r": "rank", "vera_dropout": "dropout", "target_modules": "targets"}
_OFT = {"oft_block_size": "rank", "module_dropout": "dropout", "target_modules": "targets"}
_BOFT = {"boft_block_size": "rank", "boft_dropout": "dropout", "target_modules": "targets"}
_METHODS: dict[str, tuple[str, _Make]] = {
    "lora": ("LoRA", _lora()),
    "dora": ("LoRA with magnitudes of its own (DoRA)", _lora(use_dora=True)),
    "rslora": ("LoRA divided by the root of its rank", _lora(use_rslora=True)),
    "pissa": ("LoRA that starts at the largest singular values", _lora(init_lora_weights="pissa")),
    "adalora": ("LoRA whose ranks move to where they help (it starts at 1.5 times --rank)", _adalora),
    "ia3": ("(IA)3, learned factors", _ia3),
    "vera": ("VeRA, learned factors around shared random matrices", _of_peft("VeraConfig", **_VERA)),
    "oft": ("OFT, rotations in blocks of --rank", _of_peft("OFTConfig", **_OFT)),
    "boft": ("BOFT, rotations in butterflies of --rank", _of_peft("BOFTConfig", **_BOFT)),
    "loha": ("LoHa, Hadamard products", _of_peft("LoHaConfig", **_KRONECKER)),
    "lokr": ("LoKr, Kronecker products", _of_peft("LoKrConfig", **_KRONECKER)),
    "fourierft": ("FourierFT, 125 frequencies a rank", _fourierft),
    "ln-tuning": ("the norms alone", _of_peft("LNTuningConfig")),
    "bottleneck": ("bottleneck adapter after each MLP", _bottleneck()),
    "adaptformer": ("bottleneck adapter beside each MLP", _bottleneck(placement="parallel", scale=0.1)),
    "prompts": ("--rank visual prompts for each layer", _prompts(deep=True)),
    "prompts-shallow": ("--rank visual prompts before the first layer", _prompts(deep=False)),
}
PEFT_METHODS: dict[str, str] = {name: text for name, (text, _) in _METHODS.items()}
"""Names that :func:`peft_config` takes, and what each is."""


_OF_RANKS = ("lora", "dora", "rslora", "pissa", "adalora", "loha", "lokr", "bottleneck", "adaptformer")


_ROUNDED = ("lora", "rslora")


def rounding_problem(method: str, dropout: float) -> str | None:
    """Say why a method cannot train linear layers as they will be rounded; None for one that can.

    Args:
        method: ``full``, or the PEFT method of a run.
        dropout: in its adapter.
    """
    if method != "full" and method not in _ROUNDED:
        return (
            f"goes with --method full, {' and '.join(_ROUNDED)}, and with tome and pyra beside those: what {method} "
            "adds would be folded into weights that were trained rounded, and rounded anew"
        )
    if method != "full" and dropout:
        return f"takes no dropout in the adapter, which is rounded with the weights: add --dropout 0, not {dropout:g}"
    return None


def refuse_rank(method: str, rank: int, width: int) -> None:
    """Raise :class:`ConfigError` for a rank above the width of a layer: it holds no more, and may fill the memory."""
    if method in _OF_RANKS and rank > width:
        raise ConfigError(
            f"--rank {rank} is more than the {width} features of the backbone's layers: give a smaller one"
        )


def peft_config(method: str, rank: int, dropout: float = 0.0, targets: Sequence[str] | None = None) -> PeftConfig:
    """Return the configuration of a PEFT method; LoRA and bottleneck are as the paper has them (arXiv 2403.09192, 4).

    Args:
        method: one of :data:`PEFT_METHODS`.
        rank: the size of the adapter: rank of LoRA and its kin, width of a bottleneck, block of a rotation, number of
            prompts. (IA)3 and norm tuning have none.
        dropout: dropout in the adapter, where the method knows one.
        targets: modules that are adapted; None means the projections to queries, keys and values, as in the paper.
            Bottlenecks, prompts and norm tuning have their own places.

    Raises:
        ConfigError: for another method, or a rank below 1.

    Example:
        >>> peft_config("dora", rank=8).use_dora
        True
    """
    if type(rank) is not int or rank < 1:
        raise ConfigError(f"rank must be a whole number of at least 1, got {rank!r}")
    if method not in _METHODS:
        close = did_you_mean(method, _METHODS)
        raise ConfigError(f"unknown PEFT method {method!r}{close}; one of {', '.join(_METHODS)}")
    return _METHODS[method][1](rank, dropout, None if targets is None else list(targets))
