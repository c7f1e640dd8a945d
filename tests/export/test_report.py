"""How far an export may be from its model: to the tolerance, but for images whose ties were broken the other way."""

from __future__ import annotations

import pytest
import torch

from pyra.errors import ExportError
from pyra.export.report import TIES, compare


def test_what_is_compared() -> None:
    expected = torch.tensor([[1.0, 2.0], [4.0, -8.0]])
    actual = torch.tensor([[1.0, 2.5], [-9.0, -8.0]])
    found = compare("onnxruntime", expected, actual, tolerance=2.0, merges=False)
    assert (found.runtime, found.max_difference, found.max_logit) == ("onnxruntime", 13.0, 8.0)
    assert (found.differing, found.top1_agreement, found.compared, found.real) == (0, 0.5, 2, 2)
    assert found.relative_difference == 13 / 8


def test_only_real_inputs_count_for_the_classes() -> None:
    expected = torch.tensor([[1.0, 2.0], [4.0, 8.0], [1.0, 0.0]])
    actual = torch.tensor([[1.0, 2.0], [9.0, 8.0], [0.0, 1.0]])
    found = compare("pytorch", expected, actual, tolerance=1.0, merges=False, real=2)
    assert (found.top1_agreement, found.compared, found.real) == (0.5, 3, 2)


def test_ties_are_told_from_a_wrong_export() -> None:
    expected = torch.randn(32, 5, generator=torch.Generator().manual_seed(0))
    most = int(TIES * 32)
    few, many = expected.clone(), expected.clone()
    few[:most] += 0.5
    many[: most + 1] += 0.5
    found = compare("pytorch", expected, few, tolerance=1e-3, merges=True)
    assert (found.differing, found.max_difference, found.compared) == (most, 0.0, 32)
    for actual, merges, differing in ((many, True, most + 1), (few, False, most), (expected * torch.nan, True, 32)):
        with pytest.raises(ExportError, match=rf"in pytorch differs on {differing} of 32 inputs"):
            compare("pytorch", expected, actual, tolerance=1e-3, merges=merges)


def test_a_single_image_has_no_share_of_ties() -> None:
    expected = torch.ones(1, 5)
    with pytest.raises(ExportError, match="1 of 1 inputs"):
        compare("pytorch", expected, expected + 0.5, tolerance=1e-3, merges=True)


def test_the_tolerance_itself_agrees() -> None:
    expected = torch.tensor([[1.0, 4.0]])
    assert compare("pytorch", expected, expected + 1.0, tolerance=0.25, merges=False).differing == 0
    with pytest.raises(ExportError, match=r"more than the tolerance 0\.24 of it"):
        compare("pytorch", expected, expected + 1.0, tolerance=0.24, merges=False)


def test_logits_that_are_all_zero() -> None:
    zeros = torch.zeros(2, 3)
    assert compare("pytorch", zeros, zeros, tolerance=0.0, merges=False).relative_difference == 0
    with pytest.raises(ExportError, match="differs on 2 of 2"):
        compare("pytorch", zeros, zeros + 1e-6, tolerance=0.5, merges=False)


def test_another_number_of_classes() -> None:
    with pytest.raises(ExportError, match=r"in openvino returns \[2, 4\], the model \[2, 3\]; nothing was written"):
        compare("openvino", torch.zeros(2, 3), torch.zeros(2, 4), tolerance=1.0, merges=True)
