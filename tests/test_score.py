"""Using a run's weights as the run did: in its precision, and with files read and written beside the network."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vocseg.build import build
from vocseg.device import choose_precision
from vocseg.errors import DataError, UsageError
from vocseg.recipe.prepare import load_recipe
from vocseg.run import Started, start
from vocseg.score import predict, score

SMALL = (
    "data.images=8",
    "data.val_images=6",
    "data.size=48",
    "augmentation.0.size=32",
    "train.epochs=1",
    "model.width=4",
)


def recipe(*overrides):
    return load_recipe("quickstart", overrides=(*SMALL, *overrides))[0]


def run(tmp_path, *overrides):
    events = list(start(recipe(*overrides), out=tmp_path / "runs", device="cpu"))
    return events[0], events[-1]


def scored(path):
    scoring = score(path, device="cpu")
    while True:
        try:
            next(scoring)
        except StopIteration as end:
            return end.value


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run in bf16, whatever this machine is fast at."""
    return run(tmp_path_factory.mktemp("run"), 'train.precision="bf16"')[1]


def test_a_run_in_bf16_is_scored_again_with_its_own_figures(finished):
    again = scored(finished.run)
    same = ("miou", "pixel_accuracy", "iou", "loss", "precision")
    assert {key: again[key] for key in same} == {key: finished.result[key] for key in same}


def test_a_precision_that_was_tried_is_that_of_the_run_from_then_on(tmp_path):
    started, finished = run(tmp_path)
    assert isinstance(started, Started)
    chosen = finished.result["precision"]
    native = choose_precision("auto", torch.device("cpu"))
    assert [note[:4] for note in started.notes] == ([chosen[:4]] if native == "bf16" else [])
    # Whatever was chosen, and whatever would be chosen now.
    environment = finished.run / "environment.json"
    said = json.loads(environment.read_text())
    assert said["device"] == f"cpu, {chosen}"
    environment.write_text(json.dumps(said | {"precision": "fp32"}))
    assert scored(finished.run)["precision"] == "fp32"
    for began in ("bf16", "fp32+bf16"):
        environment.write_text(json.dumps(said | {"precision": began}))
        assert scored(finished.run)["precision"] == native


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp32+bf16"])
def test_a_run_that_goes_on_does_not_try_again(precision):
    job = build(recipe(), "cpu", precision=precision)
    assert (job.placement.precision, job.notes) == (precision, ())
    assert job.training.placement is job.placement


def test_inference_can_have_a_precision_of_its_own():
    job = build(recipe(), "cpu", precision="fp32+bf16")
    with job.placement.autocast():
        assert not torch.is_autocast_enabled("cpu")
    assert job.predictor(job.network.module).placement.precision == "bf16"


def test_a_precision_that_is_named_is_not_tried():
    job = build(recipe('train.precision="fp32"'), "cpu")
    assert (job.placement.precision, job.notes) == ("fp32", ())


def test_images_are_predicted_in_their_order_whatever_they_take(finished, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    sizes = [(8 + 37 * number % 90, 8 + 53 * number % 120) for number in range(12)]
    for number, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(photos / f"{number:02d}.png")
    done = []
    for predicted in predict(finished.run, [photos], out=tmp_path / "masks", device="cpu"):
        done.append(predicted.source.stem)
        with Image.open(predicted.mask) as mask, Image.open(predicted.overlay) as overlay:
            assert mask.size == overlay.size == sizes[len(done) - 1][::-1]
        assert (predicted.done, predicted.total) == (len(done), 12)
    assert done == [f"{number:02d}" for number in range(12)]


def test_images_that_cannot_be_read_are_named_and_all_others_segmented(finished, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(9):
        Image.new("RGB", (24, 16), (number * 20, 90, 30)).save(photos / f"{number}.png")
    for number in (2, 6):
        (photos / f"{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (photos / "._1.png").write_bytes(b"what a Mac leaves on a disk that is not its own")
    told = []
    predicting = predict(finished.run, [photos], out=tmp_path / "masks", device="cpu")
    with pytest.raises(DataError) as error:
        told.extend(predicted.source.stem for predicted in predicting)
    assert [problem.where for problem in error.value.problems] == [str(photos / "2.png"), str(photos / "6.png")]
    assert told == ["0", "1", "3", "4", "5", "7", "8"]
    assert {path.stem for path in (tmp_path / "masks").glob("?.png")} == set(told)


def test_predictions_are_not_written_through_a_link_that_a_run_came_with(finished, tmp_path):
    run = shutil.copytree(finished.run, tmp_path / "run")
    Image.new("RGB", (24, 16)).save(tmp_path / "a.png")
    (tmp_path / "mine").mkdir()
    (run / "predictions").symlink_to(tmp_path / "mine")
    with pytest.raises(UsageError, match="is a link; name a folder with --out"):
        list(predict(run, [tmp_path / "a.png"], device="cpu"))
    assert not list((tmp_path / "mine").iterdir())
