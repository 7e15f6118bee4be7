"""What every test relies on: no network, no telemetry, one thread, and the evaluation data beside the repository.

Tests that use the fixture `shared` get the marker `shared_data`. Without the data (a clone of the repository alone) they are
deselected and counted in the last lines; in CI, or with `DYNKP_SHARED` set, they run whatever is there, and so fail without it.
"""

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
from hypothesis import settings  # noqa: E402

settings.register_profile("no_deadline", deadline=None)  # a busy machine is not a failure
settings.load_profile("no_deadline")

pytest_plugins = ["tests.support.browser_pages"]

SHARED = Path(os.environ.get("DYNKP_SHARED", REPOSITORY.parent / "shared"))
LEFT_OUT = pytest.StashKey[int]()


def shared_data_tests_run() -> bool:
    """Whether tests of real data run: where the data are, in CI, and where `DYNKP_SHARED` says that they should be."""
    return (SHARED / "data").is_dir() or "DYNKP_SHARED" in os.environ or os.environ.get("CI", "").lower() in ("true", "1")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the tests of real data, and deselect them where they cannot run."""
    for item in items:
        if "shared" in getattr(item, "fixturenames", ()):
            item.add_marker("shared_data")
    if not shared_data_tests_run():
        left_out = [item for item in items if item.get_closest_marker("shared_data")]
        items[:] = [item for item in items if not item.get_closest_marker("shared_data")]
        config.hook.pytest_deselected(items=left_out)
        config.stash[LEFT_OUT] = len(left_out)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how many tests were left out."""
    if number := config.stash.get(LEFT_OUT, 0):
        terminalreporter.write_line(
            f"{number} tests of real data were left out: there is no evaluation data at {SHARED}. They run in CI; "
            "set DYNKP_SHARED to the folder that holds data/cmkp and data/masc_t15 to run them here.",
            yellow=True,
        )


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of evaluation data (`data/cmkp`, `data/masc_t15`): ../shared, or what DYNKP_SHARED names."""
    if not (SHARED / "data").is_dir():
        pytest.fail(
            f"there is no evaluation data at {SHARED}: set DYNKP_SHARED to the folder that holds data/cmkp and data/masc_t15"
        )
    return SHARED
