"""The TPU kernel, interpreted, against the reference: outputs, gradients, and what it refuses."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import Causal, Dense, Full, Global, Padding, PerHead, Rule, Segments, SlidingWindow
from mha_jax.attention.backends import einsum, splash
from mha_jax.attention.backends.call import Call, regular_groups

pytestmark = pytest.mark.slow  # interpreted kernels take seconds each

B = 2
NOTHING = ~Full()


class Cell(NamedTuple):
    rule: Rule
    queries: int = 131
    keys: int = 131
    heads: int = 4
    num_groups: int = 2
    qk_dim: int = 3
    v_dim: int = 5
    groups: tuple[int, ...] | None = None
    dtype: Any = jnp.float32

    def call(self, dropout_rate=0.0):
        groups = self.groups or regular_groups(self.heads, self.num_groups)
        assert groups is not None
        sizes = self.queries, self.keys, self.heads, groups, self.num_groups, self.qk_dim, self.v_dim
        return Call(B, *sizes, jnp.dtype(self.dtype), self.rule, dropout_rate)

    def arrays(self):
        shapes = [
            (B, self.queries, self.heads, self.qk_dim),
            (B, self.keys, self.num_groups, self.qk_dim),
            (B, self.keys, self.num_groups, self.v_dim),
            (B, self.queries, self.heads, self.v_dim),
        ]
        rng = np.random.default_rng(0)
        return [jnp.asarray(rng.normal(size=shape).astype(self.dtype)) for shape in shapes]


def program(backends, cell, scale=0.6):
    """For each backend the output and the gradients for q, k and v; what of the rule may be traced is."""
    leaves, structure = jax.tree.flatten(cell.rule)
    dynamic = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def objective(backend, arrays, dynamic):
        rule = structure.unflatten([dynamic.get(i, leaf) for i, leaf in enumerate(leaves)])
        call = cell._replace(rule=rule).call()
        assert backend.refusal(call) is None
        o = backend.attend(*arrays[:3], rule=rule, dropout_rate=0.0, dropout_keys=None, scale=scale, groups=call.groups)
        return (o.astype(jnp.float32) * arrays[3].astype(jnp.float32)).sum(), o

    def run(arrays, dynamic):
        slopes = jax.value_and_grad(objective, argnums=1, has_aux=True)
        found = [slopes(backend, arrays, dynamic) for backend in backends]
        return [{"o": o, "q": dq, "k": dk, "v": dv} for (_, o), (dq, dk, dv, _) in found]

    compiled = jax.jit(run)
    return lambda arrays: jax.device_get(compiled(arrays, dynamic))


def assert_same(found, expected, forward=1e-5, backward=1e-4):
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        value, mine = (np.asarray(x, np.float32) for x in (value, found[name]))
        bound = forward if name == "o" else backward * max(1, np.abs(value).max())
        np.testing.assert_allclose(mine, value, rtol=0, atol=bound, err_msg=name)


def test_windows_and_padding_match_and_no_nan_gets_out_of_what_nobody_sees():
    # Example 0 hides all keys from 40 on; the queries from 53 on, whose window lies behind them, see nothing.
    cell = Cell(Causal() & SlidingWindow(14) & Padding(jnp.array([40, 131])))
    both, (q, k, v, c) = program((splash, einsum), cell), map(np.array, cell.arrays())
    expected = both([q, k, v, c])[1]
    q, k, v = q.copy(), k.copy(), v.copy()
    for x, hidden in ((q, 53), (k, 40), (v, 40)):
        x[0, hidden:] = np.nan
    found = both([q, k, v, c])[0]
    assert_same(found, expected)
    for name, hidden in (("o", 53), ("q", 53), ("k", 40), ("v", 40)):
        assert np.all(found[name][0, hidden:] == 0)


ids = np.cumsum(np.random.default_rng(0).random((B, 137)) < 0.1, axis=1).astype(np.int32)
segments, shuffled = jnp.asarray(ids), jnp.asarray(ids[:, ::-1])
dense = np.random.default_rng(1).random((4, 131, 131)) < 0.05
dense[:, 17:19], dense[..., 23:29] = False, False
CELLS = {
    "full mha": Cell(Full(), 127, 127, 3, 3),
    "full mqa at a block": Cell(Full(), 128, 128, 3, 1, 7, 2),
    "causal gqa above a block": Cell(Causal(), 129, 129, 6, 2, 16, 64),
    "causal, first rows empty": Cell(Causal(-5), 131, 257, 4, 1),
    "window over three tiles a side": Cell(Causal() & SlidingWindow(37), 389, 389, 2, 2),
    "window and global": Cell(SlidingWindow(11) | Global(3), 257, 131),
    "one key": Cell(Full(), 61, 1),
    "one query": Cell(Causal(60), 1, 61),
    "per head, ragged": Cell(PerHead(Causal() & SlidingWindow(9), Full(), NOTHING, ~Causal()), groups=(1, 0, 1, 1)),
    "per head with padding": Cell(PerHead(Causal(), Full(), NOTHING, Global(2)) & Padding(jnp.array([0, 77]))),
    "dense with empty rows and columns": Cell(Dense(dense)),
    "nothing": Cell(NOTHING),
    "padding twice across": Cell(Padding(jnp.array([9, 61])) & Padding(jnp.array([50, 0])), 7, 61),
    "causal segments": Cell(Causal() & Segments(segments), 137, 137),
    "segments, padding, some rows empty": Cell(
        Causal(-1) & Segments(segments, shuffled) & Padding(jnp.array([90, 137])), 137, 137
    ),
    "ids at the ends of their type": Cell(
        Segments(jnp.where(segments % 2 == 0, -(2**31), 2**31 - 1)) & Padding(jnp.array([60, 137])), 137, 137
    ),
}


@pytest.mark.parametrize("name", CELLS)
def test_outputs_and_gradients_match_the_reference(name):
    cell = CELLS[name]
    assert_same(*program((splash, einsum), cell)(cell.arrays()))


def test_bfloat16_is_as_near_to_float32_as_the_reference_in_bfloat16():
    cell = Cell(Causal() & Padding(jnp.array([40, 131])), qk_dim=17, v_dim=11, dtype=jnp.bfloat16)
    arrays = cell.arrays()
    (exact,) = program((einsum,), cell._replace(dtype=jnp.float32))([x.astype(jnp.float32) for x in arrays])
    found, reference = program((splash, einsum), cell)(arrays)
    for name, value in exact.items():
        mine, its = (np.abs(np.asarray(x[name], np.float32) - value).max() for x in (found, reference))
        assert found[name].dtype == jnp.bfloat16
        assert mine <= 2 * its


def test_seeds_together_are_seeds_one_by_one():
    @jax.jit
    def attended(q, k, v, lengths):
        rule = Causal() & Padding(lengths)
        return splash.attend(q, k, v, rule=rule, dropout_rate=0.0, dropout_keys=None, scale=1.0, groups=(0, 0, 1, 1))

    q, k, v, _ = (np.stack([x, x[::-1]]) for x in map(np.asarray, Cell(Full()).arrays()))
    lengths = np.array([[31, 131], [7, 64]])
    together = jax.vmap(attended)(q, k, v, lengths)
    for seed in range(2):
        np.testing.assert_allclose(together[seed], attended(q[seed], k[seed], v[seed], lengths[seed]), atol=1e-6)


def test_no_heads_and_no_keys_give_zeros():
    for cell in (Cell(Full(), heads=0), Cell(Full(), keys=0)):
        q, k, v, _ = cell.arrays()
        groups = (0, 0, 1, 1)[: cell.heads]
        o = splash.attend(q, k, v, rule=cell.rule, dropout_rate=0.0, dropout_keys=None, scale=1.0, groups=groups)
        assert o.shape == (B, 131, cell.heads, 5) and not o.any()


def test_free_ids_are_none_of_those_taken():
    taken = jnp.array([[0, 1, 2, 3], [3, 2, 0, 0], [-1, 9, 2**31 - 1, -(2**31)], [1, 2, 3, 4]])
    assert splash._free_id(taken).tolist() == [[4], [1], [0], [0]]


LENGTHS = jnp.array([40, 131])
IDS = jnp.zeros((B, 131), jnp.int32)
REFUSED = {
    "two segments": (Cell(Segments(IDS) & Segments(IDS)), "one Segments"),
    "traced padding under or": (Cell(Causal() | Padding(LENGTHS)), "known before the program runs"),
    "traced padding of one head": (
        Cell(PerHead(Full(), Full(), Full(), Padding(LENGTHS))), "known before the program runs"
    ),
    "traced dense": (Cell(Dense(jnp.ones((131, 131), bool))), "known before the program runs"),
    "dense by example": (Cell(Dense(np.ones((B, 1, 131, 131), bool))), "same for all examples"),
    "float16": (Cell(Full(), dtype=jnp.float16), "float32 and bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_it_cannot_do_and_says_what_would_do(name):
    cell, reason = REFUSED[name]
    leaves, structure = jax.tree.flatten(cell.rule)
    static = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, jax.Array)}
    found = []

    def ask(leaves):
        rule = structure.unflatten([static.get(i, leaf) for i, leaf in enumerate(leaves)])
        found.append(splash.refusal(cell._replace(rule=rule).call()))

    jax.eval_shape(ask, leaves)
    assert reason in found[0] and "would do" in found[0]


def test_refuses_dropout_and_64_bit():
    assert "dropout_rate=0" in str(splash.refusal(Cell(Full()).call(dropout_rate=0.1)))
    with jax.enable_x64(True):
        assert "32-bit" in str(splash.refusal(Cell(Full()).call()))


def test_takes_what_is_known_though_a_program_is_traced():
    cell = Cell(Causal() | Padding(np.array([9])))
    assert jax.jit(lambda x: x if splash.refusal(cell.call()) is None else None)(0) == 0
