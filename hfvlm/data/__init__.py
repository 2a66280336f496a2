"""Procedures that make training data, streaming and resumable: filtering, near duplicates, balancing, noun phrases,
instructions, and bootstrapped captions. `hfvlm data` is their command line."""
