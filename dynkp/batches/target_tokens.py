"""Tokens of targets, in which the tags of reasoning and answer are tokenized apart from their neighbours.

A vocabulary without tokens of their own for the tags would otherwise merge a tag with what stands behind it (`>The`,
`><answer`), and a `<think>` that is forced at prediction would be a sequence of tokens that no target begins with.

Guarantees:

- The tokens of a text that ends with a tag are the first tokens of every target that begins with this text.
- Where `<think>` and `</think>` are tokens of their own, the tokens are those of the tokenizer.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from dynkp.data.tasks import END_THINK, TAGS, THINK

# A tag; at the beginning of a target with the whitespace that the template writes in front of it.
_TAGS = re.compile(r"(\A\s*</?(?:think|answer)>|</?(?:think|answer)>)")


class TargetTokens(NamedTuple):
    """The tokens of a target.

    Attributes:
        input_ids (`list[int]`): T token ids.
        ends (`list[int]`): of each token, the position behind its last character in the text; empty if not asked for.
    """

    input_ids: list[int]
    ends: list[int]


class TargetTokenizer:
    """Tokenizes targets.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the model's tokenizer.

    Example:
        >>> from dynkp.synthetic.tiny_model import build_tiny_vlm
        >>> model, processor = build_tiny_vlm(["goal", "mufc"])
        >>> tokenize = TargetTokenizer(processor.tokenizer)
        >>> tokenize("<think>goal</think>").input_ids[:1] == tokenize("<think>").input_ids
        True
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        contents = {str(token.content) for token in added.values()}
        self.splits = not {THINK, END_THINK} <= contents
        # Some tokenizers (SentencePiece) put a blank in front of a text that is tokenized by itself. Behind a token that is
        # never merged with its neighbours, a text is tokenized as in the middle of another.
        anchors = [index for index, token in added.items() if not token.rstrip and str(token.content) not in TAGS]
        preferred = tokenizer.eos_token_id
        self._anchor = ""
        if anchors:
            index = preferred if preferred in anchors else anchors[0]
            content = str(added[index].content)
            if self._ids(content) == [index]:
                self._anchor = content

    def __call__(self, text: str, ends: bool = False) -> TargetTokens:
        """Tokenize a target.

        Args:
            text (`str`): a target, or the beginning of one.
            ends (`bool`, *optional*, defaults to `False`): whether to return the tokens' ends, which needs a fast tokenizer.

        Returns:
            [`TargetTokens`].
        """
        pieces = [piece for piece in _TAGS.split(text) if piece] if self.splits else [text]
        if len(pieces) < 2:
            return self._tokens(text, "", 0, ends)
        found, position = TargetTokens([], []), 0
        for number, piece in enumerate(pieces):
            tokens = self._tokens(piece, self._anchor if number else "", position, ends)
            found.input_ids.extend(tokens.input_ids)
            found.ends.extend(tokens.ends)
            position += len(piece)
        return found

    def _tokens(self, piece: str, anchor: str, position: int, ends: bool) -> TargetTokens:
        """Tokenize a piece of a text that begins at a position of the text."""
        output: Any = self.tokenizer(anchor + piece, add_special_tokens=False, return_offsets_mapping=ends)
        behind = position - len(anchor)
        offsets = [end + behind for _, end in output["offset_mapping"]] if ends else []
        first = 1 if anchor else 0
        return TargetTokens(list(output["input_ids"][first:]), offsets[first:])

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids
