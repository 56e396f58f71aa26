"""Inference of the settings of an optimizer from its first steps.

Nothing is guessed and no setting is looked up. From the weights before and after each step, the
moments and the gradient of the loss, all in float64, linear fits give every constant of an
Adam-like optimizer to about ten digits, each with its error; to others, known forms are fitted
(forms.py). What no form explains to rounding stays unknown. Two optimizers are compared by their
inferred settings.

Kingma and Ba, "Adam: a method for stochastic optimization", 2015; Loshchilov and Hutter, "Decoupled
weight decay regularization", 2019.
"""

from parity.check.causes.optimizer.difference import difference
from parity.check.causes.optimizer.forms import explain_forms
from parity.check.causes.optimizer.reading import Reading, read, shares
from parity.check.causes.optimizer.step import Step

__all__ = ["Reading", "Step", "difference", "explain_forms", "read", "shares"]
