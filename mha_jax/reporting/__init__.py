"""Tables, figures and the page, from run directories alone: nothing here trains."""

from mha_jax.reporting.report import build_report

__all__ = ["build_report"]
