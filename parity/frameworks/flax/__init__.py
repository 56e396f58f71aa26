"""Flax NNX behind the interface of `parity.frameworks`.

leaves.py    read, load and cast the weights of a module
capture.py   inputs, outputs and gradients of every submodule's calls
lift.py      run a program in float64 where it asks for a narrower float
purity.py    find operations narrower than float64
module.py    any module as a ModelSpec; its trainer and default optimizer; a Handle
runner.py    FlaxRunner: one model that answers the levels in NumPy
scope.py     the dtype and device that jax computes with
donation.py  compiled functions that overwrite an argument
"""
