"""Batches: renderers, collators, targets and the layout of prompts."""
