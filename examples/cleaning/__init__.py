"""The trials of `examples/clean_pairs.py`: what each procedure of `hfvlm data` reads, and what is learned from it."""
