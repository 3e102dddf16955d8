"""Scripts: flags in, library calls, files out."""
