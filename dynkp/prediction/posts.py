"""The posts that can be predicted: read, checked, and stripped of everything that a prompt may not show."""

from __future__ import annotations

from typing import Any

from dynkp.batches.image_sizes import SizeCheck
from dynkp.data.posts import validate_posts
from dynkp.data.reasoning_tasks import ReasoningTask
from dynkp.data.sentiment_posts import read_sentiment_posts
from dynkp.data.sources import load_posts
from dynkp.data.tasks import KeyphraseTask

# Whatever is wrong with these, a prediction does not depend on them.
_GOLD = ("keyphrases", "rationale", "label")


def load_posts_to_predict(
    source: str,
    task: KeyphraseTask | ReasoningTask,
    *,
    image_dir: str | None = None,
    split: str = "test",
    on_invalid: str = "error",
    use_images: bool = True,
    processor: Any = None,
    progress: bool = True,
    is_first_process: bool = True,
    num_processes: int = 1,
) -> Any:
    """Load the posts that can be predicted.

    With several processes, each calls this; the first checks the posts and tells the others which to keep.

    Args:
        source: file, folder or Hub id, in any format that docs/data.md names.
        task: what will be asked: a task about an aspect needs one in each post.
        image_dir: the folder that image names are relative to.
        split: of a folder or Hub dataset.
        on_invalid: `"error"`, or `"skip"` to leave out posts that cannot be predicted.
        use_images: whether the model will be shown images; each is then opened.
        processor: the model's processor, which may refuse images of some sizes; None to not ask it.
        progress: whether to show a progress bar.
        is_first_process: whether this process is the first of its group.
        num_processes: number of processes of the group.

    Returns:
        A dataset with `id`, `text`, `images` and, where the task has one, `aspect` or a written-out `prompt`.

    Raises:
        ValueError: on every process, if posts cannot be read or predicted, or there is none.
    """
    where: dict[str, Any] = {"image_dir": image_dir, "split": split}
    reasons = isinstance(task, ReasoningTask)
    if isinstance(task, ReasoningTask) and task.labels:
        posts: Any = read_sentiment_posts(source, task=task, need_labels=False, **where)
    else:
        posts = load_posts(source, **where)
    if not len(posts):
        raise ValueError(f"{source}: there are no posts to predict")
    posts = posts.remove_columns([name for name in _GOLD if name in posts.column_names])
    kept: list[Any] = [None]
    if is_first_process:
        try:
            numbered = posts.add_column("_row", list(range(len(posts))))
            valid, report = validate_posts(
                numbered,
                on_invalid=on_invalid,
                need_keyphrases=False,
                use_images=use_images,
                refuses=None if processor is None else SizeCheck(processor),
                separator="; " if isinstance(task, ReasoningTask) else task.separator,
                progress=progress,
            )
            if use_images and report.without_image == report.total and "prompt" not in valid.column_names:
                raise ValueError(
                    f"{source}: the model reads images, but none of the {report.total:,} posts has one. Images are read from "
                    f"the column 'images' (or 'image'); the columns are {', '.join(posts.column_names)}. If text alone is "
                    "meant, give --modality text."
                )
            kept = [valid["_row"][:]]
        except ValueError as error:
            kept = [str(error)]
    if num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(kept)
    if isinstance(kept[0], str):
        raise ValueError(kept[0])
    content = ("id", "text", "images", "aspect" if reasons else "prompt")
    return posts.select(kept[0]).select_columns([name for name in content if name in posts.column_names])
