"""Backends of attention: one function `attend` each, all with the signature of `einsum.attend`."""
