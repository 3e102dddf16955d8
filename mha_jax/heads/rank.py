"""What one head can express: the theorem of the low-rank bottleneck (Bhojanapalli et al. 2020), checked with numbers.

A head of width d sees n tokens X [n, D] and gives logits A = (X W_Q) (X W_K)^T / sqrt(d), an n x n matrix of rank d at
most, and attention softmax(A) by rows: row t are the weights of query t. The paper has tokens and queries as columns:
its P is the transpose of ours.

  Theorem 1, with D = d:  d >= n: for X of rank n, every positive P whose rows sum to 1 is softmax(A) of some W_Q, W_K;
                          d < n: for some X and P no W_Q, W_K do (there X has rank d < n, as D = d).

With D = d * h the tokens can have rank n though the head is narrower. Then softmax(A) = P means A = log P + c 1^T,
where c shifts each row as it likes: a head of width d attends as P exactly where log P with each row less its mean has
rank d at most. Rows less their means have rank n - 1 at most: over independent tokens d >= n - 1 is enough for every P,
one less than the theorem asks for, and d < n - 1 is not, for almost every P.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.special

from mha_jax.specs import UserError

Matrix = np.ndarray
_RTOL = 1e-12  # softmax and logarithm lose a few digits: what is this much smaller than the greatest is 0


class Head(NamedTuple):
    """The projections of one head, [D, d] each."""

    w_q: Matrix
    w_k: Matrix

    def attention(self, x: Matrix) -> Matrix:
        """The weights [n, n] of n tokens x [n, D]; each row sums to 1."""
        return scipy.special.softmax(self.logits(x), axis=-1)

    def logits(self, x: Matrix) -> Matrix:
        """(x W_Q) (x W_K)^T / sqrt(d)."""
        return (x @ self.w_q) @ (x @ self.w_k).T / np.sqrt(self.w_q.shape[1])


def centred(matrix: Matrix) -> Matrix:
    """Each row less its mean: softmax does not see what is the same along a row."""
    return matrix - matrix.mean(axis=-1, keepdims=True)


def least_rank(p: Matrix) -> int:
    """The smallest width of a head whose attention can be p [n, n], for tokens of full row rank.

    The rank of log p with each row less its mean, n - 1 at most; shifting rows otherwise can only add to it.
    """
    return int(np.linalg.matrix_rank(centred(np.log(_checked(p))), rtol=_RTOL))


def exact_head(x: Matrix, p: Matrix, width: int) -> Head:
    """The projections with which n tokens x [n, D] attend exactly as p [n, n], by construction.

    With X^+ the right inverse of x, W_Q = X^+ Q and W_K = X^+ K where Q K^T = sqrt(width) log p with rows less their
    mean, from its singular value decomposition: x drops out, and the logits are log p up to shifts of rows.

    Raises: UserError where x has no full row rank, p is not positive with rows that sum to 1, or the width is smaller
    than `least_rank(p)`, where no head does it.
    """
    tokens = len(x)
    if np.linalg.matrix_rank(x) < tokens:
        raise UserError(f"the {tokens} tokens have rank {np.linalg.matrix_rank(x)}; a full row rank is needed")
    need = least_rank(p)
    if width < need:
        raise UserError(f"a head of width {width} cannot have this attention over {tokens} tokens; {need} would do")
    left, values, right = np.linalg.svd(centred(np.log(p)) * np.sqrt(width))
    inverse, root = np.linalg.pinv(x), np.sqrt(values)
    # Columns beyond n add nothing; those beyond the rank have singular values of 0.
    queries, keys = np.zeros((2, tokens, width))
    kept = min(width, tokens)
    queries[:, :kept], keys[:, :kept] = left[:, :kept] * root[:kept], right[:kept].T * root[:kept]
    return Head(inverse @ queries, inverse @ keys)


def least_error(p: Matrix, width: int) -> float:
    """The least Frobenius distance of the logits of any head of this width from log p, up to shifts of rows.

    By Eckart and Young: the root of the sum of squares of the singular values beyond the width. It is 0 exactly where
    the head can attend as p.
    """
    values = np.linalg.svd(centred(np.log(_checked(p))), compute_uv=False)
    return float(np.sqrt(np.sum(values[width:] ** 2)))


def fitted_gap(x: Matrix, p: Matrix, width: int, *, steps: int = 2000, rate: float = 0.02, seed: int = 0) -> float:
    """The greatest difference between p and the attention of a head that is trained by Adam to have it.

    A check from the other side, which knows nothing of the construction; it minimises the cross-entropy of rows.
    """
    optimizer = optax.adam(rate)
    keys = jax.random.split(jax.random.key(seed))
    start = tuple(jax.random.normal(key, (x.shape[1], width)) for key in keys)
    tokens, wanted = jnp.asarray(x), jnp.asarray(p)

    def logits(weights: tuple[jax.Array, ...]) -> jax.Array:
        w_q, w_k = weights
        return (tokens @ w_q) @ (tokens @ w_k).T / width**0.5

    def loss(weights: tuple[jax.Array, ...]) -> jax.Array:
        return -jnp.sum(wanted * jax.nn.log_softmax(logits(weights)))

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        weights, state = carry
        updates, state = optimizer.update(jax.grad(loss)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), length=steps))()
    return float(jnp.max(jnp.abs(jax.nn.softmax(logits(weights)) - wanted)))


def random_case(tokens: int, d_model: int, seed: int = 0) -> tuple[Matrix, Matrix]:
    """Normal tokens x [n, D], of full row rank with probability 1, and a positive p [n, n] whose rows sum to 1."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(tokens, d_model)), scipy.special.softmax(rng.normal(size=(tokens, tokens)), axis=-1)


def _checked(p: Matrix) -> Matrix:
    if not (p > 0).all() or not np.allclose(p.sum(axis=-1), 1):
        raise UserError("p must be positive, with rows that sum to 1")
    return p
