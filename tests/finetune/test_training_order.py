"""The order of training: what each step sees, by epochs, weights and seed."""

from collections import Counter

import pytest

from tinyllama_hf.finetune.training_order import TrainingOrder, training_steps


def test_an_epoch_has_each_conversation_once_in_random_order():
    steps = training_steps([10], [1.0], epochs=2, per_step=5, seed=1)
    epochs = [steps[0] + steps[1], steps[2] + steps[3]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1] and epochs[0] != list(range(10))
    assert steps == training_steps([10], [1.0], 2, 5, 1) != training_steps([10], [1.0], 2, 5, 2)


def test_every_step_is_full():
    steps = training_steps([10], [1.0], epochs=1, per_step=4, seed=0)
    assert [len(step) for step in steps] == [4, 4, 4]
    assert sorted(number for step in steps for number in step)[:10] != list(range(10)), "two are seen twice"
    assert set(range(10)) == {number for step in steps for number in step}


def test_more_epochs_begin_like_fewer():
    assert training_steps([10], [1.0], 3, 5, 0)[:4] == training_steps([10], [1.0], 2, 5, 0)


def test_weights():
    """Twice the first source, and one half of the second: the other half in the second epoch."""
    steps = training_steps([4, 10], [2.0, 0.5], epochs=2, per_step=13, seed=0)
    seen = [Counter(step) for step in steps]
    assert len(steps) == 2
    for epoch in seen:
        assert [epoch[number] for number in range(4)] == [2] * 4
    halves = [{number for number in epoch if number >= 4} for epoch in seen]
    assert [len(half) for half in halves] == [5, 5] and halves[0] | halves[1] == set(range(4, 14))


@pytest.mark.parametrize("packing", [True, False])
def test_rows_hold_the_conversations_of_their_step(packing):
    lengths = [5, 50, 7, 60, 9, 70, 11, 80]
    steps = [[0, 1, 2, 3], [4, 5, 6, 7]]
    order = TrainingOrder(steps, lengths, rows_per_step=2, packing=packing)
    rows = order.rows()
    assert [sorted(rows[0] + rows[1]), sorted(rows[2] + rows[3])] == steps
    assert order.tokens_after() == [122, 292]
    if packing:
        assert [sum(lengths[number] for number in row) for row in rows] == [60, 62, 89, 81]
    else:
        assert rows == [[0, 2], [1, 3], [4, 6], [5, 7]], "similar lengths together"
