"""Benchmarks: ``python -m bench`` checks every case against a float64 truth, then times it beside its peers."""
