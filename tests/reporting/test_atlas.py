"""The atlas: what each head is told by, the page's data, its picture, and the page in a browser."""

import base64
import json
import re
import time

import numpy as np
import pytest
from etils import epath
from matplotlib.colors import to_rgb

from mha_jax.heads.examples import Example
from mha_jax.heads.maps import Map
from mha_jax.reporting.atlas import cells, draw, page
from mha_jax.reporting.canvas import RULE
from mha_jax.reporting.roles import COLOURS
from tests.browser import open_page
from tests.reporting.test_report import Tags

NAME = "encoder/0/attention"
OF_ROLES = {"role": ["previous", None], "roles": [["previous", "narrow"], []]}
ROLES = {
    "seeds": {"3": {"attentions": {NAME: OF_ROLES | {"nearest": ["previous", None], "strength": [0.951, 0]}}}},
}
WORTH = {
    "seeds": {
        "3": {
            "leave_one_out": {"heads": {NAME: {"mean": [0.25, -0.001], "p_holm": [0.01, 1.0]}}},
            "gradient_normalised": {"heads": {NAME: {"mean": [0.9, 0.1], "p_holm": None}}},
        }
    }
}
EXAMPLE = Example("validation 1", {}, {"encoder": ["</script>", " cat", "s"], "decoder": ["a", "b"]})


def weights(rows, columns, seed=0):
    found = np.random.default_rng(seed).random((rows, columns))
    return found / found.sum(axis=1, keepdims=True)


def two_heads():
    return [Map(NAME, 0, weights(3, 3)), Map(NAME, 1, weights(3, 3, 1))]


def test_heads_are_told_by_role_cost_importance_and_entropy_of_their_seed():
    first, second = cells(two_heads(), {NAME: [0.5, 1.0]}, 3, ROLES, WORTH)
    assert (first.role, first.roles) == ("previous", ("previous", "narrow"))
    assert dict(first.facts) == {
        "entropy": "0.50 nats", "nearest role": "previous, 0.95 above chance", "cost to cut": "+0.250 nats*",
        "importance": "0.90",
    }  # fmt: skip
    assert "nearest role" not in dict(second.facts)
    assert second.role == "no role" and dict(second.facts)["cost to cut"] == "−0.001 nats"


def test_a_head_without_a_role_has_the_tint_of_the_nearest_by_its_strength():
    one, _ = cells(two_heads(), {NAME: [0.5, 1.0]}, 4, None, None)
    tints = [one._replace(role="no role", nearest="previous", strength=x).colour for x in (0.0, 0.5, 1.0)]
    assert tints[0] == RULE and tints[2] == COLOURS["previous"]
    assert one._replace(role="sink", nearest="previous", strength=1.0).colour == COLOURS["sink"]
    grey, half, blue = (np.array(to_rgb(tint)) for tint in tints)
    np.testing.assert_allclose(half, (grey + blue) / 2, atol=1 / 255)  # colours have 8 bits


def test_what_was_not_looked_into_is_left_out():
    for roles, worth in ((None, None), (ROLES, WORTH)):
        first, _ = cells(two_heads(), {NAME: [0.5, 1.0]}, 4, roles, worth)  # seed 4 is in neither
        assert first.role == "" and first.facts == (("entropy", "0.50 nats"),)


def test_page_has_every_map_and_stands_alone():
    made = cells(two_heads(), {NAME: [0.5, 1.0]}, 3, ROLES, WORTH)
    text = page("tiny", "seed 3", EXAMPLE, made, [("relations.csv", "relations")])
    assert Tags(text).open == [] and 'href="relations.csv"' in text and "http" not in text
    payload = json.loads(re.findall(r'<script type="application/json" id="payload">(.*?)</script>', text, re.S)[0])
    assert payload["sides"] == {"encoder": [["</script>", "cat", "s"]] * 2}
    head = payload["heads"][1]
    [block] = re.findall(rf'id="map-{head["number"]}">(.*?)</script>', text, re.S)
    u = np.frombuffer(base64.b64decode(block), "<u2").reshape(head["rows"], head["columns"])
    found = head["top"] * (u / 65535) ** 2
    np.testing.assert_allclose(found, two_heads()[1].weights_TS, atol=2e-5)  # 2 sqrt(w top) / 65535, rounded


def test_picture_frames_each_map_in_the_colour_of_its_role(tmp_path):
    cross = Map("decoder/0/cross_attention", 0, weights(2, 3))
    made = cells([*two_heads(), cross], {NAME: [0.5, 1.0], cross.attention: [0.1]}, 3, ROLES, WORTH)
    draw(made, "foot", epath.Path(tmp_path))
    svg = (tmp_path / "atlas.svg").read_text()
    assert svg.count("<image") == 2 and "<!-- Cross-attention -->" in svg and "<!-- previous -->" in svg
    assert (tmp_path / "atlas.png").stat().st_size > 1000


@pytest.mark.slow
def test_atlas_of_twelve_by_twelve_heads_and_128_tokens_is_small_and_opens_at_once(tmp_path):
    names = [f"encoder/{layer}/attention" for layer in range(12)]
    maps = [Map(name, h, weights(128, 128, 12 * i + h)) for i, name in enumerate(names) for h in range(12)]
    own = {"role": ["previous", "sink", *[None] * 10], "roles": [["previous"], ["sink"], *[[]] * 10]}
    roles = {"seeds": {"0": {"attentions": dict.fromkeys(names, own)}}}
    tokens = [f"t{i}" for i in range(128)]
    made = cells(maps, dict.fromkeys(names, [1.0] * 12), 0, roles, None)
    file = tmp_path / "atlas.html"
    file.write_text(page("bert", "seed 0", Example("text", {}, {"encoder": tokens}), made, []))
    assert file.stat().st_size < 15 * 2**20
    with open_page(file) as opened:
        began = time.perf_counter()
        opened.tab.reload(wait_until="load")
        assert time.perf_counter() - began < 3
        assert opened.evaluate("document.querySelectorAll('[data-head]').length") == 144
        opened.tab.click("[data-head='13']")
        title = "Encoder self-attention, layer 1, head 1"
        assert opened.evaluate("document.getElementById('large-name').textContent") == f"{title}: sink"
        x, y, cell = opened.evaluate(
            "() => { const b = canvas.getBoundingClientRect(); return [b.left + at.left, b.top + at.top, at.cell]; }"
        )
        opened.tab.mouse.move(x + 7.5 * cell, y + 2.5 * cell)
        told = f"t2 (2) → t7 (7): {maps[13].weights_TS[2, 7]:.3f}"
        assert opened.evaluate("document.getElementById('told').textContent") == told
        opened.tab.keyboard.press("ArrowDown")
        assert opened.evaluate("document.title") == "Encoder self-attention, layer 2, head 1"
        opened.tab.keyboard.press("Escape")
        assert opened.evaluate("document.getElementById('large').open") is False
        assert opened.errors == [] and opened.requests == []
