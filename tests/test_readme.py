"""What the README shows works as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vocseg.cli import main
from vocseg.data.synthetic import synthetic
from vocseg.errors import UsageError
from vocseg.plugins import PACKAGE, bundled
from vocseg.recipe.prepare import load_recipe
from vocseg.run import start
from vocseg.score import predict
from vocseg.testing import CHECK_NAMES
from vocseg.trial import try_recipe

README = (Path(__file__).parent.parent / "README.md").read_text()
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}


def block(label: str) -> str:
    """The code block behind `<!-- label -->`."""
    found = re.search(rf"<!-- {label} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, label
    return found[1]


def without_figures(text: str) -> str:
    """Text that is the same on machines of other speed and memory."""
    return re.sub(r"\d[\d.,]*", "0", text)


def test_both_commands_are_one_line_that_a_shell_takes():
    assert block("quickstart").count("\n") == block("tests").count("\n") == 1
    assert block("quickstart").strip().endswith("vocseg run recipes/quickstart.toml")
    assert block("tests").strip().endswith("pytest -n auto")


def test_the_newcomers_path_leads_from_a_folder_of_images_to_predictions(tmp_path):
    drawn = synthetic("train", size=64, images=10)
    for folder in ("images", "masks"):
        (tmp_path / "mydata" / folder).mkdir(parents=True)
    for index in range(10):
        image, mask = drawn.read(index)
        mask = np.where(mask == 255, 255, np.minimum(mask, 2)).astype(np.uint8)
        Image.fromarray(image).save(tmp_path / "mydata" / "images" / f"barn_{index:02}.jpg")
        Image.fromarray(mask).save(tmp_path / "mydata" / "masks" / f"barn_{index:02}.png")
    (tmp_path / "barns.toml").write_text(block("own recipe"))
    small = ("train.epochs=1", "augmentation.1.size=64")
    recipe, _ = load_recipe(str(tmp_path / "barns.toml"), overrides=small)
    assert try_recipe(recipe)["training_images"] == 8
    *_, finished = start(recipe, out=tmp_path / "runs", device="cpu")
    assert set(finished.result["iou"]) == {"background", "barn", "tree"}
    done = list(predict(finished.run, [tmp_path / "mydata" / "images"], device="cpu"))
    assert len(done) == 10
    assert all(p.mask.parent == finished.run / "predictions" for p in done)


def test_the_chapter_on_plugins_leads_from_nothing_to_a_trained_network_and_loss(tmp_path, monkeypatch, capsys):
    """Every code block of the chapter, in order, in one folder; `vocseg run` with fewer and smaller scenes."""
    monkeypatch.chdir(tmp_path)
    small = "--set train.epochs=1 --set data.images=16 --set data.val_images=2 --set data.size=48 --device cpu"

    def vocseg(command, code=0):
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as done:
            main()
        assert (done.value.code or 0) == code, command
        return capsys.readouterr().out

    printed, commands = "", 0
    chapter = README.split("\n## Writing a plugin\n")[1].split("\n## ")[0]
    fenced = r"^(?:<!-- (.*?) -->\n)?```(\w*)\n(.*?)^```$"
    for label, language, code in re.findall(fenced, chapter, re.DOTALL | re.MULTILINE):
        written = [path.read_text() for path in tmp_path.glob("*/*.*")]
        if label == "failed check":
            network = Path("plugins/blocknet.py").read_text()
            assert network.count("width, num_classes, 1)") == 1
            Path("wrong.py").write_text(network.replace("width, num_classes, 1)", "width, 21, 1)"))
            needed = ("file", "build", "forward", "classes")
            without = " ".join(f"--without {name}" for name in CHECK_NAMES if name not in needed)
            assert code in vocseg(f"vocseg check wrong.py {without}", code=2)
        elif language == "":  # what the command before it printed; … stands for lines that are left out
            for part in code.split("…\n"):
                assert without_figures(part) in without_figures(printed)
        elif language == "python":
            assert code in written
        elif language == "toml":
            assert any(code in text for text in written)
        for line in code.splitlines() if language == "sh" else ():
            commands += 1
            if line.startswith("vocseg run"):
                printed = vocseg(f"{line} {small}")
                assert (Path(printed.splitlines()[-1]) / "result.json").is_file()
            elif line.startswith("vocseg"):
                printed = vocseg(line)
            else:  # pip puts what it installs where this test finds it, and nowhere else
                monkeypatch.syspath_prepend(tmp_path / "site")
                alone = "--quiet --no-deps --no-index --no-build-isolation --target site"
                command = f"{sys.executable} -m {line} {alone if line.startswith('pip') else ''}"
                subprocess.run(shlex.split(command), check=True, env=ENVIRONMENT)
    assert commands == 14
    with pytest.raises(UsageError, match="expected whole number from 4 to 512, found 2"):
        load_recipe("recipes/blocknet.toml", overrides=["model.width=2"])


def test_the_table_of_recipes_names_those_that_are_shipped():
    table = README.split("| recipes | what they are |\n")[1].split("\n\n")[0]
    named = [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(named) == sorted(path.stem for path in bundled("recipes").glob("*.toml"))
