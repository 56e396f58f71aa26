"""Which leaf of one model is which of the other, and moving them."""
