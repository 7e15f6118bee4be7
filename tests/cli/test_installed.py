"""A wheel is built and installed into a new environment, and `dynkp` alone does the whole work outside the checkout.

Holds: nothing is downloaded; recipes, launcher configurations and the metric's page are in the wheel; a model trained with a
recipe's settings on real posts with images is predicted with the task that it was saved with, and scored.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPOSITORY
from tests.support.training_runs import head, read_jsonl

Dynkp = Callable[..., str]


def environment() -> dict[str, str]:
    """This process's, without the checkout on Python's path."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def run(*command: object, folder: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def dynkp(tmp_path_factory: pytest.TempPathFactory) -> Dynkp:
    """The installed command, run in a folder that is no checkout."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"  # a build leaves files in its tree
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "dynkp", source / "dynkp", ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    run(*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "wheel", source, folder=folder)
    (wheel,) = (folder / "wheel").glob("dynkp-*.whl")
    shutil.rmtree(source)

    python = folder / "venv/bin/python"
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", folder=folder)
    run(*pip, "--python", python, "install", *offline, wheel, folder=folder)
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder).strip())
    # The dependencies are those of this environment: its folders come behind the new one's own.
    (purelib / "dependencies.pth").write_text("".join(f"{path}\n" for path in site.getsitepackages()))
    work = folder / "work"
    work.mkdir()
    where = run(python, "-c", "import dynkp; print(dynkp.__file__)", folder=work).strip()
    assert Path(where).is_relative_to(purelib), "the wheel's, not the checkout's"

    def dynkp(*words: object) -> str:
        return run(folder / "venv/bin/dynkp", *words, folder=work)

    dynkp.folder = work  # type: ignore[attr-defined]
    return dynkp


def test_the_recipes_are_installed(dynkp: Dynkp) -> None:
    assert "cmkp_aimkp_llava_1_5_7b  aimkp  llava-hf/llava-1.5-7b-hf" in dynkp("recipes")
    file = Path(yaml.safe_load(dynkp("recipes", "zero2"))["deepspeed_config"]["deepspeed_config_file"])
    assert file.is_file() and "site-packages" in file.parts and not file.is_relative_to(REPOSITORY)
    installed = file.parents[2]
    others = [path.relative_to(REPOSITORY / "dynkp") for path in (REPOSITORY / "dynkp").rglob("*") if path.is_file()]
    others = [path for path in others if path.suffix not in (".py", ".pyc")]
    assert len(others) > 15 and [path for path in others if not (installed / path).is_file()] == []


@pytest.mark.timeout(600)
def test_a_recipe_trains_predicts_and_evaluates(dynkp: Dynkp, shared: Path) -> None:
    folder: Path = dynkp.folder  # type: ignore[attr-defined]
    posts, images = head(shared / "data/masc_t15/test.jsonl", 40, folder / "posts.jsonl"), shared / "data/masc_t15/images"
    data = ["--train_file", "posts.jsonl", "--eval_posts", "6", "--image_dir", images]
    quiet = ["--use_cpu", "true", "--disable_tqdm", "true", "--max_steps", "2", "--predict_batch_size", "8"]
    tiny = ["--tiny_hidden_size", "32", "--tiny_vocab_size", "600", "--tiny_image_size", "32", "--save_strategy", "no"]
    dynkp("train", *data, *quiet, *tiny, "--strategy", "direct", "--output_dir", "tiny")

    # A LLaVA like the recipe's own, of a few thousand parameters; what the recipe says and a CPU can do stays.
    recipe = ["--recipe", "cmkp_aimkp_llava_1_5_7b", "--model_name_or_path", "tiny", "--bf16", "false"]
    other = [
        "--activation_checkpointing",
        "false",
        "--warmup_epochs",
        "0",
        "--max_new_tokens",
        "8",
        "--eval_max_new_tokens",
        "8",
    ]
    printed = dynkp("train", *recipe, *other, *data, *quiet, "--output_dir", "out")
    assert "convention aimkp" in printed and max(len(line) for line in printed.splitlines() if line[:1] != "{") <= 80
    saved = json.loads((folder / "out/dynkp_task.json").read_text())
    assert (saved["method"], saved["task"]["name"]) == ("aimkp", "aimkp")
    assert json.loads((folder / "out/adapter_config.json").read_text())["r"] == 128
    assert {row["modality"] for row in read_jsonl(folder / "out/visits.jsonl")} == {"text", "image"}

    words = ["--model", "out", "--posts", "posts.jsonl", "--image-dir", images, "--max-new-tokens", "8", "--device", "cpu"]
    dynkp("predict", *words, "--output", "predictions.jsonl", "--no-progress")
    record = json.loads((folder / "predictions.jsonl.meta.json").read_text())
    assert record["settings"]["task"]["name"] == "aimkp" and record["info"]["model"] == "out"
    table = dynkp("evaluate", "--predictions", "predictions.jsonl", "--posts", "posts.jsonl", "--convention", "aimkp")
    assert table.startswith("| subset ") and "convention aimkp" in table
    assert len(read_jsonl(folder / "predictions.jsonl")) <= len(read_jsonl(posts)), "aspects of an image are one post"
