"""Multi-head attention with the head as an axis of every parameter.

Letters, here and in the whole package: B batch, T query length, S key length, D d_model, H heads, G key/value heads,
K qk_dim, V v_dim, F d_ff, C vocabulary or classes, L layers, R seeds; M is the width of the memory, D where it is x.
Other libraries use some of them otherwise: what we call B T S H G K V, jax.nn calls B T S N K H H (its G is our H/G).
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from mha_jax.attention.attend import attend, broadcast_gate, check_backend
from mha_jax.attention.gates import HardConcreteGate, ScalarGate
from mha_jax.attention.product import product
from mha_jax.attention.rotary import rotate
from mha_jax.attention.routing import Router, note_routes
from mha_jax.attention.span import AdaptiveSpan
from mha_jax.attention.visibility import Full, Rule
from mha_jax.specs import HeadShape, RoutingSpec, SpanSpec, UserError, checks

_ROUTER = 2**31 - 1  # no number of heads: `_kernel` folds those into the same key


class Gate(nnx.Variable):
    """A factor a head, [H], on its output. It is no `nnx.Param`: optimizers leave it alone.

    While a model is looked into, it may also hold [B, H] or [B, T, H], such as for gradients of each example.
    """


class Projection(nnx.Module):
    """A linear map whose kernel keeps the head axis: it contracts the last axes of x with the first of the kernel.

    `contracted` is their number: 1 into heads, [B, T, D] x [D, H, K]; 2 out of them, [B, T, H, V] x [H, V, D].
    """

    def __init__(self, contracted: int, kernel: Array, bias_shape: tuple[int, ...] | None, dtype: DTypeLike | None):
        self.contracted = contracted
        self.dtype = dtype
        self.kernel = nnx.Param(kernel)
        self.bias = None if bias_shape is None else nnx.Param(jnp.zeros(bias_shape, kernel.dtype))

    def __call__(self, x: Array, gate: Float[Array, " H"] | None = None) -> Array:
        """The product; a gate multiplies the kernel's first axis, which costs less than to multiply x."""
        dtype = self.dtype or jnp.result_type(x.dtype, self.kernel.dtype)
        kernel = self.kernel[...]
        if gate is not None:
            kernel = kernel * gate.reshape(-1, *(1,) * (kernel.ndim - 1))
        kernel = kernel.astype(dtype)
        inner, outer = kernel.shape[: self.contracted], kernel.shape[self.contracted :]
        # One product of two matrices: with more axes, XLA on CPU takes half as long again for the gradients.
        rows = x.astype(dtype).reshape(x.shape[0] * x.shape[1], math.prod(inner))
        y = product(rows, kernel.reshape(math.prod(inner), math.prod(outer))).reshape(*x.shape[:2], *outer)
        if self.bias is None:
            return y
        bias = self.bias[...].astype(dtype)
        return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


class MultiHeadAttention(nnx.Module):
    """Multi-head attention, written as a sum over heads (Vaswani et al. 2017, section 3.2.2).

      y[b,t] = sum over h of gate[h] * (sum over visible s of w[b,h,t,s] * value(m[b,s])[g(h)]) @ out.kernel[h]
      w[b,h,t,s] = softmax over visible s of <query(x[b,t])[h], key(m[b,s])[g(h)]> / sqrt(K),  m = memory or x

    Parameters: query.kernel [D, H, K], key.kernel [M, G, K], value.kernel [M, G, V], out.kernel [H, V, D], with
    use_bias also query.bias [H, K], key.bias [G, K], value.bias [G, V], out.bias [D]; gate [H] (ones, not trained).
    A `learned_gate` (attention/gates.py), where one is put in, is trained and multiplies the gate.
    In the paper's letters: h = H, d_k = K, d_v = V, W^Q_h = query.kernel[:, h], W^O = out.kernel.

    Args:
      qk_dim, v_dim: width of one head, free of each other; default D / H.
      num_kv_heads: G; default H. G = 1 is multi-query, 1 < G < H grouped-query attention.
      memory_dim: M, where keys and values come from a memory of another width.
      head_to_group: the group that each head reads, where G does not divide H.
      dropout_rate: of attention weights, where the call is given a dropout_key.
      rope: rotate queries and keys by their positions (Su et al. 2021), with `rope_base`.
      routing: heads chosen by the token that asks. adaptive_span: a learned span for each head, of self-attention.
      init: "independent": each kernel Glorot-uniform, with H * width as fan. "shared": each kernel is cut out of one
        Glorot-uniform [D, D] draw, so that one seed starts from the same matrices whatever the number of heads.
      dtype: of the computation; default: what x and the parameters promote to.
    Raises: UserError for heads and widths that do not fit, and for options that mean nothing.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        qk_dim: int | None = None,
        v_dim: int | None = None,
        *,
        memory_dim: int | None = None,
        head_to_group: tuple[int, ...] | None = None,
        use_bias: bool = False,
        dropout_rate: float = 0.0,
        rope: bool = False,
        rope_base: float = 10_000.0,
        routing: RoutingSpec = RoutingSpec(),  # noqa: B008 (specs are frozen)
        adaptive_span: SpanSpec = SpanSpec(),  # noqa: B008
        init: Literal["independent", "shared"] = "independent",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        backend: str = "auto",
        rngs: nnx.Rngs,
    ):
        shape = HeadShape.resolve(d_model, num_heads, num_kv_heads, qk_dim, v_dim, head_to_group)
        memory_dim = d_model if memory_dim is None else memory_dim
        if rope and shape.num_heads and shape.qk_dim % 2:
            raise UserError(f"rope=True turns pairs of features: qk_dim={shape.qk_dim} must be even")
        if not rope_base > 0:
            raise UserError(f"rope_base={rope_base!r} must be positive")
        checks.rate("dropout_rate", dropout_rate)
        checks.choice("init", init, ("independent", "shared"))
        check_backend(backend)
        adaptive_span.check_backend(backend)
        self.d_model, self.memory_dim, self.shape = d_model, memory_dim, shape
        self.dropout_rate, self.rope, self.rope_base, self.backend = dropout_rate, rope, rope_base, backend

        def project(width: int, heads: int, head_dim: int) -> Projection:
            kernel = _kernel(rngs.params(), width, heads, head_dim, d_model if init == "shared" else None, param_dtype)
            return Projection(1, kernel, (heads, head_dim) if use_bias else None, dtype)

        # Four keys, always in this order: heads do not shift what later layers draw.
        self.query = project(d_model, shape.num_heads, shape.qk_dim)
        self.key = project(memory_dim, shape.num_kv_heads, shape.qk_dim)
        self.value = project(memory_dim, shape.num_kv_heads, shape.v_dim)
        out_key = rngs.params()
        kernel_DHV = _kernel(
            out_key, d_model, shape.num_heads, shape.v_dim, d_model if init == "shared" else None, param_dtype
        )
        self.out = Projection(2, kernel_DHV.transpose(1, 2, 0), (d_model,) if use_bias else None, dtype)
        self.gate = Gate(jnp.ones(shape.num_heads, param_dtype))
        self.learned_gate: ScalarGate | HardConcreteGate | None = nnx.data(None)
        # Folded out of a key that is drawn anyway, so that routed and plain models start from the same matrices.
        router_key = jax.random.fold_in(out_key, _ROUTER)
        routed, spanned = routing.kind != "none", adaptive_span.max_span is not None
        self.router = Router(routing, d_model, shape, key=router_key, param_dtype=param_dtype) if routed else None
        self.span = AdaptiveSpan(adaptive_span, shape.num_heads, param_dtype=param_dtype) if spanned else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        memory: Float[Array, "B S M"] | None = None,
        *,
        visibility: Rule = Full(),  # noqa: B008 (rules are frozen)
        gate: Array | None = None,
        dropout_key: Array | None = None,
        positions: Int[Array, "..."] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attends from x to memory, or to x itself.

        Args:
          gate: [H], [B, H] or [B, T, H]; multiplies on top of the layer's own.
          dropout_key: a typed key, or B of them; None means no dropout (evaluation).
          positions: [T] or [B, T], of x, for rope; default 0, 1, ...; a memory's are always 0, 1, ...
        """
        q = self.queries(x, positions)
        k, v = self.keys_values(x, positions) if memory is None else self.keys_values(memory)
        return self.output(self.attended(q, k, v, visibility, dropout_key), self.routed(x, gate))

    def attended(
        self,
        q: Float[Array, "B T H K"],
        k: Float[Array, "B S G K"],
        v: Float[Array, "B S G V"],
        visibility: Rule,
        dropout_key: Array | None = None,
    ) -> Float[Array, "B T H V"]:
        """What each head reads, before gates: within its span where the layer has spans."""
        rate = 0.0 if dropout_key is None else self.dropout_rate
        if self.span is not None:
            groups = self.shape.groups
            return self.span.attend(q, k, v, visibility, dropout_rate=rate, dropout_key=dropout_key, groups=groups)
        groups, backend = self.shape.head_to_group, self.backend
        return attend(q, k, v, visibility, None, rate, dropout_key, head_to_group=groups, backend=backend)

    def routed(self, x: Float[Array, "B T D"], gate: Array | None = None) -> Array | None:
        """The router's factors [B, T, H] for tokens x, times the gate; the gate alone where nothing is routed."""
        if self.router is None:
            return gate
        route = self.router(x)
        note_routes([route])
        return route.gate_BTH if gate is None else route.gate_BTH * broadcast_gate(gate, *route.gate_BTH.shape)

    def queries(self, x: Float[Array, "B T D"], positions: Int[Array, "..."] | None = None) -> Float[Array, "B T H K"]:
        """The queries of x, rotated with rope."""
        _check_width("x", x, "D", self.d_model)
        return self._rotated(self.query(x), positions)

    def keys_values(
        self, memory: Float[Array, "B S M"], positions: Int[Array, "..."] | None = None
    ) -> tuple[Float[Array, "B S G K"], Float[Array, "B S G V"]]:
        """The keys, rotated with rope, and values of memory: what decoding keeps."""
        _check_width("memory", memory, "M", self.memory_dim)
        return self._rotated(self.key(memory), positions), self.value(memory)

    def output(self, o_BTHV: Float[Array, "B T H V"], gate: Array | None = None) -> Float[Array, "B T D"]:
        """The sum over heads of gate[h] * o[b,t,h] @ out.kernel[h]."""
        own = self.head_gate()
        for factor in (gate, own if own.ndim > 1 else None):
            if factor is not None:
                factor_BTH = broadcast_gate(factor, *o_BTHV.shape[:3])
                o_BTHV = o_BTHV * factor_BTH[..., None].astype(o_BTHV.dtype)
        return self.out(o_BTHV, own if own.ndim == 1 else None)

    def head_gate(self) -> Array:
        """The layer's own factor a head: its gate, times the learned one where it has one."""
        gate = self.gate[...]
        return gate if self.learned_gate is None else gate * jnp.broadcast_to(self.learned_gate(), gate.shape)

    def _rotated(self, x: Array, positions: Array | None) -> Array:
        if not self.rope:
            return x
        return rotate(x, jnp.arange(x.shape[1]) if positions is None else positions, self.rope_base)


def _kernel(
    key: Array, width: int, heads: int, head_dim: int, shared_dim: int | None, dtype: DTypeLike
) -> Float[Array, "D H K"]:
    """Glorot-uniform [width, heads, head_dim], or the first heads * head_dim columns of a [width, shared_dim] draw."""
    columns = heads * head_dim
    if shared_dim is None:
        # Else one seed would draw the same numbers for all heads of one total width, which is what "shared" means.
        key = jax.random.fold_in(jax.random.fold_in(key, heads), head_dim)
    elif columns > shared_dim:
        raise UserError(
            f"init='shared' cuts heads out of d_model={shared_dim} columns: {heads} heads of width {head_dim} "
            f"need {columns}"
        )
    drawn = columns if shared_dim is None else shared_dim
    limit = math.sqrt(6 / (width + drawn))
    matrix = jax.random.uniform(key, (width, drawn), dtype, -limit, limit)
    return matrix[:, :columns].reshape(width, heads, head_dim)


def _check_width(name: str, x: Array, letter: str, width: int) -> None:
    if x.ndim != 3 or x.shape[-1] != width:
        raise UserError(f"{name} has shape {x.shape}; its last of three axes must be {letter}={width}")
