"""The four models: what they read, how dropout, starts and types go, and that all of it is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mha_jax.attention.visibility import Full
from mha_jax.models.transformer import build_model
from mha_jax.specs import UserError

SOURCE = jnp.array([[5, 9, 7, 2, 0], [8, 4, 2, 0, 0]])
LENGTHS = jnp.array([4, 3])
TARGET = jnp.array([[1, 6, 6, 5], [1, 9, 4, 7]])
TOKENS = jnp.array([[5, 9, 7, 200, 11, 6, 8], [8, 4, 77, 12, 12, 4, 9]])
SHAPES = [
    {},
    {"num_heads": 6, "num_kv_heads": 2, "positions": "rope"},
    {"num_heads": (4, 0), "num_kv_heads": (2, 0), "positions": "sinusoidal", "norm": "post"},
    {"num_heads": 0, "positions": "none"},
]
DROPOUT = {"dropout_rate": 0.2, "attention_dropout_rate": 0.3}


def build(run, seed=0):
    return build_model(run, rngs=nnx.Rngs(seed))


@nnx.jit  # op by op, a first forward takes many times as long
def call(model, *args, **kwargs):
    return model(*args, **kwargs)


def inputs(task):
    if task == "lm":
        return (TOKENS,)
    return (SOURCE, LENGTHS, TARGET) if task == "translation" else (TOKENS, jnp.array([6, 3]))


def example_keys(seed, rows=2):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(rows))


def test_types_are_refused_where_the_model_has_none(make_run):
    with pytest.raises(UserError, match=r"model\.token_types=0"):
        call(build(make_run("masked_lm", num_layers=1)), TOKENS, jnp.array([6, 3]), types=jnp.zeros_like(TOKENS))


def test_embeddings_without_scale_enter_as_they_are(make_run):
    model = build(make_run("lm", scale_embedding=False))
    seen = model.decoder.enter(model.tokens.embed(TOKENS), jnp.arange(7))
    positions = model.decoder.positions.embedding[...][None, :7]
    np.testing.assert_array_equal(seen, model.tokens.embedding[...][TOKENS] + positions)


def test_classifier_is_linear_in_the_mean_over_real_positions(make_run):
    model = build(make_run("classification"))
    lengths = jnp.array([6, 3])
    seen = []
    for row, length in enumerate(lengths):
        tokens = TOKENS[row : row + 1, :length]
        vectors = nnx.jit(lambda m, tokens=tokens: m.encoder(m.tokens.embed(tokens), Full()))(model)
        seen.append(np.asarray(vectors[0].mean(axis=0)))
    expected = np.stack(seen) @ np.asarray(model.classes.kernel[...]) + np.asarray(model.classes.bias[...])
    np.testing.assert_allclose(call(model, TOKENS, lengths), expected, atol=1e-5)


def test_classifier_of_an_empty_row_is_finite(make_run):
    assert np.isfinite(call(build(make_run("classification")), TOKENS, jnp.array([0, 7]))).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_language_model_sees_no_later_token(make_run, shape):
    model = build(make_run("lm", **shape))
    changed = TOKENS.at[:, 4].add(1)
    before, after = np.asarray(call(model, TOKENS)), np.asarray(call(model, changed))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert not np.allclose(before[:, 4], after[:, 4])


def test_segments_do_not_see_each_other(make_run):
    model = build(make_run("lm"))
    segments = jnp.array([[0, 0, 0, 1, 1, 1, 1]] * 2)
    changed = TOKENS.at[:, 1].add(1)
    before, after = (np.asarray(call(model, tokens, segments=segments)) for tokens in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, 3:], after[:, 3:])
    assert not np.allclose(before[:, 2], after[:, 2])
    assert not np.allclose(np.asarray(call(model, TOKENS))[:, 3:], before[:, 3:])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_translator_reads_neither_padding_nor_later_target_tokens(make_run, shape):
    model = build(make_run("translation", **shape))
    padded, later = SOURCE.at[0, 4:].set(77).at[1, 3:].set(78), TARGET.at[:, 2].set(99)
    before = np.asarray(call(model, SOURCE, LENGTHS, TARGET))
    np.testing.assert_array_equal(before, call(model, padded, LENGTHS, TARGET))
    np.testing.assert_array_equal(before[:, :2], np.asarray(call(model, SOURCE, LENGTHS, later))[:, :2])


def test_translator_reads_every_real_source_token(make_run):
    model = build(make_run("translation"))
    before = np.asarray(call(model, SOURCE, LENGTHS, TARGET))
    for place in range(3):
        changed = SOURCE.at[:, place].add(1)
        assert not np.allclose(before, call(model, changed, LENGTHS, TARGET), atol=1e-4)


@pytest.mark.parametrize("task", ["lm", "translation", "classification"])
def test_dropout_needs_keys_and_depends_on_each(make_run, task):
    model = build(make_run(task, num_layers=1, **DROPOUT))
    still = build(make_run(task, num_layers=1))
    np.testing.assert_array_equal(call(model, *inputs(task)), call(still, *inputs(task)))
    once, again, other = (np.asarray(call(model, *inputs(task), dropout_keys=example_keys(seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(once, again)
    assert not np.allclose(once, other)
    assert not np.allclose(once, call(model, *inputs(task)))


@pytest.mark.parametrize("task", ["lm", "masked_lm", "translation", "classification"])
def test_dropout_of_an_example_does_not_depend_on_the_batch(make_run, task):
    model = build(make_run(task, num_layers=1, **DROPOUT))
    keys = example_keys(0)
    together = np.asarray(call(model, *inputs(task), dropout_keys=keys))
    for row in range(2):
        alone = call(model, *(x[row : row + 1] for x in inputs(task)), dropout_keys=keys[row : row + 1])
        np.testing.assert_allclose(together[row : row + 1], alone, atol=1e-5)


@pytest.mark.slow
def test_every_use_of_dropout_has_bits_of_its_own(make_run, monkeypatch):
    traced = []

    def spy(x, keys, rate):
        traced.append(jax.random.key_data(keys))
        return x

    @nnx.jit
    def bits(model):
        model(SOURCE, LENGTHS, TARGET, dropout_keys=example_keys(0))
        return list(traced)

    monkeypatch.setattr("mha_jax.models.blocks.dropout", spy)
    model = build(make_run("translation", dropout_rate=0.2))
    used = [words.tobytes() for words in jax.device_get(bits(model))]
    # embeddings of both stacks, then two sublayers a block of the encoder and three of the decoder
    assert len(used) == len(set(used)) == 2 + 2 * 2 + 2 * 3


@pytest.mark.parametrize("task", ["lm", "translation", "classification"])
def test_heads_do_not_shift_what_other_parameters_start_from(make_run, task):
    one, other = (build(make_run(task, **heads)) for heads in ({}, {"num_heads": 6, "num_kv_heads": 1, "qk_dim": 2}))
    states = [dict(nnx.to_flat_state(nnx.state(model, nnx.Param))) for model in (one, other)]
    same = [path for path in states[0] if "attention" not in path and "cross_attention" not in path]
    assert len(same) > 10
    for path in same:
        np.testing.assert_array_equal(states[0][path][...], states[1][path][...], err_msg=str(path))


def test_embeddings_start_at_unit_scale(make_run):
    model = build(make_run("lm", d_model=101, positions="learned"))
    assert abs(float(model.tokens.embed(jnp.arange(260)[None]).std()) - 1) < 0.03
    assert abs(float(call(model, TOKENS).std()) - 1) < 0.3


@pytest.mark.parametrize("task", ["lm", "translation", "classification"])
def test_bfloat16_keeps_parameters_and_logits_in_float32(make_run, task):
    model, exact = (build(make_run(task, num_layers=1, dtype=dtype)) for dtype in ("bfloat16", "float32"))
    assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float32")}
    logits = call(model, *inputs(task))
    assert logits.dtype == jnp.float32
    difference = np.abs(np.asarray(logits) - np.asarray(call(exact, *inputs(task)))).max()
    assert 0 < difference < 0.15


def test_float64_is_float64_throughout(make_run):
    with jax.enable_x64(True):
        model = build(make_run("lm", num_layers=1, dtype="float64"))
        assert {x.dtype for x in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("float64")}
        assert call(model, TOKENS).dtype == jnp.float64


def test_models_of_several_seeds_run_as_one(make_run):
    run = make_run("lm")
    models = [build(run, seed) for seed in range(3)]
    graph, _ = nnx.split(models[0])
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(nnx.state(model) for model in models))
    together = jax.jit(jax.vmap(lambda state: nnx.merge(graph, state)(TOKENS)))(stacked)
    np.testing.assert_allclose(together, np.stack([call(model, TOKENS) for model in models]), atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
def test_more_tokens_than_positions_are_refused(make_run, positions):
    model = build(make_run("lm", positions=positions))
    with pytest.raises(UserError, match=r"a sequence of 18 tokens is longer than model.max_length=17"):
        call(model, jnp.ones((1, 18), int))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rope"])
def test_positions_tell_the_order(make_run, positions):
    # The last token sees the same tokens before it, in another order.
    swapped = TOKENS[:, [1, 0, 2, 3, 4, 5, 6]]
    model = build(make_run("lm", positions=positions, num_layers=1))
    assert not np.allclose(call(model, TOKENS)[:, -1], call(model, swapped)[:, -1], atol=1e-3)
    blind = build(make_run("lm", positions="none", num_layers=1))
    np.testing.assert_allclose(call(blind, TOKENS)[:, -1], call(blind, swapped)[:, -1], atol=1e-5)


@pytest.mark.slow
def test_every_parameter_is_trained(make_run):
    for task in ("lm", "masked_lm", "translation", "classification"):
        graph, params, rest = nnx.split(build(make_run(task, num_layers=1)), nnx.Param, ...)
        loss = lambda p, graph=graph, rest=rest, task=task: (  # noqa: E731
            jax.nn.log_softmax(nnx.merge(graph, p, rest)(*inputs(task)))[..., 2].sum()
        )
        grads = nnx.to_flat_state(jax.jit(jax.grad(loss))(params))
        assert not [path for path, g in grads if not np.abs(np.asarray(g[...])).max() > 0]
