"""The page of maps holds the weights to within its steps, and shows them in a browser."""

import base64
import json
import re

import numpy as np
import pytest
from etils import epath
from matplotlib.image import imread

from mha_jax.heads.examples import Example
from mha_jax.heads.maps import Map
from mha_jax.reporting.maps import Shown, check_size, draw, encode, label, page, page_map, pooled, thumbnail
from mha_jax.specs import UserError
from tests.browser import open_page
from tests.reporting.test_report import Tags

TOKENS = ["[start]", " the", "</script>", "\n", "$x", " cat", "[end]"]
SHORT = Example("validation 3", {}, {"encoder": TOKENS, "decoder": ["[start]", "die", "Katze"]})


def softmaxed(rows, columns, seed=0):
    powers = np.exp(3 * np.random.default_rng(seed).normal(size=(rows, columns)).astype(np.float32))
    return powers / powers.sum(axis=1, keepdims=True)


def short_maps():
    layers = [Map(f"encoder/{i}/attention", h, softmaxed(7, 7, 3 * i + h)) for i in range(2) for h in range(3)]
    return [
        *layers,
        Map("encoder/1/attention", "rollout", np.eye(7)),
        Map("decoder/0/cross_attention", 0, softmaxed(3, 7)),
    ]


def html(maps=None, example=SHORT, runs=1):
    made = [page_map(0, one) for one in maps or short_maps()]
    return page([Shown(f"run{n}", "step 20", [example], made) for n in range(runs)])


def decoded(text, facts):
    """The weights of a map, read from the text of the page as its script does."""
    blocks = re.search(rf'id="{facts["id"]}">(.*?)</script>', text, re.DOTALL)[1].split("\n")
    rows, columns, tile = facts["rows"], facts["columns"], facts["tile"]
    found, corners = np.zeros((rows, columns)), [(i, j) for i in range(0, rows, tile) for j in range(0, columns, tile)]
    for (i, j), block in zip(corners, blocks, strict=True):
        part = found[i : i + tile, j : j + tile]
        if block:
            units = np.frombuffer(base64.b64decode(block), "<u2" if facts["bits"] == 16 else "u1")
            part[:] = units.reshape(part.shape) / (2 ** facts["bits"] - 1)
    return facts["top"] * found**2


def payload(text):
    return json.loads(re.search(r'id="payload">(.*?)</script>', text, re.DOTALL)[1])


def test_page_holds_the_weights_and_tokens_and_stands_alone():
    text = html(runs=2)
    told = payload(text)
    assert [run["run"] for run in told["runs"]] == ["run0", "run1"]
    for one, facts in zip(short_maps(), told["runs"][1]["maps"], strict=True):
        assert (facts["attention"], facts["head"]) == (one.attention, one.head)
        np.testing.assert_allclose(decoded(text, facts), one.weights_TS, atol=2e-5)  # 1 / 65535
    assert told["runs"][0]["examples"][0]["tokens"]["encoder"] == [label(piece) for piece in TOKENS]
    tags = Tags(text)
    assert tags.open == [] and len(tags.ids) == len(set(tags.ids))
    assert not re.search(r'(src|href)="(?!index\.html")', text) and "//cdn" not in text


def test_long_map_has_eight_bits_in_blocks_and_an_overview():
    weights = np.tril(softmaxed(700, 700))
    one = page_map(0, Map("decoder/0/attention", 4, weights))
    facts = one.whole.facts
    assert (facts["bits"], facts["tile"], len(one.whole.blocks)) == (8, 256, 9)
    assert [bool(block) for block in one.whole.blocks] == [True, False, False, True, True, False, True, True, True]
    text = html([Map("decoder/0/attention", 4, weights)], Example("text", {}, {"decoder": ["a"] * 700}))
    (told,) = payload(text)["runs"][0]["maps"]
    np.testing.assert_allclose(decoded(text, told), weights, atol=0.004 * weights.max())  # half of 2 / 255
    assert (told["overview"]["rows"], told["overview"]["block"], told["overview"]["pool"]) == (350, 2, "max")
    top = weights.max()
    np.testing.assert_allclose(decoded(text, told["overview"]), pooled(weights, 2), atol=0.004 * top)


def test_pooling_takes_the_greatest_or_the_mean_of_whole_and_cut_squares():
    weights = np.arange(15.0).reshape(3, 5)
    np.testing.assert_array_equal(pooled(weights, 2), [[6, 8, 9], [11, 13, 14]])
    np.testing.assert_array_equal(pooled(weights, 2, "mean"), [[3, 5, 6.5], [10.5, 12.5, 14]])
    with pytest.raises(UserError, match="pool='sum' is unknown; known are max, mean"):
        pooled(weights, 2, "sum")


def test_map_without_weights_or_of_zeros_is_encoded():
    assert encode(np.zeros((0, 0))).blocks == []
    assert encode(np.zeros((3, 2))).blocks == [""]


def test_thumbnail_is_a_small_png_as_opaque_as_the_weights(tmp_path):
    weights = np.eye(96) * 0.25
    head, _, data = thumbnail(weights).partition(",")
    assert head == "data:image/png;base64" and len(data) < 2000
    (tmp_path / "small.png").write_bytes(base64.b64decode(data))
    np.testing.assert_allclose(imread(tmp_path / "small.png")[..., 3], np.eye(48) * 0.5, atol=0.004)  # 1 / 255


def test_page_beyond_its_size_is_refused_by_the_shapes_alone():
    check_size([(4096, 4096)] * 10)
    with pytest.raises(UserError, match="would hold 3072 MB of maps, and 400 MB are its limit; choose fewer"):
        check_size([(4096, 4096)] * 144)


def test_spaces_around_a_token_go_unless_it_is_nothing_else():
    assert [label(piece) for piece in (" the", "\n", " ", "", "ing")] == ["the", "↵", "␣", "∅", "ing"]


def test_pictures_are_written_as_svg_and_pdf(tmp_path):
    name = draw(
        SHORT, [one for one in short_maps() if one.attention == "encoder/1/attention"], "foot", epath.Path(tmp_path)
    )
    assert name == "encoder-1-attention-validation-3"
    svg = (tmp_path / f"{name}.svg").read_text()
    assert svg.count("<image") == 4 and "<!-- rollout -->" in svg and "<!-- [start] -->" in svg
    assert (tmp_path / f"{name}.pdf").read_bytes().startswith(b"%PDF")


TIP = "document.getElementById('tip').textContent"


def point(opened, row, column):
    """Moves the pointer to a cell of the first map."""
    x, y = opened.evaluate(
        f"""() => {{
            const {{ canvas, scroller, at }} = panes[0], box = canvas.getBoundingClientRect();
            return [box.left + at.left + {column + 0.5} * at.cell - scroller.scrollLeft,
                    box.top + at.top + {row + 0.5} * at.cell - scroller.scrollTop];
        }}"""
    )
    opened.tab.mouse.move(x, y)


@pytest.mark.slow
def test_browser_shows_heads_by_keyboard_weights_by_pointer_and_all_heads(tmp_path):
    (tmp_path / "maps.html").write_text(html(runs=2))
    with open_page(tmp_path / "maps.html") as opened:
        assert opened.evaluate("document.title") == "Encoder self-attention, layer 0, head 0 · run0"
        opened.tab.keyboard.press("ArrowRight")
        opened.tab.keyboard.press("ArrowDown")
        assert opened.evaluate("document.title") == "Encoder self-attention, layer 1, head 1 · run0"
        titles = "[...document.querySelectorAll('.pane h2')].map(h => h.textContent)"
        assert opened.evaluate(titles) == [
            "Encoder self-attention, layer 1, head 1",
            "Encoder self-attention, layer 0, head 0",
        ]
        row = short_maps()[4].weights_TS[2]
        point(opened, 2, key := int(row.argmax()))
        assert opened.evaluate(TIP) == f"</script> (2) → {label(TOKENS[key])} ({key}): {row[key]:.3f}"
        opened.tab.keyboard.press("m")
        assert opened.evaluate("document.querySelectorAll('.model button').length") == 2 * 7
        opened.tab.click("text=Cross-attention")
        opened.tab.click(".model button")
        assert opened.evaluate("document.title") == "Cross-attention, layer 0, head 0 · run0"
        assert opened.errors == [] and opened.requests == []


@pytest.mark.slow
def test_browser_scrolls_a_map_of_4096_tokens_and_decodes_only_what_is_in_view(tmp_path):
    weights = np.zeros((4096, 4096), np.float32)
    weights[np.arange(4096), np.maximum(np.arange(4096) - 1, 0)] = 0.5
    weights += 1e-4
    tokens = [f"t{i}" for i in range(4096)]
    text = html([Map("decoder/0/attention", 0, weights)], Example("text", {}, {"decoder": tokens}))
    assert len(text) < 25 * 2**20
    (tmp_path / "maps.html").write_text(text)
    with open_page(tmp_path / "maps.html") as opened:
        assert opened.evaluate("panes[0].scroller.scrollHeight") > 4096
        first = opened.evaluate("panes[0].map.weights.open.size")
        for _ in range(7):
            opened.tab.keyboard.press("+")
        opened.evaluate("panes[0].scroller.scrollTo(4000 * panes[0].at.cell, 4000 * panes[0].at.cell)")
        opened.tab.wait_for_timeout(200)
        point(opened, 4011, 4010)
        assert opened.evaluate(TIP) == "t4011 (4011) → t4010 (4010): 0.500"
        assert first < 40 and opened.evaluate("panes[0].map.weights.open.size") < 80
        assert opened.errors == [] and opened.requests == []
