"""Fingerprints of saved models: what tells a checkpoint from another one in the same folder."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

# Places in a file of weights whose bytes stand for the whole of it, and how many bytes each.
_SAMPLES, _SAMPLE_BYTES = 64, 4096
# What of a checkpoint decides on its outputs beside the weights: by name, as a run's own files may lie in the folder.
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
    """What tells a checkpoint from another one in the same folder, in milliseconds.

    Args:
        model: a folder, a file of weights, or a Hub id.

    Returns:
        For a folder, a checksum of bytes sampled all over its weights and of its configuration, tokenizer, chat template
        and processor, so that it may be moved; for a file, one of its bytes; for a Hub id, the id.
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
