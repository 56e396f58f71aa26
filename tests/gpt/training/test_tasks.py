"""What is scored against what: the shift of the next token, and none for classes."""

import jax
import numpy as np
import pytest
from torch.utils import _pytree as pytree

B, T, C = 3, 7, 5
COUNTS = np.array((4, 0, 7))
BOUND = 1e-12


def batch(gpt, counts=None, labels=None):
    """Tokens 10 to 30 in order, so that a place can be told from its token."""
    tokens = 10 + np.arange(B * T).reshape(B, T)
    arrays = [None if x is None else gpt.ints(x) for x in (counts, labels)]
    return gpt.package.Batch(gpt.ints(tokens), *arrays)


def masked(rows, counts):
    """Rows with -100 behind their counts."""
    rows = np.asarray(rows)
    return np.where(np.arange(rows.shape[1]) < np.asarray(counts)[:, None], rows, -100).tolist()


def test_a_language_model_is_scored_on_the_token_after(gpt):
    targets = gpt.package.NEXT_TOKEN.targets
    tokens = 10 + np.arange(B * T).reshape(B, T)
    assert targets(batch(gpt)).tolist() == tokens[:, 1:].tolist()
    assert targets(batch(gpt, COUNTS)).tolist() == masked(tokens[:, 1:], COUNTS - 1)


def test_labels_of_a_language_model_stand_where_their_tokens_are(gpt):
    labels = np.arange(B * T).reshape(B, T)
    labels[:, 3] = -100
    targets = gpt.package.NEXT_TOKEN.targets
    assert targets(batch(gpt, None, labels)).tolist() == labels[:, 1:].tolist()
    found = targets(batch(gpt, COUNTS, labels)).tolist()
    assert found == masked(labels[:, 1:], COUNTS - 1)


def test_classes_of_tokens_are_not_shifted(gpt):
    labels = np.arange(B * T).reshape(B, T) % C
    labels[2, 1] = -100
    targets = gpt.package.TOKEN_CLASS.targets
    assert targets(batch(gpt, None, labels)).tolist() == labels.tolist()
    assert targets(batch(gpt, COUNTS, labels)).tolist() == masked(labels, COUNTS)


def test_a_class_of_a_row_without_tokens_is_not_scored(gpt):
    targets = gpt.package.SEQUENCE_CLASS.targets
    assert targets(batch(gpt, None, [3, 1, -100])).tolist() == [3, 1, -100]
    assert targets(batch(gpt, COUNTS, [3, 1, -100])).tolist() == [3, -100, -100]
    assert targets(batch(gpt, COUNTS, [3, 1, 2])).tolist() == [3, -100, 2]


def losses_of(twins, task):
    """The mean loss by a task and how many tokens it scored, in each twin."""
    for gpt in twins:
        found = gpt.package.evaluate(gpt.model(num_layers=1), [batch(gpt, COUNTS)], task(gpt))
        yield float(found.loss.mean), int(found.loss.num_tokens)


def test_the_tasks_loss_is_the_next_token_loss_of_the_model(twins):
    _, gpt = twins
    data = batch(gpt, COUNTS)
    logits, _ = gpt.model(num_layers=1)(data.tokens_BT, counts_B=data.counts_B)
    expected = gpt.package.next_token_loss(logits, data.tokens_BT, data.counts_B)
    for mean, num_tokens in losses_of(twins, lambda gpt: gpt.package.NEXT_TOKEN):
        assert num_tokens == int(expected.num_tokens) == 3 + 0 + 6
        assert mean == pytest.approx(float(expected.mean), rel=0, abs=BOUND)


def test_a_task_of_ones_own_is_two_functions(twins):
    # Name the token before: what is scored is data, and the step does not know it.
    def task(gpt):
        def logits(model, data, key):
            return model(data.tokens_BT, counts_B=data.counts_B, key=key)[0][:, 1:]

        return gpt.package.Task(logits, lambda data: data.tokens_BT[:, :-1])

    _, gpt = twins
    data = batch(gpt, COUNTS)
    logits, _ = gpt.model(num_layers=1)(data.tokens_BT, counts_B=data.counts_B)
    expected = gpt.package.cross_entropy(logits[:, 1:], data.tokens_BT[:, :-1])
    for mean, num_tokens in losses_of(twins, task):
        assert num_tokens == B * (T - 1)
        assert mean == pytest.approx(float(expected.mean), rel=0, abs=BOUND)


def test_a_batch_goes_through_its_frameworks_trees(gpt):
    tree_map = jax.tree.map if gpt.name == "flax" else pytree.tree_map
    for counts, labels in ((None, None), (COUNTS, None), (COUNTS, [1, 2, 3])):
        data = batch(gpt, counts, labels)
        rows = tree_map(lambda leaf: leaf[1:], data)
        assert type(rows) is type(data)
        assert rows.tokens_BT.tolist() == data.tokens_BT[1:].tolist()
        assert (rows.counts_B is None) == (counts is None)
        assert (rows.labels is None) == (labels is None)
        if labels is not None:
            assert (rows.counts_B.tolist(), rows.labels.tolist()) == ([0, 7], [2, 3])
