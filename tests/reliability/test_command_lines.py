"""Whatever is typed, or stands in a name: a documented exit code, lines, and nothing written elsewhere.

In the quick form some hundred made-up command lines are tried, in the long one 1,500.
"""

import csv
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

import click
import numpy as np
import pytest
from PIL import Image

from vocseg.cli import COMMANDS, cli, main
from vocseg.errors import UNSEEN
from vocseg.plugins import PACKAGE
from vocseg.report.palette import save_palette_mask

CODES = (0, 2, 3, 4, 5, 130, 143)

TINY = """
[model]
name = "fcn_baseline"
[data]
name = "synthetic"
size = 32
images = 4
val_images = 2
batch_size = 2
cache = "off"
[[augmentation]]
name = "crop"
size = 32
[train]
epochs = 1
precision = "fp32"
"""

STRANGE = "\x1b[5;7m\x1b]0;owned\x07\x9b5m\u202e\u2066\x08\r"
"""Would blink, name the window, and turn the direction of writing, if it came to a terminal as it is."""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its finished run at `run`, images, files in the way, and a broken plugin."""
    folder = tmp_path_factory.mktemp("fuzz") / "project"
    (folder / "plugins").mkdir(parents=True)
    (folder / "plugins" / "broken.py").write_text("from vocseg import loss\ndef")
    (folder / "tiny.toml").write_text(TINY)
    (folder / "wrong.toml").write_text(TINY.replace("epochs = 1", "epocs = -1\n\\x1b"))
    (folder / "a file").write_text("nothing")
    (folder / "empty").mkdir()
    (folder / "images").mkdir()
    Image.new("RGB", (40, 33), (9, 200, 90)).save(folder / "images" / "a.png")
    (folder / "images" / "b.jpg").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert call(patch, "run", "tiny.toml", "--quiet", "--out", "made") == 0
    (made,) = folder.glob("made/tiny/*")
    shutil.move(made, folder / "run")
    shutil.rmtree(folder / "made")
    return folder


def call(patch: pytest.MonkeyPatch, *arguments: str) -> int:
    """`vocseg …` in this process; its exit code."""
    patch.setattr(sys, "argv", ["vocseg", *arguments])
    try:
        main()
    except SystemExit as done:
        return int(done.code or 0)
    raise AssertionError("the program did not end")


@pytest.fixture
def _nowhere_else(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Works in a copy of the project; there is no network, and whatever is written outside of the copy is told."""
    copy = tmp_path / "project"
    shutil.copytree(project, copy)
    for name, folder in (("HOME", "home"), ("XDG_CACHE_HOME", "home/cache"), ("TMPDIR", "temporary")):
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    for name in ("VOCSEG_DATA", "VOCSEG_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(copy)

    def refuse(*_: object, **__: object) -> None:
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    outside = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if copy not in (path, *path.parents)}
    assert outside == {Path("home"), Path("home/cache"), Path("temporary")}


# Command lines


RECIPES = (
    "tiny.toml",
    "tiny.toml",
    "quickstart",
    "wrong.toml",
    "tiny",
    "nothing.toml",
    "a file",
    "images",
    "",
    STRANGE,
)
FOLDERS = (
    "empty",
    "a file",
    "images",
    "nowhere",
    "",
    ".",
    STRANGE,
    "x" * 5000,
    "\udcff",
    "/dev/null",
    "/proc/1/x",
    "-",
    "~",
)
WORDS = (
    "",
    "0",
    "-1",
    "nan",
    "x" * 5000,
    STRANGE,
    "\udcff",
    "[red]",
    "--",
    "-h",
    "é",
    "train",
    "val",
    "voc2007",
    "dice",
)
OVERRIDES = (
    "train.epochs=1", "seed=3", "data.root=nowhere", "model.name=x", "", "=", "a=", "train.epochs", "x" * 5000,
    "seed=[",
    f"description={STRANGE}", "model.name=\udcff", "data.images=0", "optimizer.lr=1e30", "train.epochs=0",
    "model.weights=imagenet", "model.weights=a file", "data.name=voc", "augmentation=[]", "loss=[]", "data.size=16",
)  # fmt: skip
BY_NAME: dict[str, Sequence[str]] = {
    "recipe": RECIPES,
    "run": ("run", "run", "images", *FOLDERS),
    "resume": ("run", *FOLDERS),
    "images": ("images/a.png", "images", "images/b.jpg", "empty", "nowhere", STRANGE),
    "target": (*RECIPES, "voc2007", "voc9999", "plugins/broken.py"),
    "overrides": OVERRIDES,
    "device": ("cpu", "cpu", "cuda", "cuda:9", "mps", "", STRANGE, "meta"),
    "kind": ("architecture", "loss", "x", ""),
    "architecture": ("fcn_baseline", "x", STRANGE),
    "what": ("loss", "dice", "recipe", *WORDS),
    "name": ("my_net", "voc2007", "../x", "/x", "import", "a-b", "_x", "dice", "é", *WORDS),
    "steps": ("20", "19", "x"),
    "seed": ("1", "-1", "4294967296", "1.5", "x"),
    "split": ("train", "val", "../x", *WORDS),
    "splits": ("train", "val", "../x", *WORDS),
    "without": ("compile", "x", STRANGE),
}


def leaves() -> list[tuple[list[str], click.Command]]:
    """Every command, and every command of a group, with the words that call it."""
    context = click.Context(cli)
    found = []
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += [([name, inner], command.commands[inner]) for inner in command.commands]
        else:
            found.append(([name], command))
    return found


def a_command_line(rng: random.Random, leaf: tuple[list[str], click.Command]) -> list[str]:
    """A command with some of its arguments and options, each with a value of its kind or any other."""
    words, command = leaf
    line = [*words]
    for parameter in command.params:
        values = BY_NAME.get(parameter.name or "", FOLDERS)
        if isinstance(parameter, click.Argument):
            if rng.random() < 0.95:
                line.append(rng.choice(values))
        elif parameter.name != "compiled" and rng.random() < 0.25:  # compiling takes minutes
            line.append(rng.choice([*parameter.opts, *parameter.opts, *parameter.secondary_opts]))
            assert isinstance(parameter, click.Option)
            if not parameter.is_flag and rng.random() < 0.97:
                line.append(rng.choice(values if rng.random() < 0.9 else WORDS))
    if rng.random() < 0.15:
        line.insert(rng.randrange(len(line) + 1), rng.choice((*WORDS, "--debugg", "--json", "--help", "-x", "-")))
    return line


def wrong_with(code: int, said: str) -> str:
    """What no command line may end with."""
    if code not in CODES:
        return f"exit code {code}"
    if "Traceback" in said or "internal error" in said:
        return "a traceback"
    if UNSEEN.search(re.sub("[\\n\\t]", "", said)):
        return "letters that a terminal obeys"
    if code and not said.strip():
        return "an error without a word"
    return ""


@pytest.mark.usefixtures("_nowhere_else")
@pytest.mark.filterwarnings("ignore")  # torch's, where a network of one channel learns nothing
@pytest.mark.parametrize("count", [60, pytest.param(1500, marks=pytest.mark.long)])
def test_a_fuzzed_command_line_ends_with_a_documented_code(
    count: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(f"command lines {count}")
    found = leaves()
    assert len(found) == len(COMMANDS) + 2  # `data` is three
    codes: dict[int, int] = {}
    bad = []
    for i in range(count):
        line = a_command_line(rng, found[i % len(found)])
        if line[:2] == ["run", "quickstart"]:
            line[1] = "tiny.toml"  # which is over sooner
        code = call(monkeypatch, *line)
        out, err = capsys.readouterr()
        codes[code] = codes.get(code, 0) + 1
        if reason := wrong_with(code, err + out):
            bad.append(f"{reason}: {line}\n{err[-600:]}\n{out[-300:]}")
    assert not bad, "\n".join(bad)
    assert codes.keys() >= {0, 2, 3}, codes


# The program itself


def program(*arguments: str | bytes, cwd: Path, **options: object) -> subprocess.CompletedProcess:
    """`vocseg …` in a process of its own; whatever Python has to say counts as said."""
    command = [sys.executable, "-m", "vocseg", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **options.pop("env", {})}  # type: ignore[dict-item]
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 60, **options}
    return subprocess.run(command, cwd=cwd, env=environment, **given)  # type: ignore[call-overload]


@pytest.mark.skipif(os.name == "nt", reason="bytes as arguments, /dev/full and folders that go away are POSIX")
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([b"show", b"\xff\x1b[5m"], 2, rb"\udcff\x1b[5m: no such recipe"),
        ([b"show", b"quickstart", b"--set", b"description=\xff"], 2, b"not UTF-8 text"),
        ([b"list", b"\xe2\x80\xae"], 2, rb"no kind or component is named '\u202e'"),
        ([b"--\x1b[2J"], 2, b"No such option"),
        ([b"\x1b[2J"], 2, b"no command is named"),
    ],
)
def test_bytes_that_are_no_text_or_drive_terminals_are_spelt_out(
    arguments: list[bytes], code: int, said: bytes, tmp_path: Path
) -> None:
    done = program(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, b"")
    assert said in done.stderr
    assert not wrong_with(code, done.stderr.decode())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["list"], ["--help"], ["show", "quickstart", "--json"]])
def test_a_full_disk_behind_the_output_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = program(*arguments, cwd=tmp_path, stdout=full)
    assert done.returncode == 4
    assert done.stderr == b"No space left on device; --debug shows where\n"


RUN = "run quickstart --set train.epochs=30 --set data.images=16 --set data.val_images=2 --set data.size=48"


@pytest.mark.parametrize(
    ("command", "code", "said"), [("list", 0, b""), (RUN, 4, b"output: cannot be written to (Broken pipe)")]
)
def test_a_reader_that_goes_away_is_no_traceback(command: str, code: int, said: bytes, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    started = [sys.executable, "-m", "vocseg", *command.split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(started, cwd=tmp_path, env=environment, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error[: len(said)]) == (code, said)
    assert error.count(b"\n") == bool(said)


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps a folder that is in use")
def test_a_working_directory_that_is_gone_is_one_line(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'rmdir "$PWD"; exec "$0" -P -m vocseg list'
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(["sh", "-c", script, sys.executable], cwd=gone, env=environment, capture_output=True)
    assert done.returncode == 4
    assert done.stderr == b"No such file or directory; --debug shows where\n"


# Names


NAMES = (
    "background", STRANGE, "[red]bold[/red]", "$x^2_{\\frac$", "=cmd|'/C calc'!A0", "--><script>alert(1)</script>",
    "x" * 10_000, "a\nb", ":smile: <&>\"'",
)  # fmt: skip
TITLE = "[red] $x^2_$ =1+1 <b>"


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose recipe, plugin, classes and images have names that were made to do harm."""
    if os.name == "nt":
        pytest.skip("Windows has no such file names")
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "own" / kind).mkdir(parents=True)
    for i in range(6):
        name = f"$x_{{ [red] {STRANGE}\n{i}.png"
        mask = np.full((40, 44), i, np.uint8)
        mask[10:30, 5:25] = (i + 3) % len(NAMES)
        image = rng.integers(0, 99, (40, 44, 3)).astype(np.uint8) + mask[..., None] * 9
        Image.fromarray(image).save(tmp_path / "own" / "images" / name)
        save_palette_mask(mask, tmp_path / "own" / "masks" / name)
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / f"{STRANGE}.py").write_text(
        f'from vocseg import loss\n\n\n@loss\ndef strange(*, how: str = {STRANGE!r}):\n    """[red]{STRANGE}"""\n'
    )
    data = f'name = "folder"\nroot = "own"\nclasses = {json.dumps(NAMES)}\nbatch_size = 2\nval_fraction = 0.4\n'
    recipe = f"description = {json.dumps('[red] ' + STRANGE)}\n" + TINY.replace(
        'name = "synthetic"\nsize = 32\nimages = 4\nval_images = 2\nbatch_size = 2\n', data
    )
    (tmp_path / f"{TITLE}.toml").write_text(recipe.replace("\\u007f", "\x7f"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VOCSEG_DATA", raising=False)
    return tmp_path


CALLS = """
import json, sys
from pathlib import Path
from vocseg.cli import main
for line in json.loads(sys.argv[1]):
    made = next(map(str, Path().glob("made/*/*")), "")
    sys.argv = ["vocseg", *(made if word == "RUN" else word for word in line)]
    try:
        main()
    except SystemExit as done:
        print("code", done.code or 0, flush=True)
"""


def on_terminal(lines: Sequence[Sequence[str]]) -> str:
    """What these calls of `vocseg` show on a terminal, one after the other in one process."""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), "COLUMNS": "100", "TERM": "xterm"}
    import pty  # which Windows has not

    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", CALLS, json.dumps(lines)]
    shown = b""
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.STDOUT, env=environment) as process:
        os.close(theirs)
        try:
            while chunk := os.read(ours, 65536):
                shown += chunk
        except OSError:  # Linux ends a terminal that nobody holds with an error
            pass
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


def check_terminal(shown: str) -> None:
    """Nothing but what rich and click send to a terminal: colours, and where to draw a progress bar."""
    assert "\x1b[5" not in shown
    plain = re.sub(r"\x1b\[(\?25[hl]|\d*[AK]|[\d;]*m)", "", shown)
    assert not UNSEEN.search(re.sub("[\r\n]", "", plain))
    assert "Traceback" not in shown
    assert "internal error" not in shown


def test_names_reach_the_terminal_spelt_out_and_files_as_they_are(hostile: Path) -> None:
    recipe = f"{TITLE}.toml"
    calls = [
        ["list"], ["list", "strange"], ["list", "recipe"], ["show", recipe], ["check", recipe],
        ["run", recipe, "--out", "made"], ["eval", "RUN"], ["predict", "RUN", "own/images"],
        ["data", "verify", recipe], ["data", "stats", recipe, "--out", "s.svg"],
    ]  # fmt: skip
    wrong = [["run", recipe, "--set", f"model.name={STRANGE}"], ["list", STRANGE], ["eval", STRANGE]]
    shown = on_terminal(calls + wrong)
    codes = [int(code) for code in re.findall(r"^code (\d+)", shown, re.MULTILINE)]
    assert codes == [0] * len(calls) + [2] * len(wrong), shown
    check_terminal(shown)
    assert shown.count(r"\x1b[5;7m") >= 10
    for name in ("[red]bold[/red]", "$x^2_{\\frac$", ":smile: <&>"):
        assert name in shown

    (made,) = hostile.glob("made/*/*")
    assert made.parent.name == TITLE
    assert json.loads((made / "classes.json").read_bytes())["classes"] == list(NAMES)
    assert [*json.loads((made / "result.json").read_bytes())["iou"]] == list(NAMES)
    assert json.loads((made / "environment.json").read_bytes())["recipe"] == TITLE
    with (made / "metrics.csv").open(newline="") as file:
        assert [float(row["train_loss"]) for row in csv.DictReader(file)]
    for picture in ("curves", "iou", "confusion", "examples"):
        with Image.open(made / f"{picture}.png") as image:
            assert max(image.size) < 10_000
            image.load()
    assert len(list((made / "predictions").iterdir())) == 12


def test_names_are_text_in_a_drawing_that_a_browser_shows(hostile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "data", "stats", f"{TITLE}.toml", "--out", "drawn.svg") == 0
    assert call(monkeypatch, "data", "stats", f"{TITLE}.toml", "--out", "drawn.pdf") == 0
    kinds = {element.tag.rpartition("}")[2] for element in ElementTree.parse("drawn.svg").iter()}
    assert kinds <= {
        "svg", "metadata", "RDF", "Work", "type", "date", "format", "creator", "Agent", "title", "defs", "style", "g",
        "path", "use", "clipPath", "rect", "text", "tspan",
    }  # fmt: skip
    assert b"<script" not in Path("drawn.svg").read_bytes()
    assert Path("drawn.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize(
    "arguments",
    [["show", f"{TITLE}.toml"], ["list"], ["list", "strange"], ["list", "recipe"], ["data", "stats", f"{TITLE}.toml"]],
)
def test_json_holds_names_as_they_are(
    hostile: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *arguments, "--json") == 0
    out = capsys.readouterr().out
    assert not UNSEEN.search(out.replace("\n", ""))
    found: list[str] = []

    def strings(value: object) -> None:
        if isinstance(value, dict):
            found.extend(value)
            strings([*value.values()])
        elif isinstance(value, list):
            for inner in value:
                strings(inner)
        elif isinstance(value, str):
            found.append(value)

    strings(json.loads(out))
    # Python reads a carriage return in a docstring as the end of a line, and a summary ends there.
    assert any("\x1b[5;7m\x1b]0;owned\x07\x9b5m\u202e\u2066\x08" in text for text in found)


# What nobody foresaw


def test_an_error_inside_vocseg_is_one_line_that_asks_for_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError(f"of\nmany lines {STRANGE}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vocseg.plugins.discover", fail)
    monkeypatch.setattr("vocseg.recipe.prepare.discover", fail)
    assert call(monkeypatch, "show", "quickstart") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("internal error: ZeroDivisionError: of many lines \\x1b[5;7m")
    assert line.endswith("please report it with the output of --debug")
    monkeypatch.setattr(sys, "argv", ["vocseg", "show", "quickstart", "--debug"])
    with pytest.raises(ZeroDivisionError):
        main()
