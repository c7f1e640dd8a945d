"""What a grid holds, and the address of each run."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyra.errors import ConfigError
from pyra.tasks.sweeps.grid import SweepOptions


def names(**options: object) -> list[tuple[str, str | None, int]]:
    runs = SweepOptions(**options).runs()  # type: ignore[arg-type]
    return [(run.options.method, run.options.rate, run.options.seed) for run in runs]  # type: ignore[misc]


def test_every_method_at_every_rate_it_takes() -> None:
    assert names(method="lora,pyra", rate="0.3,0.5", seeds=2) == [
        *[("lora", None, 0), ("pyra", "0.3", 0), ("pyra", "0.5", 0)],
        *[("lora", None, 1), ("pyra", "0.3", 1), ("pyra", "0.5", 1)],
    ]


@pytest.mark.parametrize(
    ("rate", "expected"),
    [
        ("0:0.8:0.1", [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]),
        ("0.3:0.75:0.2", [0.3, 0.5, 0.7]),
        ("0.5, 0.1", [0.1, 0.5]),
        (0.5, [0.5]),
        ("0.1,0.3:0.5:0.1", [0.1, 0.3, 0.4, 0.5]),
    ],
)
def test_rates(rate: float | str, expected: list[float]) -> None:
    assert SweepOptions(method="pyra", rate=rate).axis() == expected


def test_rate_zero_is_what_lora_is() -> None:
    assert names(method="lora,tome,pyra", rate="0,0.5") == [("lora", None, 0), ("tome", "0.5", 0), ("pyra", "0.5", 0)]
    assert names(method="tome,pyra", rate="0,0.5")[0] == ("tome", "0", 0)
    assert ("pyra", "0", 0) in names(method="lora,pyra", rate="0,0.5", peft="dora")


def test_a_grid_of_other_options() -> None:
    runs = SweepOptions(method="lora", grid="rank=4:8,lr=1e-3:2e-3").runs()
    assert [(run.options.rank, run.options.lr) for run in runs] == [(4, 1e-3), (4, 2e-3), (8, 1e-3), (8, 2e-3)]


def test_one_elastic_training_serves_the_axis() -> None:
    runs = SweepOptions(method="lora,tome,pyra", rate="0.3:0.7:0.2", elastic=True, distill=True).runs()
    assert [(run.options.method, run.options.rate, run.rates) for run in runs] == [
        ("lora", None, ()),
        *[("tome", rate, ()) for rate in ("0.3", "0.5", "0.7")],
        ("pyra", "0.3:0.7", (0.3, 0.5, 0.7)),
    ]


def test_an_address_is_of_what_a_run_does(tmp_path: Path) -> None:
    def address(**options: object) -> str:
        return SweepOptions(method="pyra", **{"rate": "0.5", **options}).runs()[0].address  # type: ignore[arg-type]

    same = [address(output=str(tmp_path / "other"), save_steps=9, workers=3, executor="ray"), address(rate=0.50)]
    assert set(same) == {address()}
    others = [address(seed=1), address(lr=1e-4), address(limit=5), address(rate="0.6"), address(dtype="bfloat16")]
    assert len({*others, address()}) == 6
    run = SweepOptions(method="pyra", rate="0.5").runs()[0]
    assert run.name == f"pyra-0.5-seed0-{run.address}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": ""}, "names no method"),
        ({"method": "lora,lora"}, "holds lora twice"),
        ({"method": "lorra"}, "did you mean 'lora'"),
        ({"method": "pyra"}, "needs --rate"),
        ({"method": "lora", "rate": "0.5"}, "names neither"),
        ({"rate": "0.3,0.1:0.5:0.1"}, "holds 0.3 twice"),
        ({"rate": "0.5:0.1:0.1"}, "is empty"),
        ({"rate": "0.1:0.5:0"}, "is empty"),
        ({"rate": "0.1:0.5"}, "no first:last:step"),
        ({"rate": "half"}, "no first:last:step"),
        ({"rate": "nan"}, "no first:last:step"),
        ({"rate": "0.5,1.0"}, r"\[0, 1\), got 1"),
        ({"rate": "-0.1"}, r"\[0, 1\), got -0.1"),
        ({"rate": "0:0.9:0.0001"}, "take a larger step"),
        ({"rate": "0.5", "elastic": True}, "at least two rates"),
        ({"rate": "0.5", "grid": "rank=a"}, "--grid rank: 'a' is not a number"),
        ({"rate": "0.5", "grid": "rnk=4"}, "--grid 'rnk=4' is no option"),
        ({"rate": "0.5", "seeds": 0}, "--seeds must be a positive number"),
        ({"rate": "0.5", "budget": "soon"}, "--budget must be a duration"),
        ({"rate": "0.5", "budget": "0h"}, "--budget must be a duration"),
        ({"rate": "0.5", "address": "auto"}, "goes with --executor ray"),
        ({"rate": "0.5", "grid": "batch_size=0"}, "batch-size must be above 0"),
    ],
)
def test_wrong_grids(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SweepOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("0.5h", 1800)]
)
def test_budgets(text: str, seconds: float) -> None:
    assert SweepOptions(rate="0.5", budget=text).budget_seconds() == seconds
