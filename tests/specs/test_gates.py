"""The gates' section: faults in one line, and a parent counts by its name."""

import pytest

from mha_jax import config as configs
from mha_jax.specs import UserError
from tests import tiny

WRONG = [
    ({"gates__kind": "hard"}, "gates.kind='hard' is not one of"),
    ({"gates__where": ("encoder",)}, "gates.where names 'encoder'; task='lm' has 'decoder'"),
    ({"gates__where": ()}, "gates.where=() must name each kind of attention once"),
    ({"gates__l0_weight": 0.1}, "gates.l0_weight=0.1 needs gates.kind='hard_concrete', not 'none'"),
    ({"gates__kind": "hard_concrete", "gates__l0_weight": -1.0}, "gates.l0_weight=-1.0 must be a number of at least 0"),
    (
        {"gates__kind": "hard_concrete", "gates__l0_weight": {"encoder": 0.1}},
        "gates.l0_weight has entries for 'encoder'; it needs one each for 'decoder'",
    ),
    ({"gates__learning_rate_multiplier": 0.0}, "gates.learning_rate_multiplier=0.0 must be positive"),
    ({"gates__head_drop_rate": 1.0}, "gates.head_drop_rate=1.0 must be at least 0 and below 1"),
    ({"gates__prune_to": 9}, "gates.prune_to=9 is more than the 8 heads that there are"),
    ({"gates__prune_to": 1.5}, "gates.prune_to=1.5 must be a whole number of heads, or a share below 1"),
    ({"gates__prune_to": 0.5, "gates__prune_end": 21}, "must rise within training.steps=20"),
    ({"gates__prune_to": 0.5, "gates__prune_start": 20}, "gates.prune_start=20 and prune_end=20 must rise"),
    ({"gates__prune_to": 0.5, "gates__kind": "hard_concrete"}, "choose one"),
    ({"training__freeze": ("encoder",)}, "training.freeze names 'encoder'; task='lm' has 'tokens', 'decoder'"),
    ({"training__freeze": ("tokens", "decoder")}, "leaves nothing to train"),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_is_wrong_with_gates_is_one_line(overrides, message):
    with pytest.raises(UserError) as caught:
        tiny.run(**overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_weight_may_differ_by_kind():
    weights = {"encoder": 0.1, "cross": 0.2}
    spec = tiny.run(
        "translation", gates__kind="hard_concrete", gates__where=("encoder", "cross"), gates__l0_weight=weights
    )
    assert spec.gates.weight("cross") == 0.2 and spec.gated_heads == 16


def test_a_share_of_the_heads_and_a_count_of_them_name_the_same_end():
    counts = {share: tiny.run(gates__prune_to=share).gates.heads_left(8) for share in (0.25, 2, 0, 0.0, 8)}
    assert counts == {0.25: 2, 2: 2, 0: 0, 8: 8}


def test_a_run_without_the_section_is_one_without_gates():
    tree = configs.plain(tiny.config())
    del tree["gates"]
    assert configs.resolve(tree) == tiny.run()


def test_a_parent_counts_in_the_hash_by_its_name_not_by_its_place():
    here, there, other = (
        tiny.config(training__start_from=path) for path in ("a/run-12345678", "b/run-12345678/", "a/run-87654321")
    )
    assert configs.config_hash(here) == configs.config_hash(there) != configs.config_hash(other)
    assert configs.config_hash(here) != configs.config_hash(tiny.config())
    assert configs.diff(here, there) == []
