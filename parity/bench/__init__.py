"""Time the twins side by side in one run, and compare them with what the machine can do.

Nothing is timed before the twins' results agree. Import what you need from `decode` and `train`.
"""
