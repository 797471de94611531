"""Pretraining and GRPO as single files without imports from the package, to be read from top to bottom or copied. Tests
hold them equal to the recipes (tests/recipes/flat)."""
