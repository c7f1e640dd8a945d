"""How many drafted tokens a decoder accepts, and what drafting does to the speed of its answers."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm
from transformers.generation.streamers import BaseStreamer

from pyra.backbones import wrap
from pyra.backbones.joyai import JoyAIForCausalLM
from pyra.backbones.joyai_checkpoint import check_checkpoint, load_model
from pyra.backbones.joyai_drafting import DraftRecord
from pyra.config import PyraConfig
from pyra.errors import ConfigError
from pyra.tasks.language.data import examples_digest, load_text_task
from pyra.tasks.language.models import load_encoder, weights_record
from pyra.tasks.results import environment
from pyra.tasks.runs import resolve_device
from pyra.tasks.timing import spread_of


@dataclass(frozen=True)
class Answer:
    """An answer, the seconds from its first token to its last, and what became of the drafts."""

    ids: list[int]
    seconds: float
    record: DraftRecord


def study_mtp(options: Any) -> dict[str, Any]:
    """Answer prompts with drafts of several lengths, in turns; 0 drafts nothing.

    Args:
        options: of ``python -m pyra.scripts.study_mtp``.

    Returns:
        ``rows``, ``test``, ``weights`` and ``environment``.

    Raises:
        PyraError: for a backbone, task or data that cannot be had.
        ConfigError: where an answer with drafts is another one than without: nothing is worth timing then.
    """
    device = resolve_device(options.device)
    if not check_checkpoint(options.backbone).mtp:
        raise ConfigError(f"{options.backbone} holds no MTP weights: train them with python -m pyra.scripts.train_mtp")
    examples = load_text_task(options.task, options.root, options.data).split("test", options.limit)
    encoder = load_encoder(options.backbone)
    model = load_model(options.backbone, mtp=True).to(device).eval().requires_grad_(False)
    if options.rate:
        wrap(model, PyraConfig(rate=options.rate, reactivation=False))
    prompts = [torch.tensor([encoder.prompt(one.prompt)], device=device) for one in examples]
    counts = sorted({0, *options.draft_tokens})
    found: dict[int, list[list[Answer]]] = {count: [] for count in counts}
    turns = [(turn, count) for turn in range(1 + options.rounds) for count in counts]
    for turn, count in tqdm(turns, desc="drafts", unit="turn", leave=False, disable=None):
        answers = [_answer(model, ids, count, options) for ids in prompts]
        if count and [one.ids for one in answers] != [one.ids for one in found[0][-1]]:
            raise ConfigError(f"answers with {count} drafted tokens are others than without: nothing is timed")
        if turn or not count:  # the first turn warms up
            found[count].append(answers)
    found[0] = found[0][1:]
    mean = round(sum(ids.shape[1] for ids in prompts) / len(prompts))
    test = {"prompts": len(prompts), "prompt_tokens": mean, "sha256": examples_digest(examples)}
    weights = weights_record(options.backbone)
    where = environment(device.type)
    return {"rows": _rows(found), "test": test, "weights_sha256": weights, "environment": where}


class _Clock(BaseStreamer):
    """Notes when the prompt and each piece of the answer is there."""

    def __init__(self, device: torch.device, cpu: bool) -> None:
        self.device, self.stamps = device, list[float]()
        self.now = time.process_time if cpu else time.perf_counter

    def put(self, value: Tensor) -> None:
        """Note a piece."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.stamps.append(self.now())

    def end(self) -> None:
        """Note nothing."""


def _answer(model: JoyAIForCausalLM, ids: Tensor, count: int, options: Any) -> Answer:
    record, clock, most = DraftRecord(), _Clock(ids.device, options.clock == "cpu"), options.max_new_tokens
    drafts = {"use_mtp": True, "mtp_draft_tokens": count, "mtp_record": record} if count else {}
    asked = {"max_new_tokens": most, "min_new_tokens": most, "do_sample": False, "pad_token_id": 0, **drafts}
    whole = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=clock, **asked)
    return Answer(whole[0, ids.shape[1] :].tolist(), clock.stamps[-1] - clock.stamps[1], record)


def _rows(found: Mapping[int, Sequence[Sequence[Answer]]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for count, turns in found.items():
        record = DraftRecord(
            [drafted for one in turns[0] for drafted in one.record.drafted],
            [accepted for one in turns[0] for accepted in one.record.accepted],
        )
        later = sum(len(one.ids) - 1 for one in turns[0])  # the first token comes from the prompt
        speed = spread_of([later / sum(one.seconds for one in turn) for turn in turns])
        forwards = later - sum(record.accepted)
        rows.append(
            {
                "draft_tokens": count,
                "acceptance_length": record.acceptance_length,
                "acceptance_rate": record.acceptance_rate if count else None,
                "tokens_a_forward": later / forwards,
                "tokens": later,
                "decoder_forwards": forwards,
                "tokens_per_second": speed._asdict(),
                "milliseconds_a_forward": 1e3 * later / forwards / speed.p50,
            }
        )
    for row in rows:
        row["speedup"] = row["tokens_per_second"]["p50"] / rows[0]["tokens_per_second"]["p50"]
        row["cost_of_a_forward"] = row["milliseconds_a_forward"] / rows[0]["milliseconds_a_forward"]
    return rows


def mtp_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows as a table."""
    lines = [
        {
            "drafted": row["draft_tokens"],
            "tokens a forward": f"{row['tokens_a_forward']:.2f}",
            "accepted": "" if row["acceptance_rate"] is None else f"{100 * row['acceptance_rate']:.1f} %",
            "tokens/s": f"{row['tokens_per_second']['p50']:.1f}",
            "speed": f"{row['speedup']:.2f} x",
            "cost of a forward, with its draft": f"{row['cost_of_a_forward']:.2f} x",
        }
        for row in rows
    ]
    return str(tabulate(lines, headers="keys", disable_numparse=True))
