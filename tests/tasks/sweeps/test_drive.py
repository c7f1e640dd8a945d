"""A sweep does what is left, whatever ended it before."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pyra.errors import ConfigError, DataError, OutputError
from pyra.files import read_json, write_json
from pyra.tasks.output import held
from pyra.tasks.results import RESULT_FILE, RunResult, read_result
from pyra.tasks.runs import DATA, data_record, task_for
from pyra.tasks.sweeps import drive
from pyra.tasks.sweeps.drive import Progress, sweep
from pyra.tasks.sweeps.failures import FAILURES, read_failures
from pyra.tasks.sweeps.failures import HALVED as HALVED_KIND
from pyra.tasks.sweeps.folder import RUNS
from pyra.tasks.sweeps.grid import SweepOptions
from pyra.tasks.sweeps.local import LocalExecutor, killed
from pyra.tasks.sweeps.work import HALVED, Outcome, Work, perform

TINY: dict[str, Any] = {"limit": 8, "epochs": 1.0, "batch_size": 4, "image_size": 32, "device": "cpu"}


class Pretended:
    """An executor that writes a result, or ends a run as it is told."""

    def __init__(self, ends: dict[str, list[Outcome]] | None = None, slots: int = 2) -> None:
        self.slots, self.ends, self.begun = slots, ends or {}, list[Work]()
        self.stopped, self._running = False, list[Work]()

    def submit(self, work: Work) -> None:
        self.begun.append(work)
        self._running.append(work)
        assert len(self._running) <= self.slots

    def wait(self, seconds: float) -> list[tuple[Work, Outcome]]:
        work = self._running.pop(0)
        for start, outcomes in self.ends.items():
            if work.name.startswith(start) and outcomes:
                return [(work, outcomes.pop(0))]
        folder = Path(work.options["output"])
        folder.mkdir(parents=True, exist_ok=True)
        result = RunResult(task="demo", method=work.options["method"], metric="accuracy", value=0.5, macs=1,
                           schedule=[0], rate=0.0, trained_parameters=1, seed=work.options["seed"])  # fmt: skip
        write_json(folder / RESULT_FILE, result)
        return [(work, Outcome(result))]

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Any:
    def use(executor: Pretended) -> Pretended:
        monkeypatch.setattr(drive, "executor_for", lambda *_: executor)
        return executor

    return use


def stored_failure(folder: Path) -> dict[str, Any]:
    (file,) = (folder / FAILURES).iterdir()
    found: dict[str, Any] = read_json(file)
    return found


def options(folder: Path, **more: Any) -> SweepOptions:
    return SweepOptions(**{"method": "lora,pyra", "rate": "0.3,0.5", "output": str(folder / "sweep"), **more})


def test_only_what_is_left_is_done(tmp_path: Path, pretend: Any) -> None:
    first = pretend(Pretended())
    progress = sweep(options(tmp_path))
    assert (progress.total, progress.kept, len(progress.finished), progress.left) == (3, [], 3, 0) and first.stopped
    again = pretend(Pretended())
    assert len(sweep(options(tmp_path)).kept) == 3 and not again.begun
    more = pretend(Pretended())
    progress = sweep(options(tmp_path, rate="0.3,0.5,0.7", seeds=2))
    assert len(progress.kept) == 3 and [work.name.rsplit("-", 1)[0] for work in more.begun] == [
        *["pyra-0.7-seed0", "lora-seed1", "pyra-0.3-seed1", "pyra-0.5-seed1", "pyra-0.7-seed1"]
    ]


def test_a_run_that_fails_is_written_down_and_tried_again_when_asked(tmp_path: Path, pretend: Any) -> None:
    wrong = Outcome(kind="error", error="no such weights")
    pretend(Pretended({"pyra-0.3": [wrong]}))
    progress = sweep(options(tmp_path))
    assert len(progress.finished) == 2 and list(progress.failed.values()) == ["no such weights"]
    record = stored_failure(tmp_path / "sweep")
    assert record["error"] == "no such weights" and record["options"]["rate"] == "0.3" and record["kind"] == "error"
    assert [one.error for one in read_failures(tmp_path / "sweep")] == ["no such weights"]
    left_alone = pretend(Pretended())
    assert len(sweep(options(tmp_path)).failed) == 1 and not left_alone.begun
    tried = pretend(Pretended())
    progress = sweep(options(tmp_path, retry=True))
    assert not progress.failed and len(tried.begun) == 1 and not read_failures(tmp_path / "sweep")


def test_a_damaged_note_of_a_failure_is_still_one(tmp_path: Path, pretend: Any) -> None:
    pretend(Pretended({"lora": [Outcome(kind="fault", error="?")]}))
    sweep(options(tmp_path))
    (file,) = (tmp_path / "sweep" / FAILURES).iterdir()
    file.write_text("{")
    left_alone = pretend(Pretended())
    assert len(sweep(options(tmp_path)).failed) == 1 and not left_alone.begun


def test_a_run_out_of_memory_is_tried_once_with_half_the_batch(tmp_path: Path, pretend: Any) -> None:
    short = Outcome(kind="memory", error="killed")
    executor = pretend(Pretended({"lora": [short]}))
    assert len(sweep(options(tmp_path)).finished) == 3
    batches = [(work.options["batch_size"], work.halved) for work in executor.begun if work.name.startswith("lora")]
    assert batches == [(32, False), (16, True)]
    other = tmp_path / "other"
    executor = pretend(Pretended({"lora": [short, short]}))
    progress = sweep(options(other))
    assert list(progress.failed.values()) == ["killed"] and len(executor.begun) == 4
    assert stored_failure(other / "sweep")["kind"] == "memory"


def test_a_run_with_half_the_batch_goes_on_with_it(tmp_path: Path, pretend: Any) -> None:
    """Killed in between, the sweep does not begin it with the whole batch again, nor stumbles over what that left."""

    class Killed(Exception):
        pass

    class Ended(Pretended):
        def wait(self, seconds: float) -> list[tuple[Work, Outcome]]:
            folder = Path(self.begun[0].options["output"])
            if len(self.begun) > 1:
                assert self.begun[1].halved and not list(folder.iterdir())
                raise Killed
            checkpoint = folder / ".partial-a" / "checkpoints" / "checkpoint-1"
            checkpoint.mkdir(parents=True)
            write_json(folder / ".partial-a" / ".pyra-run", {"kind": "run"})
            write_json(checkpoint / "complete.json", {})
            return super().wait(seconds)

    pretend(Ended({"lora": [Outcome(kind="memory", error="killed")]}, slots=1))
    with pytest.raises(Killed):
        sweep(options(tmp_path, method="lora", rate=None))
    assert stored_failure(tmp_path / "sweep")["kind"] == HALVED_KIND
    executor = pretend(Pretended())
    progress = sweep(options(tmp_path, method="lora", rate=None))
    assert [(work.options["batch_size"], work.halved) for work in executor.begun] == [(16, True)]
    assert not progress.failed and not read_failures(tmp_path / "sweep")


def test_half_of_a_batch_is_still_a_batch() -> None:
    assert Work("a", {"batch_size": 1, "accumulate": 1}).with_half_the_batch() is None
    assert Work("a", {"batch_size": 6, "accumulate": 2}).with_half_the_batch() is None
    half = Work("a", {"batch_size": 8, "accumulate": 2}).with_half_the_batch()
    assert half is not None and half.options["batch_size"] == 4 and half.with_half_the_batch() is None


def test_the_budget_ends_it_and_the_same_line_goes_on(tmp_path: Path, pretend: Any) -> None:
    executor = pretend(Pretended(slots=1))
    clock = [0.0]

    def tell(progress: Progress) -> None:
        clock[0] = progress.took
        if progress.finished:
            time.sleep(0.3)

    progress = sweep(options(tmp_path, budget="0.2s"), tell)
    assert progress.cut and executor.stopped and 0 < len(progress.finished) < 3
    pretend(Pretended())
    assert sweep(options(tmp_path)).left == 0


def test_one_sweep_at_a_time_in_a_folder(tmp_path: Path, pretend: Any) -> None:
    inner: list[str] = []

    def tell(_: Progress) -> None:
        try:
            sweep(options(tmp_path))
        except OutputError as error:
            inner.append(str(error))

    pretend(Pretended())
    sweep(options(tmp_path), tell)
    assert inner and "another process is at work in" in inner[0]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, pretend: Any) -> None:
    pretend(Pretended())
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.txt").touch()
    with pytest.raises(OutputError, match="not from pyra"):
        sweep(options(tmp_path))
    with pytest.raises(DataError, match="does not exist"):
        sweep(options(tmp_path / "x", task=None, data=str(tmp_path / "absent")))


def test_overwrite_starts_again(tmp_path: Path, pretend: Any) -> None:
    pretend(Pretended())
    sweep(options(tmp_path))
    executor = pretend(Pretended())
    assert sweep(options(tmp_path, overwrite=True)).kept == [] and len(executor.begun) == 3


def test_overwrite_leaves_a_sweep_that_is_under_way_as_it_is(tmp_path: Path, pretend: Any) -> None:
    pretend(Pretended())
    sweep(options(tmp_path))
    before = sorted(file for file in (tmp_path / "sweep").rglob("*") if file.is_file())
    with held(tmp_path / "sweep"), pytest.raises(OutputError, match="another process is at work in"):
        sweep(options(tmp_path, overwrite=True))
    assert len(before) > 3 and all(file.is_file() for file in before)


def test_a_run_that_failed_with_half_its_batch_is_tried_again_with_all_of_it(tmp_path: Path, pretend: Any) -> None:
    """What it trained with half the batch is no beginning of a run with all of it."""
    short = Outcome(kind="memory", error="killed")

    class Interrupted(Pretended):
        def wait(self, seconds: float) -> list[tuple[Work, Outcome]]:
            staging = Path(self.begun[-1].options["output"]) / ".partial-a"
            (staging / "checkpoints" / "checkpoint-1").mkdir(parents=True)
            write_json(staging / ".pyra-run", {"kind": "run"})
            write_json(staging / "checkpoints" / "checkpoint-1" / "complete.json", {})
            return super().wait(seconds)

    pretend(Interrupted({"lora": [short, short]}, slots=1))
    assert len(sweep(options(tmp_path, method="lora", rate=None)).failed) == 1
    (run,) = (tmp_path / "sweep" / RUNS).iterdir()
    assert not list(run.glob(".partial-*"))
    executor = pretend(Pretended())
    progress = sweep(options(tmp_path, method="lora", rate=None, retry=True))
    assert [(work.options["batch_size"], work.halved) for work in executor.begun] == [(32, False)]
    assert len(progress.finished) == 1 and not progress.failed


def test_runs_of_other_data_are_not_mixed_with_new_ones(tmp_path: Path, pretend: Any) -> None:
    pretend(Pretended())
    sweep(options(tmp_path))
    run = sorted((tmp_path / "sweep" / RUNS).iterdir())[0]
    record = data_record(task_for(options(tmp_path)))
    write_json(run / DATA, record)
    assert len(sweep(options(tmp_path)).kept) == 3
    write_json(run / DATA, {**record, "changed": True})
    with pytest.raises(DataError, match="was made from other data of demo than there is now"):
        sweep(options(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"task": 3}', '{"value": "much"}'])
def test_a_damaged_result_is_made_again(content: str, tmp_path: Path, pretend: Any) -> None:
    pretend(Pretended())
    sweep(options(tmp_path))
    run = sorted((tmp_path / "sweep" / RUNS).iterdir())[0]
    (run / RESULT_FILE).write_text(content)
    executor = pretend(Pretended())
    progress = sweep(options(tmp_path))
    assert len(progress.kept) == 2 and [work.name for work in executor.begun] == [run.name]


def test_how_a_process_ended() -> None:
    assert killed(-signal.SIGKILL).kind == "memory" and killed(-signal.SIGSEGV).error.endswith("SIGSEGV")
    assert killed(3).error == "its process ended with status 3"


def test_what_goes_wrong_in_a_run_is_an_outcome(tmp_path: Path) -> None:
    work = Work("a", {"method": "linear", "data": str(tmp_path / "absent"), "task": None})
    assert perform(work).kind == "error"
    outcome = perform(Work("a", {"method": "lora", "lr": 1e8, **TINY, "output": str(tmp_path / "run"), "epochs": 3.0}))
    assert outcome.kind in ("diverged", "finished")


def test_runs_take_place_in_workers(tmp_path: Path) -> None:
    """A worker that is killed as memory runs out is replaced, and the row of its run says so."""
    given = options(tmp_path, method="lora,pyra", rate="0.5", **TINY)
    killed_one = []

    def tell(progress: Progress) -> None:
        if progress.running and not killed_one:
            children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
            for child in children:
                command = Path(f"/proc/{child}/cmdline").read_bytes()
                if b"spawn_main" in command:
                    os.kill(int(child), signal.SIGKILL)
                    killed_one.append(child)

    progress = sweep(given, tell)
    assert killed_one and not progress.failed and len(progress.finished) == 2
    rows = [read_result(folder) for folder in sorted((tmp_path / "sweep" / RUNS).iterdir())]
    assert [(row.method, row.batch_size, row.note) for row in rows] == [("lora", 2, HALVED), ("pyra", 4, None)]
    assert (tmp_path / "sweep" / "jobs" / "worker-0.log").is_file()


@pytest.mark.slow  # sweeps in processes of their own, which load torch
def test_a_sweep_that_is_killed_goes_on(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "pyra.scripts.main", "sweep", "--task", "demo", "--method", "lora,pyra", "--rate"]
    line += ["0.3,0.5", "--limit", "8", "--epochs", "1", "--batch-size", "4", "--image-size", "32", "--device", "cpu"]
    line += ["--output", str(tmp_path / "sweep")]
    first = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert first.stderr is not None
    while not (said := first.stderr.readline()).startswith("[1/3]"):
        assert said, "ended before its first run did"
    first.kill()
    first.wait()
    done = list((tmp_path / "sweep" / RUNS).glob(f"*/{RESULT_FILE}"))
    before = {file: file.read_bytes() for file in done}
    second = subprocess.run(line, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert "of them finished before" in second.stderr and "pyra recommend" in second.stdout
    assert len(list((tmp_path / "sweep" / RUNS).glob(f"*/{RESULT_FILE}"))) == 3
    assert all(file.read_bytes() == content for file, content in before.items())
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["rate"] == "0.3,0.5"


@pytest.mark.slow  # sweeps in processes of their own, which load torch
def test_a_sweep_that_is_interrupted_says_how_it_goes_on(tmp_path: Path) -> None:
    line = [sys.executable, "-m", "pyra.scripts.main", "sweep", "--task", "demo", "--method", "lora", "--epochs", "50"]
    line += ["--image-size", "32", "--device", "cpu", "--output", str(tmp_path / "sweep")]
    started = subprocess.Popen(
        line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        # What a shell starts in the background ignores Ctrl-C, and so does all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not list((tmp_path / "sweep" / RUNS).glob("*/.partial-*")):
        assert started.poll() is None, "ended before its run began"
        time.sleep(0.2)
    os.killpg(started.pid, signal.SIGINT)
    out, said = started.communicate(timeout=60)
    assert started.returncode == 130 and not out
    assert said.splitlines() == [
        "1 run", f"what is finished in {tmp_path / 'sweep'} is kept; the same line goes on", "pyra: interrupted"
    ]  # fmt: skip


def test_unreachable_clusters() -> None:
    pytest.importorskip("ray", reason="the extra `sweeps` is not installed")
    from pyra.tasks.sweeps.cluster import RayExecutor, SlurmExecutor

    with pytest.raises(ConfigError, match="no Ray cluster can be reached there"):
        RayExecutor(1, "127.0.0.1:1", 1.0, 0.0)
    with pytest.raises(ConfigError, match="no sbatch here"):
        SlurmExecutor(1, Path("jobs"), 1.0, 0.0)


def test_local_workers_end_with_their_executor(tmp_path: Path) -> None:
    executor = LocalExecutor(1, ["cpu"], 1, tmp_path / "jobs")
    assert executor.wait(0.01) == []
    work = Work("a", {"method": "linear", "task": "none-such", "output": str(tmp_path / "a")})
    executor.submit(work)
    ended: list[tuple[Work, Outcome]] = []
    while not ended:
        ended = executor.wait(1.0)
    assert ended[0][1].kind == "error" and "none-such" in ended[0][1].error
    worker = executor._workers[0].process
    executor.stop()
    assert worker.exitcode == 0


def test_options_are_kept_with_the_sweep(tmp_path: Path, pretend: Any) -> None:
    pretend(Pretended())
    sweep(options(tmp_path))
    assert read_json(tmp_path / "sweep" / "sweep.json")["method"] == "lora,pyra"
