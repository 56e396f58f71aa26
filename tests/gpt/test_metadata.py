"""Where tokens stand and what they see, against a loop that asks each slot in turn."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

B, T, S = 3, 5, 13

examples = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


def sees(slot: int, step: int, length: int, count: int) -> bool:
    """Whether the query at `step` of a call may see a slot: the past, and real tokens up to it."""
    if slot < length:
        return True
    arrived = slot - length
    return arrived <= step and arrived < count


def metadata_of(gpt, num_tokens, num_slots, lengths, counts=None, context_length=S):
    """The twin's metadata of a call over a cache of these lengths; without a cache for None."""
    cache, rows = None, 1
    if lengths is not None:
        cache, rows = (
            gpt.package.KVCache.empty(gpt.config(num_layers=1), B, num_slots),
            len(lengths),
        )
        cache = gpt.package.KVCache(cache.layers, gpt.ints(lengths))
    tokens = gpt.ints(np.zeros((rows, num_tokens)))
    counts = None if counts is None else gpt.ints(counts)
    return gpt.package.metadata.attention_metadata(tokens, cache, counts, context_length)


def place(gpt, *arguments, **options):
    """The same on the host."""
    return {x: gpt.numpy(y) for x, y in vars(metadata_of(gpt, *arguments, **options)).items()}


def seen_slots(gpt, placement, num_slots):
    """The mask by the slots that its columns stand for, (B, T, S)."""
    mask = placement["mask_BTS"]
    if gpt.name == "torch":  # has written by then
        return mask
    rows, num_tokens, _ = mask.shape
    past = mask.shape[2] - num_tokens
    seen = np.zeros((rows, num_tokens, num_slots), bool)
    seen[:, :, :past] = mask[:, :, :past]
    for b, t in np.argwhere(np.broadcast_to(placement["real_BT"], (rows, num_tokens))):
        slot = np.broadcast_to(placement["slots_BT"], (rows, num_tokens))[b, t]
        seen[b, :, slot] |= mask[b, :, past + t]
    return seen


@pytest.mark.parametrize("num_tokens", [1, T])
@examples
@hypothesis.given(data=st.data())
def test_a_query_sees_the_past_and_the_real_tokens_up_to_itself(gpt, num_tokens, data):
    lengths = data.draw(st.lists(st.integers(0, S - T), min_size=B, max_size=B))
    counts = data.draw(st.lists(st.integers(0, num_tokens), min_size=B, max_size=B))
    placement = place(gpt, num_tokens, S, lengths, counts)
    expected = [
        [[sees(s, t, lengths[b], counts[b]) for s in range(S)] for t in range(num_tokens)]
        for b in range(B)
    ]
    np.testing.assert_array_equal(seen_slots(gpt, placement, S), expected)


@examples
@hypothesis.given(data=st.data())
def test_real_tokens_stand_behind_the_past_and_padding_stands_nowhere(gpt, data):
    lengths = data.draw(st.lists(st.integers(0, S - T), min_size=B, max_size=B))
    counts = data.draw(st.lists(st.integers(0, T), min_size=B, max_size=B))
    placement = place(gpt, T, S, lengths, counts)
    nowhere = gpt.package.metadata.NOWHERE
    for b in range(B):
        for t in range(T):
            is_real = t < counts[b]
            assert placement["real_BT"][b, t] == is_real
            assert placement["slots_BT"][b, t] == (lengths[b] + t if is_real else nowhere)
            assert placement["positions_BT"][b, t] == (lengths[b] + t if is_real else 0)


def test_padding_is_never_seen(gpt):
    lengths, counts = [2, 0, 7], [3, 1, 0]
    mask = seen_slots(gpt, place(gpt, T, S, lengths, counts), S)
    for b, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        assert not mask[b, :, length + count :].any()
        assert mask[b, -1].sum() == length + count


def test_without_counts_every_token_is_real(gpt):
    given = place(gpt, T, S, [2, 0, 7], [T, T, T])
    found = place(gpt, T, S, [2, 0, 7])
    if gpt.name == "torch":
        assert given.pop("padded") and not found.pop("padded")
    for name, array in found.items():
        np.testing.assert_array_equal(np.broadcast_to(array, given[name].shape), given[name])


def test_a_single_token_builds_a_single_row(gpt):
    placement = place(gpt, 1, S, [2, 0, 7])
    mask = placement["mask_BTS"]
    # Slots and the token, or slots with the token in them.
    assert mask.shape == (B, 1, S + 1 if gpt.name == "flax" else S)
    np.testing.assert_array_equal(mask.sum(axis=2), [[3], [1], [8]])


@examples
@hypothesis.given(data=st.data())
def test_what_torch_says_to_be_all_seen_is(twins, data):
    _, gpt = twins
    num_tokens = data.draw(st.integers(1, 2))
    same = data.draw(st.booleans())
    longest = data.draw(st.integers(0, S - 2))
    lengths = [longest] * B if same else [longest, 0, longest]
    window = data.draw(st.integers(1, S + 2))
    metadata = metadata_of(gpt, num_tokens, S, lengths)
    narrow = metadata.within(window)
    assert metadata.within(None) is metadata
    for each in (metadata, narrow):
        assert each.longest == longest + num_tokens
        assert not each.all_seen or gpt.numpy(each.mask_BTS)[:, :, : each.longest].all()
    uniform = same or longest == 0
    assert metadata.all_valid == uniform
    assert metadata.all_seen == (num_tokens == 1 and uniform)
    assert narrow.all_seen == (metadata.all_seen and longest + 1 <= window)


def test_a_sequence_that_starts_here_has_one_causal_mask_for_all_rows(gpt):
    placement = place(gpt, T, T, None)
    np.testing.assert_array_equal(placement["mask_BTS"], [np.tri(T, dtype=bool)])
    np.testing.assert_array_equal(placement["positions_BT"], [range(T)])


def test_no_cache_has_the_slot_nowhere(gpt):
    # An index is a 32-bit number, and no cache and no position table reaches this far.
    assert gpt.package.metadata.NOWHERE == np.iinfo(np.int32).max


def test_a_real_token_without_a_slot_has_no_position_either(gpt):
    nowhere = gpt.package.metadata.NOWHERE
    placement = place(gpt, T, S, [S - 2, 0, S], [T, T, 1])
    overflowed = np.zeros((B, T), bool)
    overflowed[0, 2:], overflowed[2, 0] = True, True
    assert (placement["positions_BT"][overflowed] == nowhere).all()
    assert (placement["slots_BT"][overflowed] == nowhere).all()
    assert (placement["positions_BT"][~overflowed] < S).all()


def test_past_the_context_there_is_no_slot_in_a_larger_cache_either(gpt):
    placement = place(gpt, T, S, [S - T] * B, context_length=S - 2)
    nowhere = gpt.package.metadata.NOWHERE
    assert (placement["slots_BT"][:, -2:] == nowhere).all()
    assert (placement["slots_BT"][:, :-2] < S - 2).all()


def test_padding_and_wrong_ids_read_no_row_of_another_token(gpt):
    metadata = metadata_of(gpt, 3, S, [0, 0, 0], [3, 2, 0])
    found = metadata.valid_ids(gpt.ints([[5, -1, 7], [-1, 6, -9], [1, 2, 3]]))
    nowhere = gpt.package.metadata.NOWHERE
    np.testing.assert_array_equal(gpt.numpy(found), [[5, nowhere, 7], [nowhere, 6, 0], [0, 0, 0]])
