"""Attention: from the functional interface to the operators. ``fastseq.attention`` is the function, so the package has
another name."""
