"""Posts: their schema and sources, prompts and targets, and the collators."""
