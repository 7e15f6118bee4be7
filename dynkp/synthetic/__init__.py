"""Drawn posts and a tiny model, both made in code: the default of `examples/train.py`."""
