"""PyTorch modules: leaves, capture, purity, runner."""
