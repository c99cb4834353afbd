"""Scoring: class maps from whole images, counts of pixels, and the figures made of them."""
