"""Recurrent layers: from the functional interface to the operators."""
