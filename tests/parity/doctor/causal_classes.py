"""Every causal class of `transformers` with a small random config, and what the doctor says of it.

    python -m tests.parity.doctor.causal_classes [NAME ...] [--shard 0/4]

Prints a line for each class and the tally; ends with 1 where a healthy class raised an alarm.
"""

import argparse
import collections
import dataclasses
import sys
import time
import warnings
from collections.abc import Iterator

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from parity.doctor import as_model, examine

VOCABULARY, CONTEXT, LARGEST = 61, 40, 3_000_000
# What configs call their sizes, and one small value for each.
SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "emb_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_inner", "dff"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), CONTEXT),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_groups"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("sliding_window", "attention_window", "window_size"), 8),
    **dict.fromkeys(("state_size", "ssm_state_size", "mamba_d_state", "time_step_rank"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 8),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8),
    "vocab_size": VOCABULARY,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}


@dataclasses.dataclass(frozen=True)
class Said:
    """What the doctor said of one class: a line where it could not be built or asked."""

    name: str
    seconds: float
    alarms: dict[str, str]
    unbuilt: str = ""


def build(kind: str, name: str) -> torch.nn.Module:
    """Return a class of the library with a config of the small sizes that it knows."""
    config_class = transformers.CONFIG_MAPPING[kind]
    known = config_class().get_text_config().to_dict()
    sizes = {x: n for x, n in SIZES.items() if isinstance(known.get(x), int)}
    ids = {x: 0 for x in known if x.endswith("_token_id") and isinstance(known[x], int)}
    # Of layers with a state and layers of attention, one each: the library's cache asks for both.
    mixed = {"attn_layer_indices": [1]} if "attn_layer_indices" in known else {}
    config = config_class(**(sizes | ids | mixed | {"is_decoder": True}))
    with torch.device("meta"):
        large = sum(p.numel() for p in getattr(transformers, name)(config).parameters())
    if large > LARGEST:
        raise ValueError(f"{large:,} weights: no small config")
    torch.manual_seed(0)
    return getattr(transformers, name)(config).eval()


def sweep(names: list[str], shard: tuple[int, int] = (0, 1)) -> Iterator[Said]:
    """Yield what is said of each class that is named, or of all."""
    known = sorted({name: kind for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}.items())
    chosen = [x for x in known if not names or x[0] in names][shard[0] :: shard[1]]
    for name, kind in chosen:
        start = time.process_time()
        try:
            model = as_model(
                build(kind, name), name, context_length=CONTEXT - 4, vocab_size=VOCABULARY
            )
        except Exception as error:
            line = (str(error).strip().splitlines() or [""])[0]
            yield Said(name, 0.0, {}, f"{type(error).__name__}: {line[:200]}")
            continue
        found = examine(model, stop_early=False)
        alarms = {
            x.detector.name: x.finding.sentence
            for x in found.answers
            if x.detector.name in found.fired
        }
        yield Said(name, time.process_time() - start, alarms)
        del model, found


def main() -> int:
    """Print a line for each class, and the tally."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--shard", default="0/1")
    arguments = parser.parse_args()
    number, of = (int(x) for x in arguments.shard.split("/"))
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    tally: collections.Counter[str] = collections.Counter()
    for said in sweep(arguments.names, (number, of)):
        outcome = "not built" if said.unbuilt else "alarm" if said.alarms else "healthy"
        tally[outcome] += 1
        print(f"{outcome} {said.name} {said.seconds:.1f}s {said.unbuilt}", flush=True)
        for detector, sentence in said.alarms.items():
            print(f"    {detector}: {sentence}", flush=True)
    print(dict(tally))
    return int(tally["alarm"] > 0)


if __name__ == "__main__":
    sys.exit(main())
