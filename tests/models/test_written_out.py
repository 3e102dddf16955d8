"""Published models written out in NumPy, after their papers, against the models here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erf

from mha_jax.models.positions import sinusoidal_table
from mha_jax.models.transformer import build_model

SOURCE = np.array([[5, 9, 7, 2, 0], [8, 4, 2, 0, 0]])
LENGTHS = np.array([4, 3])
TARGET = np.array([[1, 6, 6, 5], [1, 9, 4, 7]])
TOKENS = np.array([[5, 9, 7, 200, 11, 6, 8], [8, 4, 77, 12, 12, 4, 9]])


def build(run):
    return build_model(run, rngs=nnx.Rngs(0))


@nnx.jit
def call(model, *args, **kwargs):
    return model(*args, **kwargs)


def layer_norm(x, norm):
    x = np.asarray(x, np.float64)
    centred = x - x.mean(-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + norm.epsilon)
    return scaled * np.asarray(norm.scale[...]) + np.asarray(norm.bias[...])


def feed_forward(x, layer, activation):
    inside = activation(x @ np.asarray(layer.up.kernel[...]) + np.asarray(layer.up.bias[...]))
    return inside @ np.asarray(layer.down.kernel[...]) + np.asarray(layer.down.bias[...])


def projected(x, projection):
    y = np.einsum("btd,dhk->bhtk", x, np.asarray(projection.kernel[...]))
    return y if projection.bias is None else y + np.asarray(projection.bias[...])[None, :, None, :]


def attention(layer, x, memory, visible):
    q, k, v = projected(x, layer.query), projected(memory, layer.key), projected(memory, layer.value)
    scores = np.where(visible, np.einsum("bhtk,bhsk->bhts", q, k) / np.sqrt(q.shape[-1]), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhts,bhsv,hvd->btd", weights, v, np.asarray(layer.out.kernel[...]))
    return out if layer.out.bias is None else out + np.asarray(layer.out.bias[...])


def with_noise(model, seed=3):
    """Norms and biases that are not one and zero, so that a forgotten one shows."""
    rng = np.random.default_rng(seed)
    leaves, tree = jax.tree.flatten(nnx.state(model, nnx.Param))
    noisy = [jnp.asarray(np.asarray(x) + 0.1 * rng.normal(size=x.shape), x.dtype) for x in leaves]
    nnx.update(model, jax.tree.unflatten(tree, noisy))
    return model


def test_vaswani_model_equals_the_paper_written_out_in_numpy(make_run):
    run = make_run("translation", positions="sinusoidal", norm="post", activation="relu")
    model = with_noise(build(run))
    table = np.asarray(model.tokens.embedding[...], np.float64)
    padding = (np.arange(5)[None, :] < np.asarray(LENGTHS)[:, None])[:, None, None, :]
    causal = np.tril(np.ones((4, 4), bool))[None, None]

    def relu(x):
        return np.maximum(x, 0)

    x = table[SOURCE] * np.sqrt(11) + sinusoidal_table(5, 11)[None]
    for block in model.encoder.blocks:
        x = layer_norm(x + attention(block.attention, x, x, padding), block.attention_norm)
        x = layer_norm(x + feed_forward(x, block.feed_forward, relu), block.feed_forward_norm)
    y = table[TARGET] * np.sqrt(11) + sinusoidal_table(4, 11)[None]
    for block in model.decoder.blocks:
        y = layer_norm(y + attention(block.attention, y, y, causal), block.attention_norm)
        y = layer_norm(y + attention(block.cross_attention, y, x, padding), block.cross_attention_norm)
        y = layer_norm(y + feed_forward(y, block.feed_forward, relu), block.feed_forward_norm)
    np.testing.assert_allclose(call(model, SOURCE, LENGTHS, TARGET), y @ table.T, atol=2e-5)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


GPT2 = {"use_bias": True, "scale_embedding": False, "norm_epsilon": 1e-5}
UNTIED = GPT2 | {"tied_output": False}


@pytest.mark.parametrize(
    ("fields", "scale"), [({}, np.sqrt(11)), (GPT2, 1.0), (UNTIED, 1.0)], ids=["plain", "gpt2", "untied"]
)
def test_pre_norm_language_model_written_out_in_numpy(make_run, fields, scale):
    model = with_noise(build(make_run("lm", positions="learned", norm="pre", activation="gelu", **fields)))
    table = np.asarray(model.tokens.embedding[...], np.float64)
    x = (table[TOKENS] + np.asarray(model.decoder.positions.embedding[...], np.float64)[None, :7]) * scale
    causal = np.tril(np.ones((7, 7), bool))[None, None]
    for block in model.decoder.blocks:
        y = layer_norm(x, block.attention_norm)
        x = x + attention(block.attention, y, y, causal)
        x = x + feed_forward(layer_norm(x, block.feed_forward_norm), block.feed_forward, gelu)
    out = table if fields.get("tied_output", True) else np.asarray(model.tokens.output[...], np.float64)
    expected = layer_norm(x, model.decoder.final_norm) @ out.T
    np.testing.assert_allclose(call(model, TOKENS), expected, atol=1e-4)


BERT = {
    "norm": "post",
    "activation": "gelu_exact",
    "norm_epsilon": 1e-12,
    "use_bias": True,
    "scale_embedding": False,
    "embedding_norm": True,
    "token_types": 2,
}


def exact_gelu(x):
    return x * 0.5 * (1 + erf(x / np.sqrt(2)))


def bert_encoder(model, types, lengths):
    """The last hidden states of BERT (Devlin et al. 2019; norms after the residuals, as Vaswani et al. 2017)."""
    tokens = model.tokens
    x = np.asarray(tokens.embedding[...], np.float64)[TOKENS] + np.asarray(tokens.type_embedding[...])[types]
    x = layer_norm(x + np.asarray(model.encoder.positions.embedding[...])[None, :7], model.encoder.embedding_norm)
    real = (np.arange(7)[None, :] < lengths[:, None])[:, None, None, :]
    for block in model.encoder.blocks:
        x = layer_norm(x + attention(block.attention, x, x, real), block.attention_norm)
        x = layer_norm(x + feed_forward(x, block.feed_forward, exact_gelu), block.feed_forward_norm)
    return x


def test_masked_language_model_can_be_bert_written_out_in_numpy(make_run):
    model = with_noise(build(make_run("masked_lm", **BERT)))
    lengths, types = np.array([6, 7]), np.array([[0, 0, 0, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1]])
    head = model.head
    x = bert_encoder(model, types, lengths) @ np.asarray(head.dense.kernel[...]) + np.asarray(head.dense.bias[...])
    expected = layer_norm(exact_gelu(x), head.norm) @ np.asarray(model.tokens.embedding[...], np.float64).T
    found = call(model, TOKENS, lengths, types=types)
    # Ten times what float32 rounds; the tanh approximation of gelu would be off by 3e-4 and more.
    np.testing.assert_allclose(found[0, :6], (expected + np.asarray(head.bias[...]))[0, :6], atol=1e-5)
    np.testing.assert_allclose(found[1], (expected + np.asarray(head.bias[...]))[1], atol=1e-5)


def test_classifier_can_read_the_first_token_as_bert_does(make_run):
    model = with_noise(build(make_run("classification", pooling="first", **BERT)))
    lengths = np.array([6, 3])
    x = bert_encoder(model, np.zeros((2, 7), int), lengths)[:, 0]
    pooled = np.tanh(x @ np.asarray(model.pooler.kernel[...]) + np.asarray(model.pooler.bias[...]))
    expected = pooled @ np.asarray(model.classes.kernel[...]) + np.asarray(model.classes.bias[...])
    np.testing.assert_allclose(call(model, TOKENS, lengths), expected, atol=1e-5)
