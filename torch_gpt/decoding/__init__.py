"""Decoding: tokens chosen from logits, batches decoded fast."""
