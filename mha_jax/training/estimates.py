"""What training takes, counted from the spec alone, without compiling anything: FLOPs exactly, memory about."""

import math

from mha_jax.attention.attend import held_whole
from mha_jax.data import batch_shapes
from mha_jax.models import cost
from mha_jax.specs import ATTENTION_KINDS, HeadShape, RunSpec

_WORDS = 3  # of every parameter: itself and Adam's two moments
_UPDATE_WORDS = 7  # that the update moves: reads these and the gradient, writes these


def step_flops(run: RunSpec) -> int:
    """FLOPs of one training step of all seeds: `cost.training_flops_per_token` of every position of the largest batch.

    Attention is counted over the whole square, and padding as if it were tokens: a step that skips either does less.
    """
    return cost.training_flops_per_token(run) * _positions(run) * len(run.seeds)


def update_bytes(run: RunSpec) -> int:
    """Bytes that the optimiser's update alone moves in a step of all seeds, 7 words a parameter."""
    return _UPDATE_WORDS * _wide(run) * cost.parameters(run) * len(run.seeds)


def estimated_peak_bytes(run: RunSpec, num_devices: int = 1, platform: str = "cpu") -> int:
    """About how many bytes a training step holds on each device at its worst moment.

      state + gradients + activations + logits, with n the positions of the largest batch that a device has:
      state        3 words a parameter and seed; twice on a CPU for several seeds, which take turns
      gradients    1 word a parameter
      activations  n * (4 D + (H + G) (K + V) + weights) an attention, n * (5 D + 3 F) a feed-forward layer (6 F for
                   SwiGLU), in the compute dtype; half as much again with model.layers="scan"
      weights      H S where they are held whole; (H + G) (K + V) again where they are computed tile by tile
      logits       2 words a token of the vocabulary

    With model.remat, what is computed again counts in one layer only; not in unrolled layers on a CPU, whose compiler
    merges it with the forward pass. A head axis of the mesh is left out, which makes the estimate too high there.
    XLA's own plans for language models of 2 to 6 layers on a CPU are within a fifth of it.
    """
    on_cpu = platform == "cpu"
    # On a CPU the devices are cores, and share one memory.
    seed, data, _ = run.mesh.sizes(num_devices) if not on_cpu else (1, 1, 1)
    seeds, positions = len(run.seeds) // seed, math.ceil(_positions(run) / data)
    at_once = 1 if on_cpu else seeds
    wide, parameters = _wide(run), cost.parameters(run)
    logits = 0 if run.task == "classification" else 2 * wide * run.data.tokens
    state = _WORDS * wide * parameters * seeds * (2 if on_cpu and seeds > 1 else 1)
    return state + at_once * (wide * parameters + positions * (logits + _activations(run, positions, on_cpu)))


def _activations(run: RunSpec, positions: int, on_cpu: bool) -> int:
    """Bytes a position that the backward pass finds kept, over all layers."""
    model, size = run.model, 2 if run.model.dtype == "bfloat16" and not on_cpu else _wide(run)
    length = run.data.length

    def attention(shape: HeadShape) -> int:
        few = model.backend == "auto" and held_whole(positions * shape.num_heads // length, length, length)
        widths = (shape.num_heads + shape.num_kv_heads) * (shape.qk_dim + shape.v_dim)
        weights = shape.num_heads * length if few or model.backend == "einsum" else widths
        return 4 * model.d_model + widths + weights

    attentions = [attention(shape) for kind in ATTENTION_KINDS[run.task] for shape in model.heads(kind)]
    blocks = model.num_layers * (2 if run.task == "translation" else 1)
    feed_forward = 5 * model.d_model + (6 if model.activation == "swiglu" else 3) * cost.matched_d_ff(run)
    every, widest = sum(attentions) + blocks * feed_forward, max(attentions, default=0)
    remat = "none" if on_cpu and model.layers == "unrolled" else model.remat
    if remat == "attention":
        every = blocks * feed_forward + len(attentions) * model.d_model + widest
    elif remat == "block":
        every = blocks * model.d_model + widest + feed_forward
    elif remat == "dots":
        # Kept are the inputs and the products with weights: about half of each layer.
        every = every // 2 + widest
    return size * every * (3 if model.layers == "scan" else 2) // 2


def _positions(run: RunSpec) -> int:
    """Target positions of the largest batch, of one seed."""
    shapes = [batch["inputs" if "inputs" in batch else "targets"].shape for batch in batch_shapes(run.data, run.task)]
    return max(math.prod(shape) for shape in shapes)


def _wide(run: RunSpec) -> int:
    """Bytes of a parameter."""
    return 8 if run.model.dtype == "float64" else 4
