"""How likely right answers are under several ways to merge prompts, of one model that nothing was trained for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tabulate import tabulate
from tqdm import tqdm

from pyra.backbones import macs, unwrap, wrap
from pyra.config import PyraConfig
from pyra.errors import ConfigError
from pyra.tasks.language.data import examples_digest, load_text_task
from pyra.tasks.language.models import backbone_digest, load_decoder, load_encoder, longest, read_config
from pyra.tasks.language.scoring import answer_nll
from pyra.tasks.results import environment
from pyra.tasks.runs import resolve_device


def study_prompts(
    backbone: str, task: str, root: str | None, data: str | None, configs: Mapping[str, PyraConfig], options: Any
) -> dict[str, Any]:
    """Score the right answers of a task under each configuration.

    Args:
        backbone: folder or hub name of a decoder.
        task: a language task.
        root: folder with a folder of each task's files.
        data: folder with the task's files themselves, instead.
        configs: by name.
        options: with ``limit``, ``batch_size`` and ``device``.

    Returns:
        ``rows``, the first of the model as it is; ``test``, ``weights_sha256`` and ``environment``.

    Raises:
        PyraError: for a task, data, backbone or configuration that cannot be had.
    """
    device = resolve_device(options.device)
    texts = load_text_task(task, root, data)
    examples = texts.split("test", options.limit)
    encoder = load_encoder(backbone)
    length = longest(backbone, read_config(backbone), encoder.tokenizer, None, texts.card.max_length)
    rows = [encoder.answered(one.prompt, [one.answer])[0] for one in examples]
    if not (read := [row for row in rows if len(row.ids) <= length]):
        raise ConfigError(f"every example of {task} is longer than {length} tokens")
    model = load_decoder(backbone)
    weights = backbone_digest(model)
    model = model.to(device).requires_grad_(False)
    prompt = round(sum(row.start for row in read) / len(read))
    plain = macs(model, input_size=prompt)
    settings: dict[str, PyraConfig | None] = {"as it is": None, **configs}
    found, before = [], None
    for name, config in tqdm(settings.items(), desc="settings", unit="setting", leave=False, disable=None):
        unwrap(model)
        if config is not None:
            wrap(model, config)
        scored = answer_nll(model, read, pad_id=encoder.pad_id, batch_size=options.batch_size, description=name)
        nlls = [one.nats / one.tokens for one in scored]
        before = nlls if before is None else before
        found.append({"name": name, "macs_ratio": macs(model, input_size=prompt) / plain, **compared(nlls, before)})
    test = {"examples": len(read), "prompt_tokens": prompt, "sha256": examples_digest(examples)}
    where = environment(device.type)
    return {"rows": found, "test": test, "weights_sha256": weights, "environment": where}


def study_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table."""
    lines = [
        {
            "prompts": row["name"],
            "MACs": f"{row['macs_ratio']:.3f}",
            "answer NLL": f"{row['nll']:.3f}",
            "change": f"{row['change']:+.3f}",
            "standard error": f"{row['standard_error']:.3f}",
        }
        for row in rows
    ]
    return str(tabulate(lines, headers="keys", disable_numparse=True))


def compared(own: Sequence[float], before: Sequence[float]) -> dict[str, float]:
    """Average over answers, each a mean over its own tokens, and the change against another scoring of the same.

    Args:
        own: nats a token of each answer.
        before: of the same answers, in their order.

    Returns:
        ``nll``, ``change``, and the ``standard_error`` of the change.
    """
    found, other = torch.tensor(own), torch.tensor(before)
    change = found - other
    error = float(change.std()) / math.sqrt(len(change)) if len(change) > 1 else 0.0
    return {"nll": float(found.mean()), "change": float(change.mean()), "standard_error": error}
