"""Reasoning tasks: MulCoT-RD's tasks, each with a label prompt and a response-chain prompt.

A response chain is an answer in named fields: four analyses (`Text_analysis`, `Image_analysis`, `Conflict_resolution`,
`Final_conclusion`) and the `Prediction`. The label prompt asks for the field `Prediction` alone.

A [`ReasoningTask`] makes, from a row with `id`, `text`, `images` and (depending on the task) `aspect`, `label`, `keyphrases`
and `rationale`, the chat messages of both prompts and of the teacher's second question, and both targets; and it reads a
model's output.

Guarantees:

- The prompts of a post begin with the same images, text, aspect and question, so that this beginning is computed once.
- Neither the label prompt nor the response-chain prompt depends on gold columns.
- `parse(target).prediction` is the gold answer, for both targets and for any rationale.
- `parse` accepts any string.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from dynkp.data.choices import did_you_mean
from dynkp.data.tasks import KeyphraseTask

SENTIMENTS = ("positive", "neutral", "negative")
ANALYSES = ("Text_analysis", "Image_analysis", "Conflict_resolution", "Final_conclusion")
PREDICTION = "Prediction"

_NAME = "|".join(name.replace("_", "[_ ]") for name in (*ANALYSES, PREDICTION))
# `"Text_analysis": "...`, `**Prediction:** x`, `- Prediction: x` or a heading `### Text_analysis`: at the start of a line
# only, since the words may occur inside a text.
_HEADER = re.compile(
    rf"^[ \t{{>-]*[\"'`*]*({_NAME})[\"'`*]*[ \t]*:|^[ \t]*#+[ \t]*[*]*({_NAME})[*]*[ \t]*:?[ \t]*$",
    re.IGNORECASE | re.MULTILINE,
)


class ResponseChain(NamedTuple):
    """A response chain (or the field Prediction alone), as read from a model's output.

    Attributes:
        fields: the analyses in the output, by name, in the order of `ANALYSES`; may be empty.
        prediction: one of the task's labels, or keyphrases joined by the task's separator; None if there is none.
    """

    fields: dict[str, str]
    prediction: str | None


@dataclass(frozen=True)
class ReasoningTask:
    """A classification of posts whose answer is a response chain or the label alone.

    Args:
        name: the key in `REASONING_TASKS`, or a name of your own.
        question: the question about the post, in both prompts; it ends their shared beginning.
        analyses: the fields of a response chain in front of the prediction, and what each should contain.
        labels: the labels, in lower case.
        takes_aspect: whether the question is about the row's `aspect`.

    Example:
        >>> task = REASONING_TASKS["masc"]
        >>> row = {"id": "1", "text": "Go Cubs", "images": [], "aspect": "Cubs", "label": "positive", "rationale": None}
        >>> task.label_target(row), task.chain_target(row)
        ('"Prediction": positive', None)
        >>> task.parse('"Prediction": "positive"').prediction
        'positive'
    """

    name: str
    question: str
    analyses: Mapping[str, str]
    labels: tuple[str, ...] = SENTIMENTS
    takes_aspect: bool = False

    def chain_prompt(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the chat messages that ask for a response chain.

        Args:
            row: a post with `text`, `images` (one placeholder is written for each) and, if the task takes one, `aspect`.

        Raises:
            ValueError: naming the post, if its aspect is missing.
        """
        return self._messages(row, self._chain_request())

    def label_prompt(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the chat messages that ask for the prediction alone.

        Args:
            row: as in `chain_prompt`.

        Raises:
            ValueError: as in `chain_prompt`.
        """
        return self._messages(row, f"Answer with this field alone:\n{self._prediction_request()}")

    def explain_prompt(self, row: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the response-chain prompt with the gold answer: the teacher's second question after a wrong first answer.

        Args:
            row: as in `chain_prompt`, with the gold answer.

        Raises:
            ValueError: as in `chain_prompt` and `answer`.
        """
        told = f"The right answer is known: {self.answer(row)}. Explain why it is right, and predict it.\n"
        return self._messages(row, told + self._chain_request())

    def chain_target(self, row: Mapping[str, Any]) -> str | None:
        """Return the response-chain target.

        The rationale's fields are written in one format, `"Name": "value"` with an empty line between two, in whatever
        format the teacher wrote them (JSON, headings, code fences). Text before the first field and after the prediction is
        removed. A rationale without fields becomes the Final_conclusion. The last field is always the gold answer.

        Args:
            row: a post with its gold answer and, if it has one, a `rationale`.

        Returns:
            The target, or None for a post without rationale.

        Raises:
            ValueError: naming the post, if its answer is missing or is not one of the task's labels.
        """
        rationale = (row.get("rationale") or "").strip()
        if not rationale:
            return None
        fields = self.parse(rationale).fields or {"Final_conclusion": _bare(_HEADER.split(rationale, maxsplit=1)[0])}
        written = [f'"{name}": "{value}"' for name, value in fields.items() if value]
        return "\n\n".join([*written, self.label_target(row)])

    def label_target(self, row: Mapping[str, Any]) -> str:
        """Return the label target: the field Prediction with the gold answer.

        Args:
            row: a post with its gold answer.

        Raises:
            ValueError: naming the post, if its answer is missing or is not one of the task's labels.
        """
        return f'"{PREDICTION}": {self.answer(row)}'

    def answer(self, row: Mapping[str, Any]) -> str:
        """Return the gold answer as `parse` reads it.

        Args:
            row: a post with `id` and `label`.

        Raises:
            ValueError: naming the post, if its answer is missing or is not one of the task's labels.
        """
        label = row.get("label")
        if label not in self.labels:
            raise ValueError(
                f"post {row.get('id', '?')!r}: label={label!r} is none of {', '.join(self.labels)}, the labels of task "
                f"{self.name!r}: correct the label, or drop the post"
            )
        return label

    def is_right(self, row: Mapping[str, Any], output: str) -> bool:
        """Return whether an output predicts the gold answer, so that its response chain may be trained on.

        Args:
            row: a post with its gold answer.
            output: a model's output.
        """
        return self.parse(output).prediction == self.answer(row)

    def parse(self, output: str) -> ResponseChain:
        """Read an output of either prompt.

        The prediction is the label named in the first line of the field Prediction; without such a field, the bare word
        in the last line of a response chain, or the label named in the last line of an output without any fields. A line
        that names several labels, such as "positive/neutral/negative", predicts none.

        Args:
            output: a model's output, any string.

        Returns:
            The analyses and the prediction.

        Raises:
            TypeError: if `output` is not a string.
        """
        if not isinstance(output, str):
            raise TypeError(f"output must be a string, got {type(output).__name__}: {output!r:.80}")
        found = _json_fields(output) or _headed_fields(output)
        if PREDICTION not in found:
            before, _, last = _bare(output).rpartition("\n")
            # A response chain that was cut off ends within an analysis, which may well name a label.
            if not found or (self.labels and len(last.split()) == 1 and self._read(last)):
                found = {**_headed_fields(before), PREDICTION: last}
        fields = {name: found[name] for name in ANALYSES if found.get(name)}
        return ResponseChain(fields, self._read((found.get(PREDICTION) or "").partition("\n")[0]))

    def _read(self, line: str) -> str | None:
        """Return the answer in the line that has the prediction."""
        named = {word for word in re.findall(r"\w+", line.lower()) if word in self.labels}
        return named.pop() if len(named) == 1 else None

    def _chain_request(self) -> str:
        fields = "".join(f'"{name}": "{what}"\n' for name, what in self.analyses.items())
        return f"Answer with these fields, with an empty line between two:\n{fields}{self._prediction_request()}"

    def _prediction_request(self) -> str:
        return f'"{PREDICTION}": {self._answer_format()}'

    def _answer_format(self) -> str:
        return "/".join(self.labels)

    def _messages(self, row: Mapping[str, Any], request: str) -> list[dict[str, Any]]:
        lines = [f"Text of the post: {row.get('text') or '(none)'}"]
        if self.takes_aspect:
            aspect = (row.get("aspect") or "").strip()
            if not aspect:
                raise ValueError(
                    f"post {row.get('id', '?')!r}: aspect={row.get('aspect')!r}, but task {self.name!r} asks about an aspect: "
                    "give one, or use task 'msc' for whole posts"
                )
            lines.append(f"Aspect: {aspect}")
        images = [{"type": "image"} for _ in row.get("images") or []]
        text = "\n".join([*lines, "", self.question, request])
        return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


@dataclass(frozen=True)
class KeyphraseReasoningTask(ReasoningTask):
    """Keyphrase prediction as a reasoning task: the answer is the post's `keyphrases`, joined.

    Args:
        keyphrase_task: writes and reads the keyphrases of an answer.

    Example:
        >>> task = REASONING_TASKS["keyphrases"]
        >>> task.label_target({"id": "1", "keyphrases": ["nba", "finals"]})
        '"Prediction": "nba; finals"'
        >>> task.parse('"Prediction": "nba; finals"').prediction
        'nba; finals'
    """

    labels: tuple[str, ...] = ()
    keyphrase_task: KeyphraseTask = KeyphraseTask("keyphrases", "")  # noqa: RUF009 (frozen)

    def answer(self, row: Mapping[str, Any]) -> str:
        """Return the gold keyphrases, joined; as `ReasoningTask.answer`."""
        try:
            return self.keyphrase_task.direct_target([" ".join(phrase.split()) for phrase in row.get("keyphrases") or ()])
        except ValueError as error:
            raise ValueError(f"post {row.get('id', '?')!r}: {error}") from error

    def label_target(self, row: Mapping[str, Any]) -> str:
        """Return the label target, in quotes; as `ReasoningTask.label_target`."""
        # In quotes, since keyphrases may contain or begin with quotes of their own.
        return f'"{PREDICTION}": "{self.answer(row)}"'

    def is_right(self, row: Mapping[str, Any], output: str) -> bool:
        """Return whether an output predicts keyphrases and all of them are the post's, ignoring case.

        Args:
            row: a post with its gold keyphrases.
            output: a model's output.
        """
        predicted = self.keyphrases(output)
        gold = {phrase.casefold() for phrase in self.keyphrase_task.parse(self.answer(row)).keyphrases}
        return bool(predicted) and {phrase.casefold() for phrase in predicted} <= gold

    def keyphrases(self, output: str) -> list[str]:
        """Return the keyphrases of an output, in its order.

        Args:
            output: a model's output.
        """
        return self.keyphrase_task.parse(self.parse(output).prediction or "").keyphrases

    def _read(self, line: str) -> str | None:
        return self.keyphrase_task.separator.join(self.keyphrase_task.parse(line).keyphrases) or None

    def _answer_format(self) -> str:
        return f'"the keyphrases, joined by {self.keyphrase_task.separator.strip()!r}"'


def _json_fields(output: str) -> dict[str, str]:
    """Return the fields of an output that is, or contains, one JSON object."""
    start, end = output.find("{"), output.rfind("}")
    try:
        content = json.loads(output[start : end + 1], strict=False) if 0 <= start < end else None
    except (ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    names = {name.casefold(): name for name in (*ANALYSES, PREDICTION)}
    # Line breaks become spaces: a line of a value must not look like a field in the target.
    return {
        names[folded]: " ".join(_as_text(value).split())
        for key, value in content.items()
        if (folded := key.casefold().replace(" ", "_")) in names
    }


def _as_text(value: Any) -> str:
    """Return a value of JSON as text: a list as its items, joined like keyphrases; null as an empty string."""
    if isinstance(value, list):
        return "; ".join(map(_as_text, value))
    return "" if value is None else str(value)


def _headed_fields(output: str) -> dict[str, str]:
    """Return the fields of an output in which each field begins a line; of a repeated prediction the first counts."""
    names = {name.casefold(): name for name in (*ANALYSES, PREDICTION)}
    headers = list(_HEADER.finditer(output))
    ends = [*(header.start() for header in headers), len(output)][1:]
    fields: dict[str, str] = {}
    for header, end in zip(headers, ends, strict=True):
        name = names[(header[1] or header[2]).casefold().replace(" ", "_")]
        value = _bare(output[header.end() : end])
        if name not in fields:
            fields[name] = value
        elif name != PREDICTION:
            fields[name] = "\n".join(filter(None, (fields[name], value)))
    return fields


def _bare(value: str) -> str:
    """Strip what surrounds a value: whitespace, a code fence, JSON's brackets and commas, emphasis, one pair of quotes."""
    end = len(value)
    while end:
        if value[end - 1].isspace() or value[end - 1] in "*,}":
            end -= 1
        elif value.endswith("```", 0, end):
            end -= 3
        else:
            break
    value = value[:end].lstrip(" \t\r\n*")
    if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'":
        value = value[1:-1].strip()
    return value


_SENTIMENT = (
    "Positive is pleased, hopeful, admiring or amused; negative is displeased, worried, sad, angry or mocking; neutral is "
    "neither, as in news and plain facts."
)

REASONING_TASKS: dict[str, ReasoningTask] = {
    task.name: task
    for task in (
        ReasoningTask(
            "msc",
            f"Which sentiment does the post as a whole, its text and its images, express? {_SENTIMENT}",
            {
                "Text_analysis": "the sentiment of the text, in brief, and why",
                "Image_analysis": "the sentiment of the images, in brief, and why",
                "Conflict_resolution": "whether the two conflict, and if so which outweighs the other",
                "Final_conclusion": "what text and images together say",
            },
        ),
        ReasoningTask(
            "masc",
            "Which sentiment does the author of the post have towards the aspect? It may differ from the sentiment of the post "
            f"as a whole. {_SENTIMENT}",
            {
                "Text_analysis": "the sentiment of the text towards the aspect, in brief, and why",
                "Image_analysis": "the sentiment of the images towards the aspect, in brief, and why",
                "Conflict_resolution": "whether the two conflict, and if so which outweighs the other",
                "Final_conclusion": "what text and images together say about the aspect",
            },
            takes_aspect=True,
        ),
        KeyphraseReasoningTask(
            "keyphrases",
            "Which keyphrases would the author tag this post with?",
            {
                "Text_analysis": "what the text is about, in brief",
                "Image_analysis": "what the images show, in brief",
                "Conflict_resolution": "what one of them says that the other does not",
                "Final_conclusion": "which topics people would look for to find the post",
            },
        ),
    )
}
"""The tasks of MulCoT-RD by name: `msc` and `masc` (sentiment of a post, and towards an aspect) and `keyphrases`."""


def resolve_reasoning_task(task: str | ReasoningTask) -> ReasoningTask:
    """Return the task of a name; a `ReasoningTask` is returned as it is.

    Args:
        task: a key of `REASONING_TASKS`, or a task.

    Raises:
        ValueError: if no task has that name.

    Example:
        >>> resolve_reasoning_task("masc").takes_aspect
        True
    """
    if isinstance(task, ReasoningTask):
        return task
    if task not in REASONING_TASKS:
        known = ", ".join(REASONING_TASKS)
        raise ValueError(
            f"task={task!r} is not known: use one of {known}, or a ReasoningTask of your own."
            f"{did_you_mean(task, REASONING_TASKS)}"
        )
    return REASONING_TASKS[task]
