"""Decoders that the bench times: the twins' own, baselines on the same weights, and peers."""
