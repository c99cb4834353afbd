"""vocseg: compare semantic segmentation networks from TOML recipes and one-file plugins.

What a plugin imports stands here. Importing it is cheap: no torch, numpy or OpenCV.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vocseg.registry import (
        architecture,
        augmentation,
        dataset,
        initializer,
        loss,
        optimizer,
        schedule,
    )

__version__ = "0.1.0"

__all__ = [
    "architecture",
    "augmentation",
    "dataset",
    "initializer",
    "loss",
    "optimizer",
    "schedule",
]


def __getattr__(name: str) -> Any:
    """The marks are read in when a plugin asks for one; `vocseg --help` can do without."""
    if name not in __all__:
        raise AttributeError(f"module 'vocseg' has no attribute '{name}'")
    from vocseg import registry

    return getattr(registry, name)
