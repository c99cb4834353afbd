"""The main job, as the README's first command does it."""

from vocseg.recipe.prepare import load_recipe
from vocseg.run import start


def test_quickstart_learns_the_scenes_that_null_models_do_not(tmp_path):
    *_, finished = start(load_recipe("quickstart")[0], out=tmp_path, device="cpu")
    assert finished.result["miou"] >= 0.75
    assert all(null["miou"] < 0.15 for null in finished.result["null_models"].values())
    assert min(finished.result["iou"].values()) > 0.5
