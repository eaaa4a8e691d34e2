"""Figures of plain data, for a file (PNG). The same data gives the same bytes."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

SIZE = 7.5, 4.0
"""Inches."""
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
"""Okabe and Ito's, which colour-blind readers tell apart."""
STYLES = ("-", "--", "-.", ":")


def curves(series: Mapping[str, pd.Series], xlabel: str, ylabel: str, title: str) -> Figure:
    """A line for each name, through the values of its series at their index; few points are marked."""
    figure, axes = _axes(xlabel, ylabel, title)
    for i, (name, line) in enumerate(series.items()):
        colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
        marker = "o" if len(line) <= 12 else None
        axes.plot(
            line.index, line, label=name, color=colour, linestyle=style, linewidth=1.4, marker=marker, markersize=3.5
        )
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    return figure


def points(rows: Iterable[tuple[str, float, float, float]], xlabel: str, ylabel: str, title: str) -> Figure:
    """A point for each (name, x, y, half the height of its error bar); NaN draws no bar."""
    figure, axes = _axes(xlabel, ylabel, title)
    for i, (name, x, y, error) in enumerate(rows):
        axes.errorbar([x], [y], yerr=[error], fmt="o", color=COLOURS[i % len(COLOURS)], capsize=3, label=name)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure with 150 dots an inch."""
    figure.savefig(path, format="png", dpi=150, metadata={"Software": None}, bbox_inches="tight")


def _axes(xlabel: str, ylabel: str, title: str):
    figure = Figure(figsize=SIZE, layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
