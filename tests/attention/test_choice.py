"""Which backend serves: the one named, or the quickest that does not refuse; and what is said of the others."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from mha_jax import attention
from mha_jax.attention import BACKENDS, Causal, LogSparse, Padding, SlidingWindow, noting_backends
from mha_jax.attention.attend import _PREFERRED, choose_backend, fell_back
from mha_jax.attention.backends.call import Call
from mha_jax.specs import UserError
from mha_jax.specs.model import BACKENDS as NAMES


def call(queries=7, keys=5, rate=0.0):
    return Call(2, queries, keys, 6, (0, 0, 1, 1, 2, 2), 3, 3, 11, jnp.dtype("float32"), Causal(), rate)


def test_auto_takes_the_reference_for_small_squares_and_never_for_large_ones():
    assert choose_backend("auto", call()).name == "einsum"
    assert choose_backend("auto", call(4096, 4096, 0.1)).name == "blockwise"


def test_auto_takes_diagonals_where_tiles_would_pay_for_much_more():
    for rule, length, name in (
        (Causal() & LogSparse(), 4096, "diagonals"),
        (LogSparse(), 2**15 + 1, "diagonals"),
        (SlidingWindow(5, dilation=64), 4096, "diagonals"),
        (SlidingWindow(64), 4096, "strips"),
        (Causal() & LogSparse() & Padding(jnp.array([5, 7])), 4096, "blockwise"),
    ):
        assert choose_backend("auto", dataclasses.replace(call(length, length), rule=rule)).name == name


def test_auto_says_who_refused_and_why(monkeypatch):
    monkeypatch.setitem(_PREFERRED, "cpu", ("picky", "blockwise"))
    monkeypatch.setitem(BACKENDS, "picky", types.SimpleNamespace(refusal=lambda call: "K=3 is odd; even K would do"))
    x = jnp.ones((1, 1031, 2, 3))
    with noting_backends() as notes:
        for _ in range(2):
            jax.eval_shape(lambda *x: attention.attend(*x), x, x, x)
    assert notes == ["T=1031 S=1031 H=2 G=2 K=3 V=3 float32: blockwise; picky: K=3 is odd; even K would do"]
    assert fell_back(notes[0])


def test_backend_that_is_named_and_refuses_is_an_error_with_the_reason(monkeypatch):
    monkeypatch.setitem(BACKENDS, "picky", types.SimpleNamespace(refusal=lambda call: "K=3 is odd; even K would do"))
    x = jnp.ones((1, 5, 2, 3))
    with pytest.raises(UserError, match="backend='picky' cannot serve this attention: K=3 is odd; even K would do"):
        attention.attend(x, x, x, backend="picky")


def test_a_config_names_the_backends_that_there_are():
    assert ("auto", *BACKENDS) == NAMES
