"""The choice between bf16 and fp32 by a trial, with a clock that the trials advance themselves."""

import copy

import pytest
import torch
from torch import nn

from vocseg.device import Placement
from vocseg.network import Normalization
from vocseg.train.precision import times_faster, try_bf16


class Clock:
    """Stands still until something takes time."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def __deepcopy__(self, memo):
        return self

    def takes(self, *seconds):
        """A function that takes so long at its first, second, … call, and as long as the last from then on."""
        left = list(seconds)

        def run():
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


class Network(nn.Module):
    """Everything a step can change: weights, batch-norm statistics, torch's random numbers, a count of its own."""

    def __init__(self, clock, time_in_bf16):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(4, 2, 1))
        self.clock, self.time_in_bf16, self.called = clock, time_in_bf16, 0

    def forward(self, images):
        self.called += 1
        self.clock.now += self.time_in_bf16 / 4 if torch.is_autocast_enabled("cpu") else 1 / 4
        return self.head(self.encoder(images))


def cross_entropy(logits, target):
    return nn.functional.cross_entropy(logits, target, ignore_index=255)


def batch():
    return torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8), torch.randint(0, 2, (2, 8, 8), dtype=torch.uint8)


def inference(network, precision):
    """One image in eval mode, which takes the same in both precisions."""
    assert not network.training

    def run():
        network.clock.now += 0.25

    return run


def tried(network, clock, loss=cross_entropy, infer=inference, **options):
    return try_bf16(
        network,
        network.encoder,
        loss,
        batch(),
        placement=Placement(torch.device("cpu"), "bf16"),
        stride=1,
        normalization=Normalization(torch.full((3,), 127.5), torch.full((3,), 127.5)),
        infer=infer,
        clock=clock,
        **options,
    )


@pytest.mark.parametrize(
    ("time_in_bf16", "expected"),
    [
        (0.5, ("bf16", "bf16: 2.00x as fast as fp32 in a trial of 1 step")),
        (0.9, ("bf16", "bf16: 1.11x as fast as fp32 in a trial of 5 steps")),
        # Too little to be worth its rounding.
        (0.98, ("fp32", "fp32: bf16 was 1.02x as fast as fp32 in a trial of 5 steps")),
        (1.15, ("fp32", "fp32: bf16 was 0.87x as fast as fp32 in a trial of 2 steps")),
    ],
)
def test_the_faster_precision_is_chosen_and_its_gain_is_said(time_in_bf16, expected):
    clock = Clock()
    assert tried(Network(clock, time_in_bf16), clock) == expected


def test_inference_is_tried_by_itself_where_training_is_faster_in_fp32():
    clock = Clock()

    def infer(network, precision):
        return clock.takes(0.25 if precision == "bf16" else 0.5)

    precision, note = tried(Network(clock, 1.15), clock, infer=infer)
    assert precision == "fp32+bf16"
    assert note == (
        "fp32 in training, where bf16 was 0.87x as fast as fp32 in a trial of 2 steps; bf16 in inference, 2.00x as fast"
    )
    assert tried(Network(clock, 0.5), clock, infer=infer)[0] == "bf16"


def test_a_trial_changes_nothing():
    clock = Clock()
    network = Network(clock, 0.5).eval()
    network.encoder.requires_grad_(False)
    network.head[1].weight.grad = torch.ones_like(network.head[1].weight)
    before = copy.deepcopy(network.state_dict())
    tried(network, clock)
    after = network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (network.training, network.called) == (False, 0)
    assert not any(p.requires_grad for p in network.encoder.parameters())
    assert torch.equal(network.head[1].weight.grad, torch.ones_like(network.head[1].weight))


def test_a_trial_draws_no_random_numbers():
    clock = Clock()
    network = Network(clock, 0.5)
    torch.manual_seed(5)
    batch()
    expected = torch.rand(3)
    torch.manual_seed(5)
    tried(network, clock)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_encoder_trains_in_the_trial_as_it_will_in_the_run(frozen):
    clock, graphs = Clock(), []

    def loss(logits, target):
        weights, pending = set(), [logits.grad_fn]
        while pending:
            node = pending.pop()
            if node is not None:
                weights |= {tuple(node.variable.shape)} if hasattr(node, "variable") else set()
                pending += [following for following, _ in node.next_functions]
        graphs.append(weights)
        return cross_entropy(logits, target)

    tried(Network(clock, 0.5), clock, loss, frozen=frozen)
    assert graphs
    assert all(((4, 3, 3, 3) in weights) != frozen for weights in graphs)


def test_what_fails_in_bf16_is_trained_in_fp32():
    class Picky(Network):
        def forward(self, images):
            logits = super().forward(images)
            if logits.dtype != torch.float32:
                raise RuntimeError("not implemented\nfor bf16")
            return logits

    clock = Clock()
    found = tried(Picky(clock, 0.5), clock)
    assert found == ("fp32", "fp32: a trial of bf16 failed with RuntimeError: not implemented for bf16")


def test_a_network_that_cannot_be_copied_is_trained_in_fp32():
    clock = Clock()
    network = Network(clock, 0.5)
    network.open_file = open(__file__)  # noqa: SIM115
    with network.open_file:
        assert tried(network, clock)[0] == "fp32"


def test_the_first_round_counts_only_where_there_is_no_other():
    clock = Clock()
    # The first call of one pays 4 seconds for what is done once; then it takes 2, and the other 2.5.
    assert times_faster(clock.takes(6, 2), clock.takes(2.5), clock=clock) == (1.25, 1)
    assert times_faster(clock.takes(6, 2), clock.takes(15), clock=clock) == (2.5, 1)


def test_two_rounds_that_agree_clearly_are_enough_and_one_is_not():
    clock = Clock()
    # Ratios 4, 1, 1.5 and 1.5: the last two agree. The median of all but the first is 1.5.
    assert times_faster(clock.takes(1), clock.takes(4, 1, 1.5), clock=clock, limit_seconds=99) == (1.5, 3)
    # Ratios 0.25, 0.5, 1.25, 0.5 and 0.5, of which the first says nothing against `one`.
    one = clock.takes(4, 2, 0.8, 2)
    assert times_faster(one, clock.takes(1), clock=clock, limit_seconds=99) == (0.5, 4)


def test_no_round_begins_after_the_limit():
    clock = Clock()
    # A round takes 2.25 seconds: the second begins before 4, the third would not.
    assert times_faster(clock.takes(1), clock.takes(1.25), clock=clock, limit_seconds=4) == (1.25, 1)
    assert times_faster(clock.takes(1), clock.takes(1.25), clock=clock, limit_seconds=1) == (1.25, 1)
    assert clock.now == 3 * 2.25
