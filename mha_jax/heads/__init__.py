"""What heads do: functions of a model and its batches."""

from mha_jax.heads.capture import Attended, HeadSums, attention_maps, attentions, head_statistics, watch

__all__ = ["Attended", "HeadSums", "attention_maps", "attentions", "head_statistics", "watch"]
