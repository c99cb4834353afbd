"""The main job, as the README's first command does it, in half its epochs."""

from vocseg.recipe.prepare import load_recipe
from vocseg.run import start


def test_quickstart_learns_the_scenes_that_null_models_do_not(tmp_path):
    recipe, _ = load_recipe("quickstart", overrides=["train.epochs=3"])
    *_, finished = start(recipe, out=tmp_path, device="cpu")
    assert finished.result["miou"] >= 0.62  # 0.697 and 0.685 with two seeds
    assert all(null["miou"] < 0.15 for null in finished.result["null_models"].values())
    assert min(finished.result["iou"].values()) > 0.4
