"""The documentation keeps up with the code.

Holds: every option has its row, every page is in the navigation, examples compile and name files and options that exist;
equations become MathML, and one that cannot be converted stops the build; docstrings reach the API reference as griffe reads
them. The built site itself is tested in tests/browser/test_site.py.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import griffe
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from mkdocs.exceptions import PluginError

from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.mulcot_rd_config import MulCoTRDConfig
from dynkp.trainer.post_config import PostConfig
from tests.conftest import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = sorted(page.relative_to(DOCS) for page in DOCS.rglob("*.md"))
LAUNCHER_OPTIONS = set(launch_command_parser()._option_string_actions)


def hook(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("config", "name"),
    [(PostConfig, "dynamic_cot"), (DynamicCoTConfig, "dynamic_cot"), (MulCoTRDConfig, "mulcot_rd")],
)
def test_every_own_option_is_in_the_page_with_its_help(config: type, name: str) -> None:
    page = hook("options").on_page_markdown((DOCS / "methods" / f"{name}.md").read_text())
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
    sources = [*(REPOSITORY / "dynkp" / "training").glob("*.py"), REPOSITORY / "dynkp" / "data" / "mixing.py"]
    named = re.compile(rf"\b{option.lstrip('-').replace('-', '_')}\b")
    configs = (DynamicCoTConfig, MulCoTRDConfig)
    fields = {field.name for config in configs for field in dataclasses.fields(config)} | {"model_name_or_path", "config"}
    return option.lstrip("-").replace("-", "_") in fields or any(named.search(path.read_text()) for path in sources)


INDEXED = {"Dynamic CoT": DynamicCoTConfig, "AimKP": AimKPConfig, "MulCoT-RD": MulCoTRDConfig}


@pytest.mark.parametrize("method", INDEXED)
def test_the_paper_index_has_the_defaults_of_the_code(method: str) -> None:
    """A row whose option is a field of the method's config states its default; every own option is on the page."""
    fields = {field.name: field for field in dataclasses.fields(INDEXED[method])}
    section = (DOCS / "paper_index.md").read_text().partition(f"\n## {method}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]
    assert all(len(row) == 6 for row in rows)
    checked = 0
    for row in rows:
        option, default = row[2].strip("`"), row[3].strip("`")
        if option in fields:
            assert default == str(fields[option].default), (
                f"{option}: {default} on the page, {fields[option].default} in the code"
            )
            checked += 1
    assert checked >= 8
    missing = [name for name in INDEXED[method].__annotations__ if name in fields and f"`{name}`" not in section]
    assert set(missing) <= NOT_OF_A_PAPER, missing


# Where weights are put or read from, and how a schedule's arguments are passed on.
NOT_OF_A_PAPER = {"assistant", "assistant_dtype", "assistant_device", "lr_scheduler_kwargs"}


def test_contributing_lists_the_rooms_in_their_order() -> None:
    layout = (DOCS / "contributing.md").read_text().partition("\n## Layout\n")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `(\w+)/` \|", layout, re.MULTILINE)
    tree = ast.parse((REPOSITORY / "tests" / "test_architecture.py").read_text())
    [rooms] = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "ROOMS"
    ]
    assert listed == [room for room in rooms if room != "examples"]


def test_equations_become_mathml() -> None:
    html = r'<p><span class="arithmatex">\(a &lt; b\)</span></p><div class="arithmatex">\n\[\frac{1}{N}\]\n</div>'
    content = hook("equations").on_page_content(html.replace("\\n", "\n"))
    assert content.count("<math") == 2 and "arithmatex" not in content
    assert 'display="inline"' in content and '<div class="equation"><math' in content
    assert "&#x0003C;" in content  # "<", not the text of its entity
    assert hook("equations").on_page_content("<p>none</p>") == "<p>none</p>"


@pytest.mark.parametrize("latex", [r"\nonsense{x}", r"\left( x"])
def test_an_equation_that_cannot_be_converted_stops_the_build(latex: str) -> None:
    with pytest.raises(PluginError, match=re.escape(repr(latex)[1:-1])):
        hook("equations").on_page_content(rf'<span class="arithmatex">\({latex}\)</span>')


SOURCE = '''
"""A module."""
from dataclasses import dataclass, field


@dataclass
class Settings:
    """Settings of [`score`]."""

    rate: float = field(default=5e-5, metadata={"help": "Learning rate, 5 %% of the other."})


def score(losses, weights=None):
    """Score losses with [`~sample.Settings`] and [`Unknown`].

    Args:
        losses (`torch.Tensor` of shape `(B, T)`): nats per token.
        weights ([`Settings`] or [`~other.package.Weights`] or
            `None`, *optional*): as above: not a type.

    Returns:
        `torch.Tensor`: one per post,
        on two lines.

    Example:

    ```python
    >>> score([1])
    1
    ```
    """
'''

SOURCE += '''

def count(losses) -> int:
    """Count losses.

    Returns:
        The number of losses: at least 0.
    """
'''


def test_docstrings_as_the_reference_reads_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "sample").mkdir()
    (tmp_path / "sample" / "__init__.py").write_text(SOURCE)
    extensions = griffe.load_extensions(DOCS / "hooks" / "docstrings.py")
    options = {"returns_multiple_items": False, "returns_named_value": False}
    package = griffe.load(
        "sample", search_paths=[tmp_path], extensions=extensions, docstring_parser="google", docstring_options=options
    )
    text, arguments, returns, examples = package["score"].docstring.parsed
    assert text.value == "Score losses with [`Settings`][sample.Settings] and `Unknown`."
    assert [(argument.name, str(argument.annotation)) for argument in arguments.value] == [
        ("losses", "torch.Tensor of shape (B, T)"),
        ("weights", "Settings or Weights or None"),
    ]
    assert arguments.value[1].description == "as above: not a type."
    assert str(returns.value[0].annotation) == "torch.Tensor"
    assert returns.value[0].description == "one per post,\non two lines."
    assert examples.value == [(griffe.DocstringSectionKind.examples, ">>> score([1])\n1")]
    count = package["count"].docstring.parsed[1].value[0]
    assert (str(count.annotation), count.description) == ("int", "The number of losses: at least 0.")
    rate = package["Settings.rate"]
    assert rate.docstring.value == "Learning rate, 5 % of the other." and str(rate.value) == "5e-05"
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
