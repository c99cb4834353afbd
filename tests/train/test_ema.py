import torch
from torch import nn

from vocseg.train.ema import Ema


def test_the_average_follows_its_formula_with_a_growing_decay():
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(0.0)
    ema = Ema(network, decay=0.3)
    network.weight.data.fill_(1.0)
    # Decays min(0.3, 2/11) = 2/11, min(0.3, 3/12) = 1/4, then 0.3: the distance to 1 shrinks by these factors.
    expected = 1.0
    for decay in (2 / 11, 1 / 4, 0.3):
        ema.update(network)
        expected *= decay
        assert torch.allclose(ema.network.weight, torch.tensor([[1 - expected]]))


def test_batch_norm_is_averaged_and_its_counter_copied():
    network = nn.BatchNorm2d(2)
    ema = Ema(network, decay=0.0)
    network(torch.randn(4, 2, 3, 3) + 5)
    ema.update(network)
    # The decay of the first step is min(0, …) = 0: the average is the network.
    assert torch.equal(ema.network.running_mean, network.running_mean)
    assert ema.network.num_batches_tracked == 1
    assert not ema.network.training


def test_the_average_keeps_the_memory_format_and_wants_no_gradients():
    network = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
    ema = Ema(network, decay=0.9)
    ema.update(network)
    assert ema.network.weight.is_contiguous(memory_format=torch.channels_last)
    assert not ema.network.weight.requires_grad
