"""On CUDA the batch size is tried: what memory runs out with is halved until it fits."""

import pytest
import torch
from torch import Tensor, nn

from vocseg.device import Placement
from vocseg.network import Normalization
from vocseg.train.batch_size import Trial

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

SIDE = 512
CUDA = torch.device("cuda")


def trial() -> Trial:
    """Two maps of 64 floats at 512 x 512 places, 134 MB an image, and as much as one of them again for gradients."""
    network = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1), nn.Conv2d(64, 2, 1))
    placement = Placement(CUDA, "fp32")
    return Trial(
        network=placement.place(network),
        backbone=None,
        loss=lambda logits, target: logits.mean(),
        sample=(torch.zeros(SIDE, SIDE, 3, dtype=torch.uint8), torch.zeros(SIDE, SIDE, dtype=torch.uint8)),
        optimizer=lambda module, backbone: torch.optim.SGD(module.parameters(), lr=0.1),
        placement=placement,
        stride=1,
        normalization=Normalization(torch.zeros(3), torch.ones(3)).to(CUDA),
    )


def test_the_largest_that_fits_is_found_by_halving() -> None:
    one = trial()
    torch.cuda.set_per_process_memory_fraction((1 << 30) / torch.cuda.mem_get_info(CUDA)[1])  # 1 GiB of it
    try:
        size, why = one.largest(64, "why", 0)
        assert size in (2, 4)
        assert why.startswith("largest that fits")
        assert one._taken(size) > 0
        assert one._taken(4 * size) == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_the_search_leaves_weights_memory_and_generators_as_they_were() -> None:
    one = trial()
    state: dict[str, Tensor] = {name: value.clone() for name, value in one.network.state_dict().items()}
    generator, held = torch.cuda.get_rng_state(CUDA), torch.cuda.memory_allocated(CUDA)
    size, why = one.largest(2, "an epoch is short", 0)
    assert (size, why.partition(";")[0]) == (2, "an epoch is short")
    assert torch.cuda.memory_allocated(CUDA) == held
    assert torch.cuda.max_memory_allocated(CUDA) == held
    assert torch.equal(torch.cuda.get_rng_state(CUDA), generator)
    assert all(torch.equal(value, state[name]) for name, value in one.network.state_dict().items())
