import json

import pytest

from vocseg.errors import EnvironmentFault
from vocseg.runs.files import write_bytes, write_json


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_written_names_the_file_and_leaves_nothing(tmp_path):
    with pytest.raises(EnvironmentFault, match=r"nowhere/file: cannot be written"):
        write_bytes(tmp_path / "nowhere" / "file", b"data")
    assert list(tmp_path.iterdir()) == []


def test_json_has_null_for_what_is_not_a_number(tmp_path):
    write_json(tmp_path / "a.json", {"miou": float("nan"), "interval": (0.5, float("inf"))})
    assert json.loads((tmp_path / "a.json").read_text()) == {"miou": None, "interval": [0.5, None]}
