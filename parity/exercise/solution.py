"""Part 2, solved: edits that give the right starters a cache. For the grader, never for a student.

The grader hands this model to a student's own loops, since it can be called with a cache and
without.
"""

from collections.abc import Sequence

from parity.exercise.plants import files
from parity.faults.edit import Edit


def solved(framework: str, more: Sequence[Edit] = ()) -> dict[str, str]:
    """The files of a starter without bugs and with part 2.

    Args:
        framework: flax or torch.
        more: edits on top.
    """
    return files(framework, [*SOLUTION[framework], *more])


def _shared(array: str, call: str) -> tuple[Edit, ...]:
    """What is alike in both frameworks but for the names of an array and of a call."""
    head = f"    def {call}(self, x_BTD: {array}) -> {array}:\n"
    cached_head = (
        f"    def {call}(\n        self, x_BTD: {array}, layer: int, cache: KVCache | None\n"
        f"    ) -> tuple[{array}, KVCache | None]:\n"
    )
    mixes, returns = '        """Mixes along time', '        """Returns the stream.'
    return (
        Edit("model.py", head + mixes, cached_head + mixes),
        Edit(
            "model.py",
            "        scores_BNTS = q_BNTH @",
            "        start = 0\n"
            "        if cache is not None:\n"
            "            start, cache = cache.length, cache.append(layer, k_BNSH, v_BNSH)\n"
            "            k_BNSH, v_BNSH = cache.keys[layer], cache.values[layer]\n"
            "        scores_BNTS = q_BNTH @",
        ),
        Edit(
            "model.py",
            "visible_TS = slots_S <= times_T1",
            "visible_TS = slots_S <= start + times_T1",
        ),
        Edit(
            "model.py",
            "return self.out(self.join_heads(mixed_BNTH))",
            "return self.out(self.join_heads(mixed_BNTH)), cache",
        ),
        Edit("model.py", head + returns, cached_head + returns),
        Edit(
            "model.py",
            "        x_BTD = x_BTD + self.attention(self.norm_1(x_BTD))\n",
            "        y_BTD, cache = self.attention(self.norm_1(x_BTD), layer, cache)\n"
            "        x_BTD = x_BTD + y_BTD\n",
        ),
        Edit(
            "model.py",
            "self.mlp(self.norm_2(x_BTD))\n        return x_BTD\n",
            "self.mlp(self.norm_2(x_BTD))\n        return x_BTD, cache\n",
        ),
        Edit(
            "model.py",
            f"    def {call}(self, tokens_BT: {array}) -> {array}:\n",
            f"    def {call}(\n        self, tokens_BT: {array}, cache: KVCache | None = None\n"
            f"    ) -> {array} | tuple[{array}, KVCache]:\n",
        ),
        Edit(
            "model.py",
            "        positions_T = ",
            "        start = 0 if cache is None else cache.length\n        positions_T = start + ",
        ),
        Edit(
            "model.py",
            "        for block in self.blocks:\n            x_BTD = block(x_BTD)\n",
            "        for layer, block in enumerate(self.blocks):\n"
            "            x_BTD, cache = block(x_BTD, layer, cache)\n",
        ),
        Edit(
            "model.py",
            "        return x_BTD @ self",
            "        logits_BTV = x_BTD @ self",
        ),
        Edit("generate.py", "from model", "from cache import KVCache\nfrom model"),
    )


_LOGITS = "        if cache is None:\n            return logits_BTV\n"
_ADVANCED = "        return logits_BTV, cache.advance(tokens_BT.shape[1])\n"
_GENERATE = """    cache = KVCache.empty(model.config, tokens_BT.shape[0])
    tokens_BG, unread_BT = tokens_BT, tokens_BT
    for _ in range(num_tokens):
        logits_BTV, cache = model(unread_BT, cache)
"""
_UNWRITTEN = '    raise NotImplementedError("part 2")\n'

SOLUTION = {
    "flax": (
        Edit(
            "model.py",
            "from flax import nnx\n",
            "from flax import nnx\n\nfrom cache import KVCache\n",
        ),
        *_shared("jax.Array", "__call__"),
        Edit("model.py", "embedding[...].T\n", f"embedding[...].T\n{_LOGITS}{_ADVANCED}"),
        Edit(
            "generate.py",
            _UNWRITTEN,
            f"{_GENERATE}"
            "        unread_BT = logits_BTV[:, -1].argmax(axis=-1, keepdims=True)\n"
            "        tokens_BG = jnp.concatenate([tokens_BG, unread_BT], axis=1)\n"
            "    return tokens_BG\n",
        ),
    ),
    "torch": (
        Edit(
            "model.py",
            "from torch.nn import functional as F\n",
            "from torch.nn import functional as F\n\nfrom cache import KVCache\n",
        ),
        *_shared("torch.Tensor", "forward"),
        Edit("model.py", "weight.T\n", f"weight.T\n{_LOGITS}{_ADVANCED}"),
        Edit(
            "generate.py",
            f"{_UNWRITTEN}",
            "    with torch.no_grad():\n"
            + "".join(f"    {line}\n" for line in _GENERATE.splitlines())
            + "            unread_BT = logits_BTV[:, -1].argmax(dim=-1, keepdim=True)\n"
            "            tokens_BG = torch.cat([tokens_BG, unread_BT], dim=1)\n"
            "    return tokens_BG\n",
        ),
    ),
}
