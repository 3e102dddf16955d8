"""Benchmarks: contestants timed in turns in one process, next to what the same work would cost at least."""
