"""The conformance kit for architectures: does a network keep the contract that vocseg relies on?

`vocseg check FILE.py` prints what it finds. In a test of one's own:

    from vocseg.testing import check_architecture

    def test_my_net():
        check_architecture("plugins/my_net.py").raise_if_failed()

It needs no data, no GPU and no pytest; most networks take a few seconds. Recipes are tried by `vocseg check RECIPE`.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

from vocseg.registry import Component
from vocseg.testing.checks import CHECKS, rows
from vocseg.testing.report import Report, Row, Verdict
from vocseg.testing.subject import subjects

__all__ = ["CHECK_NAMES", "Report", "Row", "Verdict", "check_architecture"]

CHECK_NAMES = tuple(check.name for check in CHECKS)


def check_architecture(
    target: Callable | Component | str | os.PathLike[str], /, *, without: Sequence[str] = (), **params: Any
) -> Report:
    """Checks an architecture, or each one that a file marks.

    Args:
        target: a marked function, the path of a plugin, or the name of an architecture that vocseg finds from here.
        without: names of checks to leave out, of `CHECK_NAMES`.
        params: the architecture's own, as a recipe gives them; its defaults for those that are left out.

    Raises:
        UsageError: there is no architecture there, or a parameter or a check is not known.
    """
    return Report(tuple(row for subject in subjects(target) for row in rows(subject, params, without)))
