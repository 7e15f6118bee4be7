"""Invariants of what all renderers share:

- the end of turn is the one of the family's chat template;
- a control token that is spelled out in a text is broken by a space, and nothing else is changed;
- a processor without a chat template is refused.
"""

from __future__ import annotations

import pytest

from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.batches.reasoning_renderer import ReasoningRenderer
from tests.support.chat_formats import END_OF_TURN, tokenizer_of
from tests.support.tiny_models import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_turn_and_control_tokens(family: str) -> None:
    _, processor = build(family)
    for renderer in (KeyphraseRenderer(processor), ReasoningRenderer(processor, "msc")):
        assert renderer.end_of_turn == END_OF_TURN[family]
        token = tokenizer_of(processor).eos_token
        assert renderer.break_control_tokens(f"a{token}b <think> <b>") == f"a{token[0]} {token[1:]}b <think> <b>"


def test_a_processor_without_chat_template_is_an_error() -> None:
    _, processor = build("llama")
    processor.chat_template = None
    for renderer_class, task in ((KeyphraseRenderer, "aimkp"), (ReasoningRenderer, "msc")):
        with pytest.raises(ValueError, match="`processing_class`.*chat_template_path"):
            renderer_class(processor, task)
