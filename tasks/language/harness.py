"""lm-evaluation-harness on an adapted model, or a bare backbone, through the harness's own model interface."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tabulate import tabulate

from pyra.errors import ConfigError, DataError, did_you_mean
from pyra.files import write_json, write_text
from pyra.tasks.language.evaluation import Evaluation
from pyra.tasks.language.models import backbone_digest, count_macs, load_decoder, load_encoder, longest, read_config
from pyra.tasks.language.results import UNIT, ZERO_SHOT
from pyra.tasks.language.runs import Subject, load_language_run
from pyra.tasks.language.task_files import check_task_files, sandboxed
from pyra.tasks.output import staged_output
from pyra.tasks.results import RunResult, environment, read_result
from pyra.tasks.runs import DTYPES, resolve_device

OWN = "lm-eval.json"
_NO_METRIC = ("alias", "name", "sample_len", "sample_count")


@dataclass(frozen=True, kw_only=True)
class Harness:
    """What the harness is asked for.

    Attributes:
        tasks: names of tasks, groups or tags.
        folder: with task files of your own.
        trust: run the Python code that those files name.
        how: of the rest ``limit``, ``num_fewshot`` (None: as each task says), ``batch_size``, ``max_length``, ``chat``,
            ``device`` and ``dtype``.
    """

    tasks: Sequence[str]
    folder: str | None = None
    trust: bool = False
    num_fewshot: int | None = None
    how: Evaluation = dataclasses.field(default_factory=Evaluation)


@dataclass(frozen=True)
class Outcome:
    """What the harness found.

    Attributes:
        rows: one for each task and metric.
        errors: standard error of each row's value, None where the harness gives none.
        own: the harness's results as it gives them.
    """

    rows: list[RunResult]
    errors: list[float | None]
    own: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write a file for each row, as ``pyra evaluate`` does, and the harness's own results beside them."""
        names: set[str] = set()
        for row in self.rows:
            name = re.sub(r"[^\w.-]+", "-", f"evaluation-lm-eval-{row.task}-{row.metric}").strip("-")
            while name in names:  # of metrics that differ in signs alone
                name += "-"
            names.add(name)
            write_json(folder / f"{name}.json", row)
        write_text(folder / OWN, json.dumps(self.own, indent=2, default=str, ensure_ascii=False) + "\n")

    def table(self) -> str:
        """Return the rows as a table."""
        lines = [
            {
                "task": row.task,
                "metric": row.metric,
                "value": f"{row.value:.4f}",
                "standard error": "-" if error is None else f"{error:.4f}",
                "few-shot": "-" if row.settings is None else row.settings["num_fewshot"],
                "examples": row.num_test,
            }
            for row, error in zip(self.rows, self.errors, strict=True)
        ]
        return str(tabulate(lines, headers="keys", disable_numparse=True))


def harness_on_run(folder: str | Path, asked: Harness) -> Outcome:
    """Ask the harness about a run as it is deployed, adapter folded; writes the rows and :data:`OWN` into it.

    Raises:
        ConfigError: where lm-eval is not installed, for tasks that it does not have, task files that run code, or a run
            whose model answers by a head.
        DataError, CheckpointError: where the run, or the data of a task, cannot be had.
    """
    _refuse_missing()
    folder = Path(folder)
    device = resolve_device(asked.how.device)
    subject, options, _ = load_language_run(folder)
    if subject.answer == "head":
        raise ConfigError(f"--lm-eval asks by prompt: {folder} answers by a head; train with --answer scoring")
    changed = asked.how.changed(options)
    max_length = longest(options.backbone, subject.model.config, subject.encoder.tokenizer, asked.how.max_length)
    subject = Subject(subject.model.to(device), subject.encoder, max_length, subject.answer)
    before = read_result(folder)
    names = ("method", "backbone", "seed", "trained_parameters", "weights_sha256", "train_sha256", "adapter", "epochs")
    about = {**{name: getattr(before, name) for name in (*names, "batch_size")}, "settings": before.settings or {}}
    outcome = _ask(subject, asked, about, changed.batch_size, changed.dtype, changed.chat)
    outcome.write(folder)
    return outcome


def harness_on_backbone(
    backbone: str, asked: Harness, *, output: str | None = None, overwrite: bool = False
) -> Outcome:
    """Ask the harness about a backbone that nothing was trained for.

    Args:
        backbone: folder or hub name of a decoder.
        asked: what is asked for.
        output: folder that the results are written to; None writes nothing.
        overwrite: replace an earlier one there.

    Raises:
        PyraError: for anything wrong with what is asked for, the backbone or the output folder.
    """
    _refuse_missing()
    device = resolve_device(asked.how.device)
    config = read_config(backbone)
    encoder = load_encoder(backbone, chat=bool(asked.how.chat))
    max_length = longest(backbone, config, encoder.tokenizer, asked.how.max_length)
    model = load_decoder(backbone)
    about = {
        "method": ZERO_SHOT,
        "backbone": backbone,
        "seed": 0,
        "trained_parameters": 0,
        "weights_sha256": backbone_digest(model),
        "settings": {},
    }
    subject = Subject(model.to(device), encoder, max_length, "generation")
    how = (asked.how.batch_size or 16, asked.how.dtype or "float32", bool(asked.how.chat))
    if output is None:
        return _ask(subject, asked, about, *how)
    with staged_output(output, "run", overwrite) as folder:
        outcome = _ask(subject, asked, about, *how)
        outcome.write(folder)
    return outcome


def _refuse_missing() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("--lm-eval needs lm-evaluation-harness: pip install 'pyra-adapt[lm-eval]'")


def _ask(
    subject: Subject, asked: Harness, about: Mapping[str, Any], batch_size: int, dtype: str, chat: bool
) -> Outcome:
    if asked.num_fewshot is not None and asked.num_fewshot < 0:
        raise ConfigError(f"--num-fewshot must be at least 0, got {asked.num_fewshot}")
    with _quiet():
        import lm_eval
        import lm_eval.utils
        from lm_eval.models.huggingface import HFLM

        folder = None if asked.folder is None else Path(asked.folder).expanduser().resolve()
        manager = _manager(asked, folder)
        model = HFLM(
            pretrained=subject.model,
            tokenizer=subject.encoder.tokenizer,
            batch_size=batch_size,
            max_length=subject.max_length,
            mixed_precision_dtype=None if dtype == "float32" else DTYPES[dtype],
        )
        trusted = contextlib.nullcontext() if asked.trust else sandboxed(lm_eval.utils)
        # Files that a task names lie beside it, wherever the command is given.
        here = contextlib.nullcontext() if folder is None else contextlib.chdir(folder)
        with trusted, here:
            own = _evaluate(lm_eval, model, manager, asked, chat)
    how = {"limit": asked.how.limit, "chat": chat, "dtype": dtype, "max_length": subject.max_length}
    return _outcome(own, subject, {**about, "settings": {**about["settings"], **how}})


def _manager(asked: Harness, folder: Path | None) -> Any:
    """Return the harness's tasks; those it ships are read only where they are needed: there are thousands."""
    from lm_eval.api import metrics as _metrics  # noqa: F401 - fills the registry
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks import TaskManager

    names = [name.strip() for name in asked.tasks if name.strip()]
    if not names:
        raise ConfigError("--lm-eval is empty: give names of tasks, such as gsm8k,hellaswag")
    paths = [name for name in names if "/" in name or name.endswith((".yaml", ".yml"))]
    if paths:
        raise ConfigError(f"--lm-eval {paths[0]}: give the name of a task, and its folder with --lm-eval-tasks")
    if folder is not None and not asked.trust:
        check_task_files(folder, list(metric_registry.keys()))
    manager = None if folder is None else TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not set(names) <= set(manager.all_subtasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [f"{name!r}{did_you_mean(name, manager.all_tasks)}" for name in names if name not in manager.all_tasks]
    if unknown:
        where = "" if folder is None else f", nor {folder}"
        raise ConfigError(f"lm-eval has no task {', '.join(unknown)}{where}; `lm-eval ls tasks` lists its own")
    return manager


def _evaluate(lm_eval: Any, model: Any, manager: Any, asked: Harness, chat: bool) -> dict[str, Any]:
    try:
        own = lm_eval.simple_evaluate(
            model=model,
            tasks=[name.strip() for name in asked.tasks if name.strip()],
            num_fewshot=asked.num_fewshot,
            limit=asked.how.limit,
            apply_chat_template=chat,
            task_manager=manager,
            log_samples=True,
        )
    except Exception as error:  # data that cannot be had, or a task file that says too little: whatever comes up
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"lm-eval cannot run {', '.join(asked.tasks)}: {reason} (its own tasks take their data from the hub; "
            "--lm-eval-tasks FOLDER reads task files with local data)"
        ) from error
    found: dict[str, Any] = own
    return found


def _outcome(own: dict[str, Any], subject: Subject, about: Mapping[str, Any]) -> Outcome:
    version = str(importlib.metadata.version("lm_eval"))
    device = next(subject.model.parameters()).device
    layers = int(getattr(getattr(subject.model, "config", None), "num_hidden_layers", 0))
    where = {**environment(str(device)), "lm_eval": version}
    samples = own.pop("samples", {})
    rows, errors = [], []
    for task, values in {**own["results"], **own.get("groups", {})}.items():
        digest, tokens = _examples(task, samples, own.get("group_subtasks", {}), subject)
        macs = count_macs(subject.model, tokens)
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            if key in _NO_METRIC or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            counts = own.get("n-samples", {}).get(task, {})
            said = own.get("configs", {}).get(task, {})
            higher = own.get("higher_is_better", {}).get(task, {}).get(metric)
            asked = {"num_fewshot": own.get("n-shot", {}).get(task), "answer": said.get("output_type")}
            rows.append(
                RunResult(
                    task=task,
                    metric=metric if kind in ("", "none") else f"{metric} ({kind})",
                    value=float(value),
                    macs=macs,
                    plain_macs=macs,
                    schedule=[0] * layers,
                    rate=0.0,
                    num_test=counts.get("effective"),
                    test_sha256=digest,
                    higher_is_better=higher is not False,
                    split=said.get("test_split") or said.get("validation_split") or "test",
                    task_version=_text(own.get("versions", {}).get(task)),
                    preprocessing=f"lm-eval {version}",
                    data_source=_text(said.get("dataset_path")),
                    unit=UNIT,
                    protocol="fixed",
                    selection="none",
                    environment=where,
                    **{**about, "settings": {**about["settings"], **asked}},
                )
            )
            error = values.get(f"{metric}_stderr,{kind}")
            errors.append(float(error) if isinstance(error, (int, float)) else None)
    return Outcome(rows, errors, own)


def _examples(
    task: str, samples: Mapping[str, list[dict[str, Any]]], groups: Mapping[str, list[str]], subject: Subject
) -> tuple[str | None, int]:
    """Return the hash of a task's (or a group's) examples, and how many tokens a forward reads on average."""
    names = [task]
    docs: dict[tuple[str, int], dict[str, Any]] = {}
    for name in names:  # grows where it is a group
        names += [part for part in groups.get(name, []) if part not in names]
        docs |= {(name, sample["doc_id"]): sample for sample in samples.get(name, [])}
    if not docs:
        return None, 1
    digest = hashlib.sha256()
    for _, sample in sorted(docs.items()):
        digest.update(f"{sample['doc_hash']}{sample['target_hash']}".encode())
    texts = [
        "".join(part for part in asked if isinstance(part, str)) for s in docs.values() for asked in s["arguments"]
    ]
    lengths = [min(len(ids), subject.max_length) for ids in subject.encoder.tokenizer(texts)["input_ids"]]
    return digest.hexdigest(), max(1, round(sum(lengths) / len(lengths)))


def _text(value: object) -> str | None:
    return None if value is None else str(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's advice, and git's, off the screen; errors are raised."""
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level, commit = logger.level, evaluator.get_git_commit_hash
    logger.setLevel(logging.ERROR)
    evaluator.get_git_commit_hash = lambda: None  # git complains where there is no checkout; rows name pyra's commit
    try:
        yield
    finally:
        logger.setLevel(level)
        evaluator.get_git_commit_hash = commit
