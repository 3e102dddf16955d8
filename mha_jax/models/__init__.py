"""Transformers whose every attention layer has its own number and width of heads."""

from mha_jax.models.decoding import generate, translate
from mha_jax.models.transformer import Classifier, LanguageModel, MaskedLanguageModel, TranslationModel, build_model

__all__ = [
    "Classifier",
    "LanguageModel",
    "MaskedLanguageModel",
    "TranslationModel",
    "build_model",
    "generate",
    "translate",
]
