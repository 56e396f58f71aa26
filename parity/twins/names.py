"""Names of frameworks, presets, tasks and dtypes; imports nothing, so that `--help` is instant."""

FRAMEWORKS = "flax", "torch"
# A test holds the presets equal to those of `flax_gpt`, which may not import the harness.
PRESETS = "tiny", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
TASKS = "next-token", "token-class", "sequence-class"
DTYPES = "float64", "float32", "bfloat16", "float16"
