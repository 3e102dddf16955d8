"""What is refused, and that the arguments given to jax.nn mean the rule: its "xla" takes the same ones on CPU."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mha_jax.attention import Causal, Dense, Full, Global, Padding, PerHead, SlidingWindow
from mha_jax.attention.backends import cudnn, einsum
from mha_jax.attention.backends.call import Call

B, T, S, H, G, K = 3, 11, 7, 6, 2, 8
GROUPS = (0, 0, 0, 1, 1, 1)
LENGTHS = jnp.array([5, 0, 13])
CALL = Call(B, T, T, H, GROUPS, G, K, K, jnp.dtype(jnp.bfloat16), Causal(), 0.0)


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(cudnn, "_device_refusal", lambda: None)
    monkeypatch.setattr(cudnn, "_widest", lambda: (256, "9.0"))


def results(backend, rule, keys, scale=0.7, poison=False, **options):
    shapes = (B, T, H, K), (B, keys, G, K), (B, keys, G, K), (B, T, H, K)
    q, k, v, c = (jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))
    if poison:
        q = q.at[1].set(jnp.nan)
        k, v = (x.at[0, 5:].set(jnp.nan).at[1].set(jnp.nan) for x in (k, v))

    def loss(q, k, v, scale):
        out = backend.attend(
            q, k, v, rule=rule, dropout_rate=0.0, dropout_keys=None, scale=scale, groups=GROUPS, **options
        )
        return (out * c).sum(), out

    wanted = (0, 1, 2) if isinstance(scale, float) else (0, 1, 2, 3)
    return jax.tree.leaves(jax.jit(jax.grad(loss, wanted, has_aux=True))(q, k, v, scale))


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        (Full(), S),
        (Causal(), T),
        (Causal() & SlidingWindow(3), T),
        (SlidingWindow(5) & (Causal() & SlidingWindow(1)), T),
        (Padding(LENGTHS), S),
        (Padding(jnp.array([4])) & Full(), S),
        (Causal() & Padding(LENGTHS) & Padding(jnp.array([6])), T),
    ],
)
def test_arguments_mean_the_rule(rule, keys):
    for mine, expected in zip(
        results(cudnn, rule, keys, implementation="xla"), results(einsum, rule, keys), strict=True
    ):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_lengths_given_leave_no_row_empty_and_end_with_the_keys():
    found = cudnn.translate(Causal() & Padding(LENGTHS), T, T)
    assert isinstance(found, cudnn.Arguments)
    np.testing.assert_array_equal(found.options(B, T)["key_value_seq_lengths"], [5, 1, T])


def test_a_traced_scale_is_used_and_has_a_gradient():
    scale = jnp.float32(0.7)
    for mine, expected in zip(
        results(cudnn, Causal(), T, scale, implementation="xla"), results(einsum, Causal(), T, scale), strict=True
    ):
        np.testing.assert_allclose(mine, expected, atol=1e-5)


def test_nan_behind_a_length_reaches_nobody_and_no_keys_give_exactly_zero():
    found = results(cudnn, Padding(LENGTHS), T, poison=True, implementation="xla")
    clean = results(einsum, Padding(LENGTHS), T)
    for mine, expected in zip(found, clean, strict=True):
        np.testing.assert_allclose(mine, expected, atol=1e-5)
        assert (mine[1] == 0).all()


@pytest.mark.parametrize("rule", [Full(), Causal(), Causal() & SlidingWindow(3), Causal() & Padding(LENGTHS)])
def test_what_it_can_do_is_not_refused(on_gpu, rule):
    assert cudnn.refusal(dataclasses.replace(CALL, rule=rule)) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": jnp.dtype(jnp.float32)}, "not float32"),
        ({"v_dim": 16}, "qk_dim=8, v_dim=16"),
        ({"qk_dim": 12, "v_dim": 12}, "multiple of 8"),
        ({"groups": (1, 0, 0, 1, 1, 0)}, "neighbouring heads"),
        ({"dropout_rate": 0.1}, "dropout"),
        ({"keys": 0}, "empty"),
        ({"keys": S}, f"T={T}, S={S}"),
        ({"rule": SlidingWindow(3)}, "looks back only"),
        ({"rule": Causal() & SlidingWindow(3) & Padding(LENGTHS)}, "windows are empty"),
        ({"rule": Causal(1)}, r"Causal\(offset=1\)"),
        ({"rule": Causal() & SlidingWindow(3, 2)}, "dilation=2"),
        ({"rule": Causal() | Global(2)}, "cannot express Or"),
        ({"rule": ~Causal()}, "cannot express Not"),
        ({"rule": Causal() & Dense(np.ones((T, T), bool))}, "cannot express Dense"),
        ({"rule": PerHead(*[Causal()] * H)}, "cannot express PerHead"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_reason(on_gpu, change, reason):
    assert re.search(reason, cudnn.refusal(dataclasses.replace(CALL, **change)) or "")


def test_other_platforms_are_refused_before_anything_that_only_another_gpu_kernel_would_serve():
    for call in (CALL, dataclasses.replace(CALL, dtype=jnp.dtype(jnp.float32))):
        assert "runs on GPU, and this is cpu; backend='blockwise' would do" in (cudnn.refusal(call) or "")


@pytest.mark.parametrize(
    ("capability", "width", "reason"),
    [
        ("9.0", 256, None),
        ("9.0", 264, "is above 256.*backend='rows'"),
        ("8.6", 128, None),
        ("8.6", 136, "is above 128, the most at compute capability 8.6; backend='pallas'"),
        ("10.3", 256, None),
        ("7.5", 64, "needs an NVIDIA GPU of compute capability 8.0"),
        ("gfx90a", 64, "not 'gfx90a'"),
    ],
)
def test_widths_and_gpus_without_a_kernel_are_refused(monkeypatch, capability, width, reason):
    device = type("Device", (), {"platform": "gpu", "compute_capability": capability})()
    monkeypatch.setattr(jax, "devices", lambda: [device])
    found = cudnn.refusal(dataclasses.replace(CALL, qk_dim=width, v_dim=width))
    assert found is None if reason is None else re.search(reason, found or "")
