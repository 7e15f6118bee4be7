"""Rationales: why posts have their keyphrases, as a teacher explains it."""
