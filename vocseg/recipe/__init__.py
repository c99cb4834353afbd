"""Recipes: what may stand in one, reading one with all its problems at once, and writing one back out."""
