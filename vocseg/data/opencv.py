"""OpenCV, imported when something of it is first used.

That takes 50 ms, a sixth of the time in which `vocseg run` tells what is wrong with a recipe, and needs no pixel for.
"""

from typing import Any


class _OpenCV:
    def __getattr__(self, name: str) -> Any:
        import cv2

        cv2.setNumThreads(0)  # the loader's threads are the parallelism; OpenCV's own would fight torch for the cores
        value = getattr(cv2, name)
        setattr(self, name, value)  # from now on it is found without coming here
        return value


cv2 = _OpenCV()
