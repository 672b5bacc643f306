"""Studies: what layers remember, what they cost, and the least time that a GPU needs for them."""
