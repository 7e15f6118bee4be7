"""examples/mulcot_rd.sh, command by command, on real tweets with photographs: teacher's chains to scores.

Holds with tiny models from scratch on shared/data/masc_t15: every command of the script runs; the student's base never saw
the assistant, trains from its soft labels and is scored beside it; chains are added iff their prediction is right; the
assistant's weights are the same before and after; the script resumes.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dynkp import MulCoTRDConfig, cli
from dynkp.cli import rationales, train
from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.models.fingerprints import weights_fingerprint
from dynkp.synthetic.tiny_model import build_tiny_vlm
from dynkp.training import mulcot_rd
from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "examples/mulcot_rd.sh"
QUICK = (
    "--use_peft false --bf16 false --activation_checkpointing false --freeze_vision_tower false --disable_tqdm true "
    "--use_cpu true "
    "--per_device_train_batch_size 6 --gradient_accumulation_steps 1 --per_device_eval_batch_size 6 --learning_rate 0.003 "
    "--processor_kwargs {} --num_train_epochs 3 --eval_max_new_tokens 12 --max_new_tokens 24 --predict_batch_size 8"
)


def commands(folder: Path, files: dict[str, Path], **variables: str) -> list[list[str]]:
    """What the script would run, in words."""
    environment = {
        **os.environ,
        **{name: str(path) for name, path in files.items()},
        "OUT": str(folder / "out"),
        "LAUNCH": "python",
        "MAX_NEW_TOKENS": "24",
        "ASSISTANT_OPTIONS": QUICK,
        "STUDENT_OPTIONS": QUICK,
        "DRY_RUN": "1",
        **variables,
    }
    done = subprocess.run(["bash", str(SCRIPT)], env=environment, check=True, capture_output=True, text=True)
    return [shlex.split(line[2:]) for line in done.stdout.splitlines()]


def execute(command: list[str]) -> None:
    """In this process: to start one takes longer than what most of the commands do."""
    if command[0] == "dynkp":
        arguments = [*command[1:], "--device", "cpu"] if command[1] in ("predict", "distill") else command[1:]
        if command[1:3] == ["distill", "augment"]:
            arguments = command[1:]
        assert cli.main(arguments) == 0, command
    else:
        assert command[:4] == ["python", "-m", "dynkp", "train"]
        train.main(command[4:])


@pytest.fixture(scope="module")
def pipeline(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[str]]]:
    folder = tmp_path_factory.mktemp("pipeline")
    masc = shared / "data/masc_t15"
    with (masc / "test.jsonl").open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if row["image"]]
    files = {name: folder / f"{name.lower()}.jsonl" for name in ("TRAIN", "DEV", "TEST")}
    for name, (start, end) in {"TRAIN": (0, 348), "DEV": (348, 408), "TEST": (408, 468)}.items():
        files[name].write_text("".join(json.dumps(row) + "\n" for row in rows[start:end]), encoding="utf-8")
    args = MulCoTRDConfig(output_dir=str(folder), use_cpu=True, bf16=False, task="masc", disable_tqdm=True)
    posts = mulcot_rd.load(str(files["TRAIN"]), args, str(masc / "images"))
    texts = mulcot_rd.texts(posts, args)
    for name, layers, seed in (("ASSISTANT", 2, 0), ("STUDENT", 1, 1)):
        model, processor = build_tiny_vlm(
            texts, word_level=False, vocab_size=2048, hidden_size=64, layers=layers, heads=2, image_size=32, seed=seed
        )
        files[name] = folder / name.lower()
        model.save_pretrained(files[name])
        processor.save_pretrained(files[name])
    files["IMAGES"] = masc / "images"
    script = commands(folder, files)
    for command in script:
        execute(command)
    return folder / "out", script


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_step_is_there(pipeline: tuple[Path, list[list[str]]]) -> None:
    _, script = pipeline
    steps = [command[1] if command[0] == "dynkp" else "train" for command in script]
    assert steps == ["train", "predict", "distill", "distill", "train", *["predict"] * 4, "evaluate"]


def test_a_teacher_comes_first_where_one_is_named(tmp_path: Path) -> None:
    """Its command is one that `dynkp rationales` takes, and the assistant trains on what it writes."""
    names = ("TRAIN", "DEV", "TEST", "IMAGES", "ASSISTANT", "STUDENT")
    environment = {"TEACHER_URL": "http://localhost:8000/v1", "TEACHER_MODEL": "large"}
    files = {name: tmp_path / name.lower() for name in names}
    script = commands(tmp_path, files, **environment)
    arguments = rationales.parser().parse_args(script[0][2:])
    assert script[0][:2] == ["dynkp", "rationales"] and (arguments.task, arguments.model) == ("masc", "large")
    assert script[1][script[1].index("--train_file") + 1] == arguments.output == str(tmp_path / "out/teacher.jsonl")


def test_the_student_learned_from_soft_labels_without_the_assistant(pipeline: tuple[Path, list[list[str]]]) -> None:
    out, _ = pipeline
    logs = {name: json.loads((out / name / "metrics.json").read_text())["log"] for name in ("assistant", "student")}
    divergences = [entry["chain_divergence"] for entry in logs["student"] if "chain_divergence" in entry]
    assert divergences and not any("chain_divergence" in entry for entry in logs["assistant"])
    for log in logs.values():
        losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
        assert losses[-1] < losses[0]
        assert all("eval_accuracy" in entry for entry in log if "eval_loss" in entry)
    truncation = json.loads((out / "soft_labels/truncation.json").read_text())
    assert 0 < truncation["divergence_kept"]["64"] < 1 and 0 < truncation["left_out"]["64"] < 1


def test_chains_are_added_iff_they_are_right(pipeline: tuple[Path, list[list[str]]]) -> None:
    out, _ = pipeline
    augmented, chains = read(out / "augmented.jsonl"), {row["id"]: row["raw"] for row in read(out / "chains.jsonl")}
    originals = [row for row in augmented if not row["id"].endswith("#assistant")]
    task = REASONING_TASKS["masc"]
    assert len(originals) == len(chains) == 348 and all(row["rationale"] and row["images"] for row in originals)
    right = {row["id"] for row in originals if task.is_right(row, chains[row["id"]])}
    added = {row["id"].removesuffix("#assistant"): row for row in augmented[348:]}
    assert added.keys() == right and all(row["rationale"] == chains[post_id] for post_id, row in added.items())


def test_both_systems_are_scored(pipeline: tuple[Path, list[list[str]]]) -> None:
    out, _ = pipeline
    report = json.loads((out / "scores.json").read_text())
    assert set(report["systems"]) == {"assistant", "student"}
    for system in report["systems"].values():
        assert system["posts"] == 60 and 0 <= system["accuracy"] <= 1 and "bleu_4" in system["chains"]
    assert 0 < report["floor"]["rouge_l"] < 1


def test_started_again_nothing_is_lost(pipeline: tuple[Path, list[list[str]]]) -> None:
    """A second pass: assistant and student stay as they are, files end as they were."""
    out, script = pipeline
    fingerprints = {name: weights_fingerprint(str(out / name)) for name in ("assistant", "student")}
    before = {name: (out / name).read_bytes() for name in ("chains.jsonl", "augmented.jsonl", "student.label.jsonl")}
    for command in script[:5]:  # the first and the last train
        execute(command)
    execute(script[-3])
    assert {name: weights_fingerprint(str(out / name)) for name in fingerprints} == fingerprints
    assert {name: (out / name).read_bytes() for name in before} == before


def test_keyphrases_from_scratch(shared: Path, tmp_path: Path) -> None:
    """The same method with the third task, without a model named: what train.py predicts is scored as keyphrases."""
    lines = (shared / "data/cmkp/train_tiny.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) | {"rationale": "People would look for it."} for line in lines[:12]]
    for name, part in (("train", rows[:9]), ("test", rows[9:])):
        text = "".join(json.dumps({key: value for key, value in row.items() if "image" not in key}) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    options = "--task keyphrases --max_steps 2 --tiny_hidden_size 32 --tiny_vocab_size 512 --max_new_tokens 8 --use_cpu true"
    files = ["--train_file", str(tmp_path / "train.jsonl"), "--eval_file", str(tmp_path / "test.jsonl")]
    train.main(["--method", "mulcot_rd", *files, *options.split(), "--output_dir", str(tmp_path / "out")])
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["method"] == "mulcot_rd" and metrics["systems"]["mulcot_rd"]["posts"] == 3
    assert {"keyphrases", "prediction"} <= read(tmp_path / "out/predictions.jsonl")[0].keys()
    assert read(tmp_path / "out/chains.jsonl")[0]["prompt"] == "chain"


def test_a_specialist_is_scored_on_what_it_was_trained_on(shared: Path, tmp_path: Path) -> None:
    masc = shared / "data/masc_t15"
    lines = (masc / "test.jsonl").read_text(encoding="utf-8").splitlines()[:12]
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    given = ["--method", "mulcot_rd", "--train_file", str(tmp_path / "train.jsonl"), "--image_dir", str(masc / "images")]
    given += ["--eval_posts", "3", "--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--max_steps", "1"]
    given += ["--tiny_hidden_size", "32", "--tiny_vocab_size", "512", "--max_new_tokens", "4", "--modality", "text"]
    with pytest.raises(ValueError, match="`eval_modalities` is not for `method` mulcot_rd"):
        train.main([*given, "--eval_modalities", "both", "text"])
    train.main(given)
    for file in ("predictions", "chains"):
        assert {row["modality"] for row in read(tmp_path / f"out/{file}.jsonl")} == {"text"}
