import dataclasses

import jax
import pytest
from flax import nnx

from mha_jax.models.cost import flops_per_token, kv_cache_bytes_per_token, matched_d_ff, parameters
from mha_jax.models.transformer import build_model
from mha_jax.specs import UserError

VASWANI = {
    "num_layers": 6,
    "d_model": 512,
    "num_heads": 8,
    "qk_dim": 64,
    "v_dim": 64,
    "d_ff": 2048,
    "max_length": 512,
    "positions": "sinusoidal",
    "norm": "post",
    "activation": "relu",
}
# 37,000 tokens give 63.0M. Every count that the paper prints for d_model = 256, 512 and 1024 follows from 41,100.
BPE = {"tokenizer": "bpe", "vocab_size": 41_100}
HEADS = [
    {},
    {"num_heads": 6, "num_kv_heads": 2},
    {"num_heads": 6, "num_kv_heads": 1, "use_bias": True},
    {"num_heads": 5, "num_kv_heads": 2, "head_to_group": (0, 0, 1, 0, 1)},
    {"num_heads": (0, 3)},
    {"num_heads": 0, "use_bias": True},
    {"positions": "learned", "norm": "post"},
    {"positions": "sinusoidal", "norm": "pre"},
    {"activation": "swiglu", "normalization": "rms"},
    {"activation": "swiglu", "normalization": "rms", "norm": "post", "use_ff_bias": False},
    {"use_ff_bias": False},
    {"embedding_norm": True},
]


def count_built(run):
    model = nnx.eval_shape(lambda: build_model(run, rngs=nnx.Rngs(0)))
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


# A translator has all kinds of attention and two stacks; in the others the last layers read the norm and the biases.
BUILT = [("translation", model) for model in HEADS]
BUILT += [(task, model) for task in ("lm", "masked_lm", "classification") for model in (HEADS[0], HEADS[2], HEADS[9])]


@pytest.mark.parametrize(("task", "model"), BUILT, ids=str)
def test_parameters_are_those_of_the_built_model(make_run, task, model):
    run = make_run(task, **model)
    assert parameters(run) == count_built(run)


def test_parameters_of_a_language_model_written_out(make_run):
    # D=11, H=3, K=4, V=5, F=13, L=2, 260 tokens, 17 learned positions
    attention = 11 * 3 * 4 + 11 * 3 * 4 + 11 * 3 * 5 + 3 * 5 * 11
    feed_forward = 11 * 13 + 13 + 13 * 11 + 11
    norms = 2 * (2 * 11)
    expected = 260 * 11 + 17 * 11 + 2 * (attention + feed_forward + norms) + 2 * 11
    assert parameters(make_run("lm")) == expected


@pytest.mark.parametrize(("task", "model"), [("masked_lm", {}), ("classification", {"pooling": "first"})])
def test_parameters_of_bert_are_those_of_the_built_model(make_run, task, model):
    run = make_run(task, token_types=2, embedding_norm=True, norm="post", use_bias=True, **model)
    assert parameters(run) == count_built(run)


def test_an_output_table_of_its_own_counts_once_more(make_run):
    untied, tied = make_run("lm", tied_output=False), make_run("lm")
    assert parameters(untied) == count_built(untied) == parameters(tied) + 260 * 11
    assert flops_per_token(untied) == flops_per_token(tied)


def test_a_masked_language_model_costs_its_head_more_than_a_language_model(make_run):
    # D=11, 260 tokens: a dense layer, a norm and a bias for each token
    masked, plain = make_run("masked_lm"), make_run("lm")
    assert parameters(masked) - parameters(plain) == 11 * 11 + 11 + 2 * 11 + 260
    assert flops_per_token(masked) - flops_per_token(plain) == 2 * 11 * 11
    assert kv_cache_bytes_per_token(masked) == 0


def test_flops_of_a_language_model_written_out(make_run):
    # D=11, H=6, G=2, K=4, V=5, F=13, L=2, S=7
    projections = 2 * (11 * 6 * 4 + 11 * 2 * 4 + 11 * 2 * 5 + 6 * 5 * 11)
    square = 2 * 7 * 6 * 4 + 2 * 7 * 6 * 5
    expected = 2 * (projections + square + 2 * 2 * 11 * 13) + 2 * 260 * 11
    assert flops_per_token(make_run("lm", num_heads=6, num_kv_heads=2)) == expected


def test_costs_of_a_language_model_with_swiglu_written_out(make_run):
    # D=11, H=3, K=4, V=5, F=13, L=2, S=7: three products of 11 times 13, norms without a shift
    run = make_run("lm", activation="swiglu", normalization="rms", use_ff_bias=False)
    attention, feed_forward = 2 * 11 * 3 * 4 + 2 * 11 * 3 * 5, 3 * 11 * 13
    assert parameters(run) == 260 * 11 + 17 * 11 + 2 * (attention + feed_forward + 2 * 11) + 11
    square = 2 * 7 * 3 * 4 + 2 * 7 * 3 * 5
    assert flops_per_token(run) == 2 * (2 * attention + square + 2 * feed_forward) + 2 * 260 * 11


def test_flops_of_a_translator_count_source_and_target_stack(make_run):
    # three attentions a layer, two feed-forward blocks, one look at the vocabulary
    attention = 2 * (2 * 11 * 3 * 4 + 2 * 11 * 3 * 5) + 2 * 7 * 3 * (4 + 5)
    expected = 2 * (3 * attention + 2 * 2 * 2 * 11 * 13) + 2 * 260 * 11
    assert flops_per_token(make_run("translation")) == expected


def test_flops_of_a_classifier_leave_out_the_vocabulary(make_run):
    attention = 2 * (2 * 11 * 3 * 4 + 2 * 11 * 3 * 5) + 2 * 7 * 3 * (4 + 5)
    assert flops_per_token(make_run("classification")) == 2 * (attention + 2 * 2 * 11 * 13)


@pytest.mark.parametrize(
    ("changes", "millions"),
    [
        ({}, 65),
        ({"qk_dim": 16}, 58),
        ({"qk_dim": 32}, 60),
        ({"num_layers": 2}, 36),
        ({"num_layers": 4}, 50),
        ({"num_layers": 8}, 80),
        ({"d_model": 256, "qk_dim": 32, "v_dim": 32}, 28),
        ({"d_model": 1024, "qk_dim": 128, "v_dim": 128}, 168),
        ({"d_ff": 1024}, 53),
        ({"d_ff": 4096}, 90),
    ],
    ids=str,
)
def test_parameters_of_vaswani_table_3(make_run, changes, millions):
    assert round(parameters(make_run("translation", data=BPE, **(VASWANI | changes))) / 1e6) == millions


def test_parameters_of_vaswani_base_with_37000_tokens_written_out(make_run):
    attention, feed_forward, norm = 4 * 512 * 512, 2 * 512 * 2048 + 2048 + 512, 2 * 512
    encoder = 6 * (attention + feed_forward + 2 * norm)
    decoder = 6 * (2 * attention + feed_forward + 3 * norm)
    run = make_run("translation", data=BPE | {"vocab_size": 37_000}, **VASWANI)
    assert parameters(run) == 37_000 * 512 + encoder + decoder == 63_045_632


@pytest.mark.parametrize(("num_heads", "width"), [(1, 512), (4, 128), (16, 32), (32, 16)])
def test_heads_at_fixed_width_cost_the_same(make_run, num_heads, width):
    base = make_run("translation", data=BPE, **VASWANI)
    cell = make_run("translation", data=BPE, **(VASWANI | {"num_heads": num_heads, "qk_dim": width, "v_dim": width}))
    assert parameters(cell) == parameters(base)
    assert flops_per_token(cell) == flops_per_token(base)
    assert kv_cache_bytes_per_token(cell) == kv_cache_bytes_per_token(base)


BASE = {"num_heads": 3, "num_kv_heads": None, "qk_dim": 4, "v_dim": 5}


@pytest.mark.parametrize("task", ["lm", "translation", "classification"])
@pytest.mark.parametrize("heads", [{"num_heads": 1}, {"num_heads": 4}, {"num_kv_heads": 1}, {"qk_dim": 2}], ids=str)
def test_matching_lands_within_half_a_unit_of_the_base(make_run, task, heads):
    layers = 4 if task == "translation" else 2
    for match, cost, unit in (("params", parameters, 23), ("flops", flops_per_token, 44)):
        cell = make_run(task, match=match, match_base=BASE, d_ff=53, **heads)
        assert abs(cost(cell) - cost(make_run(task, d_ff=53))) <= layers * unit / 2
        assert matched_d_ff(cell) != 53


def test_matching_is_what_the_built_model_has(make_run):
    run = make_run("lm", match="params", match_base=BASE, num_heads=1)
    assert parameters(run) == count_built(run)
    # two heads of 4 + 4 + 5 + 5 columns are gone; 23 parameters buy one unit
    assert matched_d_ff(run) == 13 + round(2 * 18 * 11 / 23)


def test_a_unit_of_swiglu_is_three_columns_and_two_biases(make_run):
    swiglu = {"activation": "swiglu", "num_heads": 1, "match_base": BASE}
    # two heads of 4 + 4 + 5 + 5 columns are gone, and their share of the 2 * 7 * (4 + 5) FLOPs of the square
    assert matched_d_ff(make_run("lm", match="params", **swiglu)) == 13 + round(2 * 18 * 11 / 35)
    assert matched_d_ff(make_run("lm", match="flops", **swiglu)) == 13 + round(2 * (2 * 18 * 11 + 14 * 9) / 66)


def test_the_base_matches_itself(make_run):
    for match in ("none", "params", "flops"):
        assert matched_d_ff(make_run("lm", match=match, match_base=BASE)) == 13


def test_matching_by_kind_of_attention(make_run):
    base = {"num_heads": {"encoder": 3, "decoder": 2, "cross": 1}, "qk_dim": 4, "v_dim": 5}
    cell = make_run("translation", match="params", match_base=base, num_heads=2)
    assert matched_d_ff(cell) == 13  # 3 + 2 + 1 heads a layer, as in 2 + 2 + 2


def test_attention_dearer_than_the_base_is_refused(make_run):
    run = make_run("lm", match="params", match_base=BASE, num_heads=30)
    with pytest.raises(UserError, match=r"num_heads=30 alone costs more than the base; a model.d_ff of at least 233"):
        matched_d_ff(run)
    assert matched_d_ff(dataclasses.replace(run, model=dataclasses.replace(run.model, d_ff=233))) == 1


def test_a_base_that_is_no_head_shape_is_refused(make_run):
    with pytest.raises(UserError, match=r"match_base has 'd_model'"):
        matched_d_ff(make_run("lm", match="params", match_base={"d_model": 3}))


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4), ("float64", 8)])
def test_cache_bytes(make_run, dtype, size):
    heads = {"num_heads": 6, "num_kv_heads": {"encoder": 6, "decoder": 2, "cross": 3}, "dtype": dtype}
    per_layer = {"lm": 2 * (4 + 5), "translation": 2 * (4 + 5) + 3 * (4 + 5), "classification": 0}
    for task, numbers in per_layer.items():
        assert kv_cache_bytes_per_token(make_run(task, **heads)) == 2 * numbers * size
