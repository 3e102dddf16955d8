import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import logsumexp

from mha_jax.models.cache import cached_step, empty_cache, read_memory
from mha_jax.models.cost import kv_cache_bytes_per_token
from mha_jax.models.decoding import generate, translate
from mha_jax.models.transformer import build_model
from mha_jax.specs import BOS, EOS, MASK, PAD, UserError

SOURCE = jnp.array([[5, 9, 7, 2, 0], [8, 4, 2, 0, 0], [6, 6, 9, 5, 2]])
SMALL = jnp.array([[5, 4, 6, 2, 0], [6, 4, 2, 0, 0], [6, 6, 4, 5, 2]])
LENGTHS = jnp.array([4, 3, 5])
SHAPES = {
    "MHA": {},
    "GQA with rope": {"num_heads": 6, "num_kv_heads": 2, "positions": "rope"},
    "MQA after Vaswani": {"num_heads": 3, "num_kv_heads": 1, "positions": "sinusoidal", "norm": "post"},
    "ragged": {"num_heads": 5, "num_kv_heads": 2, "head_to_group": (0, 0, 1, 0, 1), "use_bias": True},
    "a layer without heads": {"num_heads": (0, 3), "positions": "none"},
    "heads by kind in float64": {"num_heads": {"encoder": 2, "decoder": 3, "cross": 1}, "dtype": "float64"},
}


def build(run, tokens=None, seed=0):
    """A model with sharp logits and loud attention, or no search could tell whose cache it reads.

    With `tokens` the vocabulary is cut to so many.
    """
    model = build_model(run, rngs=nnx.Rngs(seed))
    model.tokens.embedding = nnx.Param(2 * model.tokens.embedding[...][:tokens])
    for block in model.decoder.blocks:
        block.attention.out.kernel[...] = 8 * block.attention.out.kernel[...]
    return model


# Tests that ask for no other length or beam share one program.
@functools.partial(nnx.jit, static_argnames=("max_length", "beam_size", "length_penalty"))
def search(model, source=SOURCE, lengths=LENGTHS, *, max_length=9, beam_size=4, length_penalty=0.6):
    return translate(model, source, lengths, max_length=max_length, beam_size=beam_size, length_penalty=length_penalty)


@nnx.jit
def whole_forward(model, source, lengths, target):
    return model(source, lengths, target)


@nnx.jit
def whole_language_model(model, tokens):
    return model(tokens)


@pytest.fixture
def translator(make_run):
    return build(make_run("translation"))


@nnx.jit
def whole_and_step_by_step(model, target):
    memory = read_memory(model.decoder, model.encode(SOURCE, LENGTHS), LENGTHS)

    def step(cache, t_and_token):
        t, token_N = t_and_token
        x_N1D, cache = cached_step(model.decoder, model.tokens.embed(token_N[:, None]), t, cache, memory)
        return cache, model.tokens.logits(x_N1D)[:, 0]

    _, logits = jax.lax.scan(step, empty_cache(model.decoder, 3, 7), (jnp.arange(5), target.T))
    return model(SOURCE, LENGTHS, target), logits.swapaxes(0, 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_cached_steps_equal_the_whole_forward(make_run, shape):
    with jax.enable_x64("float64" in shape):
        tolerance = 1e-12 if "float64" in shape else 1e-5
        model = build(make_run("translation", **SHAPES[shape]))
        target = jnp.array([[1, 6, 6, 5, 8], [1, 9, 4, 7, 7], [1, 5, 5, 5, 5]])
        whole, steps = whole_and_step_by_step(model, target)
        assert whole.dtype == ("float64" if "float64" in shape else "float32")
        np.testing.assert_allclose(steps, whole, atol=tolerance, rtol=tolerance)


def test_cache_holds_as_many_bytes_as_cost_says(make_run):
    run = make_run("lm", num_heads=6, num_kv_heads=2, dtype="bfloat16")
    cache = empty_cache(build(run).decoder, 3, 7)
    assert sum(x.nbytes for x in jax.tree.leaves(cache)) == 3 * 7 * kv_cache_bytes_per_token(run)


def greedy(logits_of, prompt, max_length):
    """Token after token, each from the whole forward over all before it; what is still to come is padding."""
    tokens = list(prompt)
    while len(tokens) < max_length:
        padded = jnp.array([tokens + [PAD] * (max_length - len(tokens))])
        scores = np.array(logits_of(padded)[0, len(tokens) - 1])
        scores[[PAD, BOS, MASK]] = -np.inf
        tokens.append(int(scores.argmax()))
        if tokens[-1] == EOS:
            break
    return tokens + [PAD] * (max_length - len(tokens))


@pytest.mark.parametrize("shape", ["GQA with rope", "a layer without heads"])
def test_generate_is_greedy_over_the_whole_forward(make_run, shape):
    model = build(make_run("lm", **SHAPES[shape]), tokens=7)
    prompts, lengths = jnp.array([[5, 4, 6, 0], [4, 4, 5, 6], [6, 0, 0, 0]]), jnp.array([3, 4, 1])
    written = nnx.jit(functools.partial(generate, max_length=11))(model, prompts, lengths)
    logits_of = functools.partial(whole_language_model, model)
    for row in range(3):
        assert written[row].tolist() == greedy(logits_of, prompts[row, : lengths[row]].tolist(), 11)


def test_generate_stops_at_the_end_of_sequence_but_not_at_one_in_the_prompt(make_run):
    model = build(make_run("lm", d_ff=3), tokens=5)
    model.tokens.embedding[...] = model.tokens.embedding[...].at[EOS].mul(30)
    lengths = jnp.array([3, 3, 3, 3, 3])
    prompts = jnp.array([[4, EOS, 4], [4, 4, 4], [4, 4, 3], [3, 4, 4], [4, 3, 3]])
    written = np.asarray(nnx.jit(functools.partial(generate, max_length=9))(model, prompts, lengths))
    assert (written[:, :3] == prompts).all()
    assert (written[:, 3] != PAD).all()
    ended = [row for row in range(5) if EOS in written[row, 3:]]
    assert ended
    for row in ended:
        assert (written[row, 3 + written[row, 3:].tolist().index(EOS) + 1 :] == PAD).all()


def test_drawn_tokens_follow_the_probabilities_and_end_with_the_token_asked_for(make_run):
    model = build(make_run("lm", num_layers=1), tokens=7)
    draw = nnx.jit(functools.partial(generate, max_length=3, end=BOS))
    rows = 4000
    written = np.asarray(draw(model, jnp.full((rows, 1), 5), jnp.ones(rows, int), key=jax.random.key(0)))
    scores = np.array(whole_language_model(model, jnp.array([[5, 0, 0]]))[0, 0])
    scores[[PAD, MASK]] = -np.inf
    wanted = np.exp(scores) / np.exp(scores).sum()
    # Four standard deviations of a share of 4000 draws.
    np.testing.assert_allclose(np.bincount(written[:, 1], minlength=7) / rows, wanted, atol=4 * 0.5 / rows**0.5)
    ended = written[:, 1] == BOS
    assert ended.any() and (written[ended, 2] == PAD).all() and (written[~ended, 2] != PAD).all()


@pytest.mark.slow
def test_beam_of_one_is_greedy_over_the_whole_forward(make_run):
    model = build(make_run("translation", **SHAPES["MQA after Vaswani"]))
    tokens, scores = search(model, beam_size=1)
    for row in range(3):

        def logits_of(target, row=row):
            return np.asarray(whole_forward(model, SOURCE, LENGTHS, jnp.tile(target, (3, 1))))[row : row + 1]

        assert [BOS, *tokens[row].tolist()] == greedy(logits_of, [BOS], 10)
    np.testing.assert_allclose(scores, log_probabilities(model, tokens), rtol=1e-5)


def log_probabilities(model, tokens, source=SOURCE):
    """Of each row's tokens up to the padding, from the whole forward."""
    tokens = np.asarray(tokens)
    target = np.concatenate([np.full((len(tokens), 1), BOS), tokens], axis=1)
    logits = np.asarray(whole_forward(model, source, LENGTHS, jnp.asarray(target)), np.float64)[:, :-1]
    logs = np.take_along_axis(logits, tokens[..., None], -1)[..., 0] - logsumexp(logits, axis=-1)
    return (logs * (tokens != PAD)).sum(axis=1)


def penalty(tokens, alpha=0.6):
    return ((5 + (np.asarray(tokens) != PAD).sum(axis=1)) / 6) ** alpha


@pytest.mark.parametrize("alpha", [0.0, 0.6, 6.0])
@pytest.mark.parametrize("sharpness", [1.0, 0.2])
def test_wide_beam_finds_the_best_of_all_translations(make_run, alpha, sharpness):
    # Of seven tokens 4, 5, 6 and EOS can be written: at most 9 hypotheses go on within 3 tokens.
    # Flat logits and a strong penalty make the longest best, after the sum has fallen below the score of the shortest.
    model = build(make_run("translation"), tokens=7)
    model.tokens.embedding[...] = sharpness * model.tokens.embedding[...]
    tokens, scores = search(model, SMALL, max_length=3, beam_size=9, length_penalty=alpha)
    ended = [(*body, EOS) for n in range(3) for body in itertools.product((4, 5, 6), repeat=n)]
    ended = [np.array([y + (PAD,) * (3 - len(y))] * 3) for y in ended]
    score = np.stack([log_probabilities(model, y, SMALL) / penalty(y, alpha) for y in ended])
    for row, best in enumerate(score.argmax(axis=0)):
        assert tokens[row].tolist() == ended[best][row].tolist()
        np.testing.assert_allclose(scores[row], score[best, row], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 3])
def test_scores_are_those_of_the_returned_translations(make_run, seed):
    # Hypotheses change places in the beam: a cache that does not follow them gives other scores.
    model = build(make_run("translation"), tokens=13, seed=seed)
    source = SOURCE % 13
    tokens, scores = search(model, source)
    np.testing.assert_allclose(scores, log_probabilities(model, tokens, source) / penalty(tokens), rtol=1e-4)


@pytest.mark.slow
def test_unended_translations_return_the_best_hypothesis(make_run):
    model = build(make_run("translation"))
    model.tokens.embedding[...] = model.tokens.embedding[...].at[EOS].set(0)
    tokens, scores = search(model)
    unended = ~(np.asarray(tokens) == EOS).any(axis=1)
    assert unended.any()
    expected = log_probabilities(model, tokens) / ((5 + 9) / 6) ** 0.6
    np.testing.assert_allclose(np.asarray(scores)[unended], expected[unended], rtol=1e-5)


@pytest.mark.slow
def test_a_batch_is_translated_as_its_sentences_one_by_one(make_run):
    model = build(make_run("translation", **SHAPES["GQA with rope"]))
    tokens, scores = search(model)
    for row in range(3):
        alone_tokens, alone_scores = search(model, SOURCE[row : row + 1], LENGTHS[row : row + 1])
        assert alone_tokens[0].tolist() == tokens[row].tolist()
        np.testing.assert_allclose(alone_scores[0], scores[row], rtol=1e-5)


def test_padding_of_the_source_changes_no_translation(translator):
    found = [search(translator, source) for source in (SOURCE, SOURCE.at[0, 4:].set(9).at[1, 3:].set(7))]
    assert (found[0][0] == found[1][0]).all()
    assert (found[0][1] == found[1][1]).all()


def test_what_follows_the_end_is_padding_and_specials_are_never_written(translator):
    tokens, _ = search(translator)
    for row in tokens.tolist():
        body = row[: row.index(EOS)] if EOS in row else row
        assert not {PAD, BOS, MASK} & set(body)
        assert set(row[len(body) + 1 :]) <= {PAD}


@pytest.mark.slow
def test_translators_of_several_seeds_search_as_one(make_run):
    models = [build(make_run("translation"), seed=seed) for seed in range(2)]
    graph, _ = nnx.split(models[0])
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(nnx.state(model) for model in models))

    def one_seed(state):
        return translate(nnx.merge(graph, state), SOURCE, LENGTHS, max_length=9, beam_size=4, length_penalty=0.6)

    tokens, scores = jax.jit(jax.vmap(one_seed))(stacked)
    for seed, model in enumerate(models):
        alone_tokens, alone_scores = search(model)
        assert tokens[seed].tolist() == alone_tokens.tolist()
        np.testing.assert_allclose(scores[seed], alone_scores, rtol=1e-5)


def test_lengths_beyond_the_positions_are_refused(make_run, translator):
    with pytest.raises(UserError, match=r"max_length=18 must be between 1 and model.max_length=17"):
        translate(translator, SOURCE, LENGTHS, max_length=18, beam_size=2, length_penalty=0.6)
    model = build(make_run("lm"))
    with pytest.raises(UserError, match=r"max_length=3 is shorter than the prompts, which are 5 tokens long"):
        generate(model, SOURCE, LENGTHS, max_length=3)
