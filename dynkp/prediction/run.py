"""A prediction run that may be stopped at any moment, by any number of processes, and goes on where it stopped.

Given   posts, an output file, the settings of the run, and something that predicts a batch.
Gives   the output file: JSONL, one row per post (per post and decode, where there are several).
Holds   a row is appended, and on the disk, as soon as its batch is done; nothing finished is predicted again or lost,
        whatever killed the run; batches are planned over all posts, so which process computes one, and after how many
        interruptions, changes no row, even with sampling; rows of different settings never meet in one file.

The first process appends to the output itself, each other one to `OUTPUT.rank-N` beside it. When nothing is left to do,
the first puts all rows into the posts' order, in one step. `OUTPUT.meta.json` keeps the settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from dynkp.files.atomic import atomic_files
from dynkp.files.json_files import read_json, write_json
from dynkp.files.json_lines import LineAppender, repair_last_line
from dynkp.files.locks import OutputLock, output_lock
from dynkp.prediction.batch_plan import plan_batches, prompt_size
from dynkp.prediction.engine import Engine
from dynkp.prediction.generation_tasks import Modality, prompt_columns

logger = logging.getLogger(__name__)

# A post's id and the number of the decode.
Key = tuple[str, int]


class PredictionRun:
    """What is to be predicted, and what of it is done.

    Args:
        posts: a dataset or list of rows, ids distinct.
        output: the JSONL file.
        settings: what a row depends on, besides the posts: model, task, mode, decoding. JSON values.
        batch_size: posts per batch; a continued run may have another.
        modality: as in `generate_keyphrases`.
        decodes: how often each post is decoded; with more than one, rows have a column `decode` from 0.
        seed: of sampling, for the first decode; the next has the next one. None where nothing is sampled.

    Raises:
        ValueError: if the output was begun with other settings or other posts, saying which.

    Example:
        >>> run = PredictionRun(posts, "out/predictions.jsonl", {"model": "out"}, batch_size=8)
        >>> run.start(), run.predict(engine, run.pending()), run.finish()
    """

    def __init__(
        self,
        posts: Sequence[Mapping[str, Any]] | Any,
        output: str | os.PathLike[str],
        settings: Mapping[str, Any],
        *,
        batch_size: int,
        modality: Modality = "both",
        decodes: int = 1,
        seed: int | None = None,
    ):
        self.posts = posts
        self.output = Path(output)
        self.modality = modality
        self.decodes = decodes
        self.seed = seed
        digest = hashlib.sha256()
        self.ids: list[str] = []
        sizes = []
        for index, row in enumerate(posts):
            row = prompt_columns(row, index, modality)
            self.ids.append(row["id"])
            sizes.append(prompt_size(row))
            digest.update(_prompt_content(row))
        post_id, count = Counter(self.ids).most_common(1)[0] if self.ids else ("", 0)
        if count > 1:
            raise ValueError(f"post {post_id!r}: {count} posts have this id, and predictions are told apart by their ids")
        self.settings = json.loads(json.dumps({**settings, "modality": modality, "decodes": decodes, "seed": seed}))
        self.settings["posts"] = f"{len(self.ids)} posts, sha256 {digest.hexdigest()[:16]}"
        self.meta = self.output.with_name(f"{self.output.name}.meta.json")
        self.num_images = max((images for images, _ in sizes), default=0)  # of the post with the most
        batches = plan_batches(sizes, batch_size)
        self.done: set[Key] = set()
        self.plan = [(decode, batch) for decode in range(decodes) for batch in batches]
        self._lock: OutputLock | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        files = [file for file in self._files() if file.stat().st_size]
        if not files:
            return
        remedy = f"Choose another output, or delete {' '.join(map(str, files))} to begin anew."
        if not self.meta.exists():
            raise ValueError(f"{self.output} has rows, but {self.meta.name}, which says what made them, is missing. {remedy}")
        try:
            recorded = read_json(self.meta)["settings"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.meta} is damaged ({error}). {remedy}") from error
        differing = [
            f"{name} was {recorded.get(name)!r} and is {self.settings.get(name)!r}"
            for name in sorted(recorded.keys() | self.settings.keys())
            if recorded.get(name) != self.settings.get(name)
        ]
        if differing:
            raise ValueError(f"{self.output} was begun with other settings: {'; '.join(differing)}. {remedy}")

    def _files(self) -> list[Path]:
        """The output and the other processes' files, as far as they exist."""
        shards = f"{self.output.name}.rank-"
        beside = sorted(self.output.parent.iterdir()) if self.output.parent.is_dir() else []
        found = [file for file in beside if file.name.startswith(shards) and file.name[len(shards) :].isdecimal()]
        return [file for file in (self.output, *found) if file.is_file()]

    def start(self, info: Mapping[str, Any] | None = None) -> None:
        """Write the settings, and repair what a killed run left; one process calls it, before any predicts.

        From here to `finish` or `close` no other run can start with this output.

        Args:
            info: more to be written beside the settings; not compared when the run goes on.

        Raises:
            BlockingIOError: if another run is writing to the output.
            ValueError: as when the run was made, if another run has come and gone since.
        """
        # Before anything is looked at: what another run is just writing looks like a torn line, or like nothing done.
        self._lock = output_lock(self.output)
        self._check_settings()
        for file in self._files():
            if repair_last_line(file, lambda line: _key(line) is not None):
                logger.info("%s: its last line was torn; its post is predicted again.", file)
        write_json(self.meta, {"settings": self.settings, "info": dict(info or {})})

    def pending(self) -> list[tuple[int, list[int]]]:
        """The batches with a post that is not done, each as its decode and the posts' indices; one process or all.

        Every process must have called it before one predicts, or they would not see the same.
        """
        self.done = {key for file in self._files() for key, _ in self._rows(file)}
        return [
            (decode, batch) for decode, batch in self.plan if any((self.ids[index], decode) not in self.done for index in batch)
        ]

    def predict(
        self,
        engine: Engine,
        batches: Iterable[tuple[int, list[int]]],
        *,
        rank: int = 0,
        num_ranks: int = 1,
        progress: bool = True,
    ) -> None:
        """Predict this process's share of the batches, and append the rows.

        Args:
            engine: predicts a batch of posts.
            batches: what `pending` returned.
            rank: this process's number, from 0; it takes every `num_ranks`-th batch.
            num_ranks: the number of processes.
            progress: whether to show a progress bar, with posts per second and the time left.
        """
        mine = list(batches)[rank::num_ranks]
        path = self.output if rank == 0 else self.output.with_name(f"{self.output.name}.rank-{rank}")
        keys = {(self.ids[index], decode) for decode, batch in mine for index in batch}
        share = f" (process 1 of {num_ranks})" if num_ranks > 1 else ""
        with (
            LineAppender(path) as file,
            tqdm(total=len(keys), desc=f"Predicting{share}", unit="post", disable=not progress or rank != 0) as bar,
        ):
            for decode, batch in mine:
                rows = [prompt_columns(self.posts[index], index, self.modality) for index in batch]
                seed = None if self.seed is None else self.seed + decode
                # A batch of which a killed run wrote some rows is computed again as a whole, and completed.
                new = [row for row in engine(rows, seed=seed) if (row["id"], decode) not in self.done]
                file.append_rows({**row, "decode": decode} if self.decodes > 1 else row for row in new)
                file.sync()
                bar.update(len(batch))

    def finish(self) -> list[dict[str, Any]]:
        """Put the rows of all processes into the posts' order; one process calls it, after all have predicted.

        Returns:
            The rows.

        Raises:
            RuntimeError: if a post is not done.
        """
        files = self._files()
        lines = [row for file in files for row in self._rows(file)]
        rows = dict(lines)
        order = [(post_id, decode) for post_id in self.ids for decode in range(self.decodes)]
        if missing := [key for key in order if key not in rows]:
            raise RuntimeError(f"{len(missing)} of {len(order)} predictions are missing, first {missing[0]}; run it again")
        if files != [self.output] or [key for key, _ in lines] != order:
            with atomic_files(self.output) as (partial,), partial.open("wb") as file:
                file.writelines(rows[key] + b"\n" for key in order)
            for shard in files:
                if shard != self.output:
                    shard.unlink()
        self.close()
        return [json.loads(rows[key]) for key in order]

    def close(self) -> None:
        """Let other runs have the output; `finish` does it too."""
        if self._lock is not None:
            self._lock.close()

    def _rows(self, file: Path) -> Iterator[tuple[Key, bytes]]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                key = _key(line)
                if key is None:
                    raise ValueError(
                        f"{file}, line {number}: not a prediction: {line[:80]!r}. Only a run killed in the middle of its last "
                        "line can be repaired; delete the line, and it is predicted again."
                    )
                yield key, line.rstrip(b"\n")


def _key(line: bytes) -> Key | None:
    try:
        row = json.loads(line)
        return row["id"], row.get("decode", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _prompt_content(row: Mapping[str, Any]) -> bytes:
    """What of a post its prompt is made of; pictures by name or number of bytes, so that their folder may move."""
    images = row.get("images")
    names = []
    for image in [row.get("image")] if images is None else images:
        if isinstance(image, Mapping):
            image = image.get("path") or len(image.get("bytes") or b"")
        names.append(os.path.basename(image) if isinstance(image, str | os.PathLike) else repr(image)[:80])
    content = [row["id"], row.get("text"), row.get("prompt"), names]
    if row.get("aspect") is not None:
        content.append(row["aspect"])
    return (json.dumps(content, default=str) + "\n").encode()
