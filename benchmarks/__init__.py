"""Measurements of hfvlm beside what people run today, in one process on one machine.

They are no tests: times depend on the machine, so only ratios of neighbours in one run are worth telling.
"""
