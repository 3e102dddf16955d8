"""What `python -m experiments.heads VERB` does, a file a verb: `main(argv) -> exit code`, with flags of its own."""
