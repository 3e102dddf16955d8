"""Rules of visibility drawn as squares: what each query sees, and which tiles a kernel visits for it."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap

from mha_jax.attention import Rule
from mha_jax.attention.blockmap import BlockMap, describe
from mha_jax.reporting.canvas import OURS, RULE, STYLE, panels, save

_KINDS = ListedColormap(["#ffffff", "#dbe8f6", "#f3e2d3"])  # empty, partial, full


def draw_rules(rules: Mapping[str, Rule], length: int, block: int, path: epath.PathLike) -> None:
    """Writes PATH.svg and PATH.png: one square a rule, the first example and head of each.

    Dots are visible places, tinted squares the tiles that are visited. Raises: UserError for a rule that is not for
    this length.
    """
    path = epath.Path(path)
    columns = min(4, len(rules))
    rows = -(-len(rules) // columns)
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = panels(rows, columns, 2.75 * rows + 0.3)
        for panel, (name, rule) in zip(axes.flat, rules.items(), strict=False):
            _draw(panel, name, rule, length, block)
        for panel in axes.flat[len(rules) :]:
            panel.axis("off")
        tiles = f"tiles of {block} x {block}: pale blue need the mask, pale orange do not"
        foot = f"{length} queries down, {length} keys across; {tiles}"
        save(figure, path.name, foot, path.parent)


def _draw(axes: Axes, name: str, rule: Rule, length: int, block: int) -> None:
    mask = np.asarray(rule.mask(length, length))[0, 0]
    kinds = BlockMap.of(rule, length, length, block, block).kinds[0]
    told = describe(rule, length, block)
    axes.imshow(kinds, cmap=_KINDS, vmin=0, vmax=2, extent=(0, kinds.shape[1] * block, kinds.shape[0] * block, 0))
    dots, whole = ListedColormap([OURS]), (0, length, length, 0)
    axes.imshow(np.where(mask, 1.0, np.nan), cmap=dots, extent=whole, interpolation="nearest", alpha=0.85)
    axes.set_xlim(0, length)
    axes.set_ylim(length, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for side in axes.spines.values():
        side.set_visible(True)
        side.set_color(RULE)
    axes.set_title(name, fontsize=8)
    axes.set_xlabel(f"visible {told.visible:.1%}, paid {told.paid:.1%}", fontsize=8)
