"""Rationales: explanations by a teacher model of why posts have their keyphrases."""
