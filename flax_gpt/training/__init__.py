"""Training: the loss, the optimizer, one step, and what is learned."""
