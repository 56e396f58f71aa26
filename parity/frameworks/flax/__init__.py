"""Flax NNX modules: leaves, capture, purity, runner."""
