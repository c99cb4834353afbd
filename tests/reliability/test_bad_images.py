"""Damaged images and masks: 40 faults planted among 100 pairs are all found, and no sound pair is taken for one.

A fault is what makes the pixels or the ids doubtful. What is only unusual is read: CMYK, 16 bits, grey, a palette,
transparency, a turned camera. Changed bits are planted in PNG files, which hold checksums; in the pixels of a JPEG file
nothing tells them from others, and nobody can find them.
"""

import json
import signal
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from vocseg.build import open_datasets
from vocseg.cli.progress import follow
from vocseg.cli.reporters import Plain
from vocseg.data.bad_images import find_bad, without
from vocseg.data.dataset import Dataset
from vocseg.data.threads import read
from vocseg.data.verify import verify
from vocseg.distributed import World
from vocseg.errors import DataError, Interrupted
from vocseg.recipe.prepare import load_recipe
from vocseg.recipe.reader import Recipe
from vocseg.run import Finished, resume, start
from vocseg.score import score
from vocseg.train.loop import Step

PLUGIN = '''"""One convolution."""
from torch import nn
from vocseg import architecture

@architecture
def pointwise(num_classes: int) -> nn.Module:
    """One 1x1 convolution."""
    network = nn.Conv2d(3, num_classes, 1)
    network.stride = 1
    return network
'''

RECIPE = """
seed = 5
[model]
name = "pointwise"
[data]
name = "folder"
root = "pairs"
classes = ["ground", "cat", "dog", "kite"]
batch_size = 6
workers = 2
on_bad_image = "skip"
[[augmentation]]
name = "crop"
size = 16
[[augmentation]]
name = "copy_paste"
[[loss]]
name = "cross_entropy"
class_weights = "inverse"
[optimizer]
name = "adamw"
[train]
epochs = 2
precision = "fp32"
checkpoint_minutes = 0.0
"""


class Pair:
    """The two files of one pair, to be damaged. The image is JPEG unless it is made PNG."""

    def __init__(self, root: Path, number: int):
        self.name = f"photo_{number:03d}"
        self.rng = np.random.default_rng(number)
        self.image, self.mask = root / "images" / f"{self.name}.jpg", root / "masks" / f"{self.name}.png"
        self.size = 24 + number % 5, 28 + number % 7  # never square
        self.save(self.pixels())
        self.save_mask(self.ids())

    def pixels(self) -> NDArray[np.uint8]:
        return self.rng.integers(0, 256, (*self.size, 3)).astype(np.uint8)

    def ids(self) -> NDArray[np.uint8]:
        return self.rng.choice([0, 1, 2, 3, 255], self.size).astype(np.uint8)

    def save(self, pixels: NDArray, mode: str = "RGB", **options: object) -> None:
        Image.fromarray(pixels).convert(mode).save(self.image, **options)

    def as_png(self, picture: Image.Image | None = None) -> None:
        self.image.unlink()
        self.image = self.image.with_suffix(".png")
        (picture or Image.fromarray(self.pixels())).save(self.image)

    def save_mask(self, ids: NDArray) -> None:
        Image.fromarray(ids).save(self.mask)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(2000))


def flip_a_bit(pair: Pair, path: Path) -> None:
    """Among the compressed pixels of a PNG."""
    data = bytearray(path.read_bytes())
    first, end = data.index(b"IDAT") + 4, data.index(b"IEND") - 8
    data[int(pair.rng.integers(first, end))] ^= 1 << int(pair.rng.integers(8))
    path.write_bytes(data)


def flip_in_png(pair: Pair) -> None:
    pair.as_png()
    flip_a_bit(pair, pair.image)


def header(path: Path, width: int, height: int) -> None:
    """A PNG that says it has so many pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = b"IDAT" + zlib.compress(b"\0" * 9)
    chunks = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in (chunk, pixels, b"IEND"))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def turned(pair: Pair, mask_too: bool) -> None:
    """The camera was held upright: EXIF says so, and annotation programs may show, and draw on, the turned image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pair.save(pair.pixels(), exif=exif)
    if mask_too:
        pair.save_mask(pair.ids().T.copy())


HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>"
FAULTS: list[tuple[int, str, Callable[[Pair], object]]] = [  # how often, what is said of it, how it is made
    (3, "an empty one", lambda p: p.image.write_bytes(b"")),
    (2, "an empty one", lambda p: p.mask.write_bytes(b"")),
    (3, "cannot be read", lambda p: cut(p.image)),
    (3, "cannot be read", lambda p: cut(p.mask)),
    (3, "found something else", lambda p: noise(p.image)),
    (2, "found something else", lambda p: noise(p.mask)),
    (3, "found something else", lambda p: p.image.write_bytes(HTML)),
    (3, "a checksum is wrong", lambda p: flip_a_bit(p, p.mask)),
    (2, "a checksum is wrong", flip_in_png),
    (3, "the mask is 9 x 7 and its image", lambda p: p.save_mask(np.ones((7, 9), np.uint8))),
    (2, "found RGB colours", lambda p: p.save_mask(p.pixels())),
    (3, "unknown ids 33", lambda p: p.save_mask(np.full(p.size, 33, np.uint8))),
    (2, "no such file", lambda p: p.mask.unlink()),
    (2, "no such file", lambda p: p.image.unlink()),
    (1, "EXIF is ignored", lambda p: turned(p, mask_too=True)),
    (1, "in a 16-bit mask", lambda p: p.save_mask(np.full(p.size, 700, np.uint16))),
    (1, "more than the limit", lambda p: header(p.image, 100_000, 100_000)),
    (1, "expected an image with pixels", lambda p: header(p.image, 0, 20)),
]
UNUSUAL: list[Callable[[Pair], object]] = [
    lambda p: p.save(p.pixels(), "CMYK"),
    lambda p: p.save(p.pixels(), "L"),
    lambda p: p.save(p.pixels(), progressive=True),
    lambda p: p.as_png(Image.fromarray(p.pixels()).convert("RGBA")),
    lambda p: p.as_png(Image.fromarray(p.pixels()).convert("P")),
    lambda p: p.as_png(Image.fromarray(p.rng.integers(0, 65536, p.size).astype(np.uint16))),
    lambda p: turned(p, mask_too=False),
    lambda p: p.save_mask(p.ids().astype(np.uint16)),
    lambda p: p.save_mask(np.full(p.size, 255, np.uint8)),
]


@pytest.fixture
def planted(tmp_path: Path) -> dict[str, str]:
    """Makes 100 pairs below `tmp_path` and damages 40: the names of these, and what is to be said of each."""
    for name in ("pairs/images", "pairs/masks", "plugins"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "plugins" / "pointwise.py").write_text(PLUGIN)
    (tmp_path / "bad.toml").write_text(RECIPE)
    order = np.random.default_rng(1).permutation(100).tolist()
    pairs = [Pair(tmp_path / "pairs", number) for number in order]
    found: dict[str, str] = {}
    for count, said, damage in FAULTS:
        for _ in range(count):
            pair = pairs.pop()
            damage(pair)
            found[pair.name] = said
    for change in UNUSUAL:
        change(pairs.pop())
    assert len(found) == 40
    return found


def recipe(project: Path, *overrides: str) -> Recipe:
    return load_recipe(str(project / "bad.toml"), overrides=overrides, to_run=True)[0]


def finish(events: object) -> Finished:
    *_, last = events
    assert isinstance(last, Finished)
    return last


@pytest.mark.parametrize("cache", ["auto", "./decoded"])
def test_a_run_that_skips_them_finishes_and_lists_exactly_those(planted, tmp_path, monkeypatch, capsys, cache):
    monkeypatch.chdir(tmp_path)
    Plain().follow(start(recipe(tmp_path, f'data.cache="{cache}"'), out=tmp_path / "runs", device="cpu"))
    *_, note, run = capsys.readouterr().out.splitlines()
    assert note.startswith("40 images left out")
    assert [name in note for name in planted] == [True] * 40
    result = json.loads(Path(run, "result.json").read_text())
    listed = [name for split in result["bad_images"].values() for name in split]
    assert sorted(listed) == sorted(planted)
    assert result["train_images"] + result["images"] == 60
    reasons = json.loads(Path(run, "bad_images.json").read_text())["images"]
    for name, reason in (item for split in reasons.values() for item in split.items()):
        assert planted[name] in reason, name
        assert name in reason
    # Scored again, the run has the same images and figures.
    assert follow(score(Path(run), device="cpu"), lambda scored: None)["miou"] == result["miou"]


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_run_that_stops_names_the_first_it_comes_to(planted, tmp_path, cache):
    for name in planted:  # such as are noticed before anything is read
        if planted[name] == "no such file":
            (tmp_path / "pairs" / "masks" / f"{name}.png").unlink(missing_ok=True)
            (tmp_path / "pairs" / "images" / f"{name}.jpg").unlink(missing_ok=True)
    stops = recipe(tmp_path, 'data.on_bad_image="stop"', f'data.cache="{cache}"', 'loss=[{name="dice"}]')
    with pytest.raises(DataError) as caught:
        finish(start(stops, out=tmp_path / "runs", device="cpu"))
    first, *rest = caught.value.problems
    (name,) = [name for name in planted if name in first.where]
    assert planted[name] in first.message
    assert "vocseg data verify" in rest[-1].message
    assert 'on_bad_image = "skip"' in rest[-1].message
    assert caught.value.exit_code == 3


def test_a_run_that_stops_names_missing_files_before_it_begins(planted, tmp_path):
    with pytest.raises(DataError, match=r"no mask \(\.png\) for 2 of 100 names") as caught:
        recipe(tmp_path, 'data.on_bad_image="stop"')
    assert "no image (.jpg, .jpeg, .png) for 2 of 100 names" in str(caught.value)


def test_a_run_that_skips_resumes_to_the_same_weights(planted, tmp_path):
    whole = finish(start(recipe(tmp_path, 'data.cache="off"'), out=tmp_path / "runs", device="cpu"))
    folder = None
    events = start(recipe(tmp_path, 'data.cache="off"'), out=tmp_path / "stopped", device="cpu")

    def until_the_third_step():
        nonlocal folder
        for event in events:
            folder = folder or event.run
            if isinstance(event, Step) and event.step == 3:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        until_the_third_step()
    resumed = finish(resume(folder, device="cpu"))
    assert (folder / "model.safetensors").read_bytes() == (whole.run / "model.safetensors").read_bytes()
    assert resumed.result["bad_images"] == whole.result["bad_images"]
    assert resumed.result["miou"] == whole.result["miou"]


def test_verify_finds_all_with_reasons_and_nothing_else(planted, tmp_path):
    splits = open_datasets(str(tmp_path / "bad.toml"), incomplete=True)
    assert sum(map(len, splits.values())) == 100
    findings = verify(splits)
    found: dict[str, str] = {}
    for problem in findings.problems:
        found[Path(problem.where).stem] = found.get(Path(problem.where).stem, "") + problem.message
    assert sorted(found) == sorted(planted)
    for name, said in planted.items():
        assert said in found[name]
    assert len(findings.remarks) == 1  # a mask that is void all over


@dataclass(frozen=True)
class OneOfTwo(World):
    """The first of two processes, whose other one finds what is expected of it."""

    others: tuple[int, ...] = ()

    def total(self, counts: NDArray) -> NDArray:
        counts = counts.copy()
        counts[[*self.others]] += 1
        return counts


def test_two_processes_that_read_a_part_each_find_all(planted, tmp_path):
    (dataset,) = open_datasets(str(tmp_path / "bad.toml"), splits=["train"], incomplete=True).values()
    bad = [dataset.names.index(name) for name in planted if name in dataset.names]
    reads = []
    counting = replace(dataset, read=lambda index: (reads.append(index), dataset.read(index))[1])
    found = find_bad(counting, OneOfTwo(0, 2, tuple(i for i in bad if i % 2)))
    assert found == find_bad(dataset)
    assert sorted(reads) == sorted([*range(0, len(dataset), 2), *(i for i in bad if i % 2)])


def test_where_no_image_can_be_read_one_error_says_so(planted, tmp_path):
    for image in (tmp_path / "pairs" / "images").iterdir():
        image.write_bytes(b"")
    with pytest.raises(DataError) as caught:
        finish(start(recipe(tmp_path), out=tmp_path / "runs", device="cpu"))
    (problem,) = caught.value.problems
    assert problem.message.startswith("none of 80 images can be read; the first: ")
    assert not (tmp_path / "runs").exists()


def test_the_rest_of_a_data_set_has_names_files_and_pixels_that_belong_together():
    def numbered(index: int) -> tuple[np.ndarray, np.ndarray]:
        if index % 3 == 0:
            raise DataError(f"number {index}")
        return np.full((2, 2, 3), index, np.uint8), np.zeros((2, 2), np.uint8)

    whole = Dataset(("a", "b"), tuple("abcdefg"), numbered, [(Path(c), Path(c + "m")) for c in "abcdefg"])
    rest = without(whole, {"a": "", "d": "", "g": ""})
    assert rest.names == ("b", "c", "e", "f")
    assert [read(rest, i)[0][0, 0, 0] for i in range(4)] == [1, 2, 4, 5]
    assert [image.name for image, _ in rest.files] == ["b", "c", "e", "f"]
    assert without(whole, {}) is whole
