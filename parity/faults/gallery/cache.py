"""Bugs in the KV cache and in what is generated from it."""

from parity.faults.edit import Bug, Edit

# jax attends to new tokens apart from the cache, so what is written wrong shows one call later.
# torch writes rows that stand alike as one slice; a bug in the slots does without that short cut.
_NEVER_ALIKE = Edit("positions.py", "bool(np.all(found_B == reached))", "False")

BUGS = (
    Bug(
        id="offset-zero",
        title="Decoded tokens all stand at position 0",
        symptom="The first generated token is right, and what follows is gibberish.",
        why=(
            "Positions are counted from the start of the call instead of the start of the row. "
            "The prompt is one call and comes out right. Every later call is one token long, so "
            "its only position is 0."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "positions.py",
                "positions_BT = jnp.where(real_BT, slots_BT, 0)",
                "positions_BT = jnp.where(real_BT, steps_BT, 0)",
            ),
        ),
        torch=(
            Edit(
                "positions.py",
                "positions_BT = torch.where(real_BT, slots_BT, 0)",
                "positions_BT = torch.where(real_BT, steps_BT, 0)",
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="offset-shared",
        title="One length serves all rows of the cache",
        symptom="Generation is right one row at a time and wrong for short prompts in a batch.",
        why=(
            "The longest row's length is taken for all of them. Shorter rows get positions that "
            "are too high, leave a gap in their slots and attend to it. With prompts of equal "
            "length nothing is wrong."
        ),
        seen="unslothai/unsloth#3795",
        flax=(
            Edit(
                "positions.py",
                "lengths_B1 = lengths_B[:, None]",
                "lengths_B1 = jnp.full_like(lengths_B, jnp.max(lengths_B))[:, None]",
            ),
        ),
        torch=(
            Edit(
                "positions.py",
                "lengths_B1 = lengths_B[:, None]",
                "lengths_B1 = torch.full_like(lengths_B, int(torch.max(lengths_B)))[:, None]",
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="written-one-late",
        title="Keys and values are written one slot too far",
        symptom="Tokens see an empty slot, not the one written last; text is odd from the start.",
        why=(
            "The length is advanced before the write instead of after it. Slot 0 keeps its zeros, "
            "and the token written last lies just beyond what a query may see. At the end of the "
            "cache the last slot is written twice."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "cache.py",
                "        slots_BT = placement.slots_BT\n",
                "        last = self.keys_BKSH.shape[2] - 1\n"
                "        slots_BT = jnp.minimum(placement.slots_BT + 1, last)\n"
                "        slots_BT = jnp.where(placement.real_BT, slots_BT, placement.slots_BT)\n",
            ),
        ),
        torch=(
            Edit(
                "cache.py",
                "slots = placement.slots_BT[rows, steps]",
                "slots = (placement.slots_BT[rows, steps] + 1).clamp(max=keys_BKSH.shape[2] - 1)",
            ),
            _NEVER_ALIKE,
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="old-keys-overwritten",
        title="Keys and values are written one slot too early",
        symptom="Each new token erases the one before it, and the text loses its thread.",
        why=(
            "A length that counts from 1 is used as an index that counts from 0. The newest token "
            "overwrites its predecessor, and the slot it should have filled stays empty. The first "
            "token goes to slot -1, which is the last one."
        ),
        seen="a common trap",
        flax=(
            Edit("cache.py", "slots_BT = placement.slots_BT", "slots_BT = placement.slots_BT - 1"),
        ),
        torch=(
            Edit(
                "cache.py",
                "slots = placement.slots_BT[rows, steps]",
                "slots = placement.slots_BT[rows, steps] - 1",
            ),
            _NEVER_ALIKE,
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="no-validity-mask",
        title="A decoding step attends to the whole capacity of the cache",
        symptom="Text gets worse the larger the cache is, and is right in one that is full.",
        why=(
            "A single query has no future, so it seems to need no mask. But the slots behind the "
            "length are there, and their zeros have a score of 0 like any other. They take their "
            "share of the softmax and dilute what is real."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "positions.py",
                "rungs, rung, filled = reach(num_slots, lengths_B)",
                "rungs, rung, filled = (num_slots,), 0, False",
            ),
            Edit(
                "positions.py",
                "        past = jnp.where(slots < lengths_B1, slots, NOWHERE)\n",
                "        past = jnp.where(slots < lengths_B1, slots, NOWHERE)\n"
                "        if num_tokens == 1:\n"
                "            past = jnp.where(slots == slots_BT, NOWHERE, 0)\n",
            ),
        ),
        torch=(
            Edit(
                "positions.py",
                "rungs, rung, filled = reach(\n            num_slots, "
                "lengths_B + (num_tokens if counts_B is None else counts_B)\n        )",
                "rungs, rung, filled = (num_slots,), 0, False",
            ),
            Edit(
                "positions.py",
                "    mask_BTS = columns_BS[:, None, :] < seen_BT[:, :, None]\n",
                "    mask_BTS = columns_BS[:, None, :] < seen_BT[:, :, None]\n"
                "    if num_tokens == 1:\n"
                "        mask_BTS = torch.ones_like(mask_BTS)\n",
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="chunk-hides-past",
        title="A cached call masks as if its tokens came first",
        symptom="The first generated token is right; after it only the prompt's start is seen.",
        why=(
            "A causal mask of T queries over S slots can start at the top left or end at the "
            "bottom right. From the top left, query t sees slots 0 to t and not what the cache "
            "holds before it. The two agree only when the cache is empty."
        ),
        seen="pytorch/pytorch#144858; google/flax#5591; pytorch/executorch#21749",
        flax=(
            Edit("positions.py", "seen_BT = lengths_B1 + jnp.minimum(", "seen_BT = jnp.minimum("),
        ),
        torch=(
            Edit(
                "positions.py", "seen_BT = lengths_B1 + torch.minimum(", "seen_BT = torch.minimum("
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="overflow-silent",
        title="A full cache overwrites its last slot without a word",
        symptom="Long generations degrade at some length, and nothing says that the cache is full.",
        why=(
            "An index beyond the end is clamped, as jax's slice updates do by themselves. Every "
            "further token overwrites the last slot at the last position. The answer has the right "
            "shape and no NaN, so only its content is wrong."
        ),
        seen="jax-ml/jax#34257",
        flax=(
            Edit(
                "model.py",
                "            cache.check_room(num_tokens, counts_B, self.config.context_length)\n",
                "",
            ),
            Edit(
                "positions.py",
                "slots_BT = jnp.where(slots_BT < num_slots, slots_BT, NOWHERE)",
                "slots_BT = jnp.where(real_BT, jnp.minimum(slots_BT, num_slots - 1), NOWHERE)",
            ),
            Edit(
                "positions.py",
                "rung >= found_B.max()",
                "rung >= min(num_slots, found_B.max())",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "            cache.check_room(num_tokens, counts_B, self.config.context_length)\n",
                "",
            ),
            Edit(
                "positions.py",
                "slots_BT = torch.where(slots_BT < num_slots, slots_BT, NOWHERE)",
                "slots_BT = torch.where(real_BT, slots_BT.clamp(max=num_slots - 1), NOWHERE)",
            ),
            Edit(
                "positions.py",
                "max(1, int(found_B.max()))",
                "min(num_slots, max(1, int(found_B.max())))",
            ),
        ),
        caught_by=("boundary-lengths",),
    ),
    Bug(
        id="values-from-keys",
        title="Values are written from the keys",
        symptom="Shapes fit and training is fine; every generation with a cache is wrong.",
        why=(
            "Keys and values have the same shape, and a copied line kept the wrong one. Training "
            "never reads the cache. Only a comparison of the same text with and without it can "
            "tell."
        ),
        seen="awslabs/sockeye#731",
        flax=(
            Edit(
                "cache.py",
                "values_BTKH = jnp.swapaxes(values_BKTH, 1, 2)",
                "values_BTKH = jnp.swapaxes(keys_BKTH, 1, 2)",
            ),
        ),
        torch=(
            Edit(
                "cache.py",
                "values_BKTH[rows, :, steps].to(values_BKSH.dtype)",
                "keys_BKTH[rows, :, steps].to(values_BKSH.dtype)",
            ),
            Edit(
                "cache.py",
                "values_BKSH[:, :, start:end] = values_BKTH",
                "values_BKSH[:, :, start:end] = keys_BKTH",
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="keys-and-values-swapped",
        title="Keys and values are exchanged on their way into the cache",
        symptom="Shapes fit and training is fine; every generation with a cache is wrong.",
        why=(
            "Two arguments of the same shape change places in a call. The cache then scores "
            "against values and mixes keys. Nothing raises an error, and the uncached path that "
            "training uses is right."
        ),
        seen="awslabs/sockeye#731",
        flax=(
            Edit(
                "attention.py",
                "layer.append(new.keys_BKSH, new.values_BKSH, placement)",
                "layer.append(new.values_BKSH, new.keys_BKSH, placement)",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "layer.append(new.keys_BKSH, new.values_BKSH, placement)",
                "layer.append(new.values_BKSH, new.keys_BKSH, placement)",
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="rows-not-reordered",
        title="Reordering a cache moves its lengths but not its keys and values",
        symptom="Beam search gets worse with more beams; with one beam it is right.",
        why=(
            "When a beam is replaced by a copy of another, its past has to come along. Here each "
            "row goes on over the past of whoever stood there before. The mistake needs at least "
            "two rows that change places."
        ),
        seen="huggingface/transformers#46612",
        flax=(
            Edit(
                "cache.py",
                "return KVCache(layers, self.lengths_B[rows_R], ",
                "return KVCache(self.layers, self.lengths_B[rows_R], ",
            ),
        ),
        torch=(
            Edit(
                "cache.py",
                "return KVCache(layers, lengths_R, ",
                "return KVCache(self.layers, lengths_R, ",
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="mutated-in-place",
        title="An append changes the cache that it was given",
        symptom="A prompt that is continued twice mixes the two: the second rewrites the first.",
        why=(
            "Both continuations write into the same memory behind the prompt. As long as a cache "
            "is used once and thrown away there is no difference. With a shared prefix the later "
            "call overwrites tokens that the earlier one still counts as its own."
        ),
        seen="rajveer43/VeloxQuant-MLX#59",
        flax=(
            Edit(
                "cache.py",
                "        return LayerCache(keys_BKSH, values_BKSH)\n",
                '        object.__setattr__(self, "keys_BKSH", keys_BKSH)\n'
                '        object.__setattr__(self, "values_BKSH", values_BKSH)\n'
                "        return self\n",
            ),
        ),
        torch=(
            Edit(
                "cache.py",
                "        if self._must_copy() or not self._take_claim(placement.lengths_B):\n"
                "            keys_BKSH, values_BKSH = keys_BKSH.clone(), values_BKSH.clone()\n",
                "",
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="lengths-not-moved",
        title="The lengths of the cache never move",
        symptom="The first generated token is right; the next ones overwrite the row's start.",
        why=(
            "Keys and values come back in the new cache, but the counter is that of the old one. "
            "The next call believes that the cache is empty, writes to slot 0 and sees nothing "
            "else. In jax it is the usual result of changing a local copy."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "KVCache(tuple(layers), placement.ends_B, ",
                "KVCache(tuple(layers), placement.lengths_B, ",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "KVCache(tuple(layers), placement.ends_B, ",
                "KVCache(tuple(layers), placement.lengths_B, ",
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="cache-in-half",
        title="The cache is bfloat16, whatever the model's type",
        symptom="Cached and uncached logits agree to two digits only, and long texts drift apart.",
        why=(
            "A dtype that saves memory on one device became the default. Keys and values are "
            "rounded to 8 significant bits when they are written. Most tokens still come out "
            "the same, so it takes a comparison of logits to see it."
        ),
        seen="Physical-Intelligence/openpi#978; huggingface/transformers#25420",
        flax=(
            Edit(
                "cache.py",
                "dtype = jnp.dtype(dtype or config.dtype)",
                'dtype = jnp.dtype(dtype or "bfloat16")',
            ),
        ),
        torch=(
            Edit(
                "cache.py",
                "dtype = getattr(torch, dtype or config.dtype)",
                'dtype = getattr(torch, dtype or "bfloat16")',
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
    Bug(
        id="graph-grows",
        title="Decoding records a graph for gradients that nobody will take",
        symptom="Memory grows with every generated token until there is none left.",
        why=(
            "Without no_grad each step's cache is the result of recorded operations on the one "
            "before it. The newest cache keeps the whole history alive, activations included. "
            "Tokens are right, and short runs fit into memory."
        ),
        seen="a common trap",
        torch=(
            Edit("decode.py", "@torch.no_grad()\ndef prefill(", "def prefill("),
            Edit("decode.py", "@torch.no_grad()\ndef decode_step(", "def decode_step("),
            Edit("generation.py", "@torch.no_grad()\ndef _loop(", "def _loop("),
        ),
        absent="jax records operations only inside jax.grad, so a decoding step keeps no history.",
        caught_by=("growing-graph",),
    ),
    Bug(
        id="recompiles-every-length",
        title="Each prompt length is compiled anew",
        symptom="The first prompt of any new length takes seconds instead of milliseconds.",
        why=(
            "A compiled program has fixed shapes. Without rounding the prompt up to one of a few "
            "lengths, every length that users happen to send gets a program of its own. Tokens are "
            "right, and a benchmark with one length sees nothing."
        ),
        seen="NovaSky-AI/SkyRL#539",
        flax=(
            Edit(
                "decoder.py",
                "length = room_for(num_tokens, self.config, least=1)",
                "length = num_tokens",
            ),
        ),
        absent="Nothing is compiled in eager torch, which takes every length as it comes.",
        caught_by=("recompilation",),
    ),
    Bug(
        id="last-column-read",
        title="Generation starts from the last column, padding or not",
        symptom="Prompts that are shorter than the longest in the batch continue with nonsense.",
        why=(
            "The last column of a padded batch is the last token of the longest row alone. For all "
            "others it is padding, and the logits behind padding mean nothing. A batch of one "
            "works unless prompts are rounded up in length."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "decode.py",
                "    if counts_B is None:\n"
                "        return x[:, -1:]\n"
                "    return jnp.take_along_axis(x, (counts_B - 1)[:, None, None], axis=1)\n",
                "    return x[:, -1:]\n",
            ),
        ),
        torch=(
            Edit(
                "decode.py",
                "    if counts_B is None:\n"
                "        return x[:, -1:]\n"
                "    return torch.take_along_dim(x, (counts_B - 1)[:, None, None], dim=1)\n",
                "    return x[:, -1:]\n",
            ),
        ),
        caught_by=("sampling",),
    ),
    Bug(
        id="dropout-in-generation",
        title="Dropout stays active outside of training",
        symptom="Two evaluations of the same input differ, and so do cached and uncached logits.",
        why=(
            "Dropout is active by default in both frameworks, and only a flag that somebody has "
            "to set turns it off. Evaluation loss is noisy and too high, and a compiled jax call "
            "keeps one mask for good. A dropout rate of 0, as in most tests, hides it."
        ),
        seen="a common trap (met in Flax's MiniGPT tutorial)",
        flax=(
            Edit(
                "layers.py",
                "import jax.numpy as jnp\n",
                "import jax.numpy as jnp\nimport numpy as np\n",
            ),
            Edit(
                "layers.py",
                "    if key is None or rate == 0.0:\n        return x\n",
                "    if rate == 0.0:\n"
                "        return x\n"
                "    if key is None:\n"
                "        key = random.key(np.random.randint(2**31))\n",
            ),
        ),
        torch=(
            Edit(
                "layers.py",
                "    if key is None or rate == 0.0:\n        return x\n",
                "    if key is None:\n        return F.dropout(x, rate)\n",
            ),
        ),
        caught_by=("determinism", "cached-equals-uncached"),
    ),
    Bug(
        id="key-reused",
        title="Every token is drawn with the same key",
        symptom="Sampled text falls into loops, and the same words win again and again.",
        why=(
            "A key is a value, and the same key gives the same noise. The noise of each draw then "
            "favours the same ids at every step. One token looks as random as it should; only a "
            "row of them shows the pattern."
        ),
        seen="jax-ml/jax#170",
        flax=(
            Edit(
                "generation.py",
                "random.perturb(random.fold_in(key, step), left_BV)",
                "random.perturb(key, left_BV)",
            ),
        ),
        torch=(
            Edit(
                "generation.py",
                "random.perturb(random.fold_in(key, step), left_BV)",
                "random.perturb(key, left_BV)",
            ),
        ),
        caught_by=("sampling",),
    ),
    Bug(
        id="stop-never-reached",
        title="Generated tokens are compared with padding instead of the stop ids",
        symptom="Every row runs to the full length, with the stop token in the middle of the text.",
        why=(
            "The end token was never configured, and the id that fills finished rows stands in for "
            "it. No model ever produces that id. Tokens before the stop are right, so a check of "
            "the text's beginning passes."
        ),
        seen="pytorch/torchtune#949",
        flax=(
            Edit(
                "generation.py",
                "stops_B = jnp.any(tokens_B[:, None] == stop_ids[None, :], axis=1)",
                "stops_B = tokens_B == NO_TOKEN",
            ),
        ),
        torch=(
            Edit(
                "generation.py",
                "stops_B = torch.any(tokens_B[:, None] == stop_ids[None, :], dim=1)",
                "stops_B = tokens_B == NO_TOKEN",
            ),
        ),
        caught_by=("sampling",),
    ),
    Bug(
        id="temperature-multiplied",
        title="Logits are multiplied by the temperature",
        symptom="Low temperatures give wild text and high ones repeat themselves.",
        why=(
            "Dividing by a small temperature sharpens the distribution, and multiplying by it "
            "flattens it. At a temperature of 1 the two are the same, which is where most people "
            "test."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "generation.py",
                "min(1.0 / sampling.temperature, float(jnp.finfo(given_BV.dtype).max))",
                "sampling.temperature",
            ),
        ),
        torch=(
            Edit(
                "generation.py",
                "min(1.0 / sampling.temperature, torch.finfo(given_BV.dtype).max)",
                "sampling.temperature",
            ),
        ),
        caught_by=("sampling",),
    ),
    Bug(
        id="truncate-ignored",
        title="Cutting a cache back leaves its lengths as they were",
        symptom="Tokens that were rejected and cut off still influence what follows.",
        why=(
            "Truncation changes nothing but the lengths, and the old ones are returned. The next "
            "tokens come behind those that should be gone. Speculative decoding and edited prompts "
            "depend on it; plain generation never calls it."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "cache.py",
                "return KVCache(self.layers, lengths_B, ",
                "return KVCache(self.layers, self.lengths_B, ",
            ),
        ),
        torch=(
            Edit(
                "cache.py",
                "return KVCache(self.layers, lengths_B, ",
                "return KVCache(self.layers, self.lengths_B, ",
            ),
        ),
        caught_by=("cached-equals-uncached",),
    ),
)
