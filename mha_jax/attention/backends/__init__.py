"""Backends of attention: each a module with `attend` and `refusal`, of the signatures that `einsum.py` has."""
