"""Invariants of the installed recipes:

- each has a name, a line about it, and of a training recipe its method and model; a misspelt name gets a suggestion;
- the text of an Accelerate configuration, as it is given, names a DeepSpeed file that exists, wherever one stands;
- they are package data, and the folders of examples/ are the same files.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from dynkp.recipes.catalog import FOLDER, KINDS, find_recipe, recipes
from dynkp.training.options import METHODS
from tests.conftest import REPOSITORY


def test_every_file_is_listed_with_a_line_about_it() -> None:
    files = {file for kind in KINDS for file in (FOLDER / kind).iterdir()}
    assert {recipe.path for recipe in recipes()} == files
    assert len({recipe.name for recipe in recipes()}) == len(files)
    for recipe in recipes("training"):
        assert recipe.method in METHODS and recipe.model and recipe.summary.endswith("."), recipe.name
    assert all(recipe.summary.endswith(".") for recipe in recipes("accelerate"))
    assert all(json.loads(recipe.text()) for recipe in recipes("deepspeed"))


@pytest.mark.parametrize("name", ["zero2", "zero2_multinode"])
def test_the_deepspeed_file_is_named_where_it_is(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = Path(yaml.safe_load(find_recipe(name).text())["deepspeed_config"]["deepspeed_config_file"])
    assert file.is_absolute() and json.loads(file.read_text())["zero_optimization"]["stage"] == 2
    # As the files stand in the repository, `accelerate launch --config_file examples/accelerate/...` works from its root.
    relative = yaml.safe_load(find_recipe(name).path.read_text())["deepspeed_config"]["deepspeed_config_file"]
    assert (REPOSITORY / relative).samefile(file)


def test_the_folders_of_the_examples_are_the_same_files() -> None:
    for folder, kind in (("recipes", "training"), ("accelerate", "accelerate"), ("deepspeed", "deepspeed")):
        assert (REPOSITORY / "examples" / folder).samefile(FOLDER / kind)


def test_names() -> None:
    assert find_recipe("zero2").kind == "accelerate" and find_recipe("zero2.json").kind == "deepspeed"
    assert find_recipe("zero2.yaml") == find_recipe("zero2")
    with pytest.raises(ValueError, match="no recipe 'zero3'. Did you mean 'zero2'"):
        find_recipe("zero3")
    with pytest.raises(ValueError, match="no recipe 'zero2'"):
        find_recipe("zero2", "training")
