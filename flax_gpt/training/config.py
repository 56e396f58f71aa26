"""The constants of training. Byte for byte the same file in both twins."""

import dataclasses

SCHEDULES = "constant", "linear", "cosine"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """AdamW with warm-up, decay of the rate and clipping.

    Loshchilov and Hutter, "Decoupled weight decay regularization", 2019.

    Attributes:
        learning_rate: step size at the end of the warm-up.
        schedule: of the rate after the warm-up: constant, linear or cosine.
        warmup_steps: updates over which the rate rises; update n of them, from 1, has
            n / warmup_steps of it, so that no update is lost to a rate of 0.
        total_steps: updates after which the rate stays at its end; needed to come down.
        final_fraction: of the rate, left at the end of a linear or cosine schedule.
        beta1: decay of the first moment, per step.
        beta2: decay of the second moment, per step.
        epsilon: added to the root of the corrected second moment, outside the root.
        weight_decay: decoupled, times the rate, on the matrices of linear layers. Stated, because
            the frameworks' defaults differ (torch 1e-2, optax 1e-4).
        decay_all: also decay embeddings, biases and norms.
        clip_norm: largest global gradient norm; None does not clip.
        label_smoothing: share of each target spread evenly over all classes, in [0, 1).
        accumulation_steps: parts into which the rows of a batch are cut, run one after the other;
            every scored token counts the same, whichever part it is in.
        compute_dtype: of forward and backward pass, with weights and optimizer in their own dtype:
            bfloat16, or float16 with dynamic loss scaling; None for the weights' dtype.

    Raises:
        ValueError: on constants outside their range, all problems in one message.
    """

    learning_rate: float = 1e-3
    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    final_fraction: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    decay_all: bool = False
    clip_norm: float | None = 1.0
    label_smoothing: float = 0.0
    accumulation_steps: int = 1
    compute_dtype: str | None = None

    def __post_init__(self):
        problems = [
            f"{name} is {getattr(self, name)}, it must be in (0, 1)"
            for name in ("beta1", "beta2")
            if not 0.0 < getattr(self, name) < 1.0
        ]
        problems += [
            f"{name} is {getattr(self, name)}, it must be positive and finite"
            for name in ("learning_rate", "epsilon")
            if not 0.0 < getattr(self, name) < float("inf")
        ]
        if self.schedule not in SCHEDULES:
            problems.append(
                f"schedule is {self.schedule!r}, it must be one of {', '.join(SCHEDULES)}"
            )
        elif self.schedule != "constant" and self.total_steps is None:
            problems.append(f"schedule {self.schedule} has no total_steps, it must have an end")
        if not self.warmup_steps >= 0:
            problems.append(f"warmup_steps is {self.warmup_steps}, it must not be negative")
        if self.total_steps is not None and not self.total_steps > self.warmup_steps:
            problems.append(
                f"total_steps is {self.total_steps}, it must be more than the "
                f"{self.warmup_steps} of the warm-up"
            )
        if not 0.0 <= self.final_fraction <= 1.0:
            problems.append(f"final_fraction is {self.final_fraction}, it must be in [0, 1]")
        if not self.weight_decay >= 0.0:
            problems.append(f"weight_decay is {self.weight_decay}, it must not be negative")
        if self.clip_norm is not None and not self.clip_norm > 0.0:
            problems.append(f"clip_norm is {self.clip_norm}, it must be positive or None")
        if not 0.0 <= self.label_smoothing < 1.0:
            problems.append(f"label_smoothing is {self.label_smoothing}, it must be in [0, 1)")
        if not (isinstance(self.accumulation_steps, int) and self.accumulation_steps >= 1):
            problems.append(
                f"accumulation_steps is {self.accumulation_steps!r}, it must be an integer of at "
                "least 1"
            )
        if self.compute_dtype not in (None, "bfloat16", "float16"):
            problems.append(
                f"compute_dtype is {self.compute_dtype!r}, it must be bfloat16, float16 or None"
            )
        if problems:
            raise ValueError(f"TrainConfig: {'; '.join(problems)}.")
