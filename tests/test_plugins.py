"""Discovery: where it looks, in which order, that it runs nothing, and that what it lists is what loading finds."""

import inspect
import sys
import zipfile
from pathlib import Path

import pytest

from vocseg import plugins
from vocseg.errors import UsageError, shown_path
from vocseg.plugins import CORE_FILES, bundled, discover, import_file
from vocseg.registry import MARK, Registry

HEAD = "from vocseg import loss\n"


def write_plugin(path: Path, name: str = "mine", head: str = HEAD, tail: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{head}@loss\ndef {name}(*, p: float = 0.5):\n    """Mine."""\n    return p\n{tail}')
    return path


def mine(registry: Registry) -> dict[str, str]:
    """Name → file of everything that came neither with vocseg nor with its wheel."""
    return {c.name: c.file for c in registry if c.origin not in ("vocseg", "bundled")}


def test_our_own_components_are_all_found_and_none_is_broken() -> None:
    registry = discover()
    assert registry.broken == ()
    found = {kind: len(registry.names(kind)) for kind in ("architecture", "loss", "augmentation", "optimizer")}
    found |= {kind: len(registry.names(kind)) for kind in ("schedule", "initializer", "dataset")}
    least = {"architecture": 3, "loss": 4, "augmentation": 10, "optimizer": 3}
    least |= {"schedule": 5, "initializer": 4, "dataset": 3}
    assert all(found[kind] >= count for kind, count in least.items()), found
    assert all(c.summary.endswith(".") for c in registry)


def test_every_file_of_marked_functions_in_the_package_is_looked_through() -> None:
    marked = {
        str(path.relative_to(plugins.PACKAGE))
        for path in plugins.PACKAGE.rglob("*.py")
        if any(f"\n@{kind}" in path.read_text() for kind in ("loss", "augmentation", "optimizer", "schedule"))
        or any(f"\n@{kind}" in path.read_text() for kind in ("initializer", "dataset", "architecture"))
    }
    assert marked == set(CORE_FILES)


def test_what_is_listed_is_what_loading_finds() -> None:
    components = list(discover())
    assert len(components) >= 32
    for listed in components:
        function = listed.load()
        mark, signature = getattr(function, MARK), inspect.signature(function, eval_str=True)
        by_position = [p for p in signature.parameters.values() if p.kind is not p.KEYWORD_ONLY]
        by_keyword = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
        assert (mark.kind, mark.options.get("backbone", "")) == (listed.kind, listed.backbone)
        assert function.__name__ == listed.name
        assert inspect.getdoc(function) == listed.doc
        assert [p.name for p in by_position] == list(listed.handed_over)
        assert [(p.name, p.annotation, ... if p.default is p.empty else p.default) for p in by_keyword] == [
            (p.name, p.annotation, p.default) for p in listed.parameters
        ]


def test_reading_a_plugin_does_not_run_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    for name, statement in {
        "loud": "print('run')",
        "writing": f"open({str(made)!r}, 'w').close()",
        "raising": "raise RuntimeError('run')",
        "leaving": "raise SystemExit(1)",
    }.items():
        write_plugin(tmp_path / "plugins" / f"{name}.py", name, head=f"{HEAD}{statement}\n")
    registry = discover(project=tmp_path)
    assert sorted(mine(registry)) == ["leaving", "loud", "raising", "writing"]
    assert registry.broken == ()
    assert not made.exists()
    assert capsys.readouterr() == ("", "")

    # Used, each does what it does, and one that fails is an error that names its file.
    assert registry.get("loss", "writing").build({}, {"p": 2.0}) == 2.0
    assert made.exists()
    with pytest.raises(UsageError, match=r"raising\.py:4: loss 'raising' cannot be loaded: RuntimeError: run"):
        registry.get("loss", "raising").load()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"import vocseg\ndef f(:", "line 2: not Python: invalid syntax"),
        (b"import vocseg\n\xff", "not Python"),
        (b"import vocseg\0", "null bytes"),
        (b"import vocseg\nx = " + b"(" * 5000, "line 2: not Python: too many nested parentheses"),
        (b"import vocseg\nx = " + b"-" * 100_000 + b"1", "Error"),
        (b"from vocseg import loss\n@loss\ndef f(x): ...", "line 3: loss 'f' takes 'x' by position"),
        (b"from vocseg import loss\n@loss\ndef f(*, weight: float): ...", "'weight', a key that vocseg reads itself"),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_a_broken_plugin_is_a_row_with_its_reason_and_harms_nobody(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    write_plugin(tmp_path / "plugins" / "good.py")
    bad = tmp_path / "plugins" / "bad.py"
    bad.symlink_to("nowhere") if content is None else bad.write_bytes(content)
    registry = discover(project=tmp_path)
    assert list(mine(registry)) == ["mine"]
    (broken,) = registry.broken
    assert broken.file == str(bad)
    assert reason in broken.reason


def test_files_that_do_not_mention_vocseg_are_not_looked_at(tmp_path: Path) -> None:
    write_plugin(tmp_path / "plugins" / "good.py")
    (tmp_path / "plugins" / "notes.py").write_text("this is no Python")
    (tmp_path / "plugins" / "notes.txt").write_text("vocseg")
    assert discover(project=tmp_path).broken == ()


def test_private_files_are_left_alone(tmp_path: Path) -> None:
    for name in ("_shared.py", ".hidden.py", "_package/__init__.py"):
        write_plugin(tmp_path / "plugins" / name)
    assert mine(discover(project=tmp_path)) == {}


def test_the_nearest_plugin_folder_beside_or_above_the_recipe_is_the_projects(tmp_path: Path) -> None:
    recipe = tmp_path / "a" / "recipes" / "x.toml"
    outer = write_plugin(tmp_path / "plugins" / "one.py", "outer")
    assert mine(discover(project=recipe)) == {"outer": str(outer)}
    above = write_plugin(tmp_path / "a" / "plugins" / "two.py", "above")
    assert mine(discover(project=recipe)) == {"above": str(above)}
    beside = write_plugin(tmp_path / "a" / "recipes" / "plugins" / "three.py", "beside")
    assert mine(discover(project=recipe)) == {"beside": str(beside)}
    assert mine(discover(project=recipe.parent)) == {"beside": str(beside)}
    assert mine(discover()) == {}


def test_the_plugin_folder_of_the_flag_comes_last_and_in_addition(tmp_path: Path) -> None:
    write_plugin(tmp_path / "plugins" / "one.py", "beside")
    write_plugin(tmp_path / "more" / "two.py", "flagged")
    assert set(mine(discover(project=tmp_path, plugins=tmp_path / "more"))) == {"beside", "flagged"}
    assert set(mine(discover(plugins=tmp_path / "more"))) == {"flagged"}
    with pytest.raises(UsageError, match=r"--plugins .*nowhere: no such folder"):
        discover(plugins=tmp_path / "nowhere")


def test_one_name_in_two_places_is_neithers_and_the_later_place_is_the_one_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The order is core, bundled, installed, beside the recipe, --plugins: each is blamed for what the one before has.
    core = plugins.PACKAGE / "components" / "losses.py"
    monkeypatch.setattr(plugins, "bundled", lambda kind: tmp_path / "bundled" / kind)
    install(tmp_path / "site", monkeypatch, "thing", "thing")
    places = [
        tmp_path / "bundled" / "plugins" / "a.py",
        tmp_path / "site" / "thing.py",
        tmp_path / "plugins" / "c.py",
        tmp_path / "more" / "d.py",
    ]
    for i, place in enumerate(places):
        write_plugin(place, "focal", tail=f"# {i}\n")
    registry = discover(project=tmp_path, plugins=tmp_path / "more")
    assert [component.source for component in registry.clashes] == [f"{place}:3" for place in places]
    assert f"loss 'focal' is defined at {shown_path(core)}:" in registry.missing("loss", "focal")
    assert registry.find("loss", "focal") is None


def test_a_file_that_is_there_twice_byte_for_byte_is_one(tmp_path: Path) -> None:
    first = write_plugin(tmp_path / "plugins" / "one.py")
    second = write_plugin(tmp_path / "more" / "two.py")
    assert mine(discover(project=tmp_path, plugins=tmp_path / "more")) == {"mine": str(first)}
    assert mine(discover(project=tmp_path, plugins=tmp_path / "plugins")) == {"mine": str(first)}
    second.write_text(second.read_text() + "\n")
    assert [component.file for component in discover(tmp_path, tmp_path / "more").clashes] == [str(second)]


def test_a_package_in_the_plugin_folder_is_read_with_all_its_files_and_can_be_loaded(tmp_path: Path) -> None:
    package = tmp_path / "plugins" / "net"
    write_plugin(package / "__init__.py", "outer", head="from vocseg import loss\nfrom .parts import HALF\n")
    write_plugin(package / "parts.py", "inner", head=f"{HEAD}HALF = 0.5\n")
    registry = discover(project=tmp_path)
    assert mine(registry) == {"outer": str(package / "__init__.py"), "inner": str(package / "parts.py")}
    assert registry.get("loss", "outer").build({}, {}) == 0.5
    # The same module by either way: nothing is imported twice.
    assert inspect.getmodule(registry.get("loss", "inner").load()).HALF == 0.5
    assert registry.get("loss", "inner").load().__module__.endswith("_net.parts")


def test_a_plugin_file_is_imported_once_under_a_name_of_its_own(tmp_path: Path) -> None:
    path = write_plugin(tmp_path / "json.py", head=f"{HEAD}import json\nSEEN = json.dumps(1)\n")
    module = import_file(path)
    assert module is import_file(tmp_path / "sub" / ".." / "json.py")
    assert module.SEEN == "1"  # the standard library's json, not this file
    other = write_plugin(tmp_path / "other" / "json.py")
    assert import_file(other) is not module


def test_a_plugin_that_failed_to_import_can_be_tried_again(tmp_path: Path) -> None:
    path = write_plugin(tmp_path / "a.py", tail="raise OSError('once')\n")
    for _ in range(2):
        with pytest.raises(OSError, match="once"):
            import_file(path)
    write_plugin(path)
    assert import_file(path).mine() == 0.5


def install(site: Path, monkeypatch: pytest.MonkeyPatch, module: str, dist: str, text: str | None = None) -> None:
    """What an installer leaves of a distribution with one entry point."""
    info = site / f"{dist}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(text or f"[vocseg.plugins]\n{dist} = {module}\n")
    monkeypatch.syspath_prepend(str(site))


def test_a_module_of_an_installed_distribution_is_found_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "voc_made_up_module", "made-up")
    path = write_plugin(tmp_path / "voc_made_up_module.py", tail="SEEN = 1\n")
    registry = discover()
    assert mine(registry) == {"mine": str(path)}
    assert registry.get("loss", "mine").origin == "made-up"
    assert "voc_made_up_module" not in sys.modules
    assert registry.get("loss", "mine").build({}, {"p": 0.25}) == 0.25
    assert sys.modules.pop("voc_made_up_module").SEEN == 1


def test_a_package_of_an_installed_distribution_is_found_without_importing_it_or_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "voc_outer.nets:register", "made-up")
    write_plugin(tmp_path / "voc_outer" / "__init__.py", "not_named", head="raise SystemExit\n")
    init = write_plugin(tmp_path / "voc_outer" / "nets" / "__init__.py", "one", head=f"{HEAD}raise SystemExit\n")
    inner = write_plugin(tmp_path / "voc_outer" / "nets" / "two.py", "two")
    write_plugin(tmp_path / "voc_outer" / "nets" / "_private.py", "three")
    registry = discover()
    assert mine(registry) == {"one": str(init), "two": str(inner)}
    assert not any(name.startswith("voc_outer") for name in sys.modules)


def test_a_namespace_package_may_be_named_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "voc_namespace", "made-up")
    path = write_plugin(tmp_path / "voc_namespace" / "net.py")
    assert mine(discover()) == {"mine": str(path)}


def test_a_package_installed_in_the_old_way_is_found_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "voc_made_up_module", "made-up")
    path = write_plugin(tmp_path / "voc_made_up_module.py")
    (tmp_path / "made-up-1.0.dist-info" / "METADATA").rename(tmp_path / "made-up-1.0.dist-info" / "PKG-INFO")
    (tmp_path / "made-up-1.0.dist-info").rename(tmp_path / "made_up.egg-info")  # `setup.py develop` leaves such a one
    registry = discover()
    assert mine(registry) == {"mine": str(path)}
    assert registry.get("loss", "mine").origin == "made-up"


@pytest.mark.parametrize("info", ["made_up-1.0.dist-info", "EGG-INFO"])
def test_a_package_in_an_archive_is_seen_and_said_to_be_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, info: str
) -> None:
    archive = tmp_path / "made_up-1.0-py3.egg"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("voc_zipped.py", "from vocseg import loss\n@loss\ndef mine(): ...\n")
        file.writestr(f"{info}/PKG-INFO", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n")
        file.writestr(f"{info}/entry_points.txt", "[vocseg.plugins]\nx = voc_zipped\n")
    monkeypatch.syspath_prepend(str(archive))
    (broken,) = discover().broken
    assert broken.file == str(archive / "voc_zipped.py")
    assert "cannot be read" in broken.reason


@pytest.mark.parametrize(
    ("text", "file", "reason"),
    [
        ("[vocseg.plugins]\nx = voc_not_there\n", "made-up", "x = voc_not_there leads nowhere"),
        ("[vocseg.plugins]\nx = json.not_there\n", "made-up", "no module named 'json.not_there'"),
        ("[vocseg.plugins]\nx = this is wrong\n", "made-up", "leads nowhere"),
        ("[vocseg.plugins]\nno equals sign\n", "installed packages", "cannot be read"),
    ],
)
def test_a_damaged_installation_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, file: str, reason: str
) -> None:
    install(tmp_path, monkeypatch, "", "made-up", text)
    registry = discover()
    assert mine(registry) == {}
    (broken,) = registry.broken
    assert broken.file == file
    assert reason in broken.reason
    assert registry.find("loss", "dice") is not None


def test_the_shipped_plugins_and_recipes_are_there() -> None:
    assert len(list(bundled("plugins").glob("*.py"))) >= 3
    assert len(list(bundled("recipes").glob("*.toml"))) >= 3
