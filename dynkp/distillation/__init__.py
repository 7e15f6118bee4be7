"""Distillation: the assistant and its soft labels."""
