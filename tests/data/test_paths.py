"""A name that looks like a path is never looked for on the Hub: it exists, or the error names what lies beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from dynkp.data.paths import check_path, is_path


@pytest.mark.parametrize("name", ["./out", "/out", "~/out", "out/", "a/b/c", "train.jsonl", "posts.parquet"])
def test_paths_by_their_form(name: str) -> None:
    assert is_path(name)


@pytest.mark.parametrize("name", ["gpt2", "Qwen/Qwen2.5-VL-3B-Instruct", "someone/posts"])
def test_names_that_may_be_hub_ids(name: str) -> None:
    assert not is_path(name)
    check_path(name, "--model", "folder")


def test_what_lies_in_an_existing_folder_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/student").mkdir(parents=True)
    (tmp_path / "runs/students.jsonl").touch()
    check_path("runs/student", "--model", "folder")
    with pytest.raises(FileNotFoundError, match=r"no such folder. Did you mean 'runs/student'\?"):
        check_path("runs/studnet", "--model", "folder")
    with pytest.raises(FileNotFoundError, match=r"there is no such file. Did you mean 'runs/students.jsonl'\?"):
        check_path("runs/student.jsonl", "--posts", "file")


def test_without_a_hub_every_name_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    check_path("images", "--image_dir", "folder", or_hub_id=False)
    with pytest.raises(FileNotFoundError, match="Did you mean 'images'"):
        check_path("imges", "--image_dir", "folder", or_hub_id=False)
