"""Weights of the MTP layer of JoyAI under the names of a checkpoint: read from a folder, and made of a layer.

A checkpoint numbers the layer on from the last one of the decoder, without a prefix of its own, and carries a copy of
the embedding along, which the layer shares with the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pyra.backbones.joyai import MTP_ATTRIBUTE, JoyAIForCausalLM
from pyra.backbones.joyai_dequantised import Dequantised, open_weights
from pyra.backbones.joyai_folder import Checkpoint, some
from pyra.errors import CheckpointError

_SHARED = ("embed_tokens.weight", "shared_head.head.weight")  # copies of the decoder's, which are used instead


def checkpoint_prefix(model: JoyAIForCausalLM) -> str:
    """Return what the names of the MTP layer begin with in a checkpoint of ``model``."""
    return f"model.layers.{model.config.num_hidden_layers}."


def checkpoint_name(name: str) -> str:
    """Return the name of a weight in a checkpoint, behind the prefix.

    >>> checkpoint_name("mtp_block.mlp.up_proj.weight"), checkpoint_name("post_norm.weight")
    ('mlp.up_proj.weight', 'shared_head.norm.weight')
    """
    if name.startswith("post_norm."):
        return "shared_head.norm." + name.removeprefix("post_norm.")
    return name.removeprefix("mtp_block.")


def mtp_weights(model: JoyAIForCausalLM, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the attached layer as a checkpoint's shard has it.

    Args:
        model: with the layer or without.
        state: of the model, of which the layer's tensors are taken.

    Returns:
        Its weights and a copy of the embedding; nothing where ``state`` has no such layer.
    """
    prefix, inner = checkpoint_prefix(model), f"{MTP_ATTRIBUTE}."
    own = {name.removeprefix(inner): value for name, value in state.items() if name.startswith(inner)}
    found = {prefix + checkpoint_name(name): value for name, value in own.items()}
    if found:
        found[f"{prefix}embed_tokens.weight"] = model.get_input_embeddings().weight.detach().clone()
    return found


def without_mtp(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state without the attached layer's tensors."""
    return {name: value for name, value in state.items() if not name.startswith(f"{MTP_ATTRIBUTE}.")}


def stored_mtp(checkpoint: Checkpoint, model: JoyAIForCausalLM) -> dict[str, Tensor]:
    """Read all that a checkpoint holds of MTP layers; what is quantised becomes floats of the model's type.

    Raises:
        CheckpointError: where it holds none, or those of another width.
    """
    stored = _opened(checkpoint, model)
    return {name: _read(stored[name], model) for name in checkpoint.mtp}


def fill_layer(layer: nn.Module, checkpoint: Checkpoint, model: JoyAIForCausalLM) -> None:
    """Put a checkpoint's weights into a layer, in place.

    Raises:
        CheckpointError: where it holds none, several layers, or one that is not the dense layer of ``model``.
    """
    stored = _opened(checkpoint, model)
    prefix, own = checkpoint_prefix(model), layer.state_dict()
    wanted = {prefix + checkpoint_name(name): name for name in own}
    other = [name for name in checkpoint.mtp if name not in wanted and name.removeprefix(prefix) not in _SHARED]
    missing = sorted(wanted.keys() - set(checkpoint.mtp))
    wrong = [name for name in wanted if name in stored and checkpoint.shapes[name] != list(own[wanted[name]].shape)]
    for names, what in ((missing, "lacks"), (other, "also holds"), (wrong, "has other sizes of")):
        if names:
            raise CheckpointError(
                f"{checkpoint.folder}: its MTP layer {what} {some(names)}; one dense layer is read, as JoyAI has it"
            )
    layer.load_state_dict({wanted[name]: _read(stored[name], model) for name in wanted})


def _opened(checkpoint: Checkpoint, model: JoyAIForCausalLM) -> dict[str, Any]:
    if not checkpoint.mtp:
        raise CheckpointError(
            f"{checkpoint.folder} holds no MTP weights: give a folder that has them, or train them with "
            "python -m pyra.scripts.train_mtp"
        )
    own, theirs = ((each.num_hidden_layers, each.hidden_size) for each in (model.config, checkpoint.config))
    if own != theirs:
        raise CheckpointError(
            f"{checkpoint.folder}: its MTP layer follows {theirs[0]} layers of width {theirs[1]}, the model has "
            f"{own[0]} of width {own[1]}"
        )
    return open_weights(checkpoint.folder, checkpoint.files, checkpoint.storage)


def _read(stored: Any, model: JoyAIForCausalLM) -> Tensor:
    value: Tensor = stored[...]
    return value.to(model.dtype) if isinstance(stored, Dequantised) else value
