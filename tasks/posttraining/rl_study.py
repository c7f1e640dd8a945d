"""A tiny decoder that has learned arithmetic badly, and algorithms that teach it more from equal rollouts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from pyra.errors import TrainingError
from pyra.tasks.language.pretraining import train_tokenizer
from pyra.tasks.language.tokens import IGNORED, Encoder, mask, pad
from pyra.tasks.posttraining.arithmetic import Problem, arithmetic_problems
from pyra.tasks.posttraining.rl import train_rl
from pyra.tasks.posttraining.rl_options import RlOptions
from pyra.tasks.posttraining.rl_trainer import Entry
from pyra.tasks.posttraining.templates import plain_template
from pyra.tasks.reports.curves import Panel

Row = dict[str, Any]

_BYTES_AND_MARKS = 259  # a vocabulary without a merge: every digit is a token
_WIDTH, _LAYERS, _HEADS, _POSITIONS = 96, 2, 4, 64
_BATCH, _LR, _RISING = 64, 3e-3, 50
_OF_ROLLOUTS = ("reward", "length")
_REGIMES = ("trajectories_passing", "trajectories_rolling_back", "trajectories_zeroed")
_OF_UPDATES = ("entropy", "clipped", *_REGIMES, "farthest_ratio")


def make_pupil(folder: Path, options: RlOptions, steps: int, seed: int = 0) -> list[float]:
    """Train a tiny Llama from nothing on the training problems with their answers, and write it with its tokenizer.

    Args:
        folder: to write to.
        options: whose problems are learned.
        steps: of AdamW, 64 problems each: few, so that much is left to learn.
        seed: of weights and order.

    Returns:
        The loss of each step.

    Raises:
        TrainingError: where the loss is no number.
    """
    problems, _ = arithmetic_problems(options.arithmetic(), options.problems, options.test_problems)
    tokenizer = train_tokenizer([problem.prompt for problem in problems], _BYTES_AND_MARKS)
    tokenizer.chat_template = plain_template(tokenizer)
    rows = [_learnt(problem, Encoder(tokenizer, chat=True)) for problem in problems]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=_BYTES_AND_MARKS,
                hidden_size=_WIDTH,
                intermediate_size=2 * _WIDTH,
                num_hidden_layers=_LAYERS,
                num_attention_heads=_HEADS,
                num_key_value_heads=_HEADS,
                max_position_embeddings=_POSITIONS,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=2,
                rope_theta=1000.0,
            )
        )
    losses = _supervise(model, rows, steps, seed)
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return losses


def _learnt(problem: Problem, encoder: Encoder) -> tuple[list[int], int]:
    """Return the ids of a problem with its answer, and where that begins."""
    turns = [{"role": "user", "content": problem.prompt}, {"role": "assistant", "content": problem.answer}]
    asked, whole = encoder.chat_text(turns[:1], asks=True), encoder.chat_text(turns)
    ids = [encoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (whole, asked)]
    return ids[0], len(ids[1])


def _supervise(model: nn.Module, rows: Sequence[tuple[list[int], int]], steps: int, seed: int) -> list[float]:
    ids = pad([row for row, _ in rows], 2)
    attended = mask([row for row, _ in rows])
    labels: Tensor = pad([[IGNORED] * start + row[start:] for row, start in rows], IGNORED)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / _RISING, 1.0))
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    for _ in range(steps):
        drawn = torch.randint(len(rows), (_BATCH,), generator=generator)
        loss = model(input_ids=ids[drawn], attention_mask=attended[drawn], labels=labels[drawn]).loss
        if not loss.isfinite():
            raise TrainingError(f"the loss is {float(loss)} after {len(losses)} steps")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def teach(options: RlOptions, name: str, rollouts: int) -> Row:
    """Train the pupil one way, and keep no run folder.

    Args:
        options: of the run.
        name: of the row.
        rollouts: there are ``options.updates`` steps on each.

    Returns:
        ``accuracy`` and ``accuracy_before`` on the held-out problems, ``rollouts`` (a value each), and ``seconds``.
    """
    with tempfile.TemporaryDirectory() as folder:
        run = replace(options, steps=rollouts * options.updates, output=str(Path(folder) / "run"))
        result, _, curves = train_rl(run)
    return {
        "name": name,
        "seed": options.seed,
        "accuracy_before": result.value_before,
        "accuracy": result.value,
        "updates": options.updates,
        "rollouts": by_rollout(curves, options.updates),
        "train_seconds": result.train_seconds,
        "weights_sha256": result.weights_sha256,
        "test_sha256": result.test_sha256,
    }


def by_rollout(curves: Sequence[Entry], updates: int) -> dict[str, list[float]]:
    """Return a value a rollout: what it earned, and the mean over its updates (of ratios, the largest)."""
    parts = [curves[start : start + updates] for start in range(0, len(curves), updates)]
    found = {name: [part[0][name] for part in parts] for name in _OF_ROLLOUTS}
    for name in _OF_UPDATES:
        if all(name in one for part in parts for one in part):
            combine = max if name.startswith("farthest") else mean
            found[name] = [combine([one[name] for one in part]) for part in parts]
    return {name: [round(value, 5) for value in values] for name, values in found.items()}


def study_panels(rows: Sequence[Row]) -> list[Panel]:
    """Return what is drawn: each quantity over rollouts, a line a way."""
    titles = {
        "reward": "right answers of a rollout",
        "entropy": "entropy, nats a token",
        "clipped": "clipped (tokens; gspo: answers)",
        "length": "tokens of an answer",
        "farthest_ratio": "largest ratio, or its inverse",
        "trajectories_zeroed": "answers beyond their budget",
    }
    panels = []
    for name, title in titles.items():
        lines: dict[str, list[list[tuple[float, float]]]] = {}
        for row in rows:
            if name in row["rollouts"]:
                values = _smooth(row["rollouts"][name]) if name == "reward" else row["rollouts"][name]
                lines.setdefault(row["name"], []).append(list(enumerate(values, 1)))
        if lines:
            panels.append(Panel(title, "rollout", lines))
    return panels


def _smooth(values: Sequence[float], width: int = 5) -> list[float]:
    return [mean(values[max(place - width + 1, 0) : place + 1]) for place in range(len(values))]


def study_table(rows: Sequence[Row]) -> str:
    """Return a line a way: means over seeds, with the standard deviation of the accuracy."""
    by_name: dict[str, list[Row]] = {}
    for row in rows:
        by_name.setdefault(row["name"], []).append(row)
    return str(tabulate([_line(name, found) for name, found in by_name.items()], headers="keys", disable_numparse=True))


def _line(name: str, rows: Sequence[Row]) -> Mapping[str, str]:
    after = [100 * row["accuracy"] for row in rows]
    spread = f" ({stdev(after):.1f})" if len(after) > 1 else ""

    def over(key: str) -> list[float]:
        return [value for row in rows for value in row["rollouts"].get(key, [])]

    def share(key: str) -> str:
        return f"{100 * mean(over(key)):.1f}" if over(key) else "-"

    return {
        "way": name,
        "seeds": str(len(rows)),
        "accuracy before": f"{100 * mean(row['accuracy_before'] for row in rows):.1f}",
        "after (sd)": f"{mean(after):.1f}{spread}",
        "last 10 rollouts": f"{100 * mean(value for row in rows for value in row['rollouts']['reward'][-10:]):.1f}",
        "entropy at the end": f"{mean(row['rollouts']['entropy'][-1] for row in rows):.3f}",
        "clipped %": share("clipped"),
        "rolling back %": share("trajectories_rolling_back"),
        "beyond budget %": share("trajectories_zeroed"),
    }
