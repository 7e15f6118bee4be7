"""What every test relies on: no network, no telemetry, one thread, and the evaluation data beside the repository."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent

# Set before anything imports torch or the Hub's client: both read them once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    DO_NOT_TRACK="1",
    WANDB_MODE="disabled",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    # Programs that tests start find this checkout's packages, whatever folder they run in.
    PYTHONPATH=os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
)

import pytest  # noqa: E402

pytest_plugins = ["tests.support.browser_pages"]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of evaluation data (`data/cmkp`, `data/masc_t15`): ../shared, or what DYNKP_SHARED names."""
    folder = Path(os.environ.get("DYNKP_SHARED", REPOSITORY.parent / "shared"))
    if not (folder / "data").is_dir():
        pytest.fail(
            f"there is no evaluation data at {folder}: set DYNKP_SHARED to the folder that holds data/cmkp and data/masc_t15"
        )
    return folder
