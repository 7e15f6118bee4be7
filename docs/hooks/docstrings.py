"""Griffe extension: makes docstrings of this package ready for the API reference without importing the package.

- The `help` of a config field becomes the documentation of that option, its `default` the value shown.
- `Example:` becomes `Examples:`, the only spelling for which griffe's Google parser formats doctests.
- A type written as `` `torch.Tensor` of shape `(B,)` `` loses its backticks, since the reference prints types as code.
- ``[`Name`]`` and ``[`~package.Name`]`` become links to the class or function of that name, or plain code where the reference
  has no such object.
"""

from __future__ import annotations

import ast
import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:[ ]*$", re.MULTILINE)
FENCED_EXAMPLE = re.compile(r"^Examples:\n\n?[ ]*```python\n([ ]*>>>.*?)\n[ ]*```[ ]*$", re.MULTILINE | re.DOTALL)
# A name, and its type in parentheses, which may contain parentheses and break lines.
TYPED_ARGUMENT = re.compile(
    r"^([ ]+\*{0,2}\w+(?:, \*{0,2}\w+)* )\(((?:[^()]|\((?:[^()]|\([^()]*\))*\))*)\):(?=\s)", re.MULTILINE
)
# A list right below a line of text, which Markdown would take for its continuation.
LIST = re.compile(r"^([ ]*)((?!- )\S.*)\n(?=\1- )", re.MULTILINE)
CALLED = re.compile(r"^Returns \(.*\):$", re.MULTILINE)  # what an object returns when it is called
RESULT = re.compile(r"^((?:Returns|Yields):\n[ ]+)(.*)$", re.MULTILINE)
TYPED_RESULT = re.compile(r"(\[?`[^:]+`\]?|[\w.]+(?:\[.*\])?(?: \| [\w.\[\]]+)*):(?= |$)")
MARKUP = re.compile(r"(?:\[`|`\]|`)(?:~(?:\w+\.)+)?|\*(?=\w)|(?<=\w)\*")
OPTIONAL = re.compile(r", optional(, defaults to .*)?$")  # the signature shows the default
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![\[(])")


def plain(markup: str) -> str:
    """A type without the marks of Markdown and references, on one line."""
    return OPTIONAL.sub("", " ".join(MARKUP.sub("", markup).split()))


def field_default_and_help(value: str) -> tuple[str | None, str | None]:
    """Default (as source) and help text of a dataclass field's `field(default=..., metadata={"help": ...})`."""
    if not value.startswith("field("):
        return None, None
    call = ast.parse(value, mode="eval").body
    assert isinstance(call, ast.Call)
    arguments = {keyword.arg: keyword.value for keyword in call.keywords}
    default = arguments.get("default", arguments.get("default_factory"))
    try:
        text = ast.literal_eval(arguments["metadata"])["help"]
    except (KeyError, ValueError):
        text = None
    return None if default is None else ast.unparse(default), text and text.replace("%%", "%")


class DocstringExtension(griffe.Extension):
    """Applies the changes named at the top of this file when griffe has loaded the package."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Change the docstrings of all modules, classes, functions and attributes of `pkg`."""
        self._paths: dict[str, str] = {}
        objects = list(self._objects(pkg))
        for item in objects:
            if item.docstring and not item.is_attribute:
                self._paths.setdefault(item.name, item.path)
        for item in objects:
            if item.is_attribute and item.docstring is None and item.value is not None:
                default, text = field_default_and_help(str(item.value))
                if text:
                    item.docstring = griffe.Docstring(text, parent=item)
                    item.value = default
            if item.docstring:
                item.docstring.value = self._rewrite(item.docstring.value)

    def _objects(self, parent: griffe.Object) -> Any:
        yield parent
        for member in parent.members.values():
            if not member.is_alias:
                yield from self._objects(member)

    def _rewrite(self, text: str) -> str:
        text = EXAMPLE.sub("Examples:", text)
        text = FENCED_EXAMPLE.sub(lambda match: f"Examples:\n{textwrap.indent(textwrap.dedent(match[1]), '    ')}", text)
        # The space: griffe strips closing parentheses from the types of attributes.
        text = TYPED_ARGUMENT.sub(lambda match: f"{match[1]}({plain(match[2])} ):", text)
        text = CALLED.sub("Returns:", text)
        text = RESULT.sub(self._result, text)
        text = LIST.sub(r"\1\2\n\n", text)
        return REFERENCE.sub(self._link, text)

    @staticmethod
    def _result(match: re.Match[str]) -> str:
        if typed := TYPED_RESULT.match(match[2]):
            return f"{match[1]}{plain(typed[1])}:{match[2][typed.end() :]}"
        return f"{match[1]}: {match[2]}"  # an empty type: else griffe takes the text before a colon for one

    def _link(self, match: re.Match[str]) -> str:
        name = match[2].rpartition(".")[2]
        shown = name if match[1] else match[2]
        path = self._paths.get(name)
        return f"[`{shown}`][{path}]" if path else f"`{shown}`"
