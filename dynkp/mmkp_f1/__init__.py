"""The keyphrase metric. Nothing here imports torch or the rest of the package."""
