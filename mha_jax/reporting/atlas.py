"""The atlas of a model's heads: layers by heads, each with its role, worth, entropy and map of one text.

One page that needs nothing else, and atlas.svg/.png for a paper. A file of another verb that is not there leaves its
numbers out.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Patch

from mha_jax.heads.capture import kind_of, layer_of
from mha_jax.heads.examples import Example
from mha_jax.heads.maps import Map
from mha_jax.reporting.canvas import OURS, PAGE, RULE, STYLE, panels, save
from mha_jax.reporting.html import template
from mha_jax.reporting.maps import KINDS, encode, label, pooled, thumbnail
from mha_jax.reporting.roles import COLOURS

NO_ROLE = "no role"
_SIDE = 40  # pixels of a map in the picture
_FRAME = 4


class Cell(NamedTuple):
    """One head. `facts` are (name, text) pairs in the order they are shown.

    `nearest` is the role that is most above chance, held or not, and `strength` how far above it is, 0 to 1.
    """

    map: Map
    role: str
    roles: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    nearest: str | None = None
    strength: float = 0.0

    @property
    def colour(self) -> str:
        """That of the role; of a head without one that of the nearest, the paler the nearer to chance."""
        if self.role in COLOURS or not self.role or self.nearest is None:
            return COLOURS.get(self.role, RULE)
        strong, pale = np.array(to_rgb(COLOURS[self.nearest])), np.array(to_rgb(RULE))
        red, green, blue = self.strength * strong + (1 - self.strength) * pale
        return to_hex((red, green, blue))


def cells(
    maps: Sequence[Map],
    entropies: Mapping[str, Sequence[float]],
    seed: int,
    roles: Mapping[str, Any] | None,
    importance: Mapping[str, Any] | None,
) -> list[Cell]:
    """The heads of one seed.

    Args:    maps: of single heads.
             entropies: {attention: one number a head}, in nats.
             roles, importance: roles.json and importance.json, None where there is none.
    """
    of_roles = (roles or {"seeds": {}})["seeds"].get(str(seed), {"attentions": {}})["attentions"]
    measures = (importance or {"seeds": {}})["seeds"].get(str(seed), {})
    made = []
    for one in maps:
        assert isinstance(one.head, int)
        own = of_roles.get(one.attention)
        role = (own["role"][one.head] or NO_ROLE) if own else ""
        held = tuple(own["roles"][one.head]) if own else ()
        facts = [("entropy", f"{entropies[one.attention][one.head]:.2f} nats")]
        nearest, strength = (own[part][one.head] if own and part in own else None for part in ("nearest", "strength"))
        if nearest:
            facts.append(("nearest role", f"{nearest}, {strength:.2f} above chance"))
        facts += _cost(measures.get("leave_one_out"), one.attention, one.head)
        facts += _importance(measures.get("gradient_normalised"), one.attention, one.head)
        made.append(Cell(one, role, held, tuple(facts), nearest, strength or 0.0))
    return made


def _cost(measure: Mapping[str, Any] | None, attention: str, head: int) -> list[tuple[str, str]]:
    """What the loss rises by without the head; * where that is beyond chance (p Holm below 0.05)."""
    own = (measure or {"heads": {}})["heads"].get(attention)
    if own is None:
        return []
    p = own["p_holm"][head] if own.get("p_holm") else None
    return [("cost to cut", f"{own['mean'][head]:+.3f} nats".replace("-", "−") + "*" * (p is not None and p < 0.05))]


def _importance(measure: Mapping[str, Any] | None, attention: str, head: int) -> list[tuple[str, str]]:
    own = (measure or {"heads": {}})["heads"].get(attention)
    return [("importance", f"{own['mean'][head]:.2f}")] if own else []


def page(run: str, about: str, example: Example, found: Sequence[Cell], links: Sequence[tuple[str, str]]) -> str:
    """The HTML. `links` are (file, text) of the tables that lie beside it."""
    heads, blocks, grids = [], [], []
    for kind, title in KINDS.items():
        rows: dict[int, list[dict[str, Any]]] = {}
        for cell in found:
            if kind_of(cell.map.attention) != kind:
                continue
            encoded = encode(cell.map.weights_TS)
            layer, number = layer_of(cell.map.attention), len(heads)
            name = f"{title}, layer {layer}, head {cell.map.head}"
            shown = {"number": number, "name": name, "role": cell.role, "roles": cell.roles, "facts": cell.facts}
            shown |= {"colour": cell.colour}
            heads.append(shown | encoded.facts | {"kind": kind, "layer": layer, "head": cell.map.head})
            blocks.append("\n".join(encoded.blocks))
            rows.setdefault(layer, []).append(shown | {"thumbnail": thumbnail(cell.map.weights_TS)})
        if rows:
            grids.append({"title": title, "rows": rows})
    sides = {kind: [[*map(label, names)] for names in example.sides(kind)] for kind in {one["kind"] for one in heads}}
    payload = json.dumps({"heads": heads, "sides": sides}, separators=(",", ":")).replace("<", "\\u003c")
    return template("atlas.html.jinja").render(
        run=run,
        about=about,
        example=example.name,
        grids=grids,
        legend=_legend(found),
        links=links,
        payload=payload,
        blocks=blocks,
    )


def _legend(found: Sequence[Cell]) -> list[tuple[str, str]]:
    """(name, colour) of the roles that heads have, or are nearest to."""
    present = {name for cell in found if cell.role for name in (cell.role, cell.nearest) if name}
    label = f"{NO_ROLE}: tint of the nearest, the paler the weaker" if any(c.nearest for c in found) else NO_ROLE
    known = [(role, colour) for role, colour in COLOURS.items() if role in present]
    return known + [(label, RULE)] * (NO_ROLE in present)


def draw(found: Sequence[Cell], foot: str, directory: epath.Path) -> None:
    """Writes atlas.svg and atlas.png: a panel a kind of attention, each map framed in the colour of its role."""
    kinds = [kind for kind in KINDS if any(kind_of(cell.map.attention) == kind for cell in found)]
    own = {kind: [cell for cell in found if kind_of(cell.map.attention) == kind] for kind in kinds}
    layers = {kind: list(dict.fromkeys(cell.map.attention for cell in cells)) for kind, cells in own.items()}
    counts = Counter(cell.map.attention for cell in found)
    widest = max(counts.values(), default=1)
    side = min(8.6 / widest, 1.1)
    heights = [max(len(names), 1) * side + 0.5 for names in layers.values()]
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure, axes = panels(max(len(kinds), 1), 1, sum(heights) + 0.9, height_ratios=heights)
        for axis, kind in zip(axes[:, 0], kinds, strict=False):
            axis.set_title(KINDS[kind], fontsize=9)
            _panel(axis, own[kind], layers[kind])
        patches = [Patch(color=colour, label=role) for role, colour in _legend(found)]
        if patches:
            figure.legend(handles=patches, loc="outside upper center", ncols=7, fontsize=7)
        save(figure, "atlas", f"{foot}  ·  in a map rows attend to columns; opacity is √weight", directory)


def _panel(axis: Axes, own: Sequence[Cell], layers: list[str]) -> None:
    """All maps of a kind as one image: a grid of tiles of the same size."""
    pitch = _SIDE + 2 * _FRAME + 4
    widest = max(sum(cell.map.attention == name for cell in own) for name in layers)
    image = np.ones((pitch * len(layers), pitch * widest, 3))
    for y, name in enumerate(layers):
        for x, cell in enumerate(cell for cell in own if cell.map.attention == name):
            top, left = y * pitch + 2, x * pitch + 2
            image[top : top + pitch - 4, left : left + pitch - 4] = _tile(cell)
    axis.imshow(image, interpolation="none")
    axis.set_xticks(pitch * (np.arange(widest) + 0.5) - 0.5, [str(x) for x in range(widest)], fontsize=7)
    axis.set_yticks(pitch * (np.arange(len(layers)) + 0.5) - 0.5, [str(layer_of(name)) for name in layers], fontsize=7)
    axis.set_ylabel("layer", fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _tile(cell: Cell) -> np.ndarray:
    """The map on white, in its frame; of another size than the tile its nearest points."""
    small = pooled(cell.map.weights_TS, -(-max(cell.map.weights_TS.shape) // _SIDE))
    rows, columns = (np.linspace(0, size - 1, _SIDE).round().astype(int) for size in small.shape)
    share = np.sqrt(np.clip(small[np.ix_(rows, columns)], 0, 1))[..., None]
    tile = np.empty((_SIDE + 2 * _FRAME,) * 2 + (3,))
    tile[:] = to_rgb(cell.colour if cell.role else RULE)
    tile[_FRAME:-_FRAME, _FRAME:-_FRAME] = share * to_rgb(OURS) + (1 - share) * to_rgb(PAGE)
    return tile
