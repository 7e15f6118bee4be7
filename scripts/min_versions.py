"""Run tests with the lowest versions that setup.cfg allows.

`make min-versions` makes a virtual environment in build/min-versions. uv finds the lowest versions of the requirements of
setup.cfg that fit together (their own requirements are as new as possible), pip installs them, and the tests of the core run:
equations, mechanics, batches, data, metric, prediction and one trainer. Arguments are pytest's, in place of these tests:

    make min-versions ARGS="tests/report -x"
"""

from __future__ import annotations

import configparser
import re
import subprocess
import sys
import venv
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "build" / "min-versions"
EXTRAS = ("dev", "demo")
CORE = [
    "tests/test_architecture.py",
    *(f"tests/{room}" for room in ("files", "mmkp_f1", "data", "batches", "objectives", "mechanics", "models", "prediction")),
    "tests/trainer/test_dynamic_cot_trainer.py",
]


def canonical(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements(setup_cfg: Path) -> set[str]:
    """The names of the packages that setup.cfg requires for the package and `EXTRAS`."""
    config = configparser.ConfigParser()
    config.read(setup_cfg, encoding="utf-8")
    blocks = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in EXTRAS)]
    names = (re.match(r"[\w.-]+", line.strip()) for block in blocks for line in block.splitlines())
    return {canonical(name[0]) for name in names if name}


def run(*command: str | Path) -> None:
    """Run a command; its failure is this program's."""
    subprocess.run(command, check=True, cwd=REPOSITORY)


def main(arguments: list[str]) -> int:
    """Make the environment and run pytest in it; returns pytest's exit status."""
    venv.create(FOLDER, with_pip=True)
    python = FOLDER / "bin" / "python"
    all_versions, constraints = FOLDER / "all.txt", FOLDER / "constraints.txt"
    run(python, "-m", "pip", "install", "--quiet", "uv")
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    compiled = ["setup.cfg", *extras, "--resolution", "lowest-direct", "--no-annotate", "--python", python, "--quiet"]
    run(FOLDER / "bin" / "uv", "pip", "compile", *compiled, "--output-file", all_versions)
    names = requirements(REPOSITORY / "setup.cfg")
    lines = [line for line in all_versions.read_text().splitlines() if canonical(line.partition("==")[0]) in names]
    constraints.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"Python {sys.version.split()[0]}, {', '.join(lines)}", flush=True)
    install = (python, "-m", "pip", "install", "--quiet", "-c", constraints)
    run(*install, "torch")  # first, as in the Makefile: an open range may pull another build
    run(*install, "-e", f".[{','.join(EXTRAS)}]")
    run(python, "-m", "pip", "check")
    return subprocess.run([python, "-m", "pytest", *(arguments or CORE)], cwd=REPOSITORY).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
