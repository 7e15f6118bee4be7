"""Invariants of the layout (docs/contributing.md):

- imports point one way, from a room to rooms that stand before it in `ROOMS`, and no files import each other in a circle;
  mmkp_f1 imports nothing of ours and no torch, and no module but `__init__` and `__main__` stands at the package's top;
- TRL's private names are imported in one file;
- `import dynkp` and the command's help are quick and leave torch alone, and every public name exists.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dynkp

REPOSITORY = Path(__file__).resolve().parent.parent
# The rooms of the package, from the ground up: a room imports rooms that stand before it, and itself.
ROOMS = (
    "files",
    "mmkp_f1",
    "data",
    "synthetic",
    "batches",
    "objectives",
    "mechanics",
    "models",
    "chat",
    "prediction",
    "distillation",
    "report",
    "rationales",
    "judging",
    "trainer",
    "recipes",
    "training",
    "bench",
    "cli",
    "examples",
)
FLOOR = {room: number for number, room in enumerate(ROOMS)}
# What a room must not import although it stands before it.
FORBIDDEN = {
    "mmkp_f1": {"files"},  # `evaluate` loads it by itself
    "objectives": {"files", "mmkp_f1", "data", "synthetic", "batches"},  # equations of tensors
    "mechanics": {"files", "mmkp_f1", "data", "synthetic"},  # batches in, tensors out
}
LOOSE = {"__init__.py", "__main__.py"}  # the only modules at the package's top
TRL_SEAM = "dynkp/trainer/post_trainer.py"
TRL_INTERNALS = ("trl.trainer.utils", "trl.models.utils")
FILES = sorted(file.relative_to(REPOSITORY) for folder in ("dynkp", "examples") for file in (REPOSITORY / folder).rglob("*.py"))


def imports(source: str, file: Path) -> Iterator[str]:
    """Every name a file imports, in full: `from a.b import c` gives `a.b.c`. Lazy imports count."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(file.parent.parts[: len(file.parent.parts) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room_of(file: Path) -> str:
    return file.parts[0] if file.parts[0] == "examples" else file.parts[1]


def imported_room(name: str) -> str | None:
    """The room a name of ours comes from; None for what stands at the package's top."""
    if not name.startswith("dynkp."):
        return "examples"
    first = name.split(".")[1]
    return dynkp._EXPORTS.get(first, f"dynkp.{first}").split(".")[1] if first in dynkp._EXPORTS or first in FLOOR else None


def violations(source: str, file: Path) -> list[str]:
    found = []
    room = room_of(file)
    if file.stem in ("utils", "helpers"):
        found.append(f"{file}: name the file after what it does")
    if file.parts[0] == "dynkp" and len(file.parts) == 2 and file.name not in LOOSE:
        found.append(f"{file}: a module belongs into a room")
    elif room not in FLOOR and room not in LOOSE:
        found.append(f"{file}: say in ROOMS where {room} belongs")
    for name in imports(source, file):
        if name.startswith(("dynkp.", "examples.")) and room in FLOOR:
            target = imported_room(name)
            if target is not None and (FLOOR[target] > FLOOR[room] or target in FORBIDDEN.get(room, ())):
                found.append(f"{file}: {room} must not import {name}")
        if room == "mmkp_f1" and name.split(".")[0] in ("torch", "transformers", "trl"):
            found.append(f"{file}: mmkp_f1 needs no torch, but imports {name}")
        if name.split(".")[0] == "trl" and file.as_posix() != TRL_SEAM:
            private = any(step.startswith("_") for step in name.split("."))
            if private or name.startswith(TRL_INTERNALS):
                found.append(f"{file}: {name} is TRL's own; take it through {TRL_SEAM}")
    return found


def modules_imported(file: Path) -> set[Path]:
    """The files of ours that a file imports, inside functions too."""
    source = (REPOSITORY / file).read_text(encoding="utf-8")
    found = set()
    for name in imports(source, file):
        parts = dynkp._EXPORTS.get(name.removeprefix("dynkp."), name).split(".")
        candidates = (Path(*parts[:length]).with_suffix(".py") for length in range(len(parts), 1, -1))
        found |= {candidate for candidate in candidates if (REPOSITORY / candidate).is_file()}
    return found


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {file: modules_imported(file) for file in FILES}
    assert len(set().union(*graph.values())) > 100  # the walk finds them
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_point_one_way(file):
    assert violations((REPOSITORY / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dynkp/data/posts.py", "from dynkp.trainer.post_trainer import PostTrainer"),
        ("dynkp/data/posts.py", "from ..prediction.generation import generate_keyphrases"),
        ("dynkp/data/posts.py", "from .. import prediction"),
        ("dynkp/mechanics/shared_prompt.py", "from dynkp.data.posts import validate_posts"),
        ("dynkp/loose.py", ""),
        ("dynkp/data/posts.py", "def f():\n    import dynkp.cli"),
        ("dynkp/data/posts.py", "from dynkp import DynamicCoTTrainer"),
        ("dynkp/objectives/switching.py", "import examples.train"),
        ("dynkp/mmkp_f1/scoring.py", "from dynkp.data.tasks import parse_answer"),
        ("dynkp/mmkp_f1/scoring.py", "import torch.nn"),
        ("dynkp/batches/collators.py", "from trl.trainer.utils import pad"),
        ("examples/train.py", "from trl.trainer.sft_trainer import _private"),
        ("dynkp/data/utils.py", ""),
        ("dynkp/extras/new.py", ""),
    ],
)
def test_a_forbidden_import_is_found(file, source):
    assert violations(source, Path(file))


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("dynkp/trainer/post_trainer.py", "from trl.trainer.utils import pad"),
        ("dynkp/trainer/post_trainer.py", "from ..mechanics.shared_prompt import Targets"),
        ("dynkp/mmkp_f1/mmkp_f1.py", "from .scoring import score_keyphrases"),
        ("examples/train.py", "from trl import TrlParser\nfrom dynkp import DynamicCoTTrainer"),
        ("dynkp/cli/predict.py", "from dynkp import __version__"),
    ],
)
def test_an_allowed_import_is_not(file, source):
    assert violations(source, Path(file)) == []


def in_fresh_interpreter(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60, cwd=REPOSITORY
    ).stdout


def test_import_is_quick_and_leaves_torch_alone():
    code = (
        "import sys, time; start = time.process_time(); import dynkp; seconds = time.process_time() - start; "
        "assert not {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules); print(seconds)"
    )
    assert float(in_fresh_interpreter(code)) < 0.3


def test_the_command_s_help_is_quick():
    code = (
        "import sys, time; start = time.process_time(); from dynkp.cli import main; status = main(['--help']); "
        "assert status == 0 and not {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules); "
        "print(time.process_time() - start)"
    )
    help_text, seconds = in_fresh_interpreter(code).rstrip().rsplit("\n", 1)
    assert "usage: dynkp" in help_text
    assert float(seconds) < 0.5


def test_an_unknown_command_is_refused(capsys):
    from dynkp.cli import main

    assert main(["fly"]) == 2
    assert "there is no command 'fly'" in capsys.readouterr().err
    assert main([]) == 2


def test_a_command_gets_its_arguments_and_gives_its_status(monkeypatch):
    from dynkp import cli

    module = type(sys)("pretend_command")
    module.main = lambda argv: len(argv)
    monkeypatch.setitem(sys.modules, "pretend_command", module)
    monkeypatch.setitem(cli.COMMANDS, "pretend", ("pretend_command", "for this test"))
    assert cli.main(["pretend", "--a", "b"]) == 2
    assert cli.main(["pretend"]) == 0


@pytest.mark.parametrize("name", dynkp.__all__)
def test_every_public_name_exists(name):
    assert getattr(dynkp, name) is not None
    assert name in dir(dynkp)


def test_a_misspelt_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dynkp' has no attribute 'DynamicCotTrainer'"):
        dynkp.DynamicCotTrainer  # noqa: B018
