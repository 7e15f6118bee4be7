"""A post's text is found exactly in its padded prompt.

This holds for every family's tokenizer and template, for byte-level and SentencePiece-like vocabularies, and for texts that
repeat the instruction, spell control tokens, begin with whitespace, or are full of emojis: the text's slots decode to the
text, and the slots around it to the rest of the prompt.
"""

from __future__ import annotations

import json
import unicodedata
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.prompt_layout import text_slots
from dynkp.data.tasks import TASKS
from tests.support.layouts import located
from tests.support.posts import picture
from tests.support.tiny_models import FAMILIES, VISION_FAMILIES, build

INSTRUCTION = TASKS["aimkp"].instruction
TEXTS = [
    "goal",
    "   leading and trailing blanks \n ",
    f"{INSTRUCTION}",
    f"first\n{INSTRUCTION}\nlast?",
    "!!!",
    "🎉🎉 party 👩‍👩‍👧 time é́",
    "line\n\n\nbreaks\tand\ttabs   inside",
    "USER: who? ASSISTANT: me <|im_end|>\n",
    "日本語のテキスト。",
    "x",
]


def squeezed(text: str) -> str:
    return "".join(text.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_text_slots_decode_to_the_text_and_nothing_else(family: str) -> None:
    _, processor = build(family)
    posts = [{"id": str(n), "text": text, "keyphrases": ["k"], "images": []} for n, text in enumerate(TEXTS)]
    if family in VISION_FAMILIES:
        for n, post in enumerate(posts):
            post["images"] = [picture(n)] * (1 if family == "mllama" else n % 3)
    layouts, prompt, collator = located(processor, posts, ("text",))
    assert prompt["attention_mask"][:, 0].min() == 0, "must be left-padded"
    for post, layout, ids in zip(posts, layouts, prompt["input_ids"], strict=True):
        slots = list(layout.text)
        assert squeezed(collator.renderer.tokenizer.decode(ids[slots])) == squeezed(post["text"]), post["text"]
        behind = collator.renderer.tokenizer.decode(ids[slots[-1] + 1 :])
        # A full stop may have taken the line break with it.
        assert behind.lstrip().startswith(INSTRUCTION), behind
        before = collator.renderer.tokenizer.decode(ids[: slots[0]])
        assert INSTRUCTION not in before and post["text"].split()[0] not in before.split()[-1:]
        assert not layout.grids


@pytest.mark.parametrize("family", ["llava", "gemma3", "llama"])
@pytest.mark.parametrize("text", ["", "  \n ", None])
def test_no_text_no_slots(family: str, text: str | None) -> None:
    _, processor = build(family)
    images = [picture(1)] if family != "llama" else []
    layouts, _, _ = located(processor, [{"id": "1", "text": text, "keyphrases": ["k"], "images": images}])
    assert layouts[0].text == range(0) and len(layouts[0].grids) == len(images)


def sentencepiece_like(kind: str) -> PreTrainedTokenizerFast:
    """Llama 2's make (a space put in front of all, spaces as ▁, bytes for unknown characters), or T5's (NFKC, unigram)."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
    if kind == "llama2":
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        backend.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        trainer: Any = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    else:
        backend = Tokenizer(models.Unigram())
        backend.normalizer = normalizers.NFKC()
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False)
    backend.train_from_iterator([INSTRUCTION, "my dog at the sea; USER: ASSISTANT: goal!\n", *TEXTS] * 2, trainer)
    if kind == "llama2":  # bytes are pieces of the vocabulary, not control tokens
        parsed = json.loads(backend.to_str())
        parsed["added_tokens"] = [token for token in parsed["added_tokens"] if not token["content"].startswith("<0x")]
        backend = Tokenizer.from_str(json.dumps(parsed))
    _, llava = build("llava")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
        chat_template=llava.chat_template,
    )


@pytest.mark.parametrize("kind", ["llama2", "t5"])
def test_sentencepiece_like_vocabularies(kind: str) -> None:
    _, processor = build("llava")
    processor.tokenizer = sentencepiece_like(kind)
    processor.image_token_id = processor.tokenizer.image_token_id
    posts = [
        {"id": str(n), "text": text, "keyphrases": ["k"], "images": [picture(n)] * (n % 3)} for n, text in enumerate(TEXTS)
    ]
    layouts, prompt, collator = located(processor, posts)
    for post, layout, ids in zip(posts, layouts, prompt["input_ids"], strict=True):
        decoded = collator.renderer.tokenizer.decode(ids[list(layout.text)])
        assert squeezed(decoded) == squeezed(unicodedata.normalize("NFKC", post["text"])), post["text"]
        assert INSTRUCTION in collator.renderer.tokenizer.decode(ids[layout.text.stop - 1 :])


def test_a_token_shared_with_the_template_is_the_templates() -> None:
    """Where a word grows together with template or instruction, only whitespace may come along."""
    words = ["<unk>", "<pad>", "USER:", "[goal", "of", f"day\n{INSTRUCTION.split()[0]}", *INSTRUCTION.split()[1:]]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>")
    tokenizer.chat_template = "USER: [{{ messages[0].content }}"
    layouts, prompt, _ = located(tokenizer, [{"id": "1", "text": "goal of day", "keyphrases": ["k"]}])
    assert tokenizer.convert_ids_to_tokens(prompt["input_ids"][0])[:4] == ["USER:", "[goal", "of", words[5]]
    assert layouts[0].text == range(2, 3)
    assert located(tokenizer, [{"id": "1", "text": "goal", "keyphrases": ["k"]}])[0][0].text == range(0)


@given(st.text(st.sampled_from("ab 🎉é\n!<|>USER:?What phrases"), max_size=40), st.integers(0, 2))
@settings(max_examples=150, deadline=None)
def test_any_text(text: str, num_images: int) -> None:
    renderer = PairedTargetCollator(PROCESSOR, task="aimkp").renderer
    row = {"id": "1", "text": text, "images": [picture(0)] * num_images}
    prompt = PairedTargetCollator(PROCESSOR, task="aimkp").collate_prompts([row], [row["images"]])
    ids = prompt["input_ids"][0].tolist()
    slots = text_slots(renderer, row, num_images, ids)
    # `.decode` of part of an emoji's bytes would not be equal.
    assert squeezed(renderer.tokenizer.decode([ids[slot] for slot in slots])) == squeezed(text)


PROCESSOR = build("llava")[1]


def test_texts_that_cannot_be_located_are_refused() -> None:
    _, processor = build("llava")
    renderer = PairedTargetCollator(processor).renderer
    conversation = {"id": "p7", "prompt": [{"role": "user", "content": "hm"}]}
    with pytest.raises(ValueError, match="'p7' comes with a `prompt` of its own"):
        text_slots(renderer, conversation, 0, [])
    processor.chat_template = processor.chat_template.replace("part.text", "part.text | upper")
    with pytest.raises(ValueError, match="'p8': the chat template does not write the text as it is"):
        text_slots(renderer, {"id": "p8", "text": "goal"}, 0, [])
    with (
        mock.patch.object(PreTrainedTokenizerFast, "is_fast", False),
        pytest.raises(ValueError, match="does not return the characters of its tokens"),
    ):
        text_slots(PairedTargetCollator(PROCESSOR).renderer, {"id": "p9", "text": "goal"}, 0, [1] * 99)
    with pytest.raises(ValueError, match="'p9': its text is tokenized differently"):
        text_slots(PairedTargetCollator(PROCESSOR).renderer, {"id": "p9", "text": "goal"}, 0, [1] * 99)
