"""Invariants of JSON files: what is written is read back; an error names the file, and the line where there is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynkp.files.json_files import parse_json, read_json, write_json


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    content = {"text": "é 日", "numbers": [1, 2.5, None, True]}
    write_json(tmp_path / "new" / "a.json", content)
    assert read_json(tmp_path / "new" / "a.json") == content
    assert "é 日" in (tmp_path / "new" / "a.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"not valid JSON \(Expecting value, column 1\)"),
        (b'{\n"a": 1,\n', "a.json, line 3: not valid JSON"),
        (b"[" * 100_000, "not usable JSON"),
        (b"9" * 5000, "not usable JSON"),
        (b'"\xff"', "not usable JSON"),
    ],
)
def test_an_error_names_the_file(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(tmp_path / "a.json")
    assert str(caught.value).startswith(str(tmp_path / "a.json"))
    with pytest.raises(ValueError, match="^here"):
        parse_json(data, "here")
