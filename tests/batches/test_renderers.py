"""Invariants of what all renderers share:

- the end of turn is the one of the family's chat template;
- a control token that is spelled out in a text is broken by a space, and nothing else is changed;
- without the template's trailing tokens, a target is the answer and the end-of-turn token;
- a processor without a chat template is refused.
"""

from __future__ import annotations

import pytest

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.batches.reasoning_renderer import ReasoningRenderer
from tests.support.chat_formats import END_OF_TURN, post, tokenizer_of
from tests.support.tiny_models import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_end_of_turn_and_control_tokens(family: str) -> None:
    _, processor = build(family)
    for renderer in (KeyphraseRenderer(processor), ReasoningRenderer(processor, "msc")):
        assert renderer.end_of_turn == END_OF_TURN[family]
        token = tokenizer_of(processor).eos_token
        assert renderer.break_control_tokens(f"a{token}b <think> <b>") == f"a{token[0]} {token[1:]}b <think> <b>"


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_without_the_template_s_whitespace_are_answer_and_end_of_turn(family: str) -> None:
    _, processor = build(family)
    whole, bare = (KeyphraseRenderer(processor, trailing_template_tokens=keep) for keep in (True, False))
    for kind in ("direct", "reasoning"):
        target = whole.target(post(), 0, kind)
        assert target is not None and target.endswith(END_OF_TURN[family])
        assert bare.target(post(), 0, kind) == target.removesuffix(END_OF_TURN[family]) + END_OF_TURN[family].strip()
    counts = [
        len(PairedTargetCollator(processor, trailing_template_tokens=keep)([post()])["direct"]["input_ids"][0])
        for keep in (True, False)
    ]
    blanks = END_OF_TURN[family] != END_OF_TURN[family].strip()
    assert counts[0] - counts[1] == int(blanks)


def test_a_processor_without_chat_template_is_an_error() -> None:
    _, processor = build("llama")
    processor.chat_template = None
    for renderer_class, task in ((KeyphraseRenderer, "aimkp"), (ReasoningRenderer, "msc")):
        with pytest.raises(ValueError, match="`processing_class`.*chat_template_path"):
            renderer_class(processor, task)
