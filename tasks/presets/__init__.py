"""The published recipe (arXiv 2403.09192, section 4) as options of a run: ``pyra train --config paper-high``."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
