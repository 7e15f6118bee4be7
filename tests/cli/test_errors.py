"""Invariants of how commands end:

- a user's mistake is one line on standard error and exit status 2 in every command; `--debug` puts the traceback before it;
- Ctrl-C is one line and 130, with how to continue; a run that failed is one line and 1; anything else is raised;
- errors that this package did not word itself name the option that shows where they come from;
- of several processes, all but the first say which they are; a closed pipe is no error; DeepSpeed's lines go to standard error.
"""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dynkp import cli
from dynkp.cli import COMMANDS
from dynkp.cli.errors import Interrupted, RunFailedError, report, resumable
from tests.conftest import REPOSITORY

# Each command with a file that is not there, and what its error names.
MISSING = {
    "train": ["--train_file", "nowhere.jsonl", "--use_cpu", "true"],
    "recipes": ["nowhere"],
    "predict": ["--model", "MODEL", "--posts", "nowhere.jsonl", "--output", "p.jsonl"],
    "evaluate": ["--predictions", "nowhere.jsonl", "--posts", "POSTS"],
    "stats": ["--test", "nowhere.jsonl"],
    "resample": ["--train", "nowhere.jsonl", "--test", "POSTS", "--target-overlap", "0.5", "--output-dir", "out"],
    "convert": ["--posts", "nowhere.jsonl", "--output", "x.jsonl"],
    "distill": ["cache", "--model", "./nowhere", "--posts", "POSTS", "--output", "labels"],
    "rationales": ["--posts", "nowhere.jsonl", "--output", "r.jsonl", "--base-url", "http://127.0.0.1:9/v1", "--model", "m"],
    "judge": ["--posts", "nowhere.jsonl", "--predictions", "POSTS", "--human", "form.html"],
    "clusters": ["--posts", "nowhere.jsonl", "--model", "m", "--json", "c.json"],
    "plot": ["--visits", "nowhere.jsonl", "--figure7", "f.png"],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "posts.jsonl").write_text('{"id": "1", "text": "a", "keyphrases": ["b"]}\n')
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    return tmp_path


def given(command: str) -> list[str]:
    return [command, *({"POSTS": "posts.jsonl", "MODEL": "model"}.get(word, word) for word in MISSING[command])]


def test_every_command_is_tried() -> None:
    assert COMMANDS.keys() - MISSING.keys() == {"bench"}  # which reads no file


@pytest.mark.parametrize("command", list(MISSING))
def test_a_file_that_is_not_there(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(given(command)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"dynkp {command}: error: ") and "nowhere" in error and error.count("\n") == 1, error
    assert cli.main([*given(command), "--debug"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback (most recent call last):") and f"\ndynkp {command}: error: " in error


@pytest.mark.parametrize("command", [*MISSING, "bench"])
def test_an_option_that_there_is_not(command: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = given(command) if command in MISSING else [command]
    with pytest.raises(SystemExit) as error:
        cli.main([*words, "--nonsense"])
    said = capsys.readouterr().err
    assert error.value.code == 2 and "--nonsense" in said


def test_a_misspelt_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tarin"]) == 2
    assert capsys.readouterr().err == (
        "dynkp: error: there is no command 'tarin'. Did you mean 'train'? `dynkp --help` lists the commands.\n"
    )


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def main(argv: list[str]) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("dynkp.cli.stats"), "main", main)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (KeyboardInterrupt(), 130, "\ndynkp stats: interrupted\n"),
        (Interrupted("the same command continues"), 130, "\ndynkp stats: interrupted; the same command continues\n"),
        (RunFailedError("the server is down"), 1, "dynkp stats: error: the server is down\n"),
        (ImportError("needs an extra"), 2, "dynkp stats: error: needs an extra (dynkp stats --debug shows where)\n"),
    ],
)
def test_endings(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, error)
    assert cli.main(["stats"]) == status
    assert capsys.readouterr().err == line


def test_what_is_not_the_users_mistake_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, KeyError("a mistake of ours"))
    with pytest.raises(KeyError):
        cli.main(["stats"])


def test_a_later_process_says_which_it_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    assert report("predict", RunFailedError("full"), debug=False) == 1
    assert capsys.readouterr().err == "dynkp predict, process 2: error: full\n"


def test_how_to_continue_is_said_once() -> None:
    with pytest.raises(Interrupted, match="^inner$"), resumable("outer"), resumable("inner"):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="other"), resumable("outer"):
        raise ValueError("other")


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m dynkp recipes mmkp_dynamic_cot_internvl3_2b | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=REPOSITORY, capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "error" not in done.stderr


def test_deepspeed_logs_to_standard_error(monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: Any) -> None:
    assert cli.main(["recipes"]) == 0
    logger = logging.getLogger("DeepSpeed")
    handler = logging.StreamHandler(sys.stdout)
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "propagate", False)
    capsys.readouterr()
    logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    logger.warning("a warning that matters")
    assert capsys.readouterr().out == ""
    assert [record.message for record in caplog.records] == ["a warning that matters"]
