"""The levels of the check; `names.py` has them in the order in which they run.

Each level is a module with `records(session)`, which compares, and `locate(session, records)`,
which says after a failure where the two models first diverge.
"""
