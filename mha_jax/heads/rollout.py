"""Attention through all layers of a stack: rollout and flow (Abnar and Zuidema 2020).

Both add up what each layer's heads do, with the residual stream beside them: a layer hands a position on to itself with
weight `residual` and to what its heads attend to with 1 - `residual`. The paper has residual = 0.5.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import sparse
from scipy.sparse import csgraph

from mha_jax.specs import UserError

_UNITS = 1_000_000  # maximum_flow counts in integers: capacities are millionths


def mixed(weights_HTT: Float[np.ndarray, "H T T"], residual: float = 0.5) -> Float[np.ndarray, "T T"]:
    """One layer: the mean over heads and the residual stream, rows summing to 1.

    A query that sees nothing is handed on by the residual stream alone, as is every one in a layer without heads.
    """
    if not 0 <= residual <= 1:
        raise UserError(f"residual={residual} must lie between 0 and 1: the share of the residual stream")
    heads, length, _ = weights_HTT.shape
    mean_TT = weights_HTT.mean(axis=0) if heads else np.zeros((length, length))
    layer_TT = (1 - residual) * mean_TT + residual * np.eye(length)
    total_T1 = layer_TT.sum(axis=1, keepdims=True)
    return np.where(total_T1 > 0, layer_TT / np.where(total_T1 > 0, total_T1, 1), np.eye(length))


def rollout(layers: Sequence[Float[np.ndarray, "_ T T"]], residual: float = 0.5) -> list[np.ndarray]:
    """After each layer, how much of every position comes from every token: the product of the layers so far.

    Args:    layers: weights of a stack's self-attentions, first to last; they may differ in heads.
    Returns: [T, T] a layer; rows are positions and sum to 1, columns are tokens.
    Raises:  UserError for a residual that is no share.
    """
    found: list[np.ndarray] = []
    for weights_HTT in layers:
        layer_TT = mixed(weights_HTT, residual)
        found.append(layer_TT @ found[-1] if found else layer_TT)
    return found


def flow(layers: Sequence[Float[np.ndarray, "_ T T"]], residual: float = 0.5) -> Float[np.ndarray, "T T"]:
    """The maximum flow from every position after the last layer to every token, edges as wide as the layers' weights.

    Rounded to millionths. T squared problems of T * L nodes: for tens of tokens.
    """
    edges = [mixed(weights_HTT, residual) for weights_HTT in layers]
    length = edges[0].shape[0]
    graph = _graph(edges)
    found = np.zeros((length, length))
    for query in range(length):
        for token in range(length):
            source = len(edges) * length + query
            found[query, token] = csgraph.maximum_flow(graph, source, token).flow_value / _UNITS
    return found


def _graph(edges: Sequence[np.ndarray]) -> sparse.csr_array:
    """Node (layer, position) has number layer * T + position; layer 0 are the tokens, and edges lead down."""
    length = edges[0].shape[0]
    size = (len(edges) + 1) * length
    capacities = sparse.lil_array((size, size), dtype=np.int32)
    for layer, layer_TT in enumerate(edges, 1):
        here, below = layer * length, (layer - 1) * length
        capacities[here : here + length, below : below + length] = np.rint(layer_TT * _UNITS).astype(np.int32)
    return capacities.tocsr()
