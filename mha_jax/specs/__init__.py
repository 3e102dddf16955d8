"""What a run is made of: frozen, validated values, one dataclass a section of the config.

Building a spec checks everything that can be checked without data or devices, and touches neither. Every fault is a
`UserError`: one line that says what is wrong, the value, and what would be right.
"""

from mha_jax.specs.checks import UserError
from mha_jax.specs.data import BOS, BYTE_VOCAB_SIZE, EOS, FILE_TOKENIZERS, MASK, PAD, SPECIAL_TOKENS, DataSpec
from mha_jax.specs.gates import GatesSpec
from mha_jax.specs.heads import HeadShape
from mha_jax.specs.model import ModelSpec
from mha_jax.specs.routing import RoutingSpec, SpanSpec
from mha_jax.specs.run import ATTENTION_KINDS, LARGEST_SEED, MeshSpec, RunSpec
from mha_jax.specs.training import DecodingSpec, OptimizerSpec, TrainingSpec

__all__ = [
    "ATTENTION_KINDS",
    "BOS",
    "BYTE_VOCAB_SIZE",
    "EOS",
    "FILE_TOKENIZERS",
    "LARGEST_SEED",
    "MASK",
    "PAD",
    "SPECIAL_TOKENS",
    "DataSpec",
    "DecodingSpec",
    "GatesSpec",
    "HeadShape",
    "MeshSpec",
    "ModelSpec",
    "OptimizerSpec",
    "RoutingSpec",
    "RunSpec",
    "SpanSpec",
    "TrainingSpec",
    "UserError",
]
