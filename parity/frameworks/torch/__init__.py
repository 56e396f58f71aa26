"""PyTorch behind the interface of `parity.frameworks`.

leaves.py   read, load and cast the weights of a module; tensors as arrays and back
capture.py  inputs, outputs and gradients of every submodule's calls
purity.py   find operations narrower than float64
lift.py     run what asks for a narrower float in float64
constants.py  what a module computes when it is built, in float64 where that can be had
module.py   any module as a ModelSpec; its trainer and default optimizer; a Handle
runner.py   TorchRunner: one model that answers the levels in NumPy
"""
