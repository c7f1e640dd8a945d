"""Wrap and adapt in one call."""

from __future__ import annotations

import copy

from peft import BOFTConfig, OFTConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.oft import OFTLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from pyra.adapters.expert_lora.advice import warn_of_rebuilt_stacks
from pyra.adapters.peft_model import saving_merging
from pyra.adapters.prompts import VisualPromptsConfig
from pyra.adapters.restore import unchanged_on_error
from pyra.adapters.rounded_lora import round_with_adapter
from pyra.adapters.starts import changes_weights, remember_start
from pyra.adapters.targets import IN_FOUR, REACTIVATION, fill_in_targets, trained_modules
from pyra.backbones import is_decoder, locate, wrap
from pyra.config import PyraConfig
from pyra.errors import ConfigError, PyraError, UnsupportedModelError


def adapt(model: nn.Module, pyra: PyraConfig | None = None, peft: PeftConfig | None = None) -> nn.Module:
    """Make a backbone merge tokens and attach a PEFT method; everything else is frozen.

    Args:
        model: a supported backbone with its new task head (changed in place), or a ``PeftModel`` around one that is
            to merge from now on (``peft`` is then None). With ``pyra`` None any model that PEFT takes, such as a
            decoder of transformers.
        pyra: what to merge; None leaves the tokens alone.
        peft: any PEFT configuration. Without ``target_modules`` an image encoder is adapted in its projections to
            queries, keys and values (norm tuning: in its norms; visual prompts: where its tokens come from), a
            language model where PEFT says (``ExpertLoraConfig``: in its routed experts). The task head and the
            re-activation weights are trained and saved with it. None trains those alone (with ``pyra`` None as well: a
            linear probe). AdaLoRA moves its ranks only where the training loop calls
            ``model.base_model.update_and_allocate(step)`` after each optimiser step. Linear layers that train as they
            will be rounded (``--qat int4``) take plain LoRA, which is rounded with them.

    Returns:
        A ``peft.PeftModel`` around ``model``, or ``model`` itself for ``peft`` None.

    Raises:
        UnsupportedModelError, ScheduleError: from :func:`pyra.wrap`.
        ConfigError: for anything else than configurations, where the target modules do not exist in the model or are
            of a kind the method cannot adapt, or ``modules_to_save`` reaches into the re-activation modules. The
            backbone is then as it was.

    Example:
        >>> model = adapt(model, pyra=PyraConfig(rate=0.5), peft=LoraConfig(r=8))  # doctest: +SKIP
    """
    if peft is not None and not isinstance(peft, PeftConfig):
        raise ConfigError(
            "adapt: peft takes a configuration of the peft library, such as LoraConfig(r=8), BottleneckConfig(width=8) "
            f"or pyra.adapters.methods.peft_config('lora', rank=8); got {peft!r}"
        )
    if isinstance(model, PeftModel):
        if pyra is None or peft is not None:
            raise ConfigError(
                "this model already carries an adapter: give adapt() the backbone, fold_adapter it first, or give "
                "adapt() what it shall merge and no further PEFT method"
            )
        with unchanged_on_error(model):
            carry_reactivation(wrap(model, pyra))
        return model
    with unchanged_on_error(model, altered=[model] if peft is not None and changes_weights(peft) else []):
        if pyra is None:
            return _attach(model, peft)
        if not isinstance(peft, VisualPromptsConfig):
            return _attach(wrap(model, pyra), peft)
        adapted = _attach(model, peft)  # its tokens are to be counted when the model is wrapped
        carry_reactivation(wrap(adapted, pyra))
        return adapted


def _attach(model: nn.Module, peft: PeftConfig | None) -> nn.Module:
    trained = trained_modules(model)
    _refuse_whole_numbers(model, trained)
    if peft is None:
        model.requires_grad_(False)
        for name, module in model.named_modules():
            if name in trained:
                module.requires_grad_(True)
        return model
    config = copy.deepcopy(peft)
    if config.is_prompt_learning and is_image_model(model):
        raise ConfigError(
            f"{type(config).__name__} puts prompts before the words of a language model, and {type(model).__name__} "
            "reads images: use VisualPromptsConfig of pyra.adapters"
        )
    fill_in_targets(config, model)
    _refuse_few_bits(model, config)
    round_with_adapter(model, config)
    warn_of_rebuilt_stacks(model, config)
    saved = {name.rpartition(".")[2] if name.endswith(REACTIVATION) else name for name in trained}
    asked = set(getattr(config, "modules_to_save", None) or ())
    _refuse_inner_modules(model, asked)
    if hasattr(config, "modules_to_save") and (asked or saved):
        config.modules_to_save = sorted(asked | saved)
    if REACTIVATION in saved:
        _exclude_reactivation(config)
    try:
        adapted = get_peft_model(model, config)
    except PyraError:  # from a method of ours
        raise
    except StopIteration:  # peft looks for a weight in a module that has none
        wanted = getattr(config, "target_modules", None)
        raise ConfigError(f"target_modules {wanted}: a module of that name has no weights; name others") from None
    except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        where = f"target_modules {config.target_modules}" if hasattr(config, "target_modules") else "this model"
        reason = f"{' '.join(str(error).split())[:300]}" or type(error).__name__
        raise ConfigError(f"peft cannot attach {type(config).__name__} to {where}: {reason}") from None
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = backbone_name(model)
    _refuse_other_blocks(adapted, config)
    if isinstance(
        config, BOFTConfig
    ):  # without its CUDA extension peft makes less than was asked for, and does not say
        made = next(module for name, module in adapted.named_modules() if name.endswith(".boft_R"))
        config.boft_n_butterfly_factor = len(next(made.parameters()))
    saving_merging(adapted)
    if changes_weights(config):
        remember_start(adapted, get_peft_model_state_dict(adapted, save_embedding_layers=False))
    return adapted


def _refuse_whole_numbers(model: nn.Module, trained: list[str]) -> None:
    modules = dict(model.named_modules())
    fixed = [name for name in trained if any(not p.is_floating_point() for p in modules[name].parameters())]
    if fixed:
        raise ConfigError(
            f"{', '.join(fixed)} is quantised and cannot train: load the model with llm_int8_skip_modules={fixed} in "
            "its BitsAndBytesConfig"
        )


def _refuse_few_bits(model: nn.Module, config: PeftConfig) -> None:
    """Name the methods whose layers take quantised weights for plain ones: they fail at the first forward."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if getattr(model, "is_loaded_in_8bit", False) and getattr(config, "use_dora", False):
        raise ConfigError("DoRA fails on backbones of 8 bits in peft: take 4 bits, or LoRA without use_dora")
    if getattr(model, "is_loaded_in_4bit", False) and kind in ("LOHA", "LOKR"):
        raise ConfigError(f"{kind} takes no weights of 4 bits in peft: take 8 bits, or another method such as LoRA")


def _refuse_other_blocks(adapted: nn.Module, config: PeftConfig) -> None:
    if not isinstance(config, OFTConfig) or not config.oft_block_size:
        return
    layers = [module for module in adapted.modules() if isinstance(module, OFTLayer)]
    if any(isinstance(layer, OFTLayer) for name, layer in adapted.named_modules() if name.endswith(f".{IN_FOUR}")):
        raise ConfigError(f"OFT of peft fails on {IN_FOUR}, whose input has four dimensions: name other targets")
    other = {size for layer in layers for size in layer.oft_block_size.values()} - {config.oft_block_size}
    if other:
        raise ConfigError(
            f"oft_block_size {config.oft_block_size} does not divide the width of every target module: peft would take "
            f"{', '.join(map(str, sorted(other)))} instead; give one that does"
        )


def is_image_model(model: nn.Module) -> bool:
    """Whether a model reads images and its tokens could merge: an image encoder, alone or in a larger model."""
    if is_decoder(model):
        return False
    try:
        locate(model)
    except UnsupportedModelError:
        return False
    return True


def carry_reactivation(model: PeftModel) -> None:
    """Have PEFT train, save and switch re-activation modules that came after it, with the adapter that is active."""
    saving_merging(model)
    name = model.active_adapter
    config = model.peft_config[name]
    for parent in list(model.modules()):
        module = parent._modules.get(REACTIVATION)
        if module is not None and not isinstance(module, ModulesToSaveWrapper):
            wrapper = ModulesToSaveWrapper(module, name)
            wrapper.set_adapter(name)
            setattr(parent, REACTIVATION, wrapper)
            config.modules_to_save = sorted({*(config.modules_to_save or ()), REACTIVATION})
            _exclude_reactivation(config)


def _exclude_reactivation(config: PeftConfig) -> None:
    """Re-activation is trained whole, never through a PEFT layer."""
    if getattr(config, "exclude_modules", "") is None:
        config.exclude_modules = rf"(.*\.)?{REACTIVATION}(\..*)?"


def _refuse_inner_modules(model: nn.Module, asked: set[str]) -> None:
    """PEFT takes a name in ``modules_to_save`` for every module whose path ends with it, those of others included."""
    inside = [name for name, _ in model.named_modules() if f".{REACTIVATION}." in f".{name}."[:-1]]
    clashes = sorted({wanted for wanted in asked for name in inside if name.endswith(wanted)})
    if clashes:
        raise ConfigError(
            f"modules_to_save {', '.join(clashes)}: PEFT would also take {inside[0]} for it, which is trained anyway; "
            "name a longer path or another module"
        )


def backbone_name(model: nn.Module) -> str | None:
    """Return the name of a timm model with its pretrained tag, or None."""
    source = getattr(model, "pretrained_cfg", None) or {}
    architecture, tag = source.get("architecture"), source.get("tag")
    return f"{architecture}.{tag}" if architecture and tag else architecture
