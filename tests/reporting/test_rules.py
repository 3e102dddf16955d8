"""Pictures of rules."""

import pytest

from experiments import rules
from mha_jax.attention import Causal, Segments
from mha_jax.reporting.rules import draw_rules
from mha_jax.specs import UserError


@pytest.mark.slow
def test_script_draws_every_pattern_with_its_shares(tmp_path, capsys):
    assert rules.main(["rules", f"--out={tmp_path / 'picture'}", "--length=32", "--block=4"]) == 0
    assert "picture.png" in capsys.readouterr().out
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert (tmp_path / "picture.svg").read_text().count("<image") == 8  # one a square


def test_rule_for_another_length_is_refused(tmp_path):
    with pytest.raises(UserError, match="Segments query ids have 3 positions; T=16"):
        draw_rules({"ok": Causal(), "short": Segments([[0, 0, 1]])}, 16, 4, tmp_path / "picture")


@pytest.mark.parametrize(("argv", "words"), [([], "--out is missing"), (["--out=x", "--length=3"], "length")])
def test_wrong_arguments_are_told_in_one_line(argv, words):
    with pytest.raises(UserError, match=words):
        rules.main(["rules", *argv])
