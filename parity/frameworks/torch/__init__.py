"""PyTorch behind the interface of `parity.frameworks`.

leaves.py   read, load and cast the weights of a module; tensors as arrays and back
capture.py  inputs, outputs and gradients of every submodule's calls
purity.py   find operations narrower than float64
module.py   any module as a ModelSpec; its trainer and default optimizer; a Handle
runner.py   TorchRunner: one model that answers the levels in NumPy
"""
