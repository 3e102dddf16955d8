"""The look of all figures: one palette, one frame, and text drawn as paths so that it looks alike everywhere."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

INK, MUTED, RULE, PAGE = "#1f2933", "#5f6b7a", "#dfe3e8", "#ffffff"
OURS, PAPER = "#2f74c0", "#d9782b"
# Middling in lightness from end to end, so that it reads on a white and on a dark page.
RAMP = LinearSegmentedColormap.from_list("heads", ["#2a9d8f", "#2f8fc0", "#5b6fd0", "#8f55b8", "#c2478f"])
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": RULE,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": PAGE,
    "axes.facecolor": "none",
    "svg.hashsalt": "mha_jax",
}


@dataclasses.dataclass(frozen=True)
class Picture:
    """A drawn figure: its file name without ending, what it shows, and its SVG text."""

    name: str
    title: str
    caption: str
    svg: str


def _rendered(figure: Figure, form: str) -> bytes:
    out = io.BytesIO()
    dated = {"svg": "Date", "pdf": "CreationDate"}.get(form)  # the same results give the same bytes
    figure.savefig(out, format=form, dpi=160, metadata={dated: None} if dated else None)
    return out.getvalue()


def panels(rows: int, columns: int, height: float, **layout: list[float]) -> tuple[Figure, np.ndarray]:
    """Empty panels on a page-wide figure of this height in inches, with room at the foot for the provenance."""
    figure = Figure(figsize=(9.6, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0.3 / height, 1, 1 - 0.3 / height), wspace=0.04)  # pyright: ignore
    return figure, figure.subplots(rows, columns, squeeze=False, gridspec_kw=layout)


def save(figure: Figure, name: str, foot: str, directory: epath.Path, forms: Sequence[str] = ("svg", "png")) -> str:
    """Writes NAME.svg and NAME.png, or in other forms, with a line of provenance at the foot. Returns the SVG text."""
    figure.text(0.008, 0.008, foot, fontsize=7, color=MUTED)
    made = {form: _rendered(figure, form) for form in forms}
    for form, content in made.items():
        (directory / f"{name}.{form}").write_bytes(content)
    return made["svg"].decode()
