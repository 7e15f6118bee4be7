"""The command `dynkp recipes`: the settings that are installed with the package."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dynkp.cli.arguments import CommandParser

DESCRIPTION = """\
List the recipes that are installed with the package, or print one.

A training recipe holds a paper's settings for one model: `dynkp train --recipe NAME` trains with it, and every option on the
command line wins over it. A launcher configuration is for `accelerate launch --config_file FILE`."""

EPILOG = """\
examples:
  dynkp recipes
      name, method, model and a line about each
  dynkp recipes mmkp_dynamic_cot_qwen2_5_vl_3b > mine.yaml
      a copy to change; dynkp train --config mine.yaml
  dynkp recipes zero2 > zero2.yaml
      then: accelerate launch --config_file zero2.yaml --num_processes 8 -m dynkp train --recipe NAME ...
      (the file names DeepSpeed's configuration where the package is installed)
  dynkp recipes zero2 --output-dir configs
      a copy of both files, zero2.yaml and zero2.json, that name each other
"""


def parser() -> argparse.ArgumentParser:
    """Build the parser; docs/cli.md is made of its help."""
    parser = CommandParser("recipes", DESCRIPTION, EPILOG)
    parser.add_argument("names", nargs="*", metavar="NAME", help="recipes to print (default: list all)")
    parser.add_argument("--output-dir", metavar="DIR", help="write the files there in place of printing them")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run `dynkp recipes`.

    Args:
        argv: the arguments after `dynkp recipes`; those of the process if None.

    Raises:
        ValueError: if there is no recipe of a name.
    """
    command = parser()
    arguments = command.parse_args(argv)
    from dynkp.files.atomic import write_text
    from dynkp.recipes.catalog import find_recipe

    if not arguments.names:
        if arguments.output_dir:
            command.error("--output-dir needs the names of the recipes to write")
        print(_listing())
        return
    chosen = [find_recipe(name) for name in arguments.names]
    if arguments.output_dir is None:
        print("\n".join(recipe.text().rstrip("\n") for recipe in chosen))
        return
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for recipe in chosen:
        files = {recipe.path.name: recipe.text(folder)}
        if name := recipe.deepspeed_file():
            files[name] = find_recipe(name).text()
        for name, text in files.items():
            write_text(folder / name, text)
            print(folder / name)


def _listing() -> str:
    from dynkp.recipes.catalog import recipes

    lines = ["Training recipes (dynkp train --recipe NAME): name, method, model", ""]
    for recipe in recipes("training"):
        lines += [f"{recipe.name}  {recipe.method}  {recipe.model}", f"    {recipe.summary}"]
    lines += ["", "Launcher configurations (dynkp recipes NAME > FILE; accelerate launch --config_file FILE ...)", ""]
    lines += [f"{recipe.name}\n    {recipe.summary}" for recipe in recipes("accelerate")]
    names = ", ".join(recipe.name for recipe in recipes("deepspeed"))
    return "\n".join([*lines, "", f"DeepSpeed configurations, which the launcher configurations name: {names}"])
