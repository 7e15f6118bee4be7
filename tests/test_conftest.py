"""Tests of real data in a clone of the repository alone.

Holds: without the evaluation data, tests that use the fixture `shared`, also through other fixtures, are left out and counted
in the last lines, and the run passes; with CI=true, or with DYNKP_SHARED naming a folder without data, they run and fail; where
the data are, they run and pass; `-m shared_data` selects them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

TESTS = """
import pytest

@pytest.fixture(scope="module")
def tweets(shared):
    return (shared / "data" / "tweets.txt").read_text()

def test_without_data():
    pass

def test_of_the_folder(shared):
    assert shared.name == "shared"

@pytest.mark.parametrize("number", [1, 2])
def test_of_the_tweets(tweets, number):
    assert tweets == "tweet"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A repository with this repository's pytest settings and conftest, and four tests of its own."""
    clone = tmp_path / "clone"
    (clone / "tests").mkdir(parents=True)
    shutil.copy(REPOSITORY / "setup.cfg", clone)
    shutil.copy(REPOSITORY / "tests" / "conftest.py", clone / "tests")
    shutil.copytree(REPOSITORY / "tests" / "support", clone / "tests" / "support")
    (clone / "tests" / "__init__.py").touch()
    (clone / "tests" / "test_data.py").write_text(TESTS)
    return clone


def run(clone: Path, *options: str, **variables: str) -> tuple[int, str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "DYNKP_SHARED", "PYTHONPATH")}
    command = [sys.executable, "-m", "pytest", "tests/test_data.py", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=clone, env=environment | variables, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def test_a_clone_without_data_leaves_them_out_and_passes(clone: Path) -> None:
    status, output = run(clone)
    assert status == 0, output
    assert "1 passed, 3 deselected" in output and "skipped" not in output
    assert f"3 tests of real data were left out: there is no evaluation data at {clone.parent / 'shared'}" in output


@pytest.mark.parametrize("variables", [{"CI": "true"}, {"DYNKP_SHARED": "nowhere"}], ids=["ci", "wrong folder"])
def test_they_fail_without_data_where_they_must_run(variables: dict[str, str], clone: Path) -> None:
    status, output = run(clone, **variables)
    assert status == 1, output
    assert "1 passed, 3 errors" in output and "left out" not in output
    assert "there is no evaluation data at" in output


def test_they_run_where_the_data_are(clone: Path) -> None:
    (clone.parent / "shared" / "data").mkdir(parents=True)
    (clone.parent / "shared" / "data" / "tweets.txt").write_text("tweet")
    status, output = run(clone)
    assert status == 0 and "4 passed" in output and "left out" not in output, output
    status, output = run(clone, "-m", "shared_data")
    assert status == 0 and "3 passed, 1 deselected" in output, output
