"""The code that runs in the sandbox beside a student's. It imports nothing else of parity.

The sandbox loads this folder as a package of its own, so that it need not import parity or the
framework that the exercise does not use.
"""
