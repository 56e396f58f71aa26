"""Why two models differ: what a fault did, read back until it has a name."""
