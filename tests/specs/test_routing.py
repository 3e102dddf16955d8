"""Routing and spans in a config: faults are one line before anything is built."""

import dataclasses

import pytest

from configs import default
from mha_jax.config import override, resolve
from mha_jax.specs import RoutingSpec, SpanSpec, UserError
from tests import tiny

MOH = {"model__routing__kind": "moh"}
WRONG = [
    ({"model__routing__kind": "moe"}, "model.routing.kind='moe' is not one of 'none', 'moh', 'moa'"),
    ({"model__routing__top_k": 0}, "model.routing.top_k=0 must be an integer of at least 1"),
    ({"model__routing__balance_weight": -1.0}, "model.routing.balance_weight=-1.0 must be a number of at least 0"),
    ({**MOH, "model__routing__top_k": 5}, "model.routing.top_k=5 is more than the 4 routed heads"),
    (
        {**MOH, "model__routing__shared": 4},
        "model.routing.shared=4 leaves no head to route: num_heads=4 allows at most 3",
    ),
    ({**MOH, "model__num_heads": (0, 4)}, "(model, decoder layer 0)"),
    ({"model__routing__kind": "moa", "model__routing__shared": 1}, "kind='moa' shares no heads, 0 fits"),
    ({"model__routing__kind": "moa"}, "num_kv_heads=4 must be 1"),
    ({"model__adaptive_span__max_span": 0}, "model.adaptive_span.max_span=0 must be an integer of at least 1"),
    ({"model__adaptive_span__ramp": 0}, "model.adaptive_span.ramp=0 must be an integer of at least 1"),
    ({"model__adaptive_span__init": 1.5}, "model.adaptive_span.init=1.5 must be between 0 and 1"),
    (
        {"model__adaptive_span__max_span": 5, "model__backend": "pallas"},
        "model.backend='pallas' has no adaptive spans (model.adaptive_span.max_span=5); 'auto' or 'einsum' would do",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_is_one_line(overrides, message):
    with pytest.raises(UserError) as caught:
        tiny.run("lm", **overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_spans_and_cross_attention_do_not_go_together():
    with pytest.raises(UserError, match="task='translation' has cross-attention, where there are none"):
        tiny.run("translation", model__adaptive_span__max_span=5)


def test_an_unknown_field_of_an_inner_section_is_told_with_the_nearest():
    with pytest.raises(UserError, match=r"did you mean 'model\.routing\.top_k'"):
        override(tiny.config(), {"model.routing.topk": 3})
    tree = tiny.config().to_dict()
    tree["model"]["routing"]["topk"] = 3
    with pytest.raises(UserError, match=r"'model\.routing\.topk'; did you mean 'model\.routing\.top_k'"):
        resolve(tree)


def test_configs_from_before_there_was_routing_are_plain():
    tree = tiny.config().to_dict()
    del tree["model"]["routing"], tree["model"]["adaptive_span"]
    model = resolve(tree).model
    assert (model.routing.kind, model.adaptive_span.max_span) == ("none", None)


@pytest.mark.parametrize(("section", "spec"), [("routing", RoutingSpec), ("adaptive_span", SpanSpec)])
def test_the_default_config_has_every_field_with_the_specs_default(section, spec):
    assert default.get_config().model[section].to_dict() == dataclasses.asdict(spec())
