import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import Causal, Dense, Full, Global, Padding, PerHead, Segments, SlidingWindow
from mha_jax.attention.rule import FARTHEST, integer
from mha_jax.specs import UserError

T, S = 7, 5
LENGTHS = jnp.array([3, 0, 5])
QUERY_IDS = jnp.array([[0, 0, 1, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, 5], [1, 2, 3, 4, 5, 6, 7]])
KEY_IDS = jnp.array([[0, 1, 1, 2, 2], [5, 4, 5, 4, 5], [7, 6, 5, 4, 3]])
DENSE = np.arange(3 * 2 * T * S).reshape(3, 2, T, S) % 3 > 0

# What each rule means, position by position, as DESIGN words it.
MEANING = [
    (Full(), lambda b, h, t, s: True),
    (Causal(), lambda b, h, t, s: s <= t),
    (Causal(2), lambda b, h, t, s: s <= t + 2),
    (Causal(-1), lambda b, h, t, s: s <= t - 1),
    (SlidingWindow(3), lambda b, h, t, s: abs(t - s) < 3),
    (Causal() & SlidingWindow(2), lambda b, h, t, s: s in (t - 1, t)),
    (Global(2), lambda b, h, t, s: t < 2 or s < 2),
    (Global(0), lambda b, h, t, s: False),
    (Padding(LENGTHS), lambda b, h, t, s: s < LENGTHS[b]),
    (Segments(QUERY_IDS, KEY_IDS), lambda b, h, t, s: QUERY_IDS[b, t] == KEY_IDS[b, s]),
    (Dense(DENSE), lambda b, h, t, s: DENSE[b, h, t, s]),
    (Dense(DENSE[0, 0]), lambda b, h, t, s: DENSE[0, 0, t, s]),
    (PerHead(Causal(), SlidingWindow(2)), lambda b, h, t, s: abs(t - s) < 2 if h else s <= t),
    (PerHead(Padding(LENGTHS), Full()), lambda b, h, t, s: h == 1 or s < LENGTHS[b]),
    (~Causal(), lambda b, h, t, s: s > t),
    (Causal() & (SlidingWindow(2) | Global(1)), lambda b, h, t, s: s <= t and (t - s < 2 or s < 1)),
    (Padding(LENGTHS) & PerHead(Causal(), Full()), lambda b, h, t, s: s < LENGTHS[b] and (h == 1 or s <= t)),
]


@pytest.mark.parametrize(("rule", "meaning"), MEANING)
def test_mask_is_what_the_rule_says(rule, meaning):
    expected = [[[[bool(meaning(b, h, t, s)) for s in range(S)] for t in range(T)] for h in range(2)] for b in range(3)]
    np.testing.assert_array_equal(np.broadcast_to(rule.mask(T, S), (3, 2, T, S)), expected)


@pytest.mark.parametrize(("rule", "meaning"), MEANING)
def test_rule_passes_through_jit_as_an_argument(rule, meaning):
    np.testing.assert_array_equal(jax.jit(lambda rule: rule.mask(T, S))(rule), rule.mask(T, S))


@pytest.mark.parametrize(("rule", "meaning"), MEANING)
def test_rule_that_claims_to_see_itself_does(rule, meaning):
    assert not rule.sees_self or np.diagonal(rule.mask(T, S), axis1=2, axis2=3).all()


def test_sees_self_is_told_where_it_saves_work():
    ids = QUERY_IDS
    for rule in (Full(), Causal(), SlidingWindow(1), Segments(ids), Causal() & Segments(ids), Causal(-1) | Full()):
        assert rule.sees_self
    for rule in (Causal(-1), Global(3), Padding(LENGTHS), Segments(ids, KEY_IDS), ~Causal(), Causal() & Global(1)):
        assert not rule.sees_self
    assert PerHead(Causal(), Full()).sees_self
    assert not PerHead(Causal(), Causal(-1)).sees_self


def test_axes_that_do_not_vary_stay_one():
    assert Causal().mask(T, S).shape == (1, 1, T, S)
    assert Padding(LENGTHS).mask(T, S).shape == (3, 1, T, S)
    assert PerHead(Causal(), Full()).mask(T, S).shape == (1, 2, T, S)
    assert PerHead().mask(T, S).shape == (1, 0, T, S)


def test_vmap_maps_the_arrays_of_a_rule():
    rule = Causal() & Padding(jnp.stack([LENGTHS, LENGTHS + 1]))
    masks = jax.vmap(lambda rule: rule.mask(T, S))(rule)
    np.testing.assert_array_equal(masks[1], (Causal() & Padding(LENGTHS + 1)).mask(T, S))


def test_the_farthest_reach_shows_all_and_integers_of_numpy_are_integers():
    for rule in (Causal(FARTHEST), SlidingWindow(FARTHEST, dilation=1), Global(FARTHEST)):
        assert rule.mask(T, S).all()
    assert SlidingWindow(FARTHEST, dilation=FARTHEST).mask(T, S).sum() == S
    assert type(integer("window", np.int64(3))) is int


def test_equal_rules_are_equal_and_hash_alike():
    assert Causal() & SlidingWindow(3) == Causal() & SlidingWindow(3)
    assert hash(Causal() & SlidingWindow(3)) == hash(Causal() & SlidingWindow(3))
    assert Causal(1) != Causal()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(0), "SlidingWindow window=0 must be an integer of at least 1"),
        (lambda: SlidingWindow(True), "SlidingWindow window=True must be an integer"),
        (lambda: Global(-1), "Global count=-1 must be an integer of at least 0"),
        (lambda: Causal(True), "Causal offset=True must be an integer"),
        (lambda: Causal(2**30 + 1), "Causal offset=1073741825 must be .* at most 1073741824"),
        (lambda: Causal() & DENSE, r"what & joins=array\(.*\) is not a rule; an array goes in as Dense"),
        (lambda: Causal() | 3, "what | joins=3 is not a rule"),
        (lambda: PerHead([Causal()]), r"PerHead rule 0=\[Causal\(offset=0\)\] is not a rule"),
        (lambda: PerHead().describe(16), "has no head to describe"),
        (lambda: Causal().describe(0), "length=0 must be an integer of at least 1"),
        (lambda: Causal().describe(16, -1), "block=-1 must be an integer of at least 1"),
        (lambda: Dense(None).mask(T, S), "Dense mask=None is not an array"),
        (lambda: Segments([[1, 2], [3]]).mask(T, S), r"Segments query_ids=\[\[1, 2\], \[3\]\] is not an array"),
        (lambda: Padding(QUERY_IDS).mask(T, S), r"Padding lengths is of int32 and shape \(3, 7\); .* \[B\]"),
        (lambda: Padding(jnp.ones(3)).mask(T, S), r"Padding lengths is of float32 .* integers \[B\]"),
        (lambda: Segments(KEY_IDS).mask(T, T), "Segments query ids have 5 positions; T=7"),
        (lambda: Segments(QUERY_IDS).mask(T, S), "Segments key ids have 7 positions; S=5"),
        (lambda: Segments(QUERY_IDS, KEY_IDS[:2]).mask(T, S), "3 rows of query ids and 2 of key ids"),
        (lambda: Dense(jnp.zeros((T, S))).mask(T, S), "Dense mask is of float32; it must be boolean"),
        (lambda: Dense(DENSE).mask(T, T), r"shape \(3, 2, 7, 5\) does not broadcast to \[B, H, T=7, S=7\]"),
        (lambda: Dense(DENSE[None]).mask(T, S), "does not broadcast"),
        (lambda: PerHead(PerHead(Full(), Causal()), Full()).mask(T, S), "PerHead rule 0 tells 2 heads apart"),
        (lambda: (Padding(LENGTHS) & Padding(LENGTHS[:2])).mask(T, S), r"different numbers of examples: \[2, 3\]"),
    ],
)
def test_wrong_rule_is_refused_in_one_line(make, message):
    with pytest.raises(UserError, match=message) as error:
        make()
    assert "\n" not in str(error.value)
