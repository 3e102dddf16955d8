"""What routing and spans cost, counted by hand and in the built model."""

import jax
import pytest
from flax import nnx

from mha_jax.models.cost import active_flops_per_token, flops_per_token, matched_d_ff, parameters
from mha_jax.models.transformer import build_model
from mha_jax.specs import RoutingSpec, SpanSpec

MOH, MOA = RoutingSpec(kind="moh", shared=1, top_k=1), RoutingSpec(kind="moa", top_k=2)


@pytest.mark.parametrize("task", ["lm", "translation"])
@pytest.mark.parametrize(
    "model", [{"routing": MOH}, {"routing": MOA, "num_kv_heads": 1}, {"adaptive_span": SpanSpec(max_span=5)}], ids=str
)
def test_parameters_are_those_of_the_built_model(make_run, task, model):
    if task == "translation" and "adaptive_span" in model:
        task = "classification"
    run = make_run(task, **model)
    built = nnx.eval_shape(lambda: build_model(run, rngs=nnx.Rngs(0)))
    assert parameters(run) == sum(x.size for x in jax.tree.leaves(nnx.state(built, nnx.Param)))


def test_flops_are_those_of_all_heads_and_active_flops_those_of_the_heads_in_use(make_run):
    # D=11, H=3, K=4, V=5, F=13, L=2, S=7; the router scores 3 heads and 2 parts, a token uses 2 of 3 heads
    plain, routed = make_run("lm"), make_run("lm", routing=MOH)
    router = 2 * 2 * 11 * (3 + 2)
    assert flops_per_token(routed) == flops_per_token(plain) + router
    idle = 2 * (2 * 11 * 4 + 2 * 5 * 11 + 2 * 7 * 4 + 2 * 7 * 5)
    assert active_flops_per_token(routed) == flops_per_token(routed) - idle
    assert active_flops_per_token(plain) == flops_per_token(plain)


def test_matching_takes_a_plain_model_for_the_base(make_run):
    base = {"num_heads": 3, "qk_dim": 4, "v_dim": 5}
    run = make_run("lm", match="params", match_base=base, routing=MOH)
    # Each of two routers has 11 * 5 parameters, and a unit of F costs 23.
    assert matched_d_ff(run) == 13 - round(11 * 5 / 23)
