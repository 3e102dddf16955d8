"""Planted heads are found with their scores, and even attention is at chance, exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.heads.roles import CROSS, REPEATED, SELF, RoleSums, RoleTable, Thresholds, Tokens, joined, role_sums

B, T = 40, 13
BOS, COMMA = 1, 5


def texts():
    """Each half is drawn from 30 tokens, and the second is the first again; a comma between, a start, an end."""
    rng = np.random.default_rng(0)
    half = np.stack([rng.permutation(30)[:5] + 10 for _ in range(B)])
    ids = np.concatenate([np.full((B, 1), BOS), half, np.full((B, 1), COMMA), half, np.full((B, 1), 2)], axis=1)
    special = np.isin(ids, (1, 2))
    counts = np.where(ids == COMMA, 900, ids)
    return Tokens(*map(jnp.asarray, (ids, ids, ~special, special, ids == COMMA, counts)))


TOKENS = texts()
CAUSAL = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, 1, T, T))
FULL = jnp.ones((B, 1, T, T), bool)
SUMS = jax.jit(role_sums, static_argnums=3)


def even(visible):
    return visible / visible.sum(-1, keepdims=True)


def at(places):
    """All weight of query t on key places[b, t]; queries with -1 attend evenly."""
    places = np.broadcast_to(places, (B, T))
    one = jax.nn.one_hot(places, T)
    return jnp.where((places >= 0)[..., None], one, 1 / T)[:, None]


def table(weights, visible=FULL, cross=False):
    return RoleTable.of(CROSS if cross else SELF, SUMS(weights, visible, TOKENS, cross))


@pytest.fixture(scope="module")
def planted():
    """Heads of one attention, each doing one thing everywhere."""
    t = np.arange(T)
    ids = np.asarray(TOKENS.keys_BS)
    counted = np.where(np.asarray(TOKENS.special_BS), 10**6, np.asarray(TOKENS.counts_BS))
    repeats = np.where((t > 6) & (t < 12), t - 6, -1)
    after = np.where(repeats >= 0, repeats + 1, -1)
    places = {
        "previous": np.maximum(t - 1, 0), "next": np.minimum(t + 1, T - 1), "same": t, "first": 0 * t,
        "rare": counted.argmin(1)[:, None], "separator": (ids == COMMA).argmax(1)[:, None],
        "duplicate": repeats, "induction": after,
    }  # fmt: skip
    heads = list(places)
    return heads, table(jnp.concatenate([*(at(places[name]) for name in heads), even(FULL)], axis=1))


def test_planted_heads_score_one_and_have_their_role(planted):
    heads, found = planted
    for number, role in enumerate(heads):
        assert found.mean[role][number] == pytest.approx(1, abs=1e-5), role
        assert found.held()[role][number], role
    # Key 0 holds the start token: the head of "first" is a sink too, but there are two of those to hit by chance.
    assert found.held()["sink"].tolist() == [role == "first" for role in [*heads, "even"]]
    assert found.dominant()[: len(heads)] == heads


def test_even_attention_is_at_chance_in_every_role(planted):
    _, found = planted
    for role in SELF:
        assert found.mean[role][-1] == pytest.approx(found.chance[role][-1], abs=1e-5), role
    assert found.dominant()[-1] == "broad"


def test_chance_is_that_of_these_texts_by_hand():
    found = table(even(CAUSAL), CAUSAL)
    # Tokens 1 to 11 ask; query t sees t + 1 keys.
    assert found.chance["previous"][0] == pytest.approx(np.mean([1 / (t + 1) for t in range(1, 12)]), abs=1e-6)
    assert found.chance["separator"][0] == pytest.approx(np.mean([1 / (t + 1) for t in range(6, 12)]), abs=1e-6)
    assert found.chance["long"][0] == pytest.approx(np.mean([t / 2 for t in range(1, 12)]), abs=1e-5)
    assert found.chance["first"][0] == pytest.approx(np.mean([1 / (t + 1) for t in range(2, 12)]), abs=1e-6)
    assert np.isnan(found.mean["next"][0]) and not found.held()["next"][0]


def test_random_attention_is_at_chance_within_its_interval():
    weights = jax.nn.softmax(2 * jax.random.normal(jax.random.key(0), (B, 40, T, T)))
    found = table(weights)
    for role in ("previous", "next", "same", "sink", "separator", "duplicate", "induction"):
        inside = (found.low[role] <= found.chance[role]) & (found.chance[role] <= found.high[role])
        assert inside.mean() >= 0.8, role  # of 40 heads 38 are expected, with a standard deviation of 1.4
    assert set(found.dominant()) == {None}
    assert found.nearest()[1].max() < 0.1  # the best of nine roles and 40 heads: some intervals lie above chance


def test_a_head_that_does_it_four_times_in_five_is_found_with_that_score():
    places = np.where(np.random.default_rng(1).random((B, T)) < 0.8, np.arange(T) - 1, np.arange(T))
    found = table(at(np.maximum(places, 0)))
    assert found.low["previous"][0] < 0.8 < found.high["previous"][0]
    assert not found.held()["previous"][0] and found.held(Thresholds(positional=0.7))["previous"][0]
    [nearest], [strength] = found.nearest()
    score, chance = (part["previous"][0] for part in (found.mean, found.chance))
    assert found.dominant()[0] == "narrow" and nearest == "previous"
    assert found.nearest(but=("previous",))[0] == ["same"]  # one time in five
    assert strength == pytest.approx((score - chance) / (1 - chance))


def test_rules_of_each_head_count_for_chance():
    visible = jnp.concatenate([jnp.broadcast_to(CAUSAL, (B, 1, T, T)), FULL], axis=1)
    both = table(even(visible), visible)
    for number, alone in enumerate((CAUSAL, FULL)):
        one = table(even(alone), alone)
        for role in set(SELF) - {"rare"}:  # the rarest token is that of all heads' keys
            np.testing.assert_allclose(both.chance[role][number], one.chance[role][0], rtol=1e-6)


def test_cross_attention_has_aligned_heads_and_no_induction():
    found = table(jnp.concatenate([at(np.arange(T)), even(FULL)], axis=1), cross=True)
    assert set(found.mean) == set(CROSS) and found.dominant()[0] == "aligned"
    assert found.mean["aligned"][0] == pytest.approx(1) and found.chance["aligned"][0] == pytest.approx(3 / T, abs=1e-2)


def test_induction_on_repeated_tokens_counts_as_induction():
    low = {"induction": np.array([0.1, 0.1]), REPEATED: np.array([0.9, 0.1]), "previous": np.array([0.95, 0.0])}
    chance = {role: np.full(2, 0.05) for role in low}
    found = RoleTable(low, low, low, chance)
    assert found.held()["induction"].tolist() == [True, False] and REPEATED not in found.held()
    assert found.dominant() == ["previous", None]
    one_third = RoleTable(low, {**low, "previous": chance["previous"]}, low, chance)
    assert one_third.nearest()[0] == ["induction", "induction"]
    np.testing.assert_allclose(one_third.nearest()[1], [0.85 / 0.95, 0.05 / 0.95])


def test_joined_examples_are_those_that_count_up_to_a_limit():
    def part(first):
        count = np.array([1.0, 0.0, 1.0])[:, None, None] * np.ones((3, 2, 1))
        return {"a": RoleSums(first + np.arange(3.0)[:, None, None] * count, count, count)}

    found = joined([part(0), part(10)], limit=3)["a"]
    assert found.score[:, 0, 0].tolist() == [0, 2, 10] and found.count.shape == (3, 2, 1)
