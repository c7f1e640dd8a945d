"""Paired differences, and the outcomes they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pyra.errors import DataError
from pyra.tasks.comparison import Right, paired_difference
from pyra.tasks.options import RunOptions
from pyra.tasks.outcomes import outcomes


def drawn(share: float, random: np.random.Generator) -> Right:
    return (random.random(400) < share).astype(np.float32)


def test_a_difference_and_its_interval() -> None:
    random = np.random.default_rng(1)
    theirs = [drawn(0.5, random) for _ in range(3)]
    ours = [np.maximum(one, drawn(0.2, random)) for one in theirs]
    found = paired_difference(ours, theirs)
    assert found.difference == pytest.approx(np.mean(ours) - np.mean(theirs))
    assert 0 < found.low < found.difference < found.high < 0.2
    assert found.spread_of_ours == pytest.approx(np.std([one.mean() for one in ours], ddof=1))
    same = paired_difference(theirs, theirs)
    assert same.difference == same.low == same.high == 0


def test_pairs_make_the_interval_narrower_than_two_intervals() -> None:
    random = np.random.default_rng(2)
    theirs = [drawn(0.5, random) for _ in range(3)]
    ours = [np.maximum(one, drawn(0.02, random)) for one in theirs]
    paired = paired_difference(ours, theirs)
    shuffled = paired_difference([random.permutation(one) for one in ours], theirs)
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_the_interval_holds_what_it_says(share: float) -> None:
    """Of one hundred pairs of equal methods, about 95 intervals hold the true difference, 0 (seeds do not differ)."""
    random = np.random.default_rng(3)
    held = 0
    for _ in range(100):
        ours, theirs = [drawn(share, random)], [drawn(share, random)]
        found = paired_difference(ours, theirs, draws=400)
        held += found.low <= 0 <= found.high
    assert held >= 87  # 95 expected, 87 is 3.6 standard deviations below


def test_pairs_of_different_images_are_refused() -> None:
    four, five = np.ones(4, np.float32), np.ones(5, np.float32)
    for ours, theirs in (([four], [five]), ([four], [four, four]), ([], []), ([four, five], [four, five]), ([1], [1])):
        with pytest.raises(ValueError, match="are no pairs"):
            paired_difference(ours, theirs)  # type: ignore[arg-type]
    for wrong in (np.ones(0), np.array([np.nan])):
        with pytest.raises(ValueError, match="no image, or a value that is no number"):
            paired_difference([wrong], [wrong])
    with pytest.raises(ValueError, match="draws must be positive"):
        paired_difference([four], [four], draws=0)


def test_outcomes_are_kept(tiny_backbone: Path, tmp_path: Path) -> None:
    options = RunOptions(
        backbone=str(tiny_backbone), rate=0.4, epochs=1, limit=30, batch_size=8, device="cpu", output=str(tmp_path)
    )
    found = outcomes(options, [0.4])
    assert list(found) == [0.4] and set(found[0.4]) <= {0.0, 1.0} and len(found[0.4]) == 30

    def never(options: RunOptions, classes: int) -> None:
        raise AssertionError("trained twice")

    again = outcomes(options, [0.4], never)  # type: ignore[arg-type]
    assert np.array_equal(again[0.4], found[0.4])
    with pytest.raises(DataError, match="is of a run with other options"):
        outcomes(options, [0.3])
