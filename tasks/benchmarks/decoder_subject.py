"""What ``pyra benchmark decoder`` measures: a decoder, its merging copies, which share its weights, and prompts."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from pyra.backbones import joyai, macs, schedule_of, wrap
from pyra.backbones.joyai_placement import place
from pyra.errors import ConfigError, DataError, UnsupportedModelError
from pyra.tasks.benchmarks.decoder_options import PUBLISHED, STOCK, DecoderOptions
from pyra.tasks.language.models import load_decoder, load_tokenizer, read_config

_ROOM = 0.95  # of the free memory that weights may take: prompts need some, too


def check_options(options: DecoderOptions) -> None:
    """Find what cannot be before any weights are read.

    Raises:
        ConfigError, ScheduleError, UnsupportedModelError: for no decoder, prompts that are too long, rates that cannot
            be reached or leave a prompt as it is, and weights that do not fit.
    """
    configuration = model_config(options)
    longest, most = max(options.prompt_tokens), getattr(configuration, "max_position_embeddings", None)
    if most is not None and longest + options.new_tokens > most:
        raise ConfigError(
            f"--prompt-tokens {longest} and --new-tokens {options.new_tokens}: {options.backbone} reads {most} tokens "
            "at most"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(configuration)
    except ValueError:
        raise UnsupportedModelError(
            f"{options.backbone} ({configuration.model_type}) is no decoder: it cannot answer prompts"
        ) from None
    for name, merging in options.configurations().items():
        removed = schedule_of(model, merging)
        model.model.pyra_schedule = tuple(removed)
        for tokens in options.prompt_tokens:
            if macs(model, input_size=tokens) == macs(model, [0] * len(removed), tokens):
                raise ConfigError(f"{name} removes nothing of a prompt of {tokens} tokens: give longer ones")
    if options.backbone == PUBLISHED:
        _check_memory(options, configuration)


def model_config(options: DecoderOptions) -> Any:
    """Return the configuration of the backbone, without its weights."""
    if options.backbone != PUBLISHED:
        return read_config(options.backbone)
    return joyai.config(**({} if options.layers is None else {"num_hidden_layers": options.layers}))


def _check_memory(options: DecoderOptions, configuration: Any) -> None:
    if torch.device(options.device).type == "cuda":
        free = torch.cuda.mem_get_info(options.device)[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        place([int(_ROOM * free)], configuration=configuration, dtype=options.dtype)
    except ConfigError as error:
        raise ConfigError(f"{options.device}: {error}, or fewer --layers") from None


def stock_model(options: DecoderOptions) -> nn.Module:
    """Return the decoder as it is, on its device."""
    dtype = getattr(torch, options.dtype)
    if options.backbone == PUBLISHED:
        return random_model(model_config(options), options.device, dtype)
    return load_decoder(options.backbone).to(options.device, dtype).eval()


def random_model(configuration: Any, device: str, dtype: torch.dtype) -> nn.Module:
    """Return a JoyAI model with random weights, made module by module where it stays: no copy elsewhere."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = joyai.JoyAIForCausalLM(configuration)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            blank = torch.empty_like(parameter, device=device, dtype=dtype)
            setattr(module, name, nn.Parameter(blank, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):  # float32 in every model
            setattr(module, name, torch.zeros_like(buffer, device=device))
        model._init_weights(module)
    return model.eval()


def merging_models(stock: nn.Module, options: DecoderOptions) -> dict[str, nn.Module]:
    """Return the stock model and its merging copies, by name; weights are held once."""
    found = {STOCK: stock}
    for name, config in options.configurations().items():
        found[name] = wrap(sharing_copy(stock), config).eval()
    return found


def sharing_copy(model: nn.Module) -> nn.Module:
    """Return a copy whose weights are those of the model itself."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def prompts(options: DecoderOptions, vocabulary: int) -> tuple[dict[int, Tensor], str]:
    """Return prompts [B, N] by their length, and what they are made of.

    Raises:
        ConfigError, DataError: for a file that cannot be read, or has too little text.
    """
    longest = max(options.prompt_tokens)
    needed = longest * options.batch_size
    if options.data is None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.cat([torch.randperm(vocabulary, generator=generator) for _ in range(-(-needed // vocabulary))])
        said = "random tokens"
    else:
        with warnings.catch_warnings(action="ignore"):  # that the text is longer than the model reads
            found = load_tokenizer(options.backbone)(_text(options.data, 16 * needed), add_special_tokens=False)
        ids, said = torch.tensor(found["input_ids"]), f"text of {Path(options.data).name}"
        if len(ids) < needed:
            raise DataError(
                f"--data {options.data}: {len(ids)} tokens, {options.batch_size} prompts of {longest} need {needed}"
            )
    rows = ids[:needed].view(options.batch_size, longest).to(options.device)
    return {tokens: rows[:, :tokens].contiguous() for tokens in options.prompt_tokens}, said


def _text(path: str, letters: int) -> str:
    """Return the beginning of a file's text; of JSON lines, of all texts in them."""
    try:
        with open(path, encoding="utf-8") as file:
            if not path.endswith(".jsonl"):
                return file.read(letters)
            found, held = [], 0
            for line in file:
                if held >= letters:
                    break
                found.append("\n".join(value for value in dict(json.loads(line)).values() if isinstance(value, str)))
                held += len(found[-1])
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--data {path}: not a readable text file ({' '.join(str(error).split())})") from None
    return "\n\n".join(found)
