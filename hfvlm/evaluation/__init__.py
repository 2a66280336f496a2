"""Metrics, and the evaluations of models by them."""
