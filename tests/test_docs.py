"""The documentation keeps up with the code: every option has its row, every page is in the navigation, examples compile."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser

from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.keyphrase_config import KeyphraseConfig
from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted(page.relative_to(DOCS) for page in DOCS.rglob("*.md"))
LAUNCHER_OPTIONS = set(launch_command_parser()._option_string_actions)


def hook():
    spec = importlib.util.spec_from_file_location("options", DOCS / "hooks" / "options.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("config", "name"),
    [(KeyphraseConfig, "dynamic_cot"), (DynamicCoTConfig, "dynamic_cot"), (MulCoTRDConfig, "mulcot_rd")],
)
def test_every_own_option_is_in_the_page_with_its_help(config: type, name: str) -> None:
    page = hook().on_page_markdown((DOCS / "methods" / f"{name}.md").read_text())
    assert "<!-- options" not in page
    for field in dataclasses.fields(config):
        if field.name in config.__annotations__:
            row = next(line for line in page.splitlines() if line.startswith(f"| `{field.name}` |"))
            assert len(row.split("|")[3].strip()) > 30, f"{field.name} is not explained"


def test_every_page_is_in_the_navigation() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text()
    named = set(re.findall(r"[\w/]+\.md", str(yaml.safe_load(text)["nav"])))
    assert named == {str(page) for page in PAGES}


@pytest.mark.parametrize("page", [REPOSITORY / "README.md", *(DOCS / page for page in PAGES)], ids=lambda page: page.name)
def test_python_blocks_compile_and_commands_name_files_that_exist(page: Path) -> None:
    text = page.read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        compile(block, str(page), "exec")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for command in block.replace("\\\n", " ").splitlines():
            words = shlex.split(command, comments=True)
            for word in words:
                if word.startswith("examples/"):
                    assert (REPOSITORY / word).exists(), f"{page.name} names {word}, which does not exist"
            script = words.index("examples/train.py") if "examples/train.py" in words else len(words)
            for option in (word.partition("=")[0] for word in words[script:] if word.startswith("--")):
                assert option_exists(option), f"{page.name}: train.py has no option {option}"
            if words[:2] == ["accelerate", "launch"] and script < len(words):
                for option in (word for word in words[:script] if word.startswith("--")):
                    assert option in LAUNCHER_OPTIONS, f"{page.name}: accelerate launch has no option {option}"


def option_exists(option: str) -> bool:
    sources = [REPOSITORY / "dynkp" / "training" / "run.py", REPOSITORY / "dynkp" / "data" / "mixing.py"]
    named = re.compile(rf"\b{option.lstrip('-').replace('-', '_')}\b")
    configs = (DynamicCoTConfig, MulCoTRDConfig)
    fields = {field.name for config in configs for field in dataclasses.fields(config)} | {"model_name_or_path", "config"}
    return option.lstrip("-").replace("-", "_") in fields or any(named.search(path.read_text()) for path in sources)
