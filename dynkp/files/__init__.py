"""Files: atomic writes, locks, JSON and JSON Lines."""
