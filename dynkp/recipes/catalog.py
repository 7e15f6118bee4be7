"""The recipes that are installed with the package, by name.

Given   a name, as `dynkp recipes` lists them.
Gives   the file, its text, and of a training recipe its method, its model and one line about it.
Holds   a configuration of Accelerate that names a DeepSpeed file names an existing one: the files themselves name it relative
        to the repository, for `accelerate launch` from there; their text as given here has its absolute path.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import yaml

from dynkp.data.choices import did_you_mean

FOLDER = Path(__file__).resolve().parent
KINDS = {"training": ".yaml", "accelerate": ".yaml", "deepspeed": ".json"}


class Recipe(NamedTuple):
    """An installed file of settings.

    Attributes:
        name: what commands call it; of a DeepSpeed file the file's name.
        kind: `"training"`, `"accelerate"` or `"deepspeed"`.
        path: the file.
        summary: one line about it; empty for a DeepSpeed file, which is JSON without comments.
        method: what `dynkp train --method` takes; empty for what is no training recipe.
        model: folder or Hub id of the model; as `method`.
    """

    name: str
    kind: str
    path: Path
    summary: str
    method: str = ""
    model: str = ""

    def text(self, deepspeed_folder: str | Path = FOLDER / "deepspeed") -> str:
        """Read the file.

        Args:
            deepspeed_folder: where the DeepSpeed file lies that an Accelerate configuration names.

        Returns:
            The text, with the absolute path of the DeepSpeed file.

        Example:
            >>> "deepspeed_config_file: /etc/dynkp/zero2.json" in find_recipe("zero2").text("/etc/dynkp")
            True
        """
        text = self.path.read_text(encoding="utf-8")
        name = self.deepspeed_file()
        if name is None:
            return text
        return text.replace(f"examples/deepspeed/{name}", str(Path(deepspeed_folder).absolute() / name))

    def deepspeed_file(self) -> str | None:
        """The name of the DeepSpeed file that an Accelerate configuration refers to; None where it refers to none."""
        if self.kind != "accelerate":
            return None
        settings = yaml.safe_load(self.path.read_text(encoding="utf-8"))
        file = settings.get("deepspeed_config", {}).get("deepspeed_config_file")
        return None if file is None else Path(file).name


def recipes(kind: str | None = None) -> list[Recipe]:
    """List the installed recipes.

    Args:
        kind: only those of this kind.

    Example:
        >>> [recipe.name for recipe in recipes("accelerate")]
        ['ddp', 'zero2', 'zero2_multinode']
    """
    found = []
    for each, suffix in KINDS.items():
        if kind in (None, each):
            found += [_recipe(each, file) for file in sorted((FOLDER / each).glob(f"*{suffix}"))]
    return found


def find_recipe(name: str, kind: str | None = None) -> Recipe:
    """Look up a recipe by its name.

    Args:
        name: as `recipes` lists it; the suffix `.yaml` may be left out.
        kind: only among those of this kind.

    Raises:
        ValueError: if there is none of that name, with the name most like it.
    """
    by_name = {recipe.name: recipe for recipe in recipes(kind)}
    found = by_name.get(name) or by_name.get(name.removesuffix(".yaml"))
    if found is None:
        raise ValueError(f"there is no recipe {name!r}.{did_you_mean(name, by_name)} `dynkp recipes` lists them.")
    return found


def _recipe(kind: str, file: Path) -> Recipe:
    if kind == "deepspeed":
        return Recipe(file.name, kind, file, "")
    text = file.read_text(encoding="utf-8")
    summary = text.partition("\n")[0].removeprefix("#").strip()
    if kind == "accelerate":
        return Recipe(file.stem, kind, file, summary)
    settings = yaml.safe_load(text)
    method = settings.get("method", "dynamic_cot")
    return Recipe(file.stem, kind, file, summary, method, settings["model_name_or_path"])
