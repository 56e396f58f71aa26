"""What runs inside the sandbox, beside a student's code. Imports nothing else of parity.

The sandbox loads this folder as a package of its own, so that neither parity nor the framework
that the exercise is not about has to be imported.
"""
