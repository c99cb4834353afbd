import pytest

from vocseg.train.early_stopping import Best, better_is_less


@pytest.mark.parametrize(
    ("metric", "mode", "less"),
    [("val_loss", "auto", True), ("miou", "auto", False), ("miou", "min", True), ("train_loss", "max", False)],
)
def test_losses_are_minimised_unless_the_recipe_says_otherwise(metric, mode, less):
    assert better_is_less(metric, mode) is less


def test_the_best_value_and_the_wait_since_are_kept():
    best = Best(less=False)
    assert [best.update(v, e) for e, v in enumerate([0.1, 0.3, 0.3, 0.2, 0.4], 1)] == [True, True, False, False, True]
    assert (best.value, best.epoch, best.waited) == (0.4, 5, 0)


def test_a_value_that_is_not_a_number_is_never_better_than_one_that_is():
    best = Best(less=True)
    nan = float("nan")
    assert [best.update(v, e) for e, v in enumerate([nan, nan, 2.0, nan, 1.0], 1)] == [True, False, True, False, True]
    assert best.value == 1.0


def test_the_state_goes_on_where_it_was():
    best = Best(less=True)
    best.update(1.0, 1)
    best.update(2.0, 2)
    other = Best(less=True)
    other.load(best.state())
    assert other == best
