"""What every test relies on: no network, no telemetry, one thread, and the evaluation data beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

# Set before anything imports torch or the Hub's client: both read them once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
)

import pytest  # noqa: E402

pytest_plugins = ["browser_pages"]  # one conftest.py: a second one, in a folder, would take this one's name from the tests

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of evaluation data (`data/cmkp`, `data/masc_t15`): ../shared, or what DYNKP_SHARED names."""
    folder = Path(os.environ.get("DYNKP_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.fail(
            f"there is no evaluation data at {folder}: "
            "set DYNKP_SHARED to the folder that holds data/cmkp and data/masc_t15"
        )
    return folder
