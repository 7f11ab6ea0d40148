"""Watching a training run: what memory does, and what it does wrong. Nothing here changes it."""
