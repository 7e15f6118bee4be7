"""The keyphrase metric, independent of torch and of the rest of the package."""
