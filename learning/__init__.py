"""What small models of every architecture learn, beside a blind baseline: `python -m learning`, or `make learn`."""
