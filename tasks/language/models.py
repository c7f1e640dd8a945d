"""Language backbones by folder or hub name, with their tokenizers: nothing is unpickled, no code is run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    CompressedTensorsConfig,
)

from pyra.adapters.targets import trained_modules
from pyra.backbones import is_decoder, macs, wrapped_schedule
from pyra.backbones.joyai import MODEL_TYPES
from pyra.backbones.joyai_checkpoint import load_model
from pyra.backbones.joyai_tokenizer import heed_bos
from pyra.checkpoints import file_digest
from pyra.errors import CheckpointError, ConfigError, UnsupportedModelError
from pyra.tasks.language.thinking import thinking_values
from pyra.tasks.language.tokens import Encoder
from pyra.tasks.provenance import weights_digest

LONGEST = 512
"""Tokens that are read where ``--max-length`` says nothing; fewer where the backbone reads fewer."""

_NEVER_CODE: Mapping[str, Any] = {"trust_remote_code": False}


def read_config(backbone: str) -> Any:
    """Return the configuration of a backbone.

    Raises:
        ConfigError: for a folder that transformers has not written, or a name that cannot be had.
        UnsupportedModelError: for a backbone of images.
    """
    folder = Path(backbone).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"{folder}: no config.json there; a backbone folder is one that transformers has saved")
    if folder.is_dir():
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if "architecture" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
                raise UnsupportedModelError(f"{backbone} is a timm model, which reads images: give a language model")
    elif not backbone.strip() or folder.is_file():
        raise ConfigError(f"--backbone {backbone!r}: give a folder that transformers has saved, or a name on the hub")
    elif folder.is_absolute() or backbone.startswith((".", "~")) or backbone.count("/") > 1:  # no name on the hub
        raise ConfigError(f"--backbone {backbone!r}: no such folder")
    try:
        config = AutoConfig.from_pretrained(_place(backbone), **_NEVER_CODE)
    except Exception as error:  # of a file that may hold anything, or a hub that may be anywhere
        raise ConfigError(
            f"--backbone {backbone!r} cannot be had ({_one_line(error)}): give a folder that transformers has saved, "
            "or a name on the hub"
        ) from None
    if getattr(config, "vocab_size", None) is None:
        raise UnsupportedModelError(f"{backbone} ({config.model_type}) reads no text: give a language model")
    return config


def load_tokenizer(backbone: str) -> Any:
    """Return the tokenizer of a backbone, which begins a text as its files say.

    Raises:
        ConfigError: where it has none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(_place(backbone), **_NEVER_CODE)
        heed_bos(tokenizer, _place(backbone))
    except Exception as error:  # as above
        raise ConfigError(
            f"{backbone} has no tokenizer that can be read ({_one_line(error)}): save it beside the model with "
            "tokenizer.save_pretrained"
        ) from None
    return tokenizer


def load_encoder(backbone: str, *, chat: bool = False, thinking: str = "auto") -> Encoder:
    """Return the encoder of a backbone's tokenizer.

    Raises:
        ConfigError: where there is no tokenizer, or ``chat`` is asked for and it has no chat template.
    """
    tokenizer = load_tokenizer(backbone)
    if chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(f"--chat: the tokenizer of {backbone} has no chat template; leave it out")
    return Encoder(tokenizer, chat, values=thinking_values(tokenizer, thinking, backbone) if chat else {})


def load_classifier(backbone: str, labels: list[str], pad_id: int, seed: int = 0) -> nn.Module:
    """Return a backbone with a classification head (new, unless the weights bring one of that size), in float32.

    Args:
        backbone: folder or hub name.
        labels: names of the labels.
        pad_id: id that fills batches: decoders read the last token that is another.
        seed: of weights that are drawn anew.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: where it cannot be had, or takes no such head.
    """
    config = read_config(backbone)
    config.num_labels = len(labels)
    config.id2label, config.label2id = dict(enumerate(labels)), {name: index for index, name in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if config.pad_token_id is None:
        config.pad_token_id = pad_id
    if not _known(AutoModelForSequenceClassification, config):
        raise UnsupportedModelError(f"{backbone} ({config.model_type}) takes no head for the classification of texts")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, drawn = _load(AutoModelForSequenceClassification, backbone, config, ignore_mismatched_sizes=True)
    new = tuple(f"{name}." for name in trained_modules(model))
    _refuse_lost(backbone, [key for key in drawn if not key.startswith(new) and "pooler" not in key])
    return model


def load_decoder(backbone: str) -> nn.Module:
    """Return a backbone that says which token comes next, in float32; integers of compressed-tensors become floats.

    Raises:
        ConfigError, CheckpointError: where it cannot be had.
        UnsupportedModelError: for a model that is no decoder: one that sees the tokens it should predict.
    """
    config = read_config(backbone)
    if not _known(AutoModelForCausalLM, config):
        raise UnsupportedModelError(f"{backbone} ({config.model_type}) is no decoder: it cannot answer by prompt")
    if config.model_type in MODEL_TYPES and getattr(config, "quantization_config", None):
        return load_model(_place(backbone), dtype=torch.float32)  # transformers may take the wrong scales
    model, drawn = _load(AutoModelForCausalLM, backbone, config)
    if not _is_causal(model):
        raise UnsupportedModelError(
            f"{backbone} ({config.model_type}) sees the tokens that come after: it cannot answer by prompt; "
            "tasks with labels take it with --answer head"
        )
    _refuse_lost(backbone, drawn)
    return model


def _load(auto: Any, backbone: str, config: Any, **options: Any) -> tuple[nn.Module, list[str]]:
    """Return a model, and the names of its tensors that the files do not hold, or not in its size."""
    quantised = getattr(config, "quantization_config", None) or {}
    if isinstance(quantised, dict) and quantised.get("quant_method") == "compressed-tensors":
        options["quantization_config"] = CompressedTensorsConfig(run_compressed=False)  # floats, to train and to count
    try:
        model, told = auto.from_pretrained(
            _place(backbone),
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **_NEVER_CODE,
            **options,
        )
    except Exception as error:  # as above
        raise CheckpointError(
            f"the weights of {backbone} cannot be read ({_one_line(error)}); they must be safetensors files"
        ) from None
    _refuse_nan(model, backbone)
    other = (key[0] if isinstance(key, tuple) else key for key in told["mismatched_keys"])
    return model.eval(), sorted({*told["missing_keys"], *other})


def _refuse_lost(backbone: str, lost: list[str]) -> None:
    if lost:
        raise CheckpointError(
            f"the weights of {backbone} are not those of its config.json: {len(lost)} tensors are missing or of "
            f"another size, such as {lost[0]}"
        )


def longest(backbone: str, config: Any, tokenizer: Any, asked: int | None, usual: int = 0) -> int:
    """Return how many tokens are read.

    Args:
        backbone: its name, for errors.
        config: of the model.
        tokenizer: which may read fewer (RoBERTa's positions start at 2).
        asked: ``--max-length``; None takes ``usual`` or what the backbone reads.
        usual: of the task's card; 0 is :data:`LONGEST`.

    Raises:
        ConfigError: where more is asked for than the backbone reads.
    """
    known = (getattr(config, "max_position_embeddings", None), getattr(tokenizer, "model_max_length", None))
    most = min((int(value) for value in known if value and value > 0), default=LONGEST)
    if asked is not None and asked > most:
        raise ConfigError(f"--max-length {asked}: {backbone} reads {most} tokens at most")
    return min(usual or LONGEST, most) if asked is None else asked


def weights_record(backbone: str) -> dict[str, str] | None:
    """Return the SHA-256 of each file of weights in a backbone folder, or None for a name on the hub."""
    folder = Path(backbone).expanduser()
    if not folder.is_dir():
        return None
    return {file.name: file_digest(file) for file in sorted(folder.glob("*.safetensors"))}


def backbone_digest(model: nn.Module) -> str:
    """Return the hash of a backbone's weights; a head, and what pools for it, may be new and do not count."""
    new = [*trained_modules(model), *(name for name, _ in model.named_modules() if name.endswith("pooler"))]
    return weights_digest(model, leave_out=[model.get_submodule(name) for name in new])


def count_macs(model: nn.Module, tokens: int) -> int:
    """Return the multiply-accumulates of a prompt of ``tokens`` tokens, without the head: products and attention.

    Of decoders that could merge as :func:`pyra.macs` has it, experts included; of other models as PyTorch counts them.
    Products are counted whole, those that a causal mask leaves out with them.
    """
    try:
        if is_decoder(model):
            return macs(model, input_size=tokens)
    except UnsupportedModelError:
        pass
    device = next(model.parameters()).device
    ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_ON_A_CPU) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    return int(counter.get_total_flops() // 2) - (0 if head is None else tokens * head.weight.numel())


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


# Of PyTorch's kernels for attention the counter does not know the one for CPUs.
_ON_A_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}


def count_plain_macs(model: nn.Module, tokens: int) -> int:
    """Count as :func:`count_macs` does, with nothing merging."""
    schedule = wrapped_schedule(model)
    return count_macs(model, tokens) if schedule is None else macs(model, [0] * len(schedule), tokens)


def prompt_masks(model: nn.Module, ids: Tensor, starts: Sequence[int]) -> dict[str, Tensor]:
    """Return what a forward over ids [B, T] needs beside them where prompts merge: nothing where none do.

    Args:
        model: of any kind.
        ids: padded at the right.
        starts: of each row, where its answer begins.
    """
    if not any(wrapped_schedule(model) or []):
        return {}
    ends = torch.tensor(starts, device=ids.device)
    return {"prompt_mask": torch.arange(ids.shape[1], device=ids.device) < ends[:, None]}


@contextlib.contextmanager
def precision(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run forwards in ``dtype`` by autocast; float32 means none."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


def _is_causal(model: nn.Module) -> bool:
    """Whether a later token leaves the logits of earlier ones alone."""
    rows = torch.tensor([[1, 2, 3, 0], [1, 2, 3, 4]]) % int(getattr(model, "config").vocab_size)  # noqa: B009
    with torch.inference_mode():
        first, second = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[:, :3]
    return bool(torch.allclose(first, second, atol=1e-4, rtol=1e-3))


def _refuse_nan(model: nn.Module, backbone: str) -> None:
    """Raise :class:`CheckpointError` for weights that are NaN or infinite, which no comparison of outputs explains."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            raise CheckpointError(f"{backbone}: {name} holds NaN or infinite values; get the file of weights anew")


def _known(auto: Any, config: Any) -> bool:
    return type(config) in auto._model_mapping


def _place(backbone: str) -> str:
    folder = Path(backbone).expanduser()
    return str(folder.resolve()) if folder.is_dir() else backbone


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
