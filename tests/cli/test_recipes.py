"""Invariants of `dynkp recipes`:

- the list has every recipe with its method and model; what is printed is the file, ready to be used from any folder;
- `--output-dir` writes a launcher configuration with the DeepSpeed file that it names.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dynkp import cli
from dynkp.recipes.catalog import find_recipe, recipes


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out.splitlines()
    for recipe in recipes("training"):
        place = listed.index(f"{recipe.name}  {recipe.method}  {recipe.model}")
        assert listed[place + 1].strip() == recipe.summary
    assert {"ddp", "zero2", "zero2_multinode"} <= set(listed)


def test_a_recipe_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "mmkp_dynamic_cot_internvl3_2b"]) == 0
    assert capsys.readouterr().out == find_recipe("mmkp_dynamic_cot_internvl3_2b").path.read_text()
    assert cli.main(["recipes", "zero2"]) == 0
    settings = yaml.safe_load(capsys.readouterr().out)
    assert Path(settings["deepspeed_config"]["deepspeed_config_file"]).samefile(find_recipe("zero2.json").path)


def test_copies_name_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "zero2", "ddp", "--output-dir", str(tmp_path / "configs")]) == 0
    written = {Path(line) for line in capsys.readouterr().out.split()}
    assert written == {tmp_path / "configs" / name for name in ("zero2.yaml", "zero2.json", "ddp.yaml")}
    settings = yaml.safe_load((tmp_path / "configs/zero2.yaml").read_text())
    assert settings["deepspeed_config"]["deepspeed_config_file"] == str(tmp_path / "configs/zero2.json")


@pytest.mark.parametrize(
    ("words", "message"),
    [(["zero3"], "Did you mean 'zero2'?"), (["--output-dir", "x"], "--output-dir needs the names")],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(["recipes", *words])
    except SystemExit as error:
        status = error.code
    error = capsys.readouterr().err
    assert status == 2 and message in error and error.count("\n") == 1
