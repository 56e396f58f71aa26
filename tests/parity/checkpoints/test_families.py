"""Every family: what transformers writes both twins read, and what we write it reads."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from parity.checkpoints import Checkpoint, save
from tests.parity.checkpoints.library import MODELS, Wide, both, prompts, randomize, theirs

BOUND = 1e-12
B, T, G = 3, 11, 9
COUNTS = np.array((T, 6, 1))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory) -> Callable[[str], Path]:
    """Where a family's model is saved, by transformers itself."""
    made = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "checkpoint"
            theirs(family).save_pretrained(made[family])
        return made[family]

    return folder


@pytest.mark.parametrize("family", MODELS)
def test_both_twins_compute_and_write_what_transformers_does(family, folder_of):
    """The logits of whole texts, and greedy tokens after prompts that are padded on the left."""
    checkpoint, model = Checkpoint.open(folder_of(family)), theirs(family)
    assert checkpoint.config.dtype == "float64" and checkpoint.notes == ()
    tokens, mask = prompts(B, T), np.arange(T) >= T - COUNTS[:, None]
    with Wide(), torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
        written = model.generate(
            torch.from_numpy(np.where(mask, tokens, 0)),
            attention_mask=torch.from_numpy(mask.astype(np.int64)), max_new_tokens=G,
            do_sample=False,
        )[:, T:].numpy()  # fmt: skip
    assert expected.dtype == np.float64 and expected.std() > 0.3 and len(np.unique(written)) > 3
    with both(checkpoint) as twins:
        for package, twin, array, numpy in twins:
            found = numpy(twin(array(tokens))[0])
            np.testing.assert_allclose(found, expected, rtol=0, atol=BOUND)
            padded, lengths = package.right_pad(array(tokens), array(mask.astype(np.int64)))
            decoder = package.Decoder(twin, B)
            # Each length without a cache is a program for jax; other tests have these.
            for use_cache in (True, False) if package.__name__ == "torch_gpt" else (True,):
                generation = package.generate(decoder, padded, G, lengths, use_cache=use_cache)
                np.testing.assert_array_equal(numpy(generation.tokens_BG), written)


@pytest.mark.parametrize("family", MODELS)
def test_a_folder_that_we_write_is_the_same_model_to_transformers(family, folder_of, tmp_path):
    checkpoint = Checkpoint.open(folder_of(family))
    save(tmp_path / "out", family, checkpoint.config, dict(checkpoint.leaves()))
    with Wide(), torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.float64, attn_implementation="eager",
            experts_implementation="eager",
        )  # fmt: skip
        pairs = [model(torch.from_numpy(prompts())).logits for model in (theirs(family), again)]
    names = theirs(family).state_dict()
    assert all(torch.equal(x, names[name]) for name, x in again.state_dict().items())
    assert torch.dist(*pairs, p=float("inf")) <= BOUND  # memory that is aligned otherwise
    assert Checkpoint.open(tmp_path / "out").config == checkpoint.config


def test_longrope_is_that_of_transformers_token_by_token(tmp_path):
    """Beyond the original length each token turns by the other divisors."""
    name, config, sizes = MODELS["phi3"]
    sizes = sizes | dict(original_max_position_embeddings=8, max_position_embeddings=32)
    with Wide():
        torch.manual_seed(0)
        made = getattr(transformers, config)(**sizes, attn_implementation="eager")
        model = getattr(transformers, name)(made).double().eval()
        randomize(model)
        model.save_pretrained(tmp_path / "long")
        tokens, expected, cache = torch.from_numpy(prompts(1, 16)), [], None
        with torch.no_grad():
            for place in range(16):
                out = model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
                expected.append(out.logits)
                cache = out.past_key_values
    with both(Checkpoint.open(tmp_path / "long")) as twins:
        for _, gpt, array, numpy in twins:
            found = numpy(gpt(array(tokens.numpy()))[0])
            np.testing.assert_allclose(found, torch.cat(expected, 1), rtol=0, atol=BOUND)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("stops, penalty", [((), 1.0), ((5, 7, 17, 19, 40, 63, 88), 0.6)])
def test_both_twins_search_as_transformers_does(family, stops, penalty, folder_of):
    num_tokens, num_new = 11, 12
    counts = np.array((num_tokens, 6, 2))
    tokens, mask = prompts(3), np.arange(num_tokens) >= num_tokens - counts[:, None]
    with Wide(), torch.no_grad():
        searched = theirs(family).generate(
            torch.from_numpy(np.where(mask, tokens, 0)),
            attention_mask=torch.from_numpy(mask.astype(np.int64)), max_new_tokens=num_new,
            do_sample=False, num_beams=4, num_return_sequences=4, early_stopping="never",
            length_penalty=penalty, eos_token_id=list(stops) or None,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    scores = searched.sequences_scores.numpy().reshape(3, 4)
    expected = searched.sequences[:, num_tokens:].numpy().reshape(3, 4, -1)
    with both(Checkpoint.open(folder_of(family))) as twins:
        for package, model, array, numpy in twins:
            padded, lengths = package.right_pad(array(tokens), array(mask.astype(np.int64)))
            found = package.beam_search(model, padded, 4, num_new, lengths, stops, penalty)
            written = numpy(found.tokens_BRG)[:, :, : expected.shape[2]]
            np.testing.assert_array_equal(written, np.where(written < 0, written, expected))
            np.testing.assert_allclose(numpy(found.scores_BR), scores, rtol=0, atol=1e-10)
            assert bool(np.any(written < 0)) == bool(stops)  # a stop does end a beam
