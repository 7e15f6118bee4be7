"""Invariants of the commands' parsers: errors are one line with a suggestion; old option names work and say the new one; every
value has a type that says what was expected.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import pytest

from dynkp.cli import COMMANDS
from dynkp.cli.arguments import (
    CommandParser,
    above_zero,
    add_old_spelling,
    at_least,
    check_inputs,
    device,
    from_zero,
    json_object,
    positive,
    share,
)


def parser() -> CommandParser:
    parser = CommandParser("fly", "Fly.")
    parser.add_argument("--height", type=positive, required=True)
    parser.add_argument("--engine", choices=["jet", "rocket"], default="jet")
    add_old_spelling(parser, "--motor", "--engine", choices=["jet", "rocket"])
    return parser


def error_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as error:
        parser().parse_args(words)
    assert error.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("dynkp fly: error: ") and said.endswith("`dynkp fly --help` lists the options.\n")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hieght", "3"], "arguments are required: --height. There is no option --hieght. Did you mean '--height'?"),
        (["--height", "3", "--engin=jet", "--enginee", "x"], "unrecognized arguments: --enginee x"),
        (["--height", "3", "--enginee", "x"], "There is no option --enginee. Did you mean '--engine'?"),
        (["--height", "3", "--engine", "rokcet"], "invalid choice: 'rokcet'"),
        (["--height", "3", "--engine", "rokcet"], "Did you mean 'rocket'?"),
        (["--height", "0"], "argument --height: 0 is not a number of 1 or more"),
        (["--height", "high"], "argument --height: invalid positive value: 'high'"),
        (["--height", "3", "left"], "unrecognized arguments: left"),
    ],
)
def test_errors(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error_of(words, capsys)


def test_an_old_spelling(capsys: pytest.CaptureFixture[str]) -> None:
    assert parser().parse_args(["--height", "3", "--motor", "rocket"]).engine == "rocket"
    assert capsys.readouterr().err == "dynkp fly: --motor is now called --engine; the old name still works.\n"
    assert parser().parse_args(["--height", "3"]).engine == "jet"
    assert "--motor" not in parser().format_help()


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_has_the_debug_option_and_a_reference(command: str) -> None:
    module = importlib.import_module(COMMANDS[command][0])
    text = module.parser().format_help()
    assert "--debug" in text and "traceback of an error" in " ".join(text.split())
    assert "picture" not in text.lower()


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (positive, ("1", 1), "0"),
        (at_least(2), ("2", 2), "1"),
        (above_zero, ("0.5", 0.5), "inf"),
        (from_zero, ("0", 0.0), "-1"),
        (share, ("1", 1.0), "1.1"),
        (json_object, ('{"a": 1}', {"a": 1}), "[1]"),
        (device, ("cuda:1", "cuda:1"), "gpu"),
    ],
)
def test_types(kind: Callable[[str], Any], good: tuple[str, Any], bad: str) -> None:
    assert kind(good[0]) == good[1]
    with pytest.raises(argparse.ArgumentTypeError, match="not|none"):
        kind(bad)


def test_inputs(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").touch()
    arguments = argparse.Namespace(posts="a.jsonl", predictions=["a.jsonl", "b.jsonl"], image_dir="imgs", hub="some/posts")
    check_inputs(arguments, "posts", "hub", "absent")
    with pytest.raises(FileNotFoundError, match="--predictions='b.jsonl': there is no such file. Did you mean 'a.jsonl'"):
        check_inputs(arguments, "predictions", kind="file")
    with pytest.raises(FileNotFoundError, match="--image-dir='imgs': there is no such folder"):
        check_inputs(arguments, "image_dir")
    with pytest.raises(FileNotFoundError, match="--hub='some/posts': there is no such file"):
        check_inputs(arguments, "hub", kind="file")
