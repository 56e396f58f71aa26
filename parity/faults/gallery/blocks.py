"""Bugs inside the blocks: residuals, projections, norms, activations and the head."""

from parity.faults.edit import Bug, Edit

BUGS = (
    Bug(
        id="residual-missing",
        title="The attention branch replaces the stream instead of adding to it",
        symptom="Deep models barely train: gradients shrink with every block they pass.",
        why=(
            "The residual path carries the token and its gradient through all blocks unchanged. "
            "Without it everything has to go through attention, whose output starts near zero, so "
            "the token's own identity is lost in the first block."
        ),
        seen="a common trap",
        flax=(Edit("model.py", "x_BTD = x_BTD + y_BTD", "x_BTD = y_BTD"),),
        torch=(Edit("model.py", "x_BTD = x_BTD + y_BTD", "x_BTD = y_BTD"),),
        caught_by=("residual-stream",),
    ),
    Bug(
        id="residual-from-norm",
        title="The residual adds the normed input instead of the stream",
        symptom="Training works; loss is slightly off and pretrained weights give nonsense.",
        why=(
            "The norm was applied to the variable itself, so what is added back is its output. "
            "Each block then forgets the scale of the stream, and gradients pass through every "
            "norm. A small model hardly cares."
        ),
        seen="a common trap",
        flax=(Edit("model.py", "x_BTD = x_BTD + y_BTD", "x_BTD = self.norm_1(x_BTD) + y_BTD"),),
        torch=(Edit("model.py", "x_BTD = x_BTD + y_BTD", "x_BTD = self.norm_1(x_BTD) + y_BTD"),),
        caught_by=("parity",),
    ),
    Bug(
        id="residual-doubled",
        title="The residual is added twice",
        symptom="The stream doubles in every block, so deep layers contribute less and less.",
        why=(
            "Both the branch and the block add the input. After L blocks the embedding is 2**L "
            "times as large as it was, and branches of constant size no longer matter beside it. "
            "The final norm hides the scale from the logits."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "        x_BTD = x_BTD + y_BTD\n",
                "        y_BTD = x_BTD + y_BTD\n        x_BTD = x_BTD + y_BTD\n",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "        x_BTD = x_BTD + y_BTD\n",
                "        y_BTD = x_BTD + y_BTD\n        x_BTD = x_BTD + y_BTD\n",
            ),
        ),
        caught_by=("parity",),
    ),
    Bug(
        id="query-as-key",
        title="Keys are made by the query projection",
        symptom="Training works a little worse, and the key projection gets no gradient.",
        why=(
            "A copied line kept the wrong name. Scores become symmetric, so a token that looks at "
            "another is looked at in the same measure. The key projection is in the model, in the "
            "optimizer and in the checkpoint, and nothing reads it."
        ),
        seen="a common trap",
        flax=(Edit("model.py", "k_BTKH = self.key(x_BTD)", "k_BTKH = self.query(x_BTD)"),),
        torch=(Edit("model.py", "k_BTKH = self.key(x_BTD)", "k_BTKH = self.query(x_BTD)"),),
        caught_by=("gradient-coverage",),
    ),
    Bug(
        id="key-as-value",
        title="Values are made by the key projection",
        symptom="Training works a little worse, and the value projection gets no gradient.",
        why=(
            "A copied line kept the wrong name. One matrix now has to say both where to look and "
            "what to pass on. Shapes agree and the loss falls; only a look at the gradients finds "
            "the matrix that nothing reads."
        ),
        seen="a common trap",
        flax=(Edit("model.py", "v_BTKH = self.value(x_BTD)", "v_BTKH = self.key(x_BTD)"),),
        torch=(Edit("model.py", "v_BTKH = self.value(x_BTD)", "v_BTKH = self.key(x_BTD)"),),
        caught_by=("gradient-coverage",),
    ),
    Bug(
        id="norm-dropped",
        title="Attention reads the stream without its norm",
        symptom="Attention starts out nearly silent: its inputs are some forty times too small.",
        why=(
            "The layer is built and saved, but the forward pass does not call it. The fresh stream "
            "is near 0.03 where the norm would make it 1, so scores are flat and values tiny. "
            "In a long training the stream grows and attention grows unstable with it."
        ),
        seen="a common trap",
        flax=(Edit("model.py", "self.attention(self.norm_1(x_BTD), ", "self.attention(x_BTD, "),),
        torch=(Edit("model.py", "self.attention(self.norm_1(x_BTD), ", "self.attention(x_BTD, "),),
        caught_by=("gradient-coverage", "attention-scale"),
    ),
    Bug(
        id="final-norm-dropped",
        title="The final norm is not applied before the head",
        symptom="Logits are tiny at the start, and their scale drifts with the depth of the model.",
        why=(
            "In a pre-norm model the stream itself is never normed, and its size grows from block "
            "to block. Without the last norm the head reads that size. The first loss is ln V to "
            "all digits, closer than an honest model gets."
        ),
        seen="a common trap",
        flax=(Edit("model.py", "return self.norm(x_BTD), cache", "return x_BTD, cache"),),
        torch=(Edit("model.py", "return self.norm(x_BTD), cache", "return x_BTD, cache"),),
        caught_by=("gradient-coverage",),
    ),
    Bug(
        id="norm-twice-used",
        title="The first norm is used where the second was meant",
        symptom="Training works, one norm per block never changes, and pretrained weights fail.",
        why=(
            "norm_1 and norm_2 differ by one character. Fresh norms are all alike, so outputs at "
            "the start are exactly right. They drift apart as soon as weights are trained or "
            "loaded, and the second norm has no gradient."
        ),
        seen="a common trap",
        flax=(Edit("model.py", "self.mlp(self.norm_2(x_BTD)", "self.mlp(self.norm_1(x_BTD)"),),
        torch=(Edit("model.py", "self.mlp(self.norm_2(x_BTD)", "self.mlp(self.norm_1(x_BTD)"),),
        caught_by=("gradient-coverage",),
    ),
    Bug(
        id="norm-over-time",
        title="A norm takes mean and variance over time instead of features",
        symptom="The loss is too low in training, and cached calls disagree with uncached ones.",
        why=(
            "Statistics over the time axis contain every later token, so the future leaks through "
            "two numbers per feature. The mask cannot help, since the norm comes before it. With "
            "one token at a time the variance is 0, and the output is the bias alone."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "        y_BTD, layer = self.attention(self.norm_1(x_BTD), placement, layer, "
                "subkeys[0])\n",
                "        mean_B1D = jnp.mean(x_BTD, axis=1, keepdims=True)\n"
                "        variance_B1D = jnp.var(x_BTD, axis=1, keepdims=True)\n"
                "        y_BTD = (x_BTD - mean_B1D) / "
                "jnp.sqrt(variance_B1D + self.norm_1.epsilon)\n"
                "        y_BTD = y_BTD * self.norm_1.scale[...][None, None, :]\n"
                "        y_BTD = y_BTD + self.norm_1.bias[...][None, None, :]\n"
                "        y_BTD, layer = self.attention(y_BTD, placement, layer, subkeys[0])\n",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "        y_BTD, layer = self.attention(self.norm_1(x_BTD), placement, layer, "
                "subkeys[0])\n",
                "        mean_B1D = torch.mean(x_BTD, dim=1, keepdim=True)\n"
                "        variance_B1D = torch.var(x_BTD, dim=1, keepdim=True, unbiased=False)\n"
                "        y_BTD = (x_BTD - mean_B1D) / "
                "torch.sqrt(variance_B1D + self.norm_1.eps)\n"
                "        y_BTD = y_BTD * self.norm_1.weight[None, None, :]\n"
                "        y_BTD = y_BTD + self.norm_1.bias[None, None, :]\n"
                "        y_BTD, layer = self.attention(y_BTD, placement, layer, subkeys[0])\n",
            ),
        ),
        caught_by=("causality", "causality-gradient", "cached-equals-uncached"),
    ),
    Bug(
        id="scale-by-model-width",
        title="Scores are divided by the root of the model width",
        symptom="Attention is more even than it should be; nothing is visibly wrong.",
        why=(
            "The variance of a dot product is the number of its terms, and a head has D / K of "
            "them. Dividing by sqrt(D) makes scores too small by sqrt(K). Training makes up for it "
            "with larger queries, so no loss shows it."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "attention.py",
                "q_BKQTH.shape[-1] ** -0.5",
                "(q_BKQTH.shape[1] * q_BKQTH.shape[-1]) ** -0.5",
            ),
        ),
        torch=(
            Edit(
                "attention.py",
                "q_BKQTH.shape[-1] ** -0.5",
                "(q_BKQTH.shape[1] * q_BKQTH.shape[-1]) ** -0.5",
            ),
        ),
        caught_by=("attention-scale",),
    ),
    Bug(
        id="scale-missing",
        title="Scores are not divided by the root of the head width",
        symptom="Attention grows sharp early, more so with wide heads; small models learn anyway.",
        why=(
            "Scores have a standard deviation of sqrt(H) instead of 1, and the softmax saturates "
            "as queries and keys grow. Its gradient then vanishes. With fresh small weights all "
            "scores are near 0, and nothing shows."
        ),
        seen="aladdinpersson/Machine-Learning-Collection#65",
        flax=(Edit("attention.py", " * q_BKQTH.shape[-1] ** -0.5", ""),),
        torch=(Edit("attention.py", " * q_BKQTH.shape[-1] ** -0.5", ""),),
        caught_by=("attention-scale",),
    ),
    Bug(
        id="out-projection-dropped",
        title="The heads are not mixed by the output projection",
        symptom="Training works with fewer weights than it should: one matrix gets no gradient.",
        why=(
            "Shapes fit without the projection, since the heads together are as wide as the "
            "stream. Each head then writes to its own slice of the stream and to no other. In jax "
            "decay drives the unused matrix slowly to zero; torch skips what has no gradient."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "y_BTD = self.out(jnp.swapaxes(mixed_BNTH, 1, 2).reshape(B, T, -1))",
                "y_BTD = jnp.swapaxes(mixed_BNTH, 1, 2).reshape(B, T, -1)",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "y_BTD = self.out(torch.swapaxes(mixed_BNTH, 1, 2).reshape(B, T, -1))",
                "y_BTD = torch.swapaxes(mixed_BNTH, 1, 2).reshape(B, T, -1)",
            ),
        ),
        caught_by=("gradient-coverage",),
    ),
    Bug(
        id="activation-dropped",
        title="The MLP has no activation between its two maps",
        symptom="The model trains, to a worse loss, as if it had no MLP.",
        why=(
            "Two linear maps in a row are one linear map, however wide the middle is. All weights "
            "get gradients and every probe of the plumbing passes. What is missing is capacity, "
            "which no single batch shows."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "h_BTF = activate(self.config, h_BTF)",
                "pass",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "h_BTF = activate(self.config, h_BTF)",
                "pass",
            ),
        ),
        caught_by=("parity",),
    ),
    Bug(
        id="gelu-exact",
        title="GELU is exact where its tanh approximation was meant",
        symptom="Outputs with pretrained weights are off in the fourth digit.",
        why=(
            "The two forms differ by at most 5e-4, and the frameworks have opposite defaults: flax "
            "approximates and torch does not. A model trained with either works. Weights trained "
            "with one and run with the other are slightly wrong everywhere."
        ),
        seen="a common trap",
        flax=(
            Edit("layers.py", 'approximate=config.activation == "gelu_tanh"', "approximate=False"),
        ),
        torch=(
            Edit(
                "layers.py",
                'approximate="tanh" if config.activation == "gelu_tanh" else "none"',
                'approximate="none"',
            ),
        ),
        caught_by=("parity",),
    ),
    Bug(
        id="norm-epsilon",
        title="The epsilon of the norms is another framework's default",
        symptom="Outputs differ in the fifth digit from where the weights come from.",
        why=(
            "LayerNorm adds 1e-5 in torch and 1e-6 in flax unless told otherwise. Beside a "
            "variance near 1 that changes the output by 5e-6, far below what training shows. "
            "Beside the variance of fresh embeddings, 8e-4, it is half a percent."
        ),
        seen="a common trap",
        flax=(Edit("layers.py", "epsilon=config.norm_epsilon", "epsilon=1e-6"),),
        torch=(Edit("layers.py", "eps=config.norm_epsilon", "eps=1e-6"),),
        caught_by=("parity",),
    ),
    Bug(
        id="block-reused",
        title="The first block is used for every layer",
        symptom="The model learns like a shallow one, and most of its weights get no gradient.",
        why=(
            "The loop counts layers but always calls block 0. Depth is there, but it shares one "
            "set of weights. All other blocks are built, saved and loaded without ever being run."
        ),
        seen="a common trap",
        flax=(
            Edit(
                "model.py",
                "x_BTD, layers[index] = block(x_BTD,",
                "x_BTD, layers[index] = self.blocks[0](x_BTD,",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "x_BTD, layers[index] = block(x_BTD,",
                "x_BTD, layers[index] = self.blocks[0](x_BTD,",
            ),
        ),
        caught_by=("gradient-coverage",),
    ),
    Bug(
        id="attribute-misspelt",
        title="Initial weights go to a misspelt attribute of the layer",
        symptom="Attention and MLP stay dead at zero; only the embeddings learn anything.",
        why=(
            "Python and both frameworks accept any attribute name, so the drawn weights become a "
            "new parameter that no forward pass reads. The real one keeps its zeros. Two zero maps "
            "in a row give each other zero gradients, and stay where they are."
        ),
        seen="a common trap (met in Flax's MiniGPT tutorial)",
        flax=(
            Edit(
                "layers.py",
                "layer.kernel.set_value(initial(config, (in_dim, out_dim), std, key))",
                "layer.kernal = nnx.Param(initial(config, (in_dim, out_dim), std, key))",
            ),
        ),
        torch=(
            Edit(
                "layers.py",
                "        layer.weight.copy_(initial(config, (in_dim, out_dim), std, key).T)\n"
                "        if bias:\n"
                "            layer.bias.zero_()\n",
                "        layer.weight.zero_()\n"
                "        if bias:\n"
                "            layer.bias.zero_()\n"
                "    layer.wieght = nn.Parameter(initial(config, (in_dim, out_dim), std, key).T)\n",
            ),
        ),
        caught_by=("gradient-coverage", "overfit-one-batch"),
    ),
    Bug(
        id="tied-gradient-lost",
        title="The tied head uses a detached copy of the embedding",
        symptom="The loss falls more slowly; words that are never read are never learned either.",
        why=(
            "The embedding gets gradients from two places, and the head gives the larger part. "
            "With a copy the outputs are equal to the last bit, so no forward comparison can see "
            "it. What is left is the gradient of the tokens that were read."
        ),
        seen="karpathy/nanoGPT#21; huggingface/transformers#3799",
        flax=(
            Edit(
                "model.py",
                "self.token_embedding.embedding[...])",
                "jax.lax.stop_gradient(self.token_embedding.embedding[...]))",
            ),
        ),
        torch=(
            Edit(
                "model.py",
                "self.token_embedding.weight)",
                "self.token_embedding.weight.detach())",
            ),
        ),
        caught_by=("parity",),
    ),
    Bug(
        id="bias-dropped",
        title="The first map of the MLP leaves out its bias",
        symptom="Fresh models agree to all digits; trained weights give slightly other outputs.",
        why=(
            "Biases start at zero, where leaving one out changes nothing. A comparison of fresh "
            "models therefore passes, and loading a trained one fails quietly. The bias is saved "
            "with the rest and has no gradient."
        ),
        seen="a common trap",
        # Used as a matrix it must stay one where weights are laid out.
        flax=(
            Edit("model.py", "self.up(x_BTD)", "x_BTD @ self.up.kernel[...]"),
            Edit(
                "packing.py",
                "if isinstance(linear, nnx.Linear):",
                'if isinstance(linear, nnx.Linear) and name != "up":',
            ),
        ),
        torch=(
            Edit("model.py", "self.up(x_BTD)", "x_BTD @ self.up.weight.T"),
            Edit(
                "packing.py",
                "list(block.mlp.named_children())",
                '[x for x in block.mlp.named_children() if x[0] != "up"]',
            ),
        ),
        caught_by=("gradient-coverage",),
    ),
)
