"""Measurements of hfvlm next to transformers' own classes and to what a careful user does, in one process.

A row asserts equal results before it is timed. Times depend on the machine, so only ratios of neighbours in one run
are worth telling.
"""
