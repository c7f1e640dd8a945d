"""Grids of runs, and what comes after them: the report of a folder of runs, and which of them to take."""
