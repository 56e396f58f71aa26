"""What the machine offers. Nothing here knows the rest of parity.

devices.py        where the frameworks run, at what precision, and a fingerprint of the machine
threads.py        how torch's threads wait for each other
memory.py         give memory back, keep arrays on disk
files.py          files that appear whole or not at all
progress.py       a live line on a terminal, a line per step in a log; interrupts
import_target.py  the objects that `package.module:name` and `file.py:name` stand for
"""
