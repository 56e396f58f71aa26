"""The two GPTs as one pair."""
