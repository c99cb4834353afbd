"""Without a network, or with one that swallows everything, what is missing is told in one line, soon."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from vocseg.plugins import PACKAGE, bundled

SYNTHETIC = "data={name='synthetic', size=64, images=2, val_images=2, batch_size=2}"

# In a process where every connection is refused, and what torch and the networks take to be imported is not counted.
OFFLINE = """
import json, os, socket, sys, time

def refuse(*arguments, **named):
    raise ConnectionRefusedError(111, "Connection refused")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
if "heavy" in sys.argv[1]:
    import segmentation_models_pytorch, vocseg.run
from vocseg.cli import main
for line in json.loads(sys.argv[2]):
    if "=" in line[0]:
        os.environ.update([line.pop(0).split("=")])
    sys.argv = ["vocseg", *line]
    begun, busy = time.monotonic(), time.process_time()
    try:
        main()
    except SystemExit as done:
        spent = max(time.process_time() - busy, (time.monotonic() - begun) / 5)
        print(json.dumps([done.code or 0, spent]), file=sys.stderr, flush=True)
"""


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Empty caches, and nothing in the environment that says where data or weights are."""
    monkeypatch.chdir(tmp_path)
    away = ("VOCSEG_", "HF_", "XDG_", "TORCH_HOME", "HUGGINGFACE")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(away) and not k.lower().endswith("_proxy")}
    return {**kept, "HOME": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent), "OMP_NUM_THREADS": "1"}


def outcomes(what: str, lines: list[list[str]], environment: dict[str, str]) -> list[tuple[int, float, list[str]]]:
    """Exit code, seconds and lines on stderr of each call.

    The seconds are the processor's, or a fifth of the clock's, which others on the machine have a part in.
    """
    command = [sys.executable, "-c", OFFLINE, what, json.dumps(lines)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    found, said = [], []
    for line in done.stderr.splitlines():
        if line.startswith("["):
            code, seconds = json.loads(line)
            found.append((code, seconds, said))
            said = []
        else:
            said.append(line)
    assert len(found) == len(lines), done.stderr
    return found


def with_published_weights() -> list[str]:
    """The shipped recipes whose network begins from weights that were published."""
    recipes = {path.stem: tomllib.loads(path.read_text())["model"] for path in bundled("recipes").glob("*.toml")}
    return sorted(name for name, model in recipes.items() if model.get("weights", "none") != "none")


def test_weights_that_are_missing_are_one_line_that_says_where_to_put_them(
    environment: dict[str, str], tmp_path: Path
) -> None:
    small = ["--set", SYNTHETIC, "--set", "model.encoder=resnet10t", "--set", "train.precision=fp32"]
    call = ["run", "transfer_resnet34", *small]
    refused, forbidden = outcomes("heavy", [call, ["HF_HUB_OFFLINE=1", *call]], environment)
    for (code, seconds, said), reason in (
        (refused, "huggingface.co does not answer"),
        (forbidden, "HF_HUB_OFFLINE forbids"),
    ):
        (line,) = said
        assert code == 4
        assert line.startswith("ImageNet weights of resnet10t: not on this machine, and ")
        for part in (reason, "--set model.weights='\"none\"'", "VOCSEG_WEIGHTS", "resnet10t.safetensors"):
            assert part in line
        assert seconds < 1
    assert not list(tmp_path.glob("runs/*/*"))


@pytest.mark.long
def test_each_shipped_recipe_says_which_weights_it_lacks(environment: dict[str, str]) -> None:
    names = with_published_weights()
    assert len(names) >= 10
    found = outcomes("heavy", [["run", name, "--set", SYNTHETIC] for name in names], environment)
    for name, (code, _, said) in zip(names, found, strict=True):
        assert code == 4, name
        (line,) = said
        assert "not on this machine, and " in line
        assert "does not answer" in line


def test_data_that_is_missing_is_one_line_that_says_how_to_fetch_it(environment: dict[str, str]) -> None:
    names = sorted(path.stem for path in bundled("recipes").glob("*.toml") if path.stem != "quickstart")
    assert len(names) >= 20
    for name, (code, seconds, said) in zip(
        names, outcomes("light", [["run", name] for name in names], environment), strict=True
    ):
        assert code == 3, (name, said)
        (line,) = said
        assert "VOCdevkit" in line
        assert "vocseg data fetch voc20" in line
        assert seconds < 1


def test_a_data_set_that_cannot_be_fetched_is_one_line(environment: dict[str, str]) -> None:
    calls = [["data", "fetch", "voc2007"], ["data", "fetch", "sbd"], ["run", "transfer_resnet34", "--fetch"]]
    for code, seconds, said in outcomes("light", calls, environment):
        assert code == 4
        lines = [line for line in said if not line.startswith(("downloading ", "trying "))]
        assert len(lines) == 1, said
        assert "could not download" in lines[0]
        assert "put" in lines[0]
        assert seconds < 2


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A host that takes connections and never says a word."""
    held = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)
        for connection in held:
            connection.close()


def test_a_host_that_swallows_everything_is_given_up(
    environment: dict[str, str], black_hole: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch import nn

    from vocseg.data import published
    from vocseg.errors import EnvironmentFault

    monkeypatch.setattr(published.constants, "ENDPOINT", black_hole)
    monkeypatch.setattr(published, "ANSWER_SECONDS", 0.5)
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    network = nn.Linear(1, 1)
    network.pretrained_cfg = {"architecture": "little_net", "hf_hub_id": "nobody/little_net_that_is_nowhere"}
    begun = time.monotonic()
    with pytest.raises(EnvironmentFault, match=r"127\.0\.0\.1 does not answer") as error:
        published.imagenet_weights(network, [])
    assert time.monotonic() - begun < 5
    assert len(str(error.value).splitlines()) == 1
