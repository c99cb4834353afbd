"""Whatever stands in a recipe or a `--set`, it is read or refused in lines, at once and in little memory.

In the quick form some hundred hostile recipes are read, in the long one 9,000; the bombs always go off.
"""

import contextlib
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from inspect import getsource
from pathlib import Path

import pytest

from vocseg.errors import UNSEEN, UsageError, VocsegError
from vocseg.plugins import PACKAGE, bundled, discover
from vocseg.recipe.prepare import load_recipe
from vocseg.recipe.reader import Recipe, read_recipe
from vocseg.recipe.schema import PLACES, TABLES
from vocseg.recipe.toml import MAX_BYTES, write_value
from vocseg.recipe.writer import write_resolved
from vocseg.registry import Registry

resource = pytest.importorskip("resource", reason="Windows does not tell how much memory a process had")

SECONDS = 0.5
MEGABYTES = 200
MOST_LETTERS = 1000
"""Of a line that says what is wrong."""

SHIPPED = [path.read_text() for path in sorted(bundled("recipes").glob("*.toml"))]

STRANGE = "\0\x07\x1b[31m\x7f\x9b\u202e\u2028\ufeff\U000e0041"
TEXTS = (
    "", " ", "a" * 10_000, "é" * 999, STRANGE, "$x^2_\\frac", "[red]bold[/]", "=cmd|'/C calc'!A0", "../../etc/passwd",
    "/dev/null", "~nobody/x", "C:\\x", "CON", "name", "none", "auto", "nan", "\n\n", "\\", '"', "'''", "os.system",
)  # fmt: skip
NUMBERS = (
    "0", "-1", "1", "-0.0", "0.5", "1e-400", "1e400", "nan", "-inf", "9223372036854775807", "9223372036854775808",
    "-99999999999999999999", "1" * 4000, "1" * 5000, "0x" + "f" * 999, "0b1", "1_0", "01", "1e5_0",
)  # fmt: skip
OTHERS = (
    "true", "[]", "{}", "[[]]", "[1, 'a', true]", "[{}]", "{a = {b = {c = 1}}}", "[1.0, 1.0]", "[[0, 1], [2]]",
    "1979-05-27T07:32:00Z", "07:32:00", "1979-13-99", "[" * 70 + "]" * 70, "[" + "0, " * 5000 + "]", "[nan]", "",
)  # fmt: skip
SOUP = "[]{}=.,\"'#\n\\ \t\r019eE+-_:TZabc\0\x1b\u202eé\U0001f600"


@pytest.fixture(scope="module")
def registry() -> Registry:
    return discover()


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VOCSEG_DATA", raising=False)


# What is made up


def a_value(rng: random.Random) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        text = rng.choice(TEXTS)
        return rng.choice((write_value(text), f"'{text}'", f'"""{text}"""', f'"{text}"', text))
    return rng.choice(NUMBERS if kind == 1 else OTHERS)


def from_nothing(rng: random.Random, registry: Registry) -> bytes:
    """Bytes, or letters that mean something in TOML."""
    if rng.random() < 0.3:
        return rng.randbytes(rng.randrange(2000))
    return "".join(rng.choices(SOUP, k=rng.randrange(3000))).encode()


def by_the_grammar(rng: random.Random, registry: Registry) -> bytes:
    """Tables and keys as recipes have them, some in the wrong place, and values of every kind."""
    components = list(registry)
    headed = rng.random() < 0.4
    lines = HEAD.decode().splitlines() if headed else []
    tables = [*(place.header for place in PLACES), *(f"[{name}]" for name in TABLES), "[[train]]", "[loss]", "[x.y.z]"]
    for header in rng.choices(tables, k=rng.randrange(2)) if headed else [None, *rng.choices(tables, k=5)]:
        keys: list[str] = ["seed", "description", "name", "x", '"\\u001b[2J"', "a.b", "'a b'"]
        if header:
            lines.append(header)
            place = next((p for p in PLACES if p.header == header), None)
            if place:
                component = rng.choice([c for c in components if c.kind == place.kind])
                if rng.random() < 0.9:
                    lines.append(f'name = "{component.name}"')
                keys += [*place.core.model_fields, *(p.name for p in component.parameters)] * 3
            elif header.strip("[]") in TABLES:
                keys += [*TABLES[header.strip("[]")].model_fields] * 3
        lines += [f"{key} = {a_value(rng)}" for key in rng.sample(keys, k=min(len(keys), rng.randrange(5)))]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def of_a_shipped_one(rng: random.Random, registry: Registry) -> bytes:
    """A recipe of ours with a few lines or bytes changed."""
    lines = rng.choice(SHIPPED).splitlines()
    for _ in range(rng.randint(1, 4)):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        change = rng.randrange(7)
        if change == 0:
            del lines[i]
        elif change == 1:
            lines.insert(i, lines[j])
        elif change == 2:
            lines[i], lines[j] = lines[j], lines[i]
        elif change == 3:
            lines[i] = lines[i].partition("=")[0] + "= " + a_value(rng)
        elif change == 4:
            lines.insert(i, rng.choice(SHIPPED))
        elif change == 5:
            at = rng.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + rng.choice(SOUP) + lines[i][at + rng.randrange(2) :]
        elif len(lines[i]) > 4:
            at = rng.randrange(len(lines[i]) - 1)
            lines[i] = lines[i][:at] + lines[i][at + 1] + lines[i][at] + lines[i][at + 2 :]
        lines = lines or [""]
    text = bytearray("\n".join(lines).encode())
    for _ in range(rng.choice((0, 0, 0, 1, 5))):
        text[rng.randrange(len(text))] = rng.randrange(256)
    return bytes(text)


SOURCES = (from_nothing, by_the_grammar, of_a_shipped_one)
COUNTS = [60, pytest.param(3000, marks=pytest.mark.long)]


# What must hold


def check_lines(error: VocsegError) -> None:
    assert error.exit_code in (2, 3)
    assert error.problems
    for problem in error.problems:
        line = str(problem)
        assert line.strip()
        assert not UNSEEN.search(line), line
        assert len(line) <= MOST_LETTERS, line


def check_recipe(recipe: Recipe, registry: Registry) -> None:
    """What was taken reads the same from the run folder."""
    written = Path("resolved.toml")
    written.write_text(write_resolved(recipe), encoding="utf-8")
    assert not UNSEEN.search(written.read_text(encoding="utf-8").replace("\n", ""))
    assert read_recipe(written, registry).resolved == recipe.resolved


def is_right(read: Callable[[], Recipe], given: object, registry: Registry) -> bool:
    """Reads a recipe, and says whether it was right."""

    def seconds() -> float:
        nonlocal recipe
        begun = time.thread_time()
        try:
            recipe = read()
        except VocsegError as error:
            check_lines(error)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__} from {given!r}") from error
        return time.thread_time() - begun

    recipe: Recipe | None = None
    # Twice where it took long: a look for garbage among all that the other tests left may have fallen into it.
    assert seconds() < SECONDS or seconds() < SECONDS, given
    if recipe is not None:
        check_recipe(recipe, registry)
    return recipe is not None


@pytest.fixture
def _in_little_memory() -> Iterator[None]:
    """All recipes of a test together make the process grow by less than one may."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is used now
    before = peak_megabytes()
    yield
    assert peak_megabytes() - before < MEGABYTES


def peak_megabytes() -> float:
    """The most memory that this process has had."""
    if sys.platform == "linux":  # where `getrusage` also counts what the process was forked from
        (found,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return int(found) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@pytest.mark.usefixtures("_in_little_memory")
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_fuzzed_recipe_is_right_or_refused_in_lines(source: Callable, count: int, registry: Registry) -> None:
    rng = random.Random(f"{source.__name__} {count}")
    right = 0
    for i in range(count):
        text = source(rng, registry)
        Path("fuzzed.toml").write_bytes(text)
        # One in twenty as `vocseg show` reads it, with the paths in it, and the others as text alone.
        read = (
            (lambda: load_recipe("fuzzed.toml")[0])
            if i % 20 == 0
            else partial(read_recipe, Path("fuzzed.toml"), registry)
        )
        right += is_right(read, text, registry)
    assert right < count * 0.9
    assert right > 0 or source is from_nothing


@pytest.mark.usefixtures("_in_little_memory")
@pytest.mark.parametrize("count", COUNTS)
def test_a_fuzzed_override_is_right_or_refused_in_lines(count: int, registry: Registry) -> None:
    rng = random.Random(f"overrides {count}")
    path = bundled("recipes") / "quickstart.toml"
    tables = [*(place.table for place in PLACES), *TABLES, "x", "augmentation.0", "loss.99", "loss.-1"]
    keys = ["name", "epochs", "weights", "root", "x", "", "a b", "0", "9" * 20, "a." * 9, "a." * 99]
    right = 0
    for _ in range(count):
        given = rng.choices(["train.epochs=3", "seed=7", "description=a run", "model.weights=none"], k=rng.randrange(3))
        if rng.random() < 0.7:
            given.append(f"{rng.choice(tables)}.{rng.choice(keys)}={a_value(rng)}")
        if rng.random() < 0.2:
            given.append(rng.choice(("".join(rng.choices(SOUP, k=rng.randrange(40))), "model.name=\udcff")))
        right += is_right(partial(read_recipe, path, registry, given), given, registry)
    assert 0 < right < count * 0.9


# Bombs: each in a process of its own


def _lines(line: str, size: int = MAX_BYTES - 1000) -> bytes:
    """The line again and again, with a number of its own where it has %d."""
    count = size // (len(line) + 5)
    return "".join((line % i if "%" in line else line) + "\n" for i in range(count)).encode()


HEAD = b'[model]\nname = "unet"\n[data]\nname = "synthetic"\n[train]\nepochs = 1\n'
BOMBS = {
    "nested arrays": b"x = " + b"[" * 30_000 + b"]" * 30_000,
    "nested tables": b"x = " + b"{a=" * 15_000 + b"1" + b"}" * 15_000,
    "a key of many parts": b"a." * 32_000 + b"a = 1",
    "a key of many parts in a table": b"x = {y = 1, " + b"a." * 32_000 + b"a = 1}",
    "many keys": _lines("k%d=1"),
    "a million keys": _lines("k%d=1", 12_000_000),
    "50 MB": b"#" * 50_000_000,
    "many tables": HEAD + _lines("[t%d]"),
    "many losses": HEAD + _lines('[[loss]]\nname = "dice"'),
    "many wrong losses": HEAD + _lines('[[loss]]\nname = "dice"\nx = 1'),
    "many losses without a name": HEAD + _lines("[[loss]]"),
    "a huge number": b"seed = " + b"9" * 60_000,
    "a huge hexadecimal number": b"seed = 0x" + b"f" * 60_000,
    "a huge exponent": b"seed = 1e99999999999999\n[train]\nclip = -1e99999999999",
    "many numbers that are none": b"x = [" + b"nan," * 15_000 + b"]",
    "quotes": b'x = "' + b'\\"' * 32_000,
    "a long name": HEAD.replace(b"unet", b"u" * 60_000),
    "a long key": HEAD + b"k" * 60_000 + b" = 1",
}
NO_FILES = {
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo if hasattr(os, "mkfifo") else None,
    "links in a ring": lambda path: path.symlink_to(path),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
}


MEASURED = """
import resource, sys
from tests_peak import peak_megabytes
from vocseg.cli import main
try:
    main()
finally:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    open("cost", "w").write(f"{usage.ru_utime + usage.ru_stime} {peak_megabytes()}")
"""


def cost(arguments: Sequence[str]) -> tuple[int, str, float, float]:
    """Exit code, stderr, CPU seconds and peak megabytes of `vocseg …` in a process of its own."""
    Path("tests_peak.py").write_text(f"import re, resource, sys\nfrom pathlib import Path\n{getsource(peak_megabytes)}")
    command = [sys.executable, "-c", MEASURED, *arguments]
    environment = {**os.environ, "PYTHONPATH": f"{PACKAGE.parent}{os.pathsep}."}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    seconds, megabytes = map(float, Path("cost").read_text().split())
    return done.returncode, done.stderr, seconds, megabytes


@pytest.fixture(scope="module")
def usual(tmp_path_factory: pytest.TempPathFactory) -> float:
    """CPU seconds of showing a small recipe."""
    folder = tmp_path_factory.mktemp("usual")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("small.toml").write_bytes(HEAD)
        code, said, seconds, _ = cost(["show", "small.toml"])
    assert (code, said) == (0, "")
    return seconds


@pytest.mark.parametrize("bomb", [*BOMBS, *NO_FILES])
def test_a_bomb_does_not_go_off(bomb: str, usual: float) -> None:
    path = Path("bomb.toml")
    if bomb in BOMBS:
        path.write_bytes(BOMBS[bomb])
    elif NO_FILES[bomb] is None or os.name == "nt":
        pytest.skip("not on this system")
    else:
        NO_FILES[bomb](path)
    code, said, seconds, megabytes = cost(["show", "bomb.toml"])
    assert code == (0 if bomb == "many losses" else 2), said
    lines = said.splitlines()
    assert len(lines) <= 101
    assert all(line.startswith("bomb.toml") and len(line) < MOST_LETTERS for line in lines), said[:2000]
    assert seconds - usual < SECONDS
    assert megabytes < MEGABYTES


@pytest.mark.skipif(os.name == "nt", reason="Windows knows no pipes among files, and links need a privilege")
def test_what_is_no_recipe_does_not_keep_the_list_of_recipes_busy() -> None:
    for number, (name, make) in enumerate(NO_FILES.items()):
        make(Path(f"{number} {name}.toml"))
    with Path("huge.toml").open("wb") as huge:
        huge.truncate(2**36)  # of which nothing is on the disk
    code, said, seconds, megabytes = cost(["list", "recipe"])
    assert (code, said) == (0, "")
    assert seconds < 2
    assert megabytes < MEGABYTES


# A recipe's name


@pytest.mark.parametrize("name", ["..", ".", "a\x1b[31m", "a\nb", "a\u202eb"])
def test_a_recipe_whose_name_is_no_folders_is_refused(name: str) -> None:
    path = Path(f"{name}.toml")
    path.write_bytes(HEAD)
    with pytest.raises(VocsegError, match="its runs are filed under a recipe's name") as error:
        load_recipe(str(path))
    check_lines(error.value)


@pytest.mark.parametrize(
    "name", ["a b", "été", "$x^2$", "[red]", "=1+1", "CON", "-x", "x" * 250, ".hidden", "a..b", "~"]
)
def test_other_names_are_a_folders(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_bytes(HEAD)
    recipe, _ = load_recipe(str(path))
    folder = tmp_path / "runs" / recipe.name
    folder.mkdir(parents=True)
    assert folder.resolve().parent == (tmp_path / "runs").resolve()


def test_so_many_mistakes_on_all_sides_are_told_in_a_hundred_lines(registry: Registry) -> None:
    Path("many.toml").write_bytes(HEAD + b"".join(b"unknown_%d = 1\n" % number for number in range(300)))
    for flags in (0, 1, 99, 100, 120):
        with pytest.raises(UsageError) as caught:
            read_recipe(Path("many.toml"), registry, [f"nonsense {number}" for number in range(flags)])
        assert len(caught.value.problems) == 100
        assert "there may be more" in str(caught.value.problems[-1])
