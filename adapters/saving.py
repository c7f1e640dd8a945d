"""Write everything that was trained to an adapter folder (:mod:`pyra.adapters.folder`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pyra.adapters.adapting import carry_reactivation
from pyra.adapters.card import CardInfo, is_ours, model_card
from pyra.adapters.folder import CARD, PEFT_FILE, PYRA_FILE, WEIGHTS, merging_record
from pyra.adapters.several import settle
from pyra.adapters.starts import save_as_plain_lora
from pyra.adapters.targets import trained_modules
from pyra.backbones import wrapped_config, wrapped_schedule
from pyra.checkpoints import value_problems, writing
from pyra.errors import CheckpointError, ConfigError
from pyra.files import write_json, write_text


def save_adapter(model: nn.Module, folder: str | Path, card: CardInfo | None = None) -> None:
    """Write everything that was trained to ``folder``.

    Each file is replaced atomically, and what an older adapter left is removed last. The other files are those of
    ``model.save_pretrained``; the model card is pyra's own, and takes the place of an earlier one of pyra alone: a
    ``README.md`` that somebody wrote stays.

    Args:
        model: from :func:`pyra.adapters.adapt`.
        folder: created if missing.
        card: what the model card is to say beyond what the model knows, such as a result.

    Raises:
        ConfigError: where ``folder`` is none, or the model carries several adapters, or trained weights that PEFT would
            not save (named).
        CheckpointError: where a trained weight is NaN or infinite (named); nothing is written.
        OSError: where a file cannot be written, such as on a full disk; an earlier adapter stays.
    """
    if not isinstance(folder, (str, Path)) or Path(folder).is_file():
        raise ConfigError(f"save_adapter writes a folder, got {folder!r}")
    settle(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder), tempfile.TemporaryDirectory(prefix=".adapter-", dir=folder) as staging:
        written = Path(staging)
        if isinstance(model, PeftModel):
            name = _only_adapter(model)
            carry_reactivation(model)  # where tokens came to merge after the PEFT method was attached
            _check_nothing_is_lost(model, name)
            model.save_pretrained(staging, save_embedding_layers=False)
            written = written if name == "default" else written / name
            save_as_plain_lora(model, written / WEIGHTS, written / PEFT_FILE)
        else:
            modules = dict(model.named_modules())
            trained = {f"{name}.{key}" for name in trained_modules(model) for key in modules[name].state_dict()}
            trained |= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
            kept = {k: v.contiguous() for k, v in model.state_dict().items() if k in trained}
            save_file(kept, written / WEIGHTS)
            config = wrapped_config(model)
            if config is not None:
                write_json(written / PYRA_FILE, merging_record(config, wrapped_schedule(model)))
        state = load_file(written / WEIGHTS)
        problems = value_problems({key: tensor for key, tensor in state.items() if tensor.is_floating_point()})
        if problems:
            raise CheckpointError("this adapter is not worth saving: " + "; ".join(problems[:8]))
        write_text(written / CARD, model_card(model, state, card or CardInfo()))
        files = sorted(file for file in written.iterdir() if file.name != CARD or is_ours(folder / CARD))
        for file in files:
            os.replace(file, folder / file.name)
        for name in {PEFT_FILE, PYRA_FILE} - {file.name for file in files}:
            (folder / name).unlink(missing_ok=True)


def _adapter_state(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """What PEFT saves; embeddings are left out without asking the hub whether they changed."""
    state: dict[str, Tensor] = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    return state


def _only_adapter(model: PeftModel) -> str:
    names = list(model.peft_config)
    if len(names) != 1:
        raise ConfigError(
            f"the model carries {len(names)} adapters ({', '.join(names)}), one can be saved: delete_adapter the others"
        )
    return str(names[0])


def _check_nothing_is_lost(model: PeftModel, adapter: str) -> None:
    """Refuse to save where a weight that was trained belongs to no adapter and to no module saved whole."""
    state = _adapter_state(model, adapter)
    if model.peft_config[adapter].is_prompt_learning:  # saved is what their encoder makes of its weights
        state |= {name: p for name, p in model.named_parameters() if name.startswith("prompt_encoder.")}
    saved = {tensor.data_ptr() for tensor in state.values()}
    lost = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and parameter.data_ptr() not in saved
        and name.replace(f".{adapter}", "") not in state  # AdaLoRA saves the rows that are left, copied
    ]
    if lost:
        raise ConfigError(
            f"{', '.join(lost[:5])}{', ...' if len(lost) > 5 else ''}: trained, but PEFT does not save them; "
            "name their modules in modules_to_save"
        )
