"""What commands say of warnings."""

from __future__ import annotations

import warnings

import pytest

from pyra.tasks.quiet import quiet_libraries


def test_a_warning_is_one_line_without_the_code_that_gave_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards
    quiet_libraries()
    assert warnings.formatwarning(UserWarning("pyra: a\n  b"), UserWarning, "a.py", 3) == "pyra: warning: a b\n"
