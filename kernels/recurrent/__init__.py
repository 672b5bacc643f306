"""Triton kernels of the recurrent scan."""
