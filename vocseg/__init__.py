"""vocseg: compare semantic segmentation networks from TOML recipes and one-file plugins.

What a plugin imports stands here. Importing it is cheap: no torch, numpy or OpenCV.
"""

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
