"""Attention maps to look at: pictures for a paper, thumbnails, and one page that needs nothing else.

On the page a weight w is the whole number u = round(levels * sqrt(w / top)), top being the greatest weight of its map:
16 bits up to 256 x 256, and 8 bits (off by at most 0.4 % of top) beyond. A map lies there in square blocks, which the
page decodes when they come into view; a long one also pooled, to show where to look.

Treescope, which comes with Flax, draws an array with names along its axes, but offers no choice among heads, no lines
between tokens and no long map in blocks.
"""

import base64
import io
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm, to_rgba
from matplotlib.image import imsave

from mha_jax.heads.capture import kind_of, layer_of
from mha_jax.heads.examples import Example
from mha_jax.heads.maps import Map
from mha_jax.reporting.canvas import OURS, PAGE, STYLE, panels, save
from mha_jax.reporting.html import template
from mha_jax.specs import UserError

KINDS = {"encoder": "Encoder self-attention", "decoder": "Decoder self-attention", "cross": "Cross-attention"}
POOLS = {"max": np.maximum, "mean": np.add}
_BLUES = LinearSegmentedColormap.from_list("weights", [PAGE, "#9cc1ea", OURS, "#0b2a4f"])
_TILE = 256
_FINE = 256 * 256  # weights of a map up to which they have 16 bits
_OVERVIEW = 512  # cells of a side of a long map that is pooled
_NAMED = 40  # more tokens than this have no names along a picture
_PAGE_BYTES = 400 * 2**20


class Encoded(NamedTuple):
    """A map as text: `facts` say how to read the blocks, base64 of u row by row; "" is a block of zeros."""

    facts: dict[str, Any]
    blocks: list[str]


class PageMap(NamedTuple):
    """A map of the page's example of this number, and, of a long one, its overview."""

    facts: dict[str, Any]
    whole: Encoded
    overview: Encoded | None


class Shown(NamedTuple):
    """What the page shows of one run."""

    run: str
    about: str
    examples: Sequence[Example]
    maps: Sequence[PageMap]


def encode(weights_TS: Float[np.ndarray, "T S"], tile: int = _TILE) -> Encoded:
    """A map for the page. Blocks are [tile, tile], those at the edges smaller, in rows of blocks."""
    (rows, columns), top = weights_TS.shape, float(weights_TS.max(initial=0))
    bits = 16 if rows * columns <= _FINE else 8
    levels = 2**bits - 1
    scaled = np.sqrt(np.maximum(weights_TS, 0) / (top or 1)) * levels
    units_TS = np.rint(scaled).astype("<u2" if bits == 16 else "u1")
    blocks = [
        base64.b64encode(block.tobytes()).decode() if (block := units_TS[i : i + tile, j : j + tile]).any() else ""
        for i in range(0, rows, tile)
        for j in range(0, columns, tile)
    ]
    return Encoded({"rows": rows, "columns": columns, "top": top, "bits": bits, "tile": tile}, blocks)


def pooled(weights_TS: Float[np.ndarray, "T S"], block: int, pool: str = "max") -> Float[np.ndarray, "t s"]:
    """The maximum or mean of every square of block x block weights; squares at the edges are smaller.

    Raises: UserError for another pool.
    """
    if pool not in POOLS:
        raise UserError(f"pool={pool!r} is unknown; known are {', '.join(POOLS)}")
    rows, columns = (np.arange(0, size, block) for size in weights_TS.shape)
    found = POOLS[pool].reduceat(POOLS[pool].reduceat(weights_TS, rows, axis=0), columns, axis=1)
    if pool == "mean":
        heights, widths = (np.diff([*x, size]) for x, size in zip((rows, columns), weights_TS.shape, strict=True))
        found = found / (heights[:, None] * widths[None, :])
    return found


def thumbnail(weights_TS: Float[np.ndarray, "T S"], size: int = 48, pool: str = "max") -> str:
    """A PNG as a data URI, at most `size` pixels a side: blue on nothing, the more opaque the greater sqrt(weight)."""
    small = pooled(weights_TS, -(-max(weights_TS.shape) // size), pool)
    rgba = np.broadcast_to(np.asarray(to_rgba(OURS)), (*small.shape, 4)).copy()
    rgba[..., 3] = np.sqrt(np.clip(small, 0, 1))
    out = io.BytesIO()
    imsave(out, rgba, format="png", metadata={"Software": ""})
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def label(piece: str) -> str:
    """A token as an axis shows it: without the spaces around it, unless it is nothing else."""
    return piece.strip() or piece.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") or "∅"


def page_map(example: int, one: Map, pool: str = "max") -> PageMap:
    """A map made ready for the page, which lets its weights go."""
    facts = {"example": example, "attention": one.attention, "head": one.head}
    facts |= {"kind": kind_of(one.attention), "layer": layer_of(one.attention)}
    overview, longest = None, max(one.weights_TS.shape)
    if longest > _OVERVIEW:
        block = -(-longest // _OVERVIEW)
        small = encode(pooled(one.weights_TS, block, pool), tile=_OVERVIEW)
        overview = Encoded(small.facts | {"block": block, "pool": pool}, small.blocks)
    return PageMap(facts, encode(one.weights_TS), overview)


def check_size(shapes: Iterable[tuple[int, int]]) -> None:
    """Raises UserError where maps of these shapes would make a page beyond 400 MB."""
    size = sum(rows * columns * (2 if rows * columns <= _FINE else 1) * 4 / 3 for rows, columns in shapes)
    if size > _PAGE_BYTES:
        raise UserError(
            f"the page would hold {size / 2**20:.0f} MB of maps, and {_PAGE_BYTES / 2**20:.0f} MB are its limit; "
            "choose fewer layers, heads or examples"
        )


def page(shown: Sequence[Shown]) -> str:
    """The HTML of the maps of one run, or of two side by side."""
    runs, blocks = [], []
    for number, one in enumerate(shown):
        examples = [
            {"name": example.name, "tokens": {stack: [*map(label, names)] for stack, names in example.tokens.items()}}
            for example in one.examples
        ]
        maps = []
        for place, (facts, whole, overview) in enumerate(one.maps):
            name = f"map-{number}-{place}"
            blocks.append((name, "\n".join(whole.blocks)))
            maps.append(facts | {"id": name} | whole.facts)
            if overview is not None:
                blocks.append((f"{name}-overview", overview.blocks[0]))
                maps[-1]["overview"] = overview.facts | {"id": f"{name}-overview"}
        runs.append({"run": one.run, "about": one.about, "examples": examples, "maps": maps})
    payload = json.dumps({"kinds": KINDS, "runs": runs}, separators=(",", ":")).replace("<", "\\u003c")
    return template("maps.html.jinja").render(shown=shown, payload=payload, blocks=blocks)


def draw(example: Example, maps: Sequence[Map], foot: str, directory: epath.Path) -> str:
    """Writes a picture of the maps of one attention as small panels, SVG and PDF. Returns its name.

    That is ATTENTION-EXAMPLE, with "-" for "/" and " ". More than 40 tokens have no names along the axes, and a map of
    more than 512 is pooled by its maximum.
    """
    name = f"{maps[0].attention}/{example.name}".replace("/", "-").replace(" ", "-")
    with mpl.rc_context({**STYLE, "axes.grid": False, "axes.titlesize": 9, "pdf.fonttype": 42}):
        _draw(example.sides(kind_of(maps[0].attention)), maps, name, foot, directory)
    return name


def _draw(sides: tuple[list[str], list[str]], maps: Sequence[Map], name: str, foot: str, directory: epath.Path) -> None:
    columns = min(len(maps), 4 if max(map(len, sides)) <= _NAMED else 6)
    rows = -(-len(maps) // columns)
    side = 9.6 / max(columns, 3)
    tall = min(max(len(sides[0]) / max(len(sides[1]), 1), 0.4), 2.5)
    figure, axes = panels(rows, columns, rows * (side * tall + 0.3) + 0.4)
    for place, one in zip(axes.flat, maps, strict=False):
        block = -(-max(one.weights_TS.shape) // _OVERVIEW)
        small = pooled(one.weights_TS, block)
        norm = PowerNorm(0.5, vmin=0, vmax=max(float(small.max(initial=0)), 1e-9))
        place.imshow(small, cmap=_BLUES, norm=norm, interpolation="none", aspect="auto")
        place.set_title(f"head {one.head}" if isinstance(one.head, int) else one.head)
        _name(place, sides, side)
    for place in axes.flat[len(maps) :]:
        place.set_axis_off()
    save(figure, name, f"{foot}  ·  rows attend to columns; colour is √(weight / greatest)", directory, ("svg", "pdf"))


def _name(axes: Axes, sides: tuple[list[str], list[str]], side: float) -> None:
    """Tokens along both axes, where they can be read. A dollar would begin mathematics."""
    axes.tick_params(length=0)
    axes.set_xticks([])
    axes.set_yticks([])
    if max(map(len, sides)) > _NAMED:
        return
    size = min(7.0, 72 * side / max(map(len, sides)) * 0.6)
    queries, keys = ([label(piece).replace("$", r"\$") for piece in names] for names in sides)
    axes.set_xticks(range(len(keys)), keys, rotation=90, fontsize=size)
    axes.set_yticks(range(len(queries)), queries, fontsize=size)
