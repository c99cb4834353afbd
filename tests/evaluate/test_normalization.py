import numpy as np
import pytest
import torch

from vocseg.build import build
from vocseg.network import choose_normalization
from vocseg.recipe.prepare import load_recipe

PRETRAINED = ((0.5, 0.6, 0.4), (0.25, 0.5, 0.1))
PIXEL = (255, 0, 51)  # red, green, blue: 1, 0 and 0.2 of 255
EXPECTED = {
    "auto": ((1 - 0.5) / 0.25, (0 - 0.6) / 0.5, (0.2 - 0.4) / 0.1),
    "imagenet": ((1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225),
    "half": (1, -1, -0.6),
    "none": (1, 0, 0.2),
    "bgr_mean": (51 - 104.008, 0 - 116.669, 255 - 122.675),  # blue first, not scaled
}
FILLS = {
    "auto": (128, 153, 102),
    "imagenet": (124, 116, 104),
    "half": (128, 128, 128),
    "none": (0, 0, 0),
    "bgr_mean": (123, 117, 104),  # red first again
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_pixel_worked_out_by_hand(name):
    pixels = torch.zeros(2, 3, 4, 3, dtype=torch.uint8)
    pixels[1, 2, 3] = torch.tensor(PIXEL)
    found = choose_normalization(name, PRETRAINED)(pixels)
    assert found.shape == (2, 3, 3, 4)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found[1, :, 2, 3].tolist() == pytest.approx(EXPECTED[name], rel=1e-5)


@pytest.mark.parametrize("name", FILLS)
def test_the_fill_colour_is_zero_once_normalised_as_near_as_whole_numbers_come(name):
    normalization = choose_normalization(name, PRETRAINED)
    assert normalization.fill == FILLS[name]
    found = normalization(torch.tensor(normalization.fill, dtype=torch.uint8).reshape(1, 1, 1, 3))
    assert (found.flatten() * normalization.std).abs().max() <= 0.5


def test_every_normalization_of_a_recipe_is_tested_here():
    schema = type(load_recipe("quickstart")[0].data.settings).model_json_schema()
    assert set(schema["properties"]["normalize"]["enum"]) == EXPECTED.keys() == FILLS.keys()


def test_training_loading_and_scoring_use_the_recipes_normalization_and_looks():
    settings = ("data.normalize=bgr_mean", "data.images=2", "data.val_images=1", "evaluate.flip=true")
    windows = ("evaluate.window=64", "evaluate.overlap=0.25")
    job = build(load_recipe("quickstart", overrides=[*settings, *windows])[0], "cpu")
    predictor = job.predictor(job.network.module)
    for normalization in (job.training.normalization, predictor.normalization):
        assert normalization.bgr
        assert normalization.mean.numpy() == pytest.approx(np.array([104.008, 116.669, 122.675]))
    assert job.training.batches.fill == (123, 117, 104)
    assert (predictor.looks.flip, predictor.looks.window, predictor.looks.overlap) == (True, 64, 0.25)
