"""The rungs of the check; `ladder.py` has them in the order in which they are climbed.

Each level is a module with `records(session)`, which compares, and `locate(session, records)`,
which says after a failure where the two models part.
"""
