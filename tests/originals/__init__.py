"""How hfvlm's models are run as an original was, one module an architecture.

`compare(golden)` runs a case, whatever its kind, and calls `golden.compare` for each output it can name.
"""
