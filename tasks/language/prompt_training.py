"""Adapters trained on prompts that merge, on prompts that shorten otherwise and on whole ones, side by side."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tabulate import tabulate

from pyra.adapters import fold_adapter
from pyra.backbones import wrap
from pyra.backbones.hf_decoder_cache import key_value_bytes
from pyra.tasks.language.answering import answer
from pyra.tasks.language.data import examples_digest, load_text_task
from pyra.tasks.language.models import backbone_digest
from pyra.tasks.language.options import LanguageOptions
from pyra.tasks.language.prompt_study import compared
from pyra.tasks.language.runs import adapted, new_subject
from pyra.tasks.language.training import asking, fit, training_rows
from pyra.tasks.runs import resolve_device
from pyra.tasks.timing import spreads

Row = dict[str, Any]


def train_and_score(options: LanguageOptions, test: int, name: str) -> Row:
    """Train one adapter and answer the test split with it, as ``pyra train`` does, and keep no run folder.

    Args:
        options: of the run; ``limit`` is of the training examples.
        test: test examples (a fixed draw).
        name: of the row.

    Returns:
        ``nlls`` of the right answers (nats a token of each) and their mean, ``accuracy`` (the task's metric),
        ``macs_ratio``, ``train_seconds``, and what it was trained and tested on.

    Raises:
        PyraError: for anything wrong with the options, the data or the backbone.
    """
    device = resolve_device(options.device)
    task = load_text_task(options.task, options.root, options.data)
    subject = new_subject(options, task)
    weights = backbone_digest(subject.model)
    rows, trained_on = training_rows(subject, task.split("train", options.limit))
    examples = task.split("test", test)
    model = adapted(subject.model, options)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(model, replace(subject, model=model), rows, options, Path(folder), device)
    folded = replace(subject, model=fold_adapter(model).to(device).eval().requires_grad_(False))
    scored = answer(folded, task, examples, asking(options, f"{name}: test"))
    nlls = [one.nats / one.tokens for one in scored.nlls or [] if one is not None]
    return {
        "name": name,
        "seed": options.seed,
        "nll": mean(nlls),
        "accuracy": scored.value,
        "macs_ratio": scored.macs / scored.plain_macs,
        "trained_parameters": trained,
        "train_seconds": fitted.seconds,
        "last_losses": [entry["loss"] for entry in fitted.losses[-10:]],
        "nlls": nlls,
        "train_examples": len(trained_on),
        "train_sha256": examples_digest(trained_on),
        "test_sha256": examples_digest(examples),
        "weights_sha256": weights,
    }


def prefill_rows(runs: Mapping[str, LanguageOptions], test: int, rounds: int) -> dict[str, Row]:
    """Time reading a prompt of the task's mean length under each way, in turns, with weights as they are loaded.

    Returns:
        By name: ``prefill_ms`` (median) and ``cache_bytes``.
    """
    first = next(iter(runs.values()))
    device = resolve_device(first.device)
    task = load_text_task(first.task, first.root, first.data)
    subject = new_subject(first, task)
    prompts = [subject.encoder.answered(one.prompt, [one.answer])[0] for one in task.split("test", test)]
    length = round(mean(row.start for row in prompts))
    ids = torch.tensor([next(row.ids[:length] for row in prompts if len(row.ids) >= length)], device=device)
    jobs: dict[str, Callable[[], Any]] = {}
    for name, options in runs.items():
        config = options.pyra_config()
        model = new_subject(first, task).model
        model = model if config is None else wrap(model, config)
        jobs[name] = _reading(model.to(device).eval(), ids)
    times = spreads(jobs, rounds, device=device)
    sizes = {name: key_value_bytes(job().past_key_values) for name, job in jobs.items()}
    return {
        name: {"prompt_tokens": length, "prefill_ms": 1e3 * times[name].p50, "cache_bytes": sizes[name]}
        for name in runs
    }


def _reading(model: Any, ids: torch.Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.inference_mode():
            return model(ids, use_cache=True, logits_to_keep=1)

    return run


def training_table(rows: Sequence[Row], prefill: Mapping[str, Row]) -> str:
    """Return a line a way: means over seeds; changes are against the first way, in pairs of equal answers and seeds."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    first = next(iter(by_name))
    before = {row["seed"]: row["nlls"] for row in by_name[first]}
    lines = []
    for name, found in by_name.items():
        own = [nll for row in found for nll in row["nlls"]]
        change = compared(own, [nll for row in found for nll in before[row["seed"]]])
        speed = (
            {}
            if name not in prefill
            else {
                "prefill": f"{prefill[first]['prefill_ms'] / prefill[name]['prefill_ms']:.2f} x",
                "KV bytes": f"{prefill[name]['cache_bytes'] / prefill[first]['cache_bytes']:.2f}",
            }
        )
        lines.append(
            {
                "way": name,
                "seeds": len(found),
                "MACs": f"{found[0]['macs_ratio']:.3f}",
                "answer NLL": f"{change['nll']:.3f}",
                "change": f"{change['change']:+.3f}",
                "standard error": f"{change['standard_error']:.3f}",
                "accuracy": f"{100 * mean(row['accuracy'] for row in found):.1f}",
                **speed,
            }
        )
    return str(tabulate(lines, headers="keys", disable_numparse=True))


def pairs_table(rows: Sequence[Row]) -> str:
    """Return a line for every two ways: the change of the answers' NLL, in pairs of equal answers and seeds."""
    by_way: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        by_way.setdefault(row["name"], {})[row["seed"]] = row["nlls"]
    lines = []
    for way, other in itertools.combinations(by_way, 2):
        seeds = by_way[way].keys() & by_way[other].keys()
        own, theirs = ([nll for seed in sorted(seeds) for nll in by_way[name][seed]] for name in (other, way))
        if seeds:
            change = compared(own, theirs)
            told = {"change": f"{change['change']:+.3f}", "standard error": f"{change['standard_error']:.3f}"}
            lines.append({"way": other, "against": way, **told})
    return str(tabulate(lines, headers="keys", disable_numparse=True))
