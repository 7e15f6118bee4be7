"""The command reference has every command and option, and every `dynkp` command line in the documentation is understood."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from dynkp import PostConfig
from dynkp.cli import COMMANDS
from dynkp.cli.train import TrainParser, read_config
from dynkp.recipes.catalog import find_recipe
from dynkp.training.options import METHODS, DataArguments, PredictionArguments, TinyModelArguments
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", *sorted(DOCS.rglob("*.md"))]


def parser_of(command: str) -> argparse.ArgumentParser:
    module = importlib.import_module(COMMANDS[command][0])
    return (getattr(module, "parser", None) or module._parser)()


def parse(command: str, words: list[str]) -> None:
    """Parse the words of a command line; those of `train` by the parser of their method or recipe."""
    parser = parser_of(command)
    if command == "train":
        chosen = dict(zip(words, words[1:], strict=False))
        recipe = read_config(str(find_recipe(chosen["--recipe"], "training").path), "") if "--recipe" in chosen else {}
        parser = TrainParser(chosen.get("--method", recipe.get("method", "dynamic_cot")))
    parser.parse_args(words)


def command_lines(text: str) -> list[list[str]]:
    lines = []
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            for start in (["dynkp"], ["accelerate", "launch", "-m", "dynkp"]):
                if words[: len(start)] == start and words[len(start) : len(start) + 1]:
                    lines.append(words[len(start) :])
    return lines


def documented_options(command: str) -> list[str]:
    """Every option of a command; of `train`, the options of every method that are not TRL's or transformers'."""
    if command != "train":
        actions = parser_of(command)._actions
        return [option for action in actions if action.help != argparse.SUPPRESS for option in action.option_strings]
    ours = [DataArguments, PredictionArguments, TinyModelArguments]
    names = [field.name for configuration in ours for field in dataclasses.fields(configuration)]
    names += [name for _, configuration in METHODS.values() for name in configuration.__annotations__ if name[0] != "_"]
    names += [name for name in PostConfig.__annotations__ if name[0] != "_" and name != "remove_unused_columns"]
    return ["--recipe", "--config", "--help-all", *(f"--{name} " for name in names)]


def test_the_reference_has_every_command_and_option() -> None:
    spec = importlib.util.spec_from_file_location("commands", DOCS / "hooks" / "commands.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page = hook.on_page_markdown((DOCS / "cli.md").read_text())
    assert hook.MARKER not in page
    assert hook.on_page_markdown("other page") == "other page"
    for command in COMMANDS:
        section = page.partition(f"## dynkp {command}\n")[2].partition("\n## dynkp")[0]
        for option in documented_options(command):
            assert option in section, f"{command} {option}"
        assert "examples:" in section, f"dynkp {command} --help has no examples"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_are_understood(page: Path) -> None:
    for command, *words in command_lines(page.read_text()):
        assert command in COMMANDS, f"{page.name}: dynkp {command}"
        parse(command, words)


@pytest.mark.parametrize("command", ["train", "recipes", "predict", "rationales", "judge", "distill", "evaluate", "stats"])
def test_examples_in_the_help_are_understood(command: str) -> None:
    parser = parser_of(command)
    lines = re.sub(r"\\\n\s*", "", parser.epilog).splitlines()
    examples = [line.strip() for line in lines if re.match(r"  (dynkp|accelerate launch)", line)]
    assert examples
    for line in examples:
        (words,) = command_lines(f"```bash\n{line}\n```")
        parse(words[0], words[1:])
