"""Timings on a GPU: cases, contestants, and a runner that survives crashes and hangs."""
