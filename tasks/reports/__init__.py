"""Tables and plots of results; matplotlib and plotly are imported only while a plot is drawn."""

from __future__ import annotations

from pyra.tasks.reports.front import pareto_front
from pyra.tasks.reports.plot import pareto_plot
from pyra.tasks.reports.table import results_table

__all__ = ["pareto_front", "pareto_plot", "results_table"]
