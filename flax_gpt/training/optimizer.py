"""AdamW from the framework's parts, with every default that differs between the two stated.

Read beside torch_gpt/training/optimizer.py.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from flax_gpt.training.config import TrainConfig

_State = Any  # of a chain of optax: a tuple of the states of its parts

CLIP_EPSILON = 1e-6  # torch's, added to the norm that divides; optax adds nothing
INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 2000  # of the loss, in float16


def adamw(config: TrainConfig) -> optax.GradientTransformation:
    """Make AdamW with decoupled decay. Loshchilov and Hutter, 2019, algorithm 2.

    `optax.adamw` is this chain, but for the bias correction: it computes 1 - beta**count in
    float32, which at count 1 and beta 0.999 is off by 1.3e-5, where torch uses Python doubles.

    Returns:
        The chain.
    """
    return optax.chain(
        scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=lambda tree: _decayed(config, tree)),
        optax.scale_by_learning_rate(lambda count: learning_rate(config, count)),
    )


def learning_rate(config: TrainConfig, count: ArrayLike) -> jax.Array:
    """Return the rate of the update that comes after `count` others.

    The frameworks' own schedules differ: optax's warm-up gives the first update a rate of 0, and
    torch's counts its own calls, so that calling it before the update shifts every rate by one.

    Returns:
        The rate.
    """
    count = jnp.asarray(count).astype(jnp.result_type(float))
    progress = 0.0
    if config.schedule != "constant":
        assert config.total_steps is not None  # as TrainConfig sees to
        span = config.total_steps - config.warmup_steps
        progress = jnp.clip((count - config.warmup_steps) / span, 0.0, 1.0)
    if config.schedule == "cosine":
        progress = 0.5 - 0.5 * jnp.cos(math.pi * progress)
    fraction = 1.0 - (1.0 - config.final_fraction) * progress
    warm = jnp.minimum((count + 1.0) / max(config.warmup_steps, 1), 1.0)
    return config.learning_rate * jnp.where(count < config.warmup_steps, warm, fraction)


def num_updates(optimizer: _State) -> jax.Array:
    """Return the number of updates that an AdamW state has seen."""
    return optimizer[0].count


def clip_gradients(
    config: TrainConfig, gradients: optax.Updates
) -> tuple[optax.Updates, jax.Array]:
    """Scale a whole gradient down to the largest norm allowed; return its norm before that too.

    Pascanu et al., "On the difficulty of training recurrent neural networks", 2013.

    Returns:
        The gradient, scaled, and the norm.
    """
    # twin: torch's own norm adds squares up one after the other on a CPU, and in float32 that of
    # GPT-2's embedding comes out 0.3 % too small; so both sum them by hand.
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(g)) for g in jax.tree.leaves(gradients)))
    if config.clip_norm is None:
        return gradients, norm
    scale = jnp.minimum(config.clip_norm / (norm + CLIP_EPSILON), 1.0)
    return jax.tree.map(lambda g: g * scale, gradients), norm


def scale_by_adam(beta1: float, beta2: float, epsilon: float) -> optax.GradientTransformation:
    """Make Adam's direction, with bias corrections exact to rounding; state as in optax."""

    def init(params: optax.Params) -> optax.OptState:
        # Two trees of zeros: a buffer that is in a state twice cannot be donated.
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return optax.ScaleByAdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        updates: optax.Updates, state: _State, params: optax.Params | None = None
    ) -> tuple[optax.Updates, _State]:
        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            # -expm1(n log b) is 1 - b**n without the cancellation.
            steps = count.astype(m.dtype)
            m_hat = m / -jnp.expm1(steps * math.log(beta1))
            v_hat = v / -jnp.expm1(steps * math.log(beta2))
            return m_hat / (jnp.sqrt(v_hat) + epsilon)

        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * g * g, state.nu, updates)
        return jax.tree.map(direction, mu, nu), optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossScale:
    """A factor of the loss that keeps float16 gradients off zero, as torch.amp.GradScaler's.

    Micikevicius et al., "Mixed precision training", 2018, section 3.2.

    Attributes:
        scale: what the loss is multiplied by; a power of two, so that it costs no digit.
        streak: finite gradients since it last changed.
    """

    scale: jax.Array
    streak: jax.Array

    @classmethod
    def create(cls) -> "LossScale":
        """Return the scale before the first step."""
        return cls(jnp.asarray(INITIAL_SCALE, jnp.float32), jnp.zeros((), jnp.int32))

    def update(self, finite: jax.Array) -> "LossScale":
        """Halve after a gradient that was not finite, double after enough that were."""
        grown = finite & (self.streak + 1 == GROWTH_INTERVAL)
        factor = jnp.where(finite, jnp.where(grown, 2.0, 1.0), 0.5)
        scale = self.scale * factor
        streak = jnp.where(finite & ~grown, self.streak + 1, 0)
        # torch too stays at the last scale that is a float: from infinity there is no way back.
        return LossScale(jnp.where(jnp.isfinite(scale), scale, self.scale), streak)


def _decayed(config: TrainConfig, parameters: optax.Params) -> optax.Params:
    """Mark the leaves that decay: the kernels of linear layers, or all."""

    def decays(path: tuple, _: jax.Array) -> bool:
        return config.decay_all or any(getattr(key, "key", None) == "kernel" for key in path)

    return jax.tree_util.tree_map_with_path(decays, parameters)
