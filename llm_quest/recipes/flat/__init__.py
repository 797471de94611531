"""Two recipes as single plain files, for reading from top to bottom and for taking away: pretraining and GRPO. Each
repeats what the house has assembled from parts, and a test holds the two equal (tests/recipes/flat)."""
