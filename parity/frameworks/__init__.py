"""One interface to a model, implemented once for each framework.

protocols.py     Runner, Trainer, Decoder: what the levels of a check ask of a model
batch.py         Batch: the inputs of one call
spec.py          ModelSpec: how to build, call and score a model; ModuleUse: how a user says so
leaves.py        weights as named NumPy arrays: copy, cast, compare
capture.py       Trace: one call of one module; several captures in lockstep
purity.py        Purity: the operations of a run that are not in float64
rounding.py      what rounding may have done to constants
scoped.py        an object whose methods run inside a context
default_call.py  call, loss and optimizer where the user names none
handle.py        all that one framework offers, imported when it is asked for
flax/            the same in Flax NNX
torch/           the same in PyTorch
"""
