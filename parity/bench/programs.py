"""What XLA says of the programs that compute one token: operations, bytes and memory."""

import jax
import jax.numpy as jnp

from flax_gpt import GPT, Decoder


def costs(program: jax.stages.Compiled) -> dict[str, float]:
    """FLOP and bytes of one run, as far as XLA tells them; of branches it takes the dearest."""
    found = program.cost_analysis() or {}
    named = {"FLOP": found.get("flops"), "bytes": found.get("bytes accessed")}
    return {name: float(cost) for name, cost in named.items() if cost}


def uncached_costs(model: GPT, batch_size: int, context: int) -> dict[str, float]:
    """Costs of one token behind `context` others, all of which are read again.

    Returns:
        FLOP, bytes, and the memory of what is computed on the way, as far as XLA tells them.
    """
    tokens_BT = jax.ShapeDtypeStruct((batch_size, context), jnp.int32)
    compiled = Decoder(model, batch_size, packed=False).program(_read_all, tokens_BT)
    memory = compiled.memory_analysis()
    found = {} if memory is None else {"memory": float(memory.temp_size_in_bytes)}
    return costs(compiled) | {name: cost for name, cost in found.items() if cost > 0}


def _read_all(model: GPT, tokens_BT: jax.Array) -> jax.Array:
    x_BTD, _ = model.hidden(tokens_BT)
    return model.unembed(x_BTD[:, -1:])
