"""Resumable prediction runs: predictions for posts, written to a file, by one or several processes.

A run may be interrupted at any time and continued by starting it again. The output is a JSON Lines file with one row per
post (or per post and decode, if there are several decodes).

Guarantees:

- The rows of a batch are appended and written to disk as soon as the batch is done. No finished prediction is computed again
  or lost, however the run ended.
- Batches are planned over all posts. Rows therefore do not depend on which process computes a batch or on how often the run
  was interrupted, even with sampling.
- A file has rows of one set of settings only.

The first process appends to the output itself, each other process to `OUTPUT.rank-N` beside it. When all predictions are done,
the first process writes all rows to the output in the posts' order, atomically. `OUTPUT.meta.json` has the settings.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from tqdm.auto import tqdm

from dynkp.files.atomic import atomic_files
from dynkp.files.json_files import read_json, write_json
from dynkp.files.json_lines import LineAppender, repair_last_line
from dynkp.files.locks import OutputLock, output_lock
from dynkp.prediction.batch_plan import plan_batches, prompt_size
from dynkp.prediction.engine import Engine
from dynkp.prediction.generation_tasks import Modality, prompt_columns

logger = logging.getLogger(__name__)

Key: TypeAlias = tuple[str, int]
"""A post's id and the number of the decode."""


class PredictionRun:
    """A resumable prediction run.

    Args:
        posts: a dataset or list of posts with distinct ids.
        output: the JSON Lines file.
        settings: what a prediction depends on, besides the posts: model, task, mode, decoding. JSON values.
        batch_size: number of posts per batch; a continued run may have another.
        modality: as in `generate_keyphrases`.
        decodes: how often each post is decoded; with more than one decode, rows have a column `decode` from 0.
        seed: seed of sampling, for the first decode; decode i has the seed `seed` + i. None if nothing is sampled.

    Attributes:
        output: the file.
        settings: all settings, as they are written beside the output.
        ids: the posts' ids, in order.
        plan: all batches, each as the number of its decode and the indices of its posts.
        done: predictions that are done, as of the last call of `pending`.
        num_images: greatest number of images of a post.

    Raises:
        ValueError: naming what differs, if the output was started with other settings or other posts; naming the post, if
            its id occurs twice.

    Example:
        >>> import tempfile
        >>> posts = [{"id": "1", "text": "my dog"}, {"id": "2", "text": "the sea"}]
        >>> def engine(rows, seed=None):  # in place of a `TransformersEngine`
        ...     return [{"id": row["id"], "keyphrases": [row["text"]]} for row in rows]
        >>> run = PredictionRun(posts, f"{tempfile.mkdtemp()}/predictions.jsonl", {"model": "out"}, batch_size=8)
        >>> run.start()
        >>> run.predict(engine, run.pending(), progress=False)
        >>> run.finish()[1]
        {'id': '2', 'keyphrases': ['the sea']}
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
            raise ValueError(
                f"post {post_id!r}: {count} posts have this id, but predictions are identified by their ids; give distinct ids"
            )
        self.settings = json.loads(json.dumps({**settings, "modality": modality, "decodes": decodes, "seed": seed}))
        self.settings["posts"] = f"{len(self.ids)} posts, sha256 {digest.hexdigest()[:16]}"
        self.meta = self.output.with_name(f"{self.output.name}.meta.json")
        self.num_images = max((images for images, _ in sizes), default=0)
        batches = plan_batches(sizes, batch_size)
        self.done: set[Key] = set()
        self.plan = [(decode, batch) for decode in range(decodes) for batch in batches]
        self._lock: OutputLock | None = None
        self._check_settings()

    def _check_settings(self) -> None:
        files = [file for file in self._files() if file.stat().st_size]
        if not files:
            return
        remedy = f"Choose another output, or delete {' '.join(map(str, files))} to start again."
        if not self.meta.exists():
            raise ValueError(f"{self.output} has rows, but {self.meta.name}, the file of their settings, is missing. {remedy}")
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
            raise ValueError(f"{self.output} was started with other settings: {'; '.join(differing)}. {remedy}")

    def _files(self) -> list[Path]:
        """Return the output and the other processes' files, if they exist."""
        shards = f"{self.output.name}.rank-"
        beside = sorted(self.output.parent.iterdir()) if self.output.parent.is_dir() else []
        found = [file for file in beside if file.name.startswith(shards) and file.name[len(shards) :].isdecimal()]
        return [file for file in (self.output, *found) if file.is_file()]

    def start(self, info: Mapping[str, Any] | None = None) -> None:
        """Start or continue the run: write the settings, and repair the files of a killed run.

        One process calls it, before any process predicts. From this call to `finish` or `close` no other run can start with
        the same output.

        Args:
            info: further values to write beside the settings; they may differ when the run is continued.

        Raises:
            BlockingIOError: if another run is writing to the output.
            ValueError: if another run with other settings has written to the output since this object was made.
        """
        # Locked before the files are read: a line that another run is just writing would look like a torn one.
        self._lock = output_lock(self.output)
        self._check_settings()
        for file in self._files():
            if repair_last_line(file, lambda line: _key(line) is not None):
                logger.info("%s: its last line was torn; its post is predicted again.", file)
        write_json(self.meta, {"settings": self.settings, "info": dict(info or {})})

    def pending(self) -> list[tuple[int, list[int]]]:
        """Return the batches with a prediction that is not done.

        If there are several processes, all of them call this before any of them predicts, so that all get the same batches.

        Returns:
            Batches, each as the number of its decode and the indices of its posts.

        Raises:
            ValueError: naming file and line, if a line is not a prediction.
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
            rank: rank of this process, from 0; it predicts every `num_ranks`-th batch.
            num_ranks: number of processes.
            progress: whether to show a progress bar, with posts per second and the remaining time.
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
        """Write the rows of all processes to the output, in the posts' order; close the run.

        One process calls it, after all processes have predicted.

        Returns:
            The rows.

        Raises:
            RuntimeError: if predictions are missing.
            ValueError: naming file and line, if a line is not a prediction.
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
        """Release the lock on the output, so that other runs can start; `finish` does this too."""
        if self._lock is not None:
            self._lock.close()

    def _rows(self, file: Path) -> Iterator[tuple[Key, bytes]]:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                key = _key(line)
                if key is None:
                    raise ValueError(
                        f"{file}, line {number}: not a prediction: {line[:80]!r}. Only a torn last line of a killed run is "
                        "repaired; delete this line, and its post is predicted again."
                    )
                yield key, line.rstrip(b"\n")


def _key(line: bytes) -> Key | None:
    try:
        row = json.loads(line)
        return row["id"], row.get("decode", 0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _prompt_content(row: Mapping[str, Any]) -> bytes:
    """Return what a post's prompt is made of; images as names or numbers of bytes, so that their folder may be moved."""
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
