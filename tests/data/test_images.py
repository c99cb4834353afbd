"""Reading images and masks: what is read is what was written, and every defect names its file."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vocseg.data.images import image_size, read_image, read_mask, read_pair
from vocseg.data.lists import first_few
from vocseg.errors import DataError

GRADIENT = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
IDS = (np.arange(20 * 30) % 21).astype(np.uint8).reshape(20, 30)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    Image.fromarray(pixels).save(path, **options)
    return path


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(path: Path, bit_depth: int, colour_type: int, width: int, height: int, rows: list[bytes]) -> Path:
    """A PNG written by hand, for what PIL does not write."""
    head = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


def test_a_png_is_read_as_it_was_written(tmp_path):
    pixels = read_image(save(tmp_path / "a.png", GRADIENT))
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    np.testing.assert_array_equal(pixels, GRADIENT)


def test_a_jpeg_is_read_in_rgb_order(tmp_path):
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 250
    pixels = read_image(save(tmp_path / "a.jpg", red, quality=95))
    assert pixels[8, 8, 0] > 240
    assert pixels[8, 8, 2] < 10


def test_content_decides_and_not_the_suffix(tmp_path):
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.jpg", GRADIENT, format="PNG")), GRADIENT)


JPEGS = {
    "colour at half size": {},
    "colour at full size": {"subsampling": "4:4:4"},
    "colour at half width": {"subsampling": "4:2:2"},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_blocks": 2},
    "rgb": {"keep_rgb": True},
    "grey": {"mode": "L"},
    "four colours": {"mode": "CMYK"},
}


def noisy_photo(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([4 * x, 3 * y, 255 - 2 * x], axis=-1)
    return (smooth + np.random.default_rng(0).integers(0, 60, smooth.shape)).clip(0, 255).astype(np.uint8)


def outcome(read):
    """What comes of reading, as something to compare: pixels, or that there are none."""
    try:
        return np.asarray(read()).tolist()
    except Exception:
        return "refused"


@pytest.mark.parametrize("kind", JPEGS)
@pytest.mark.parametrize("size", [(48, 64), (33, 47), (1, 1), (8, 17)])
def test_a_jpeg_has_the_pixels_that_pillow_makes_of_it(tmp_path, kind, size):
    settings = {"mode": "RGB", **JPEGS[kind]}
    Image.fromarray(noisy_photo(*size)).convert(settings.pop("mode")).save(tmp_path / "a.jpg", **settings)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.jpg"), expected)


@pytest.mark.parametrize("kind", ["colour at half size", "progressive", "restarts", "grey"])
def test_a_damaged_jpeg_is_what_pillow_makes_of_it_or_refused_as_it_does(tmp_path, kind):
    settings = {"mode": "RGB", **JPEGS[kind]}
    path = tmp_path / "a.jpg"
    Image.fromarray(noisy_photo(33, 47)).convert(settings.pop("mode")).save(path, **settings)
    sound = path.read_bytes()
    rng = np.random.default_rng(1)
    found = []
    for _ in range(60):
        data = bytearray(sound)
        data[int(rng.integers(20, len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        found.append(outcome(lambda: read_image(path)))
        if found[-1] != "refused":  # vocseg also refuses what PIL takes, such as a header that tells two sizes
            assert found[-1] == outcome(lambda: Image.open(path).convert("RGB"))
    assert len({str(pixels) for pixels in found}) > 5


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_every_mode_becomes_three_channels(tmp_path, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.fromarray(GRADIENT).convert(mode).save(path)
    assert read_image(path).shape == (20, 30, 3)


def test_transparency_in_a_palette_is_dropped_without_a_warning(tmp_path):
    image = Image.fromarray(GRADIENT).convert("P")
    image.save(tmp_path / "a.png", transparency=bytes(range(256)))
    assert read_image(tmp_path / "a.png").shape == (20, 30, 3)


def test_sixteen_bit_grey_keeps_its_upper_eight_bits(tmp_path):
    grey = np.array([[0, 255, 256, 65535]], np.uint16)
    # 255 // 256 = 0, 256 // 256 = 1, 65535 // 256 = 255
    np.testing.assert_array_equal(read_image(save(tmp_path / "a.png", grey))[0, :, 0], [0, 0, 1, 255])


def test_exif_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show
    assert read_image(save(tmp_path / "a.jpg", GRADIENT, exif=exif)).shape == (20, 30, 3)


def test_damaged_exif_gives_no_warning(tmp_path):
    buffer = io.BytesIO()
    # One entry, the resolution (0x011A), whose value would stand beyond the end of the data.
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x011A, 5, 1, 5000)
    Image.fromarray(GRADIENT).save(buffer, "JPEG", exif=exif)
    data = buffer.getvalue()
    jfif = data.index(b"\xff\xe0")  # without JFIF's resolution PIL looks for EXIF's
    data = data[:jfif] + data[jfif + 2 + struct.unpack(">H", data[jfif + 2 : jfif + 4])[0] :]
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.warns(UserWarning, match="Truncated File Read"), Image.open(tmp_path / "a.jpg"):
        pass
    assert read_image(tmp_path / "a.jpg").shape == (20, 30, 3)


def test_an_image_over_the_limit_is_refused_before_it_is_decoded(tmp_path):
    # Half a gigapixel by its header and not one row of pixels: decoding would say "truncated".
    path = png(tmp_path / "a.png", 8, 2, 25_000, 20_000, [])
    with pytest.raises(DataError, match=r"a\.png: 25000 x 20000 pixels are more than the limit of 100,000,000"):
        read_image(path)
    with pytest.raises(DataError, match="30 x 20 pixels are more than the limit of 599"):
        read_image(save(tmp_path / "b.png", GRADIENT), max_pixels=599)
    assert read_image(tmp_path / "b.png", max_pixels=600).shape == (20, 30, 3)


def test_pils_own_limit_plays_no_part(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", GRADIENT)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(path)
    assert read_image(path).shape == (20, 30, 3)


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 0.9])
def test_a_truncated_file_is_named(tmp_path, name, share):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = save(tmp_path / name, noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError) as caught:
        read_image(path)
    (problem,) = caught.value.problems
    assert problem.where == str(path)
    assert "\n" not in problem.message


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.png: no such file"):
        read_image(tmp_path / "nothing.png")
    with pytest.raises(DataError, match=str(tmp_path.name)):
        read_image(tmp_path)


@pytest.mark.parametrize("format_", ["GIF", "BMP", "TIFF", "WEBP"])
def test_other_formats_are_refused(tmp_path, format_):
    path = save(tmp_path / "a.png", GRADIENT, format=format_)
    with pytest.raises(DataError, match=r"a\.png: expected a JPEG or PNG file"):
        read_image(path)


def test_a_palette_mask_gives_indices_and_not_colours(tmp_path):
    mask = Image.fromarray(IDS)
    mask.putpalette([c for i in range(256) for c in (255 - i, i, 7)])
    mask.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), IDS)


@pytest.mark.parametrize("colour_type", [0, 3])
@pytest.mark.parametrize(
    "damage", [None, "checksum", "stream", "short", "long", "end", "critical chunk", "interlaced", "filter"]
)
def test_a_mask_of_plain_rows_is_read_as_the_decoder_reads_it(tmp_path, colour_type, damage):
    rows = [bytes(row) for row in IDS]
    path = png(
        tmp_path / "m.png", 8, colour_type, 30, 20, {"short": rows[:-1], "long": [*rows, rows[0]]}.get(damage, rows)
    )
    data = bytearray(path.read_bytes())
    if colour_type == 3:
        data[33:33] = chunk(b"PLTE", bytes(range(63)))
    if damage == "checksum":
        data[-13] ^= 1  # of IDAT; 12 bytes of IEND follow its four
    if damage == "stream":
        data[-17] ^= 1  # the last byte of what is compressed
    if damage == "end":
        del data[-12:]
    if damage == "critical chunk":
        data[33:33] = chunk(b"ABCD", b"")
    if damage == "interlaced":
        data[28] = 1
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    if damage == "filter":  # the second row is told as what is added to the pixel on its left
        one = b"\0" + rows[0] + b"\1" + rows[1][:1] + bytes(np.diff(IDS[1])) + b"".join(b"\0" + r for r in rows[2:])
        data[data.index(b"IDAT") - 4 : -12] = chunk(b"IDAT", zlib.compress(one))
    path.write_bytes(data)
    # What PIL itself makes of the file; but PIL does not look at the checksum of pixels.
    expected = outcome(lambda: Image.open(path)) if damage != "checksum" else "refused"
    assert outcome(lambda: read_mask(path)) == expected
    assert (expected == IDS.tolist()) == (damage in (None, "long", "filter", "end", "critical chunk"))


def test_a_mask_of_plain_rows_is_held_to_the_limit_of_pixels(tmp_path):
    path = save(tmp_path / "m.png", IDS)
    with pytest.raises(DataError, match="30 x 20 pixels are more than the limit of 599"):
        read_mask(path, max_pixels=599)
    assert read_mask(path, max_pixels=600).flags.writeable


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_the_size_is_known_from_the_header_alone(tmp_path, name):
    path = save(tmp_path / name, GRADIENT)
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 10])
    assert image_size(path) == (20, 30)
    with pytest.raises(DataError, match="no such file"):
        image_size(tmp_path / "nothing.png")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_a_palette_mask_of_few_bits_gives_indices(tmp_path, bits):
    ids = IDS % 2**bits
    mask = Image.fromarray(ids)
    mask.putpalette([c for i in range(2**bits) for c in (9 * i, i, 7)])
    mask.save(tmp_path / "m.png", bits=bits)
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), ids)


def test_a_grey_mask_gives_its_values(tmp_path):
    np.testing.assert_array_equal(read_mask(save(tmp_path / "m.png", IDS)), IDS)


def test_a_one_bit_mask_has_ids_0_and_1(tmp_path):
    mask = read_mask(save(tmp_path / "m.png", IDS > 10))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, (IDS > 10).astype(np.uint8))


def test_a_sixteen_bit_mask_is_read_where_its_ids_fit(tmp_path):
    mask = read_mask(save(tmp_path / "m.png", IDS.astype(np.uint16)))
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, IDS)
    with pytest.raises(DataError, match="found 256 in a 16-bit mask"):
        read_mask(save(tmp_path / "n.png", np.array([[3, 256]], np.uint16)))


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_of_two_or_four_bits_is_refused_because_png_stretches_it(tmp_path, bits):
    path = png(tmp_path / "m.png", bits, 0, 16 // bits, 1, [b"\x10\x10"])
    with pytest.raises(DataError, match="write ids with 8 bits"):
        read_mask(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_a_mask_of_colours_is_refused_with_a_remedy(tmp_path, mode):
    Image.fromarray(GRADIENT).convert(mode).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=rf"m\.png: .*found {mode} colours; replace each colour by the id of its class"):
        read_mask(tmp_path / "m.png")


def test_a_jpeg_mask_is_refused(tmp_path):
    with pytest.raises(DataError, match="must be a PNG file, found JPEG"):
        read_mask(save(tmp_path / "m.jpg", IDS))


def test_a_pair_holds_ids_below_the_number_of_classes_or_void(tmp_path):
    image = save(tmp_path / "a.png", GRADIENT)
    ids = IDS.copy()
    ids[0, :2] = 255
    mask = save(tmp_path / "m.png", ids)
    np.testing.assert_array_equal(read_pair(image, mask, 21)[1], ids)
    with pytest.raises(DataError, match=r"m\.png: unknown ids 19, 20; 19 classes have ids 0 to 18, void is 255"):
        read_pair(image, mask, 19)


@pytest.mark.parametrize("value", [20, 254])
def test_one_pixel_of_an_unknown_id_is_enough(tmp_path, value):
    ids = np.zeros((20, 30), np.uint8)
    ids[19, 29] = value
    with pytest.raises(DataError, match=f"unknown ids {value};"):
        read_pair(save(tmp_path / "a.png", GRADIENT), save(tmp_path / "m.png", ids), 20)


def test_a_pair_of_two_sizes_is_refused_and_exif_suspected_where_the_sides_are_swapped(tmp_path):
    image = save(tmp_path / "a.png", GRADIENT)
    with pytest.raises(DataError, match=r"m\.png: the mask is 29 x 20 and its image .*a\.png is 30 x 20$"):
        read_pair(image, save(tmp_path / "m.png", IDS[:, 1:]), 21)
    with pytest.raises(DataError, match="EXIF is ignored"):
        read_pair(image, save(tmp_path / "t.png", np.ascontiguousarray(IDS.T)), 21)


def test_ten_names_and_a_count_stand_for_many():
    assert first_few(list(range(10))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    assert first_few(list(range(12))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
