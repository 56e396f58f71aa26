"""Names of what the bench can time; free of imports, so that `parity bench --help` is instant."""

DTYPES = "float32", "bfloat16"
DECODERS = (
    "flax step",
    "flax loop",
    "flax uncached",
    "flax naive",
    "torch step",
    "torch uncached",
    "torch in place",
    "transformers",
    "transformers static",
    "ctranslate2",
)
LIBRARIES = "transformers", "ctranslate2"  # of the peers, whose names begin with them
