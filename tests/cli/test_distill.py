"""`dynkp distill`: what it writes is what a student needs, and what it cannot do it says in one line.

Holds: the cache is cut to the vocabulary the student shares, goes on where it stopped and says what truncation costs;
augmentation adds exactly the right chains and keeps posts and pictures; errors name file, option or post, without traceback.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dynkp.cli import main
from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.data.tasks import TASKS
from dynkp.distillation.soft_labels import SoftLabelCache, task_fingerprint
from dynkp.models.saved_task import SavedTask
from tests.support.reasoning_trainers import reasoning_rows
from tests.support.tiny_models import build


def write_posts(folder: Path, count: int = 4) -> list[dict[str, Any]]:
    """`posts.jsonl` with pictures in `images`."""
    (folder / "images").mkdir()
    rows = []
    for post in reasoning_rows("llava", count):
        names = [f"{post['id']}-{index}.png" for index in range(len(post["images"]))]
        for name, image in zip(names, post["images"], strict=True):
            image.save(folder / "images" / name)
        rows.append({**post, "images": names})
    (folder / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def save(folder: Path, rows: int = 0, family: str = "llava", seed: int = 1) -> str:
    model, processor = build(family, seed=seed)
    if rows:
        model.resize_token_embeddings(model.get_output_embeddings().weight.shape[0] + rows)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def arguments(command: str, folder: Path, **options: Any) -> list[str]:
    options = {"posts": folder / "posts.jsonl", "image-dir": folder / "images", "output": folder / "out", **options}
    given = [str(word) for name, value in options.items() if value is not None for word in (f"--{name}", value)]
    return ["distill", command, *given, *(["--device", "cpu", "--no-progress"] if command == "cache" else [])]


def test_the_cache_is_cut_to_what_the_student_shares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_posts(tmp_path)
    assistant, student = save(tmp_path / "assistant", rows=16), save(tmp_path / "student", seed=0)
    command = arguments("cache", tmp_path, model=assistant, student=student, **{"top-k": 4, "batch-size": 3})
    assert main(command) == 0
    cache = SoftLabelCache(tmp_path / "out")
    vocabulary = build("llava")[0].config.text_config.vocab_size
    assert cache.settings["vocabulary"] == vocabulary and cache.settings["top_k"] == 4
    every = {(f"post-{i}", task) for i in range(4) for task in ("label", "chain")}
    assert set(cache.locations) == every - {("post-2", "chain")}
    printed = capsys.readouterr().out
    assert "7 answers written, 7 in all" in printed and "left out by the likeliest k tokens: 1: 9" in printed
    report = json.loads((tmp_path / "out/truncation.json").read_text())
    assert 0 < report["divergence_kept"]["1"] < report["divergence_kept"]["4"] < 1
    assert main(command) == 0 and "0 answers written, 7 in all" in capsys.readouterr().out
    assert main(arguments("cache", tmp_path, model=assistant, student=student, **{"top-k": 5})) == 2
    assert "other settings: top_k was 4 and is 5" in capsys.readouterr().err


def test_several_processes_share_the_posts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank by rank, as accelerate launch would start them; each has files of its own."""
    write_posts(tmp_path)
    model = save(tmp_path / "assistant")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert main(arguments("cache", tmp_path, model=model)) == 0
    assert len(SoftLabelCache(tmp_path / "out").locations) == 7
    files = {file.name for file in (tmp_path / "out").glob("labels-*")}
    assert files == {f"labels-{rank}-00000.safetensors" for rank in (0, 1)}


def test_a_student_with_other_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_posts(tmp_path)
    models = {"model": save(tmp_path / "assistant"), "student": save(tmp_path / "student", family="qwen2")}
    assert main(arguments("cache", tmp_path, **models)) == 2
    assert "shared token ids" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "/nowhere"}, "/nowhere"),
        ({"posts": "/nowhere.jsonl"}, "/nowhere.jsonl"),
        ({"task": "dynamic_cot"}, "dynamic_cot"),
    ],
)
def test_what_is_not_there_is_named(
    options: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_posts(tmp_path)
    assert main(arguments("cache", tmp_path, **{"model": "/elsewhere", **options})) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_posts_without_label_are_named_or_dropped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_posts(tmp_path)
    rows[1]["label"] = "angry"
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = save(tmp_path / "assistant")
    assert main(arguments("cache", tmp_path, model=model)) == 2
    assert "post 'post-1'" in capsys.readouterr().err
    assert main(arguments("cache", tmp_path, model=model, **{"on-invalid": "skip"})) == 0
    assert len(SoftLabelCache(tmp_path / "out").locations) == 5


@pytest.mark.parametrize("option", ["--top-k=0", "--temperature=0", "--temperature=inf", "--compare=-1", "--batch-size=x"])
def test_numbers_out_of_range_are_refused(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*arguments("cache", tmp_path, model="m"), option])
    assert option.partition("=")[0] in capsys.readouterr().err


def test_right_chains_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_posts(tmp_path)
    outputs = {
        "post-0": '"Text_analysis": "A goal."\n\n"Prediction": positive',  # right
        "post-1": '"Prediction": positive',  # wrong: neutral
        "post-2": "nothing that can be read",
        "post-3": '"Image_analysis": "An evening."\n\n"Prediction": positive',  # right
    }
    chains = tmp_path / "chains.jsonl"
    chains.write_text("".join(json.dumps({"id": key, "raw": raw}) + "\n" for key, raw in outputs.items()), encoding="utf-8")
    assert main(arguments("augment", tmp_path, chains=chains)) == 0
    written = [json.loads(line) for line in (tmp_path / "out").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in written] == [*(row["id"] for row in rows), "post-0#assistant", "post-3#assistant"]
    for before, after in zip(rows, written, strict=False):
        assert {name: after[name] for name in before} == before
    for row in written[4:]:
        original = next(post for post in rows if post["id"] == row["id"].removesuffix("#assistant"))
        assert row["rationale"] == outputs[original["id"]] and row["images"] == original["images"]
        assert (row["label"], row["aspect"]) == (original["label"], original["aspect"])
    assert "4 posts and 2 more" in capsys.readouterr().out and not list(tmp_path.glob(".out*"))


def test_chains_of_other_posts_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_posts(tmp_path)
    (tmp_path / "chains.jsonl").write_text(json.dumps({"id": "stranger", "raw": ""}) + "\n", encoding="utf-8")
    assert main(arguments("augment", tmp_path, chains=tmp_path / "chains.jsonl")) == 2
    assert "stranger" in capsys.readouterr().err and not (tmp_path / "out").exists()


# The task that is saved with the assistant, and recorded with its predictions


def test_the_assistant_s_task_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_posts(tmp_path)
    model = save(tmp_path / "assistant")
    SavedTask(REASONING_TASKS["msc"], method="mulcot_rd").write(model)
    assert main(arguments("cache", tmp_path, model=model)) == 0
    assert SoftLabelCache(tmp_path / "out").settings["task"] == task_fingerprint(REASONING_TASKS["msc"])
    assert main(arguments("cache", tmp_path, model=model, task="masc")) == 2
    error = capsys.readouterr().err
    assert "was trained with task 'msc', not 'masc': leave --task out, or add --ignore-saved-task" in error
    words = arguments("cache", tmp_path, model=model, task="masc", output=tmp_path / "other")
    assert main([*words, "--ignore-saved-task"]) == 0
    assert SoftLabelCache(tmp_path / "other").settings["task"] == task_fingerprint(REASONING_TASKS["masc"])
    SavedTask(TASKS["aimkp"], method="aimkp").write(model)
    assert main(arguments("cache", tmp_path, model=model, output=tmp_path / "third")) == 2
    assert "was trained with task 'aimkp'; an assistant has one of MulCoT-RD's tasks" in capsys.readouterr().err
    assert len(rows) == 4


def test_the_assistant_s_modality_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_posts(tmp_path)
    model = save(tmp_path / "assistant")
    assert main(arguments("cache", tmp_path, model=model)) == 0
    assert "modality" not in SoftLabelCache(tmp_path / "out").settings
    SavedTask(REASONING_TASKS["masc"], "image", method="mulcot_rd").write(model)
    assert main(arguments("cache", tmp_path, model=model, output=tmp_path / "images only")) == 0
    cache = SoftLabelCache(tmp_path / "images only")
    assert cache.settings["modality"] == "image"
    assert {post for post, _ in cache.locations} == {row["id"] for row in rows if row["images"]}
    SavedTask(REASONING_TASKS["masc"], "text", method="mulcot_rd").write(model)
    for image in (tmp_path / "images").iterdir():
        image.write_text("not read for an assistant of texts")
    assert main(arguments("cache", tmp_path, model=model, output=tmp_path / "texts only")) == 0
    assert SoftLabelCache(tmp_path / "texts only").settings["modality"] == "text"
    assert main(arguments("cache", tmp_path, model=model)) == 2
    assert "modality" in capsys.readouterr().err


def test_the_task_of_response_chains_is_the_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_posts(tmp_path)
    chains = tmp_path / "chains.jsonl"
    chains.write_text(json.dumps({"id": "post-0", "raw": '"Prediction": positive'}) + "\n", encoding="utf-8")
    record = tmp_path / "chains.jsonl.meta.json"
    record.write_text(json.dumps({"settings": {"task": {"name": "msc", "prompt": "chain"}}}))
    assert main(arguments("augment", tmp_path, chains=chains)) == 0
    assert main(arguments("augment", tmp_path, chains=chains, task="masc")) == 2
    assert "was predicted with task 'msc', not 'masc': leave --task out" in capsys.readouterr().err
    assert main([*arguments("augment", tmp_path, chains=chains, task="masc"), "--ignore-saved-task"]) == 0
