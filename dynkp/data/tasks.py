"""Keyphrase tasks: the prompt of a post, its two targets, and the parser of the model's answer.

A [`KeyphraseTask`] writes the chat messages of a post's prompt and the two targets of Dynamic CoT; `parse_answer` reads a
model's output.

Guarantees:

- For distinct keyphrases in which `keyphrase_problem` finds no problem, `parse_answer(target).keyphrases == keyphrases`, for
  the direct and for the reasoning target and for any rationale.
- `parse_answer` accepts any string, and its time is linear in the length of the string.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dynkp.data.choices import did_you_mean

# The parser is part of the metric, which imports nothing else of dynkp.
from dynkp.mmkp_f1.answers import ANSWER, END_ANSWER, END_THINK, TAG, THINK, Answer, normalise_phrase, parse_answer
from dynkp.mmkp_f1.answers import TAGS as TAGS
from dynkp.mmkp_f1.answers import count_words as count_words


def keyphrase_problem(phrase: Any, separator: str = "; ") -> str | None:
    """Return why a keyphrase cannot be written into a target and read back, or None if it can.

    Args:
        phrase: a gold keyphrase.
        separator: the string between keyphrases in the targets.

    Returns:
        The predicate of a sentence whose subject is the keyphrase, or None.

    Example:
        >>> keyphrase_problem("rock; roll")
        "contains the separator ';'"
        >>> keyphrase_problem("rock & roll") is None
        True
    """
    if not isinstance(phrase, str):
        return f"is not a string but {type(phrase).__name__}"
    normalised = normalise_phrase(phrase)
    if not normalised:
        return "is empty"
    if phrase != normalised:
        return "begins or ends with whitespace, '#' or an invisible character, or is not in Unicode's composed form (NFC)"
    if separator.strip() in phrase:
        return f"contains the separator {separator.strip()!r}"
    if tag := TAG.search(phrase):
        return f"contains the tag {tag.group()}"
    return None


@dataclass(frozen=True)
class KeyphraseTask:
    """A task of keyphrase prediction: the instruction of the prompt, and the format of the answer.

    Args:
        name: the key in `TASKS`, or a name of your own.
        instruction: the text behind the post's text in the prompt.
        separator: the string between keyphrases: one punctuation mark other than `<`, `>`, `/` and `#`, with or without
            whitespace around it.

    Raises:
        ValueError: if the separator is anything else.

    Example:
        >>> task = KeyphraseTask("tags", "Which tags?", separator=", ")
        >>> task.direct_target(["beagles", "dogs"])
        'beagles, dogs'
        >>> task.reasoning_target(["beagles"], "A dog.")
        '<think>A dog.</think><answer>beagles</answer>'
    """

    name: str
    instruction: str
    separator: str = "; "

    def __post_init__(self) -> None:
        mark = self.separator.strip()
        # One mark that no tag contains: a separator can neither cut a tag nor be part of one.
        if len(mark) != 1 or mark.isalnum() or mark in "<>/#":
            raise ValueError(
                f"separator={self.separator!r} must be one punctuation mark other than '<', '>', '/' and '#', "
                "with or without whitespace around it, such as '; ' or ', '"
            )

    def prompt(self, text: str, num_images: int = 0) -> list[dict[str, Any]]:
        r"""Return the chat messages of a post's prompt: its images, its text, a line break and the instruction.

        Args:
            text: the post's text; may be empty.
            num_images: number of image placeholders, at least 0.

        Returns:
            One user message with content parts, as chat templates of vision-language models take it.

        Example:
            >>> TASKS["aimkp"].prompt("my dog", 1)[0]["content"][1]["text"]
            'my dog\nWhat phrases should be used to tag the media?'
        """
        question = f"{text}\n{self.instruction}" if text else self.instruction
        images = [{"type": "image"} for _ in range(num_images)]
        return [{"role": "user", "content": [*images, {"type": "text", "text": question}]}]

    def direct_target(self, keyphrases: Sequence[str]) -> str:
        """Return the direct target, `k1; k2`.

        Args:
            keyphrases: at least one keyphrase, in the order to be learned.

        Raises:
            ValueError: if there is no keyphrase, or one cannot be read back (see `keyphrase_problem`).
        """
        if isinstance(keyphrases, str) or not keyphrases:
            raise ValueError(f"keyphrases must be a list of at least one string, got {keyphrases!r}")
        for phrase in keyphrases:
            if problem := keyphrase_problem(phrase, self.separator):
                raise ValueError(f"the keyphrase {phrase!r} {problem}: change or remove it")
        return self.separator.join(keyphrases)

    def reasoning_target(self, keyphrases: Sequence[str], rationale: str) -> str:
        """Return the reasoning target, `<think>r</think><answer>k1; k2</answer>`.

        Tags inside the rationale are written with square brackets: the teacher's rationales may contain them, and as tags
        they would end the reasoning or give another answer.

        Args:
            keyphrases: as in `direct_target`.
            rationale: why people would use these keyphrases for the post; not empty.

        Raises:
            ValueError: as in `direct_target`, or if the rationale is empty or whitespace only.
        """
        if not rationale.strip():
            raise ValueError("the rationale is empty: a post without rationale has a direct target only")
        reasoning = TAG.sub(lambda tag: f"[{tag.group()[1:-1]}]", rationale.strip())
        return f"{THINK}{reasoning}{END_THINK}{ANSWER}{self.direct_target(keyphrases)}{END_ANSWER}"

    def parse(self, output: str) -> Answer:
        """Read a model's output with this task's separator.

        Args:
            output: the output, any string.

        Returns:
            As `parse_answer`.
        """
        return parse_answer(output, self.separator)


TASKS = {
    task.name: task
    for task in (
        # The paper does not print its prompt. This one asks neither for reasoning nor for a bare answer: when to begin with
        # <think> is what Dynamic CoT teaches.
        KeyphraseTask("dynamic_cot", "Which keyphrases would the author tag this post with?"),
        # AimKP's prompt, as printed in the paper; answers are joined by ", ".
        KeyphraseTask("aimkp", "What phrases should be used to tag the media?", separator=", "),
    )
}
"""The keyphrase tasks by name: `dynamic_cot` (answers joined by "; ") and `aimkp` (prompt as printed, joined by ", ")."""


def resolve_task(task: str | KeyphraseTask) -> KeyphraseTask:
    """Return the task of a name; a `KeyphraseTask` is returned as it is.

    Args:
        task: a key of `TASKS`, or a task.

    Raises:
        ValueError: if no task has that name.

    Example:
        >>> resolve_task("aimkp").separator
        ', '
    """
    if isinstance(task, KeyphraseTask):
        return task
    if task not in TASKS:
        known = ", ".join(TASKS)
        raise ValueError(
            f"task={task!r} is not known: use one of {known}, or a KeyphraseTask of your own.{did_you_mean(task, TASKS)}"
        )
    return TASKS[task]
