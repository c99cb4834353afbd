"""What is set before torch is imported, and what is left to whoever set it first."""

import os

import pytest

from vocseg.process import prepare_process

OURS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_threads_spin_a_while_unless_the_environment_says_how_they_wait(monkeypatch, given, expected):
    monkeypatch.setenv("MALLOC_ARENA_MAX", "16")  # which leaves this process's memory alone
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", os.environ.get("OPENBLAS_NUM_THREADS", "1"))
    for name in OURS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    prepare_process()
    found = {name: os.environ[name] for name in OURS if name in os.environ}
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert found == expected
