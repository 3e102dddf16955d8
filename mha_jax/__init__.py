"""How many heads, and how wide? Head-count ablations of Transformers in JAX and Flax."""
