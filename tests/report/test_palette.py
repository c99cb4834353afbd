import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from vocseg.report.palette import id_colours, save_palette_mask, voc_palette


def test_the_voc_colours_are_the_published_ones():
    colours = voc_palette()
    # The bits of an id go to R, G, B in turn, highest first: 15 = 0b001111 sets bit 7 of each, and bit 6 of R;
    # 20 = 0b010100 sets bit 7 of B and bit 6 of G; 255 sets bits 7, 6, 5 of R and G and bits 7, 6 of B.
    assert colours[[0, 1, 2, 4, 15, 20, 255]].tolist() == [
        [0, 0, 0],
        [128, 0, 0],
        [0, 128, 0],
        [0, 0, 128],
        [192, 128, 128],
        [0, 64, 128],
        [224, 224, 192],
    ]
    assert len(np.unique(colours, axis=0)) == 256
    assert voc_palette(21).tolist() == colours[:21].tolist()


def test_a_data_sets_own_colours_come_first_and_void_keeps_its_colour():
    colours = id_colours(((9, 8, 7), (255, 0, 1)))
    assert colours[[0, 1, 2, 255]].tolist() == [[9, 8, 7], [255, 0, 1], [0, 128, 0], [224, 224, 192]]
    assert id_colours(()).tolist() == id_colours(voc_palette(21)).tolist() == voc_palette().tolist()


@settings(max_examples=25, deadline=None)
@given(mask=arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.integers(0, 255)))
def test_a_palette_mask_reads_back_as_the_same_ids(mask, tmp_path_factory):
    path = tmp_path_factory.mktemp("masks") / "mask.png"
    save_palette_mask(mask, path, ((10, 20, 30),))
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "P")
        assert picture.getpalette()[:6] == [10, 20, 30, 128, 0, 0]
        assert np.array_equal(np.asarray(picture), mask)


def test_only_a_uint8_mask_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"mask\.png: expected a uint8 mask \(h, w\), got int64 \(2, 2\)"):
        save_palette_mask(np.zeros((2, 2), np.int64), tmp_path / "mask.png")
    assert list(tmp_path.iterdir()) == []
