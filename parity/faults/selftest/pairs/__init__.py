"""Ports as users write them: each file has `torch_net`, `flax_net` and `inputs`."""
