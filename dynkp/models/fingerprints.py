"""Fingerprints of saved models: digests that distinguish a model from another one saved in the same folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

# Number of positions in a file of weights that are sampled, and number of bytes read at each.
_SAMPLES, _SAMPLE_BYTES = 64, 4096
# Files that determine a model's outputs beside its weights; by name, since a run may have files of its own in the folder.
_SETTINGS_FILES = frozenset(
    (
        "config.json",
        "adapter_config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "chat_template.json",
        "processor_config.json",
        "preprocessor_config.json",
    )
)


def weights_fingerprint(model: str) -> str:
    """Return the fingerprint of a saved model, within milliseconds.

    Args:
        model: a folder, a file of weights, or a Hub id.

    Returns:
        For a folder, a checksum of sampled bytes of its weights and of its configuration, tokenizer, chat template and
        processor, which does not change when the folder is moved; for a file, a checksum of its sampled bytes; for a Hub id,
        the id.
    """
    if os.path.isdir(model):
        inside = sorted(Path(model).iterdir())
        files = [file for file in inside if file.suffix in (".safetensors", ".bin") or file.name in _SETTINGS_FILES]
    elif os.path.isfile(model):
        files = [Path(model)]
    else:
        return model
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            for place in range(_SAMPLES):
                stream.seek(place * max(0, size - _SAMPLE_BYTES) // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return f"weights sha256 {digest.hexdigest()[:16]}"
