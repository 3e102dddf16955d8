import jax
import jax.numpy as jnp
import numpy as np

from mha_jax.heads.shapes import SHAPES, map_shapes

T = 24
SHAPES_OF = jax.jit(map_shapes)


def shape_of(weights, special=()):
    """The name of one map's shape; a row is made to sum to 1."""
    weights = jnp.asarray(weights / weights.sum(-1, keepdims=True), jnp.float32)[None, None]
    is_special = jnp.isin(jnp.arange(T), jnp.array(special, int))[None]
    visible = jnp.ones((1, 1, T, T), bool)
    found = np.asarray(SHAPES_OF(weights, visible, ~is_special, is_special))[0, 0]
    assert found.sum() == 1
    return SHAPES[found.argmax()]


def test_planted_maps_have_their_shapes():
    even = np.ones((T, T))
    columns = even + 60 * np.isin(np.arange(T), (0, 11))[None]
    diagonal = even + 60 * np.eye(T, k=-1)
    two = np.arange(T) < 12
    blocks = 0.05 + (two[:, None] == two[None])
    found = [shape_of(x) for x in (columns, diagonal, columns + diagonal, blocks, even)]
    assert found[:3] == ["vertical", "diagonal", "vertical+diagonal"]
    # Blocks are known by the special token between them.
    assert shape_of(blocks, special=(11,)) == "block" and found[3:] == ["heterogeneous"] * 2


def test_an_example_without_queries_has_no_shape():
    none = jnp.zeros((1, T), bool)
    weights = jnp.full((1, 1, T, T), 1 / T)
    assert not SHAPES_OF(weights, jnp.ones((1, 1, T, T), bool), none, none).any()
    # Of a text of a single token there is nothing to tell.
    one = jnp.ones((1, 1), bool)
    assert not SHAPES_OF(jnp.ones((1, 1, 1, 1)), one[None, None], one, ~one).any()
