"""The case file and what it names: rows, prompts, generated posts, and where all of it lies."""
