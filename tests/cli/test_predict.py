"""Invariants of `dynkp predict`:

- what is written equals `generate_keyphrases` on the same model, whatever the batch size's order of work;
- a run that was stopped, killed or torn goes on: no row twice, none lost, and the file ends as if nothing had happened;
- settings never mix: another model, decoding or other posts are refused by name, and leave the file alone;
- a model is asked as it was trained, with the task that is saved with it, and a contradiction is refused;
- two processes write the rows that one writes; an adapter gives the same rows as it is, merged, and named alone;
- vLLM's adapter keeps to the published interface: what it is given, and what becomes of its answer (no vLLM is installed
  here, so a stand-in with that interface takes its place).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText, AutoProcessor

from dynkp import TASKS, cli, generate_keyphrases, generate_reasoning, load_posts
from dynkp.cli import predict
from dynkp.data.sentiment_posts import load_sentiment_posts
from dynkp.models.fingerprints import weights_fingerprint
from dynkp.prediction.engine import derived_seed
from dynkp.prediction.generation_tasks import KeyphraseGenerationTask, prompt_columns
from dynkp.prediction.run import PredictionRun
from dynkp.synthetic.tiny_model import build_tiny_vlm
from tests.conftest import REPOSITORY
from tests.support.posts import picture
from tests.support.training_runs import write_jsonl

TEXTS = ["a red fish in the sea", "goal for united", "sunset at the harbour"]
COLUMNS = ["id", "keyphrases", "raw", "reasoned", "output_tokens", "prompt_tokens", "output_words", "mode", "modality"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA, an adapter for it, and 14 posts of unequal length, two in three with a picture."""
    folder = tmp_path_factory.mktemp("predict")
    model, processor = build_tiny_vlm(
        [f"{text} Which keyphrases would the author tag this post with? fish; dog" for text in TEXTS],
        word_level=False,
        vocab_size=400,
        hidden_size=32,
        layers=1,
        heads=2,
        vision_hidden=32,
        vision_layers=1,
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    adapted = get_peft_model(AutoModelForImageTextToText.from_pretrained(folder / "model"), config)
    adapted.save_pretrained(folder / "adapter")
    (folder / "images").mkdir()
    with (folder / "posts.jsonl").open("w") as file:
        for index in range(14):
            row: dict[str, Any] = {"id": f"p{index}", "text": " ".join([TEXTS[index % 3]] * (1 + index % 4))}
            if index % 3:
                picture(index).save(folder / "images" / f"{index}.png")
                row["image"] = f"{index}.png"
            file.write(json.dumps(row) + "\n")
    return folder


def arguments(folder: Path, output: Path, *more: str, batch_size: int = 4) -> list[str]:
    return [
        *("predict", "--model", str(folder / "model"), "--posts", str(folder / "posts.jsonl"), "--image-dir"),
        *(str(folder / "images"), "--output", str(output), "--max-new-tokens", "6", "--batch-size", str(batch_size)),
        *("--device", "cpu", "--no-progress", *more),
    ]


def run(folder: Path, output: Path, *more: str, **options: int) -> list[dict[str, Any]]:
    assert cli.main(arguments(folder, output, *more, **options)) == 0
    return read(output)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[dict[str, Any]]:
    """An uninterrupted run."""
    return run(folder, folder / "whole" / "p.jsonl")


def test_equals_generate_keyphrases(folder: Path, whole: list[dict[str, Any]]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    posts = load_posts(folder / "posts.jsonl", image_dir=folder / "images")
    expected = generate_keyphrases(model, processor, posts, batch_size=1, max_new_tokens=6, progress=False)
    assert whole == list(expected)
    assert [row["id"] for row in whole] == [f"p{index}" for index in range(14)]
    assert list(whole[0]) == COLUMNS
    assert len({row["raw"] for row in whole}) > 3
    assert sorted(file.name for file in (folder / "whole").iterdir()) == ["p.jsonl", "p.jsonl.meta.json"]


def test_a_finished_run_loads_no_model(
    folder: Path, whole: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(predict, "_load_engine", lambda *_, **__: pytest.fail("nothing is left to predict"))
    assert run(folder, folder / "whole" / "p.jsonl") == whole
    assert "14 predictions, all done before" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [4, 3])
@pytest.mark.parametrize("kept", [0, 1, 5.4, 6.999, 13.5])
def test_goes_on_after_a_torn_line(
    folder: Path, whole: list[dict[str, Any]], tmp_path: Path, kept: float, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So many rows, and so much of the next: what a killed run can leave."""
    output = tmp_path / "p.jsonl"
    lines = (folder / "whole" / "p.jsonl").read_bytes().splitlines(keepends=True)
    torn = lines[int(kept) : int(kept) + 1]
    part = torn[0][: int(len(torn[0]) * (kept % 1))]
    output.write_bytes(b"".join(lines[: int(kept)]) + part)
    (tmp_path / "p.jsonl.meta.json").write_bytes((folder / "whole" / "p.jsonl.meta.json").read_bytes())
    appended = []
    finish = PredictionRun.finish
    monkeypatch.setattr(PredictionRun, "finish", lambda self: (appended.append(self.output.read_bytes()), finish(self))[1])
    assert run(folder, output, batch_size=batch_size) == whole
    assert appended[0].startswith(b"".join(lines[: int(kept)])), "finished rows were touched"
    assert len(appended[0].splitlines()) == 14


def test_a_whole_last_line_without_its_break_is_kept(folder: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    output = tmp_path / "p.jsonl"
    output.write_bytes((folder / "whole" / "p.jsonl").read_bytes().rstrip(b"\n"))
    (tmp_path / "p.jsonl.meta.json").write_bytes((folder / "whole" / "p.jsonl.meta.json").read_bytes())
    assert run(folder, output) == whole


def test_killed_and_continued(folder: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of a sampled run, which then goes on to the very rows of an uninterrupted one."""
    sampled = ["--num-beams", "2", "--do-sample", "--temperature", "1.5", "--decodes", "2", "--seed", "3"]
    sampled += ["--max-new-tokens", "40"]
    expected = run(folder, tmp_path / "whole.jsonl", *sampled, batch_size=1)
    output = tmp_path / "p.jsonl"
    command = [sys.executable, "-m", "dynkp.cli", *arguments(folder, output, *sampled, batch_size=1)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not output.exists() or output.read_bytes().count(b"\n") < 4:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended, or never wrote a row"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = output.read_bytes()
    assert 4 <= before.count(b"\n") < 28, "the run ended before it was killed"
    assert run(folder, output, *sampled, batch_size=1) == expected
    assert [(row["id"], row["decode"]) for row in expected] == [(f"p{i}", d) for i in range(14) for d in (0, 1)]
    assert any(one["raw"] != two["raw"] for one, two in zip(expected[::2], expected[1::2], strict=True))
    kept = [json.loads(line) for line in before.splitlines(keepends=True) if line.endswith(b"\n")]
    assert all(row in expected for row in kept)


@pytest.mark.timeout(240)
def test_two_processes_write_what_one_does(folder: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    """With rows left by one process, and by a third that no longer runs."""
    output = tmp_path / "p.jsonl"
    lines = (folder / "whole" / "p.jsonl").read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[5:7]))
    (tmp_path / "p.jsonl.rank-2").write_bytes(lines[0] + lines[9][:30])
    (tmp_path / "p.jsonl.meta.json").write_bytes((folder / "whole" / "p.jsonl.meta.json").read_bytes())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launcher, "-m", "dynkp.cli", *arguments(folder, output)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert read(output) == whole
    assert json.loads((tmp_path / "p.jsonl.meta.json").read_text())["info"]["processes"] == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.jsonl", "p.jsonl.meta.json"]


def test_adapters(folder: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    adapter = ["--adapter", str(folder / "adapter")]
    as_it_is = run(folder, tmp_path / "a.jsonl", *adapter)
    assert run(folder, tmp_path / "b.jsonl", *adapter, "--merge-adapter") == as_it_is
    # Named alone: argparse takes the last --model.
    assert run(folder, tmp_path / "c.jsonl", "--model", str(folder / "adapter")) == as_it_is
    assert [row["raw"] for row in as_it_is] != [row["raw"] for row in whole]


def test_modes_and_modality(folder: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    think = run(folder, tmp_path / "think.jsonl", "--mode", "think")
    assert all(row["raw"].startswith("<think>") and row["reasoned"] and row["mode"] == "think" for row in think)
    more = ["--mode", "direct", "--modality", "text", "--task", "aimkp", "--separator", "!"]
    direct = run(folder, tmp_path / "direct.jsonl", *more)
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    posts = load_posts(folder / "posts.jsonl", image_dir=folder / "images")
    task = dataclasses.replace(TASKS["aimkp"], separator="!")
    options = {"mode": "direct", "modality": "text", "task": task, "max_new_tokens": 6, "progress": False}
    assert direct == list(generate_keyphrases(model, processor, posts, **options))
    assert all(not row["raw"].startswith("<") and row["modality"] == "text" for row in direct)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mode", "direct"], "mode was 'auto' and is 'direct'"),
        (["--num-beams", "2"], "num_beams was 1 and is 2"),
        (["--modality", "text"], "modality was 'both' and is 'text'"),
        (["--task", "aimkp"], "task was "),
        (["--max-new-tokens", "7"], "max_new_tokens was 6 and is 7"),
        (["--model", "MODEL2"], "model was 'weights sha256"),
        (["--posts", "POSTS2"], "posts was '14 posts"),
    ],
)
def test_other_settings_are_refused(
    folder: Path, whole: list[dict[str, Any]], tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = folder / "whole" / "p.jsonl"
    if "MODEL2" in more:
        model = AutoModelForImageTextToText.from_pretrained(folder / "model")
        model.lm_head.weight.data[3] += 1e-3
        model.save_pretrained(tmp_path / "model2")
        more = ["--model", str(tmp_path / "model2")]
    if "POSTS2" in more:
        (tmp_path / "posts.jsonl").write_text((folder / "posts.jsonl").read_text().replace("united", "city", 1))
        more = ["--posts", str(tmp_path / "posts.jsonl")]
    before = output.read_bytes(), (output.parent / "p.jsonl.meta.json").read_bytes()
    assert cli.main(arguments(folder, output, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and "Choose another output, or delete" in error
    assert (output.read_bytes(), (output.parent / "p.jsonl.meta.json").read_bytes()) == before


def test_moved_folders_are_the_same(folder: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "moved").symlink_to(folder / "model")
    (tmp_path / "pictures").symlink_to(folder / "images")
    moved = ["--model", str(tmp_path / "moved"), "--image-dir", str(tmp_path / "pictures")]
    assert run(folder, folder / "whole" / "p.jsonl", *moved, batch_size=2) == whole
    assert weights_fingerprint(str(tmp_path / "moved")) == weights_fingerprint(str(folder / "model"))


def test_a_checkpoint_is_more_than_its_weights(folder: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(folder / "model", model)
    before = weights_fingerprint(str(model))
    (model / "predictions.jsonl.meta.json").write_text("{}")  # of a run, whose output may stand in the same folder
    assert weights_fingerprint(str(model)) == before
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert weights_fingerprint(str(model)) != before


@pytest.mark.parametrize(
    ("content", "meta", "message"),
    [
        (b'{"id": "p1"}\n{"id": "p2"}\n', None, "p.jsonl.meta.json, the file of their settings, is missing"),
        (b'{"id": "p1"}\n', b"{", "p.jsonl.meta.json is damaged"),
        (b'{"id": "p1"}\n', b"[]", "p.jsonl.meta.json is damaged"),
        (b'{"id": "p1", "raw": ""}\nnonsense\n{"id": "p2"}\n', True, "p.jsonl, line 2: not a prediction"),
        (b"[1]\n", True, "p.jsonl, line 1: not a prediction"),
    ],
)
def test_files_that_are_no_predictions(
    folder: Path,
    whole: list[dict[str, Any]],
    tmp_path: Path,
    content: bytes,
    meta: bytes | bool | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "p.jsonl"
    output.write_bytes(content)
    if meta is True:
        meta = (folder / "whole" / "p.jsonl.meta.json").read_bytes()
    if meta is not None:
        (tmp_path / "p.jsonl.meta.json").write_bytes(meta)
    assert cli.main(arguments(folder, output)) == 2
    assert message in capsys.readouterr().err
    assert output.read_bytes() == content


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"id": "1", "text": "a"}', '{"id": "1", "text": "b"}'], "repeated_id"),
        (['{"id": "1", "text": "a", "image": "../posts.jsonl"}'], "is outside the image folder"),
        (['{"id": "1", "text": "a", "image": "nowhere.png"}'], "nowhere.png"),
        (['{"id": "1"}'], "neither text nor image"),
        (['{"id": "1", "text": "a"'], "line 1: not valid JSON"),
        ([], "there are no posts to predict"),
    ],
)
def test_bad_posts(folder: Path, tmp_path: Path, lines: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    posts = tmp_path / "posts.jsonl"
    posts.write_text("\n".join(lines) + "\n")
    assert cli.main(arguments(folder, tmp_path / "p.jsonl", "--posts", str(posts))) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.jsonl").exists()


def test_the_gold_does_not_matter(folder: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    """Keyphrases that no model could be taught are no reason not to predict; nor do they change the posts' checksum."""
    rows = [json.loads(line) for line in (folder / "posts.jsonl").read_text().splitlines()]
    gold = [{**row, "keyphrases": ["a;b", "x", "x", "<think>"], "rationale": "because"} for row in rows]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in gold))
    assert run(folder, folder / "whole" / "p.jsonl", "--posts", str(tmp_path / "posts.jsonl")) == whole
    assert run(folder, tmp_path / "p.jsonl", "--posts", str(tmp_path / "posts.jsonl")) == whole


def test_written_out_prompts(folder: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "posts.jsonl").read_text().splitlines()]
    for row in rows:
        row["prompt"] = TASKS["dynamic_cot"].prompt(row.pop("text"), int("image" in row))
        row["completion"] = [{"role": "assistant", "content": "fish"}]
    (tmp_path / "posts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(folder, tmp_path / "p.jsonl", "--posts", str(tmp_path / "posts.jsonl")) == whole


def test_bad_posts_left_out(folder: Path, tmp_path: Path) -> None:
    posts = tmp_path / "posts.jsonl"
    posts.write_text('{"id": "1", "text": "a", "image": "nowhere.png"}\n{"id": "2", "text": "goal"}\n')
    rows = run(folder, tmp_path / "p.jsonl", "--posts", str(posts), "--on-invalid", "skip")
    assert [row["id"] for row in rows] == ["2"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--decodes", "3"], "--decodes 3: without --do-sample"),
        (["--temperature", "0.5"], "--temperature is for sampling"),
        (["--do-sample", "--temperature", "0"], "0 is not a number above 0"),
        (["--do-sample", "--top-p", "1.5"], "1.5 is not above 0 and at most 1"),
        (["--batch-size", "0"], "0 is not a number of 1 or more"),
        (["--backend", "vllm", "--num-beams", "5"], "vLLM does not sample with beams"),
        (["--vllm-options", "[]"], "[] is not a JSON object"),
        (["--output", "."], "is a folder"),
        (["--device", "nowhere"], "nowhere is none of auto, cpu, cuda"),
    ],
)
def test_arguments_that_do_not_fit(
    folder: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments(folder, tmp_path / "p.jsonl", *more))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--model", "./nowhere"], "model='./nowhere': there is no such folder"),
        (["--model", "IMAGES"], "neither a config.json nor an adapter_config.json"),
        (["--merge-adapter"], "there is no adapter for"),
        (["--adapter", "nope"], "--adapter='nope': there is no such folder, and the Hub cannot be reached"),
        (["--adapter", "IMAGES"], "neither a config.json nor an adapter_config.json"),
        (["--task", "tags"], "task='tags' is not known"),
        (["--separator", "and"], "separator='and' must be one punctuation mark"),
        (["--posts", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--backend", "vllm"], "backend='vllm' needs vLLM, which is not installed"),
    ],
)
def test_errors_name_what_is_wrong(
    folder: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = [str(folder / "images") if word == "IMAGES" else word for word in more]
    assert cli.main(arguments(folder, tmp_path / "p.jsonl", *more)) == 2
    assert message in capsys.readouterr().err


def test_interrupted_by_hand(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def interrupt(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(predict, "_load_engine", interrupt)
    assert cli.main(arguments(folder, tmp_path / "p.jsonl")) == 130
    assert "the same command continues" in capsys.readouterr().err


def test_out_of_memory_says_what_to_do(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(predict, "_load_engine", full)
    assert cli.main(arguments(folder, tmp_path / "p.jsonl")) == 1
    assert "with a smaller --batch-size continues" in capsys.readouterr().err


# --- the task that is saved with a model ---


@pytest.fixture(scope="module")
def aimkp_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that AimKP taught 24 posts by heart, and the posts."""
    folder = tmp_path_factory.mktemp("aimkp")
    words = ("beagle", "harbour", "guitar", "marathon", "cactus", "rainbow", "chess", "volcano")
    rows = [
        {"id": str(n), "text": f"post number {n} about a {words[n % 8]} in the city", "keyphrases": [words[n % 8], "life"]}
        for n in range(24)
    ]
    posts = write_jsonl(folder / "posts.jsonl", rows)
    options = "--method aimkp --tiny_hidden_size 64 --tiny_vocab_size 400 --tiny_attention_dropout 0 --max_steps 60"
    options += " --warmup_epochs 100 --per_device_train_batch_size 24 --learning_rate 0.005 --weight_decay 0 --warmup_steps 5"
    options += " --save_strategy no --use_cpu true --disable_tqdm true"
    assert cli.main(["train", *options.split(), "--train_file", posts, "--output_dir", str(folder / "model")]) == 0
    return folder


def f1_at_1(folder: Path, output: Path, *more: str) -> float:
    """What `dynkp predict` and `dynkp evaluate` make of the model."""
    words = ["--model", str(folder / "model"), "--posts", str(folder / "posts.jsonl"), "--output", str(output), *more]
    assert cli.main(["predict", *words, "--max-new-tokens", "24", "--device", "cpu", "--no-progress"]) == 0
    scores = output.with_suffix(".scores")
    words = ["--predictions", str(output), "--posts", str(folder / "posts.jsonl"), "--resamples", "0", "--json", str(scores)]
    assert cli.main(["evaluate", *words]) == 0
    return json.loads(scores.read_text())["subsets"]["all"]["f1@1"]


def test_a_model_is_asked_as_it_was_trained(aimkp_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Asked with Dynamic CoT's prompt, as before the task was saved, an AimKP model falls without a sign of it."""
    text = ("--modality", "text")  # the posts have no images
    assert f1_at_1(aimkp_model, tmp_path / "default.jsonl", *text) == pytest.approx(
        2 / 3
    )  # one of two keyphrases, always right
    assert "was trained by aimkp with task 'aimkp', whose prompt and answers are used" in caplog.text
    rows = read(tmp_path / "default.jsonl")
    assert all(len(row["keyphrases"]) == 2 and ", " in row["raw"] for row in rows), "read with AimKP's separator"
    assert f1_at_1(aimkp_model, tmp_path / "named.jsonl", *text, "--task", "aimkp") == pytest.approx(2 / 3)
    assert read(tmp_path / "named.jsonl") == rows
    otherwise = [*text, "--task", "dynamic_cot", "--ignore-saved-task"]
    assert f1_at_1(aimkp_model, tmp_path / "otherwise.jsonl", *otherwise) < 0.4
    caplog.clear()
    (aimkp_model / "model/dynkp_task.json").rename(aimkp_model / "model/moved.json")
    try:
        assert f1_at_1(aimkp_model, tmp_path / "without.jsonl", *text) < 0.4
        assert "has no dynkp_task.json, so task 'dynamic_cot' is taken" in caplog.text
    finally:
        (aimkp_model / "model/moved.json").rename(aimkp_model / "model/dynkp_task.json")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--task", "dynamic_cot"],
            "was trained with task 'aimkp', not 'dynamic_cot': leave --task out, or add --ignore-saved",
        ),
        (["--task", "masc"], "was trained with task 'aimkp', not 'masc'"),
        (["--separator", "; "], "was trained with separator ', ', not '; '"),
        (["--task", "aimpk"], "Did you mean 'aimkp'?"),
        (["--mode", "think"], "was trained by aimkp, without reasoning, so --mode 'think' fails: leave --mode out, or add"),
    ],
)
def test_a_contradiction_is_refused(
    aimkp_model: Path, tmp_path: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--model",
        str(aimkp_model / "model"),
        "--posts",
        str(aimkp_model / "posts.jsonl"),
        "--output",
        str(tmp_path / "p"),
    ]
    assert cli.main(["predict", *words, "--device", "cpu", *more]) == 2
    error = capsys.readouterr().err.splitlines()
    assert message in error[-1] and not (tmp_path / "p").exists()


def test_prompts_longer_than_in_training_are_counted(
    aimkp_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    f1_at_1(aimkp_model, tmp_path / "usual.jsonl", "--modality", "text")
    assert "max_length" not in caplog.text
    lengths = sorted(row["prompt_tokens"] for row in read(tmp_path / "usual.jsonl"))
    (tmp_path / "posts.jsonl").write_text((aimkp_model / "posts.jsonl").read_text())
    shutil.copytree(aimkp_model / "model", tmp_path / "model")
    saved = json.loads((tmp_path / "model/dynkp_task.json").read_text())
    (tmp_path / "model/dynkp_task.json").write_text(json.dumps({**saved, "max_length": lengths[0] - 1}))
    f1_at_1(tmp_path, tmp_path / "long.jsonl", "--modality", "text")
    assert f"24 prompts have more than the {lengths[0] - 1} tokens (max_length)" in caplog.text


def test_one_modality_of_two_is_an_ablation_and_the_other_of_one_a_contradiction(
    aimkp_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictured = tmp_path / "pictured"
    pictured.mkdir()
    (pictured / "model").symlink_to(aimkp_model / "model")
    picture(1).save(pictured / "1.png")
    rows = read(aimkp_model / "posts.jsonl")
    write_jsonl(pictured / "posts.jsonl", [{**rows[0], "image": str(pictured / "1.png")}, *rows[1:]])
    assert f1_at_1(pictured, tmp_path / "image.jsonl", "--modality", "image") < 0.4
    assert {row["modality"] for row in read(tmp_path / "image.jsonl")} == {"image"}
    specialist = tmp_path / "specialist"
    shutil.copytree(aimkp_model / "model", specialist)
    saved = json.loads((specialist / "dynkp_task.json").read_text())
    (specialist / "dynkp_task.json").write_text(json.dumps({**saved, "modality": "text"}))
    (tmp_path / "posts.jsonl").write_text((aimkp_model / "posts.jsonl").read_text())
    (tmp_path / "model").symlink_to(specialist)
    f1_at_1(tmp_path, tmp_path / "text.jsonl")
    assert {row["modality"] for row in read(tmp_path / "text.jsonl")} == {"text"}, "its own, without being asked"
    words = ["--model", str(specialist), "--posts", str(tmp_path / "posts.jsonl"), "--output", str(tmp_path / "both.jsonl")]
    assert cli.main(["predict", *words, "--device", "cpu", "--modality", "both"]) == 2
    assert "was trained on the posts' text alone, not on modality 'both': leave --modality out" in capsys.readouterr().err


def test_outputs_without_any_keyphrase_say_what_to_look_at(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = run(folder, tmp_path / "p.jsonl", "--mode", "think")
    assert all(not row["keyphrases"] for row in rows)
    assert "No output holds a keyphrase: 13 of 14 were cut off at 6 tokens, so raise --max-new-tokens." in caplog.text


# --- vLLM ---


class StandIn(types.ModuleType):
    """The part of vLLM's published interface that is used, recording what it is given."""

    def __init__(self) -> None:
        super().__init__("vllm")
        record = self.record = {}
        answer = self.answer = []

        class LLM:
            def __init__(self, model: str, *, dtype: str = "auto", **options: Any) -> None:
                known = {"limit_mm_per_prompt", "enable_lora", "max_lora_rank", "tensor_parallel_size"}
                assert set(options) <= known
                record["llm"] = {"model": model, "dtype": dtype, **options}
                record["files"] = sorted(os.listdir(model))

            def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool, lora_request: Any) -> list[Any]:
                record.setdefault("prompts", []).extend(prompts)
                record.setdefault("parameters", []).extend(sampling_params)
                record["lora"] = lora_request
                assert len(prompts) == len(sampling_params) and use_tqdm is False
                completion = types.SimpleNamespace(token_ids=tuple(answer), finish_reason="stop")
                return [
                    types.SimpleNamespace(prompt_token_ids=[0] * (len(prompt["prompt_token_ids"]) + 15), outputs=[completion])
                    for prompt in prompts
                ]

        class SamplingParams:
            def __init__(
                self,
                *,
                max_tokens: int,
                temperature: float,
                top_p: float,
                seed: int | None,
                stop_token_ids: list[int],
                logit_bias: dict[int, float] | None,
                detokenize: bool,
            ) -> None:
                vars(self).update({name: value for name, value in locals().items() if name != "self"})

        class LoRARequest:
            def __init__(self, lora_name: str, lora_int_id: int, lora_path: str) -> None:
                self.given = (lora_name, lora_int_id, lora_path)

        self.LLM, self.SamplingParams = LLM, SamplingParams
        self.lora = types.ModuleType("vllm.lora")
        self.request = types.ModuleType("vllm.lora.request")
        self.request.LoRARequest = LoRARequest


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, folder: Path) -> StandIn:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setitem(sys.modules, "vllm.lora", stand_in.lora)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", stand_in.request)
    tokenizer = AutoProcessor.from_pretrained(folder / "model").tokenizer
    stand_in.answer += tokenizer("red fish; sea</s>fish", add_special_tokens=False)["input_ids"]
    return stand_in


def test_vllm_prompts_and_answers(folder: Path, tmp_path: Path, vllm: StandIn) -> None:
    rows = run(folder, tmp_path / "p.jsonl", "--backend", "vllm", "--vllm-options", '{"tensor_parallel_size": 2}')
    model = str(folder / "model")
    expected = {"model": model, "dtype": "auto", "limit_mm_per_prompt": {"image": 1}, "tensor_parallel_size": 2}
    assert vllm.record["llm"] == expected and vllm.record["lora"] is None
    assert all(row["keyphrases"] == ["red fish", "sea"] and not row["reasoned"] for row in rows)
    processor = AutoProcessor.from_pretrained(model)
    task = KeyphraseGenerationTask(processor)
    posts = {row["id"]: prompt_columns(row) for row in load_posts(folder / "posts.jsonl", image_dir=folder / "images")}
    given = {tuple(prompt["prompt_token_ids"]): prompt for prompt in vllm.record["prompts"]}
    assert len(vllm.record["prompts"]) == 14
    for row in rows:
        post = posts[row["id"]]
        text = task.renderer.prompt(post, len(post["images"]))
        prompt = given[tuple(processor.tokenizer(text, add_special_tokens=False)["input_ids"])]
        assert prompt["prompt_token_ids"].count(processor.tokenizer.bos_token_id) == 1
        images = prompt.get("multi_modal_data", {}).get("image", [])
        assert [image.mode for image in images] == ["RGB"] * len(post["images"])
        assert row["prompt_tokens"] == len(prompt["prompt_token_ids"]) + 15
    parameters = vllm.record["parameters"][0]
    assert (parameters.temperature, parameters.seed, parameters.max_tokens, parameters.logit_bias) == (0.0, None, 6, None)
    assert processor.tokenizer.eos_token_id in parameters.stop_token_ids


def test_the_engine_s_old_option_still_works(
    folder: Path, tmp_path: Path, vllm: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    new = run(folder, tmp_path / "new.jsonl", "--engine", "vllm")
    assert capsys.readouterr().err.count("--backend") == 0
    assert run(folder, tmp_path / "new.jsonl", "--backend", "vllm") == new, "the same settings: the run goes on"
    assert "--backend is now called --engine; the old name still works." in capsys.readouterr().err


def test_vllm_sampling_is_seeded_by_post(folder: Path, tmp_path: Path, vllm: StandIn) -> None:
    sampled = ["--do-sample", "--temperature", "0.5", "--decodes", "2", "--seed", "7"]
    rows = run(folder, tmp_path / "p.jsonl", "--backend", "vllm", *sampled)
    assert len(rows) == 28
    seeds = {parameters.seed for parameters in vllm.record["parameters"]}
    assert seeds == {derived_seed(7 + decode, f"p{index}") for decode in (0, 1) for index in range(14)}
    assert {parameters.temperature for parameters in vllm.record["parameters"]} == {0.5}


def test_vllm_modes(folder: Path, tmp_path: Path, vllm: StandIn) -> None:
    think = run(folder, tmp_path / "think.jsonl", "--backend", "vllm", "--mode", "think")
    assert all(row["raw"] == "<think> red fish; sea" and row["reasoned"] for row in think)
    tokenizer = AutoProcessor.from_pretrained(folder / "model").tokenizer
    tag = tokenizer.convert_tokens_to_ids("<think>")
    assert all(prompt["prompt_token_ids"][-1] == tag for prompt in vllm.record["prompts"])
    run(folder, tmp_path / "direct.jsonl", "--backend", "vllm", "--mode", "direct")
    bias = vllm.record["parameters"][-1].logit_bias
    assert tag in bias and set(bias.values()) == {-100.0}
    assert all("<" in tokenizer.decode([index]) for index in bias)


def test_vllm_adapters(folder: Path, tmp_path: Path, vllm: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = ["--backend", "vllm", "--adapter", str(folder / "adapter")]
    run(folder, tmp_path / "a.jsonl", *adapter)
    assert vllm.record["lora"].given == ("adapter", 1, str(folder / "adapter"))
    assert vllm.record["llm"]["enable_lora"] is True and vllm.record["llm"]["max_lora_rank"] == 8
    run(folder, tmp_path / "b.jsonl", *adapter, "--merge-adapter")
    assert vllm.record["lora"] is None and vllm.record["llm"]["model"] != str(folder / "model")
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= set(vllm.record["files"])

    whole_modules = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    whole_modules["modules_to_save"] = ["multi_modal_projector"]
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(whole_modules))
    assert cli.main(arguments(folder, tmp_path / "c.jsonl", *adapter[:2], "--adapter", str(tmp_path / "adapter"))) == 2
    assert "multi_modal_projector" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["predict", "evaluate", "stats"])
def test_help_is_quick(command: str) -> None:
    code = (
        f"import sys, time; start = time.process_time(); from dynkp.cli import {command}"
        f"; text = {command}.parser().format_help(); assert 'examples:' in text"
        "; assert not {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)"
        "; print(time.process_time() - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=REPOSITORY)
    assert float(done.stdout) < 0.5


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["predict", "--help"])
    text = capsys.readouterr().out
    assert "accelerate launch -m dynkp predict" in text and "--decodes 3" in text


# Reasoning tasks


@pytest.fixture
def sentiment(folder: Path, tmp_path: Path) -> Path:
    """The posts with aspects and labels, as TomBERT's file."""
    path = tmp_path / "test.tsv"
    lines = ["index\t#1 Label\t#2 ImageID\t#3 String\t#3 String"]
    for index in range(6):
        image = f"{index}.png" if index % 3 else ""
        lines.append(f"{index}\t{index % 3}\t{image}\t{TEXTS[index % 3]} $T$\tfish")
    path.write_text("\n".join(lines) + "\n")
    return path


def test_reasoning_tasks(folder: Path, sentiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    posts, _ = load_sentiment_posts(sentiment, image_dir=folder / "images", progress=False)
    more = ["--posts", str(sentiment), "--task", "masc"]
    for prompt in ("label", "chain"):
        output = tmp_path / f"{prompt}.jsonl"
        rows = run(folder, output, *more, "--prompt", prompt)
        expected = generate_reasoning(model, processor, posts, task="masc", prompt=prompt, max_new_tokens=6, progress=False)
        assert rows == list(expected) and [row["id"] for row in rows] == [f"test-{index}" for index in range(6)]
        printed = capsys.readouterr().out
        assert "6 predictions; " in printed and "100.0% unread" in printed
    # What is predicted depends on no label, and what was begun goes on with the same prompt and aspects only.
    text = sentiment.read_text()
    sentiment.write_text("\n".join(line.replace("\t0\t", "\t1\t").replace("\t2\t", "\t1\t") for line in text.splitlines()))
    assert run(folder, tmp_path / "label.jsonl", *more) == read(tmp_path / "label.jsonl")
    assert cli.main(arguments(folder, tmp_path / "label.jsonl", *more, "--prompt", "chain")) == 2
    assert "task was {'name': 'masc', 'prompt': 'label'" in capsys.readouterr().err
    sentiment.write_text(text.replace("\tfish", "\tdog"))
    assert cli.main(arguments(folder, tmp_path / "label.jsonl", *more)) == 2
    assert "posts was '6 posts" in capsys.readouterr().err
    # The two files are what `dynkp evaluate` takes.
    sentiment.write_text(text)
    scored = ["evaluate", "--task", "sentiment", "--posts", str(sentiment), "--predictions", str(tmp_path / "label.jsonl")]
    assert cli.main([*scored, "--chains", str(tmp_path / "chain.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "| label  |     0.00 |" in printed and "No post has a rationale" in printed


def test_reasoning_about_keyphrases_is_scored_like_any(folder: Path, tmp_path: Path) -> None:
    rows = run(folder, tmp_path / "p.jsonl", "--task", "keyphrases")
    assert len(rows) == 14 and all(isinstance(row["keyphrases"], list) for row in rows)
    posts = tmp_path / "posts.jsonl"
    lines = (folder / "posts.jsonl").read_text().splitlines()
    posts.write_text("".join(json.dumps({**json.loads(line), "keyphrases": ["fish"]}) + "\n" for line in lines))
    assert cli.main(["evaluate", "--predictions", str(tmp_path / "p.jsonl"), "--posts", str(posts), "--resamples", "0"]) == 0


def test_posts_without_aspect_are_named(
    folder: Path, sentiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentiment.write_text(sentiment.read_text() + "6\t1\t\tno aspect $T$\t \n")
    more = ["--posts", str(sentiment), "--task", "masc"]
    assert cli.main(arguments(folder, tmp_path / "p.jsonl", *more)) == 2
    assert "post 'test-6': no_aspect" in capsys.readouterr().err
    assert len(run(folder, tmp_path / "p.jsonl", *more, "--on-invalid", "skip")) == 6
    assert len(run(folder, tmp_path / "m.jsonl", "--posts", str(sentiment), "--task", "msc")) == 7


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--task", "masc", "--mode", "think"], "--mode and --separator are not for --task masc; --prompt says"),
        (["--task", "msc", "--separator", ","], "--mode and --separator are not for --task msc"),
        (["--prompt", "chain"], "--prompt is not for --task dynamic_cot; --mode says"),
    ],
)
def test_options_of_the_other_tasks(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        cli.main(arguments(folder, tmp_path / "p.jsonl", *more))
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "1.png"}], "post 'p0': no_image_dir: image '1.png'"),
        ([{"img": "1.png"}, {}], "post 'p0': unread_image"),
        ([{}, {}], "none of the 2 posts has one"),
    ],
)
def test_posts_are_not_predicted_without_their_images_in_silence(
    folder: Path, tmp_path: Path, rows: list[dict[str, Any]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    posts = tmp_path / "posts.jsonl"
    posts.write_text("".join(json.dumps({"id": f"p{n}", "text": "united", **row}) + "\n" for n, row in enumerate(rows)))
    command = ["predict", "--model", str(folder / "model"), "--posts", str(posts), "--output", str(tmp_path / "p.jsonl")]
    command += ["--max-new-tokens", "2", "--device", "cpu", "--no-progress"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert message in error and not (tmp_path / "p.jsonl").exists()
    assert cli.main([*command, "--modality", "text"]) == 0
    assert len(read(tmp_path / "p.jsonl")) == len(rows)
