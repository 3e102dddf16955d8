"""How many heads, and how wide? A small byte-level language model at a fixed width.

Scientific:  model.num_heads, with qk_dim = v_dim = d_model / num_heads (heads times width is constant, and so are
             parameters and matrix-product FLOPs).
Nuisance:    the seed (initialisation, data order, dropout): three a cell, compared seed by seed.
Fixed:       everything else; one learning rate, not tuned per head count but by the profile `tuned`.
Decides:     validation/loss, in nats a byte, at the last step.
Corpus:      documentation and docstrings of the standard library; nothing is downloaded.

  python -m experiments.sweep --config=configs/default.py --workdir=runs/default      ten minutes on two CPU cores
  python -m experiments.sweep --config=configs/default.py:smoke --workdir=runs/smoke  a minute; only proves that it runs
  python -m experiments.sweep --config=configs/default.py:tuned --workdir=runs/tuned  with a learning rate per cell

Every field that a config may set stands here once, with its default; the other configs say only what differs.
"""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from mha_jax.specs import UserError


def get_config(profile: str = "") -> ConfigDict:
    config = ConfigDict()
    config.name = "default"
    config.task = "lm"
    config.seeds = (0, 1, 2)
    config.parallel = "jit"
    config.pack = "auto"  # cells of one shape trained together: at most so many seeds of all, or what fits and pays
    config.mesh = ConfigDict({"seed": 1, "data": placeholder(int), "head": 1})
    config.parent = placeholder(dict)  # written by experiments.heads into the runs that it makes

    config.model = model = ConfigDict()
    model.num_layers = 2
    model.d_model = 128
    model.num_heads = 8
    model.num_kv_heads = placeholder(int)  # None: as many as heads
    model.qk_dim = placeholder(int)  # None: d_model / num_heads
    model.v_dim = placeholder(int)
    model.head_to_group = placeholder(tuple)
    model.d_ff = 512
    model.max_length = 128
    model.positions = "learned"
    model.rope_base = 10_000.0
    model.norm = "pre"
    model.normalization = "layer"
    model.norm_epsilon = 1e-6
    model.activation = "gelu"
    model.use_bias = False
    model.use_ff_bias = True
    model.scale_embedding = True
    model.embedding_norm = False
    model.token_types = 0
    model.tied_output = True
    model.pooling = "mean"
    model.dropout_rate = 0.0
    model.attention_dropout_rate = 0.0
    model.match = "none"
    model.match_base = placeholder(dict)
    model.init = "independent"
    model.dtype = "float32"
    model.backend = "auto"
    model.layers = "unrolled"
    model.remat = "none"
    model.routing = ConfigDict({"kind": "none", "shared": 0, "top_k": 1, "balance_weight": 0.01, "z_weight": 0.0})
    model.adaptive_span = ConfigDict({"max_span": placeholder(int), "ramp": 32, "init": 0.0, "weight": 2e-6})

    config.data = data = ConfigDict()
    data.source = "embedded"
    data.length = 128
    data.batch_size = 8
    data.tokenizer = "bytes"
    data.vocab_size = placeholder(int)
    data.tokenizer_file = placeholder(str)
    data.files = ConfigDict({split: placeholder(str) for split in ("train", "validation", "test")})
    data.tfds_name = placeholder(str)
    data.languages = placeholder(tuple)
    data.validation_fraction = 0.05
    data.segments = False
    data.batch_tokens = placeholder(int)
    data.buckets = placeholder(tuple)
    data.num_classes = placeholder(int)
    data.max_examples = placeholder(int)
    data.data_dir = placeholder(str)  # None: .cache/data in the working directory of the sweep

    config.optimizer = optimizer = ConfigDict()
    optimizer.name = "adamw"
    optimizer.learning_rate = 2e-3
    optimizer.schedule = "cosine"
    optimizer.warmup_steps = 20
    optimizer.final_fraction = 0.1
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.98
    optimizer.epsilon = 1e-9
    optimizer.weight_decay = 0.01
    optimizer.clip_norm = placeholder(float)

    config.training = training = ConfigDict()
    training.steps = 200
    training.eval_every = 100
    training.checkpoint_every = 100
    training.log_every = 10
    training.keep_last = 2
    training.average_last = 1
    training.label_smoothing = 0.0
    training.start_from = placeholder(str)
    training.freeze = placeholder(tuple)

    config.gates = gates = ConfigDict()
    gates.kind = "none"
    gates.where = placeholder(tuple)
    gates.l0_weight = 0.0
    gates.initial_log_alpha = 2.0
    gates.learning_rate_multiplier = 1.0
    gates.head_drop_rate = 0.0
    gates.prune_to = placeholder(float)
    gates.prune_start = 0
    gates.prune_end = placeholder(int)

    config.decoding = ConfigDict(
        {"beam_size": 4, "length_penalty": 0.6, "batch_size": 64, "max_sentences": placeholder(int)}
    )

    if profile == "smoke":
        config.name = "smoke"
        config.seeds = (0, 1)
        model.update(num_layers=1, d_model=32, d_ff=64, max_length=32)
        data.update(length=32, batch_size=8, max_examples=200)
        training.update(steps=20, eval_every=10, checkpoint_every=10, log_every=5)
        optimizer.warmup_steps = 5
    elif profile not in ("", "tuned"):
        raise UserError(f"unknown profile {profile!r} of configs/default.py; known are 'smoke', 'tuned', or none")
    return config.lock()


def get_sweep(profile: str = "") -> Iterator[dict[str, Any]]:
    """Fixed width: qk_dim and v_dim follow as d_model / num_heads."""
    for num_heads in (1, 8) if profile == "smoke" else (1, 2, 4, 8, 16):
        yield {"model.num_heads": num_heads}


def get_tuning(profile: str = "") -> dict[str, Any] | None:
    """A cell's learning rate is the best of four for it, by one seed that its own three do not share."""
    if profile != "tuned":
        return None
    return {"fields": {"optimizer.learning_rate": (5e-4, 1e-3, 2e-3, 4e-3)}, "metric": "validation/loss", "seeds": (3,)}


CLAIMS = [
    {
        "text": "8 heads beat 1 head at the same width.",
        "metric": "validation/loss",
        "better": {"model.num_heads": 8},
        "worse": {"model.num_heads": 1},
    },
    {
        "text": "Splitting further stops paying: 16 heads and 8 heads end within 0.02 nats of each other.",
        "metric": "validation/loss",
        "between": [{"model.num_heads": 8}, {"model.num_heads": 16}],
        "margin": 0.02,
    },
]
