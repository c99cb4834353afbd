"""The run folder: what one execution leaves behind, written so that a crash never costs what was there before."""
