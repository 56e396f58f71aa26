"""One interface to a model, implemented once for each framework."""
