"""Invariants of PairedTargetCollator:

- prompts are padded on the left, targets on the right; rows are not changed;
- text that looks like a control token stays text and never changes the number of image tokens;
- every target ends its turn; direct targets are the tokens that TRL's own collators give for the same conversation, except
  where TRL puts something before the answer (Qwen3's empty <think></think>, Mllama's BOS) or nothing behind it (LLaVA-1.5);
- answer weights begin at `<answer>`, to the byte.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from PIL import Image
from trl.data_utils import apply_chat_template
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.data.images import ImageError
from dynkp.data.tasks import TASKS, parse_answer
from tests.support.chat_formats import CONTROL_TOKENS, END_OF_TURN, post, texts, tokenizer_of
from tests.support.posts import picture, rows
from tests.support.tiny_models import FAMILIES, TEXT_FAMILIES, VISION_FAMILIES, build

QUESTION = TASKS["dynamic_cot"].instruction


# Whole tensors


def test_whole_batch_of_llava() -> None:
    """Two posts, one with an image: 16 image tokens; every token of prompt and targets."""
    _, processor = build("llava")
    tokenizer = processor.tokenizer
    batch = PairedTargetCollator(processor, answer_weight=2.0)(
        [post(id=7, images=[picture(1, (28, 28))]), post(id="b", text="", keyphrases=["a", "b"], rationale=None)]
    )

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    first = encode("<s>USER: " + "<image>" * 16 + f"\ngoal\n{QUESTION} ASSISTANT:")
    second = encode(f"<s>USER: {QUESTION} ASSISTANT:")
    padding = len(first) - len(second)
    assert padding > 0
    assert batch["prompt"]["input_ids"].tolist() == [first, [tokenizer.pad_token_id] * padding + second]
    assert batch["prompt"]["attention_mask"].tolist() == [[1] * len(first), [0] * padding + [1] * len(second)]
    assert batch["prompt"]["pixel_values"].shape == (1, 3, 28, 28)

    direct = [encode(" dog </s>"), encode(" a; b </s>")]
    width = max(map(len, direct))
    pad = tokenizer.pad_token_id
    assert batch["direct"]["input_ids"].tolist() == [ids + [pad] * (width - len(ids)) for ids in direct]
    assert batch["direct"]["mask"].tolist() == [[True] * len(i) + [False] * (width - len(i)) for i in direct]
    assert batch["direct"]["weights"].tolist() == [[1.0] * len(i) + [0.0] * (width - len(i)) for i in direct]
    assert batch["direct"]["lengths"] == [len(ids) for ids in direct]

    pieces = (" <think>", "A dog.", "</think>", "<answer>", "dog", "</answer>", " </s>")  # tags are tokenized apart
    reasoning = [token for piece in pieces for token in encode(piece)]
    assert batch["reasoning"]["input_ids"].tolist() == [reasoning, [pad] * len(reasoning)]
    assert batch["reasoning"]["mask"].tolist() == [[True] * len(reasoning), [False] * len(reasoning)]
    assert batch["reasoning"]["lengths"] == [len(reasoning), 0]
    assert batch["reasoning"]["weights"][1].tolist() == [0.0] * len(reasoning)
    assert batch["has_rationale"].tolist() == [True, False]
    assert batch["id"] == ["7", "b"]
    assert batch.keys() == {"prompt", "direct", "reasoning", "has_rationale", "id"}


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_sides(family: str) -> None:
    _, processor = build(family)
    batch = PairedTargetCollator(processor)(rows(family))
    mask = batch["prompt"]["attention_mask"]
    assert (mask.diff(dim=1) >= 0).all() and mask[:, -1].all() and not mask.all()
    for kind in ("direct", "reasoning"):
        targets = batch[kind]
        assert (targets["mask"].int().diff(dim=1) <= 0).all()
        assert targets["mask"].sum(dim=1).tolist() == targets["lengths"]
        assert targets["input_ids"].shape[1] == max(targets["lengths"])
        assert (targets["weights"] == targets["mask"]).all()
    assert batch["has_rationale"].tolist() == [True, True, False, True]
    assert [length > 0 for length in batch["reasoning"]["lengths"]] == [True, True, False, True]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_post_has_the_same_tokens_in_a_batch_of_one(family: str) -> None:
    _, processor = build(family)
    collator, posts = PairedTargetCollator(processor), rows(family)
    batch = collator(posts)
    for index, one in enumerate(posts):
        single = collator([one])
        length = single["prompt"]["input_ids"].shape[1]
        assert batch["prompt"]["input_ids"][index, -length:].equal(single["prompt"]["input_ids"][0])
        assert not batch["prompt"]["attention_mask"][index, :-length].any()
        for kind in ("direct", "reasoning"):
            size = single[kind]["lengths"][0]
            assert batch[kind]["input_ids"][index, :size].equal(single[kind]["input_ids"][0, :size])


def test_a_kind_not_asked_for_is_empty() -> None:
    _, processor = build("llama")
    batch = PairedTargetCollator(processor, kinds=("direct",))(rows("llama"))
    assert batch["reasoning"]["lengths"] == [0] * 4 and batch["reasoning"]["input_ids"].shape == (4, 0)
    assert not batch["has_rationale"].any() and min(batch["direct"]["lengths"]) > 0


# Rows


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llama"])
def test_rows_are_not_changed(family: str) -> None:
    _, processor = build(family)
    posts = rows(family)
    conversation = {
        "id": "c",
        "images": posts[0]["images"],
        "prompt": [{"role": "user", "content": "what?"}],
        "completion": [{"role": "assistant", "content": "dog"}],
        "reasoning_completion": None,
    }
    given = [*posts, conversation]
    before = copy.deepcopy(given)
    collator = PairedTargetCollator(processor)
    first, second = collator(given), collator(given)
    assert given == before
    assert first["prompt"]["input_ids"].equal(second["prompt"]["input_ids"])


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_images_of_every_kind(family: str, tmp_path: Any) -> None:
    """PIL, bytes, path and `image` instead of `images` give the same pixels; grey and transparent ones are made RGB."""
    _, processor = build(family)
    collator = PairedTargetCollator(processor)
    original = picture(3, (28, 28))
    original.save(tmp_path / "picture.png")
    data = (tmp_path / "picture.png").read_bytes()
    values = [original, {"bytes": data, "path": None}, {"bytes": None, "path": str(tmp_path / "picture.png")}]
    batches = [collator([post(images=[value])]) for value in (*values, str(tmp_path / "picture.png"))]
    row = post(image=original)
    del row["images"]
    batches.append(collator([row]))
    for batch in batches[1:]:
        for name, value in batches[0]["prompt"].items():
            assert value.equal(batch["prompt"][name]), name
    for mode in ("L", "RGBA", "P", "1"):
        collator([post(images=[original.convert(mode)])])


def test_an_unreadable_image_names_the_post() -> None:
    _, processor = build("llava")
    with pytest.raises(ImageError, match="post 'bad'"):
        PairedTargetCollator(processor)([post(id="bad", images=[{"bytes": b"no picture", "path": None}])])


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_no_image_at_all(family: str) -> None:
    _, processor = build(family)
    batch = PairedTargetCollator(processor)([post(images=[]), post(images=None, id="q")])
    assert not any(name.startswith("pixel_values") for name in batch["prompt"])
    assert batch["prompt"]["input_ids"].shape[0] == 2


@pytest.mark.parametrize("family", [family for family in VISION_FAMILIES if family != "mllama"])
def test_several_images(family: str) -> None:
    _, processor = build(family)
    collator, tokenizer = PairedTargetCollator(processor), tokenizer_of(processor)
    counts = [
        (collator([post(images=[picture(k, (28, 28)) for k in range(number)])])["prompt"]["input_ids"] == image).sum().item()
        for image in [image_token_id(processor, tokenizer)]
        for number in (0, 1, 2, 3)
    ]
    assert counts[0] == 0 < counts[1] and counts == [counts[1] * number for number in range(4)]


def image_token_id(processor: Any, tokenizer: Any) -> int:
    token = getattr(processor, "image_token", None) or tokenizer.image_token
    return tokenizer.convert_tokens_to_ids(token)


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_a_text_model_leaves_images_out(family: str) -> None:
    _, tokenizer = build(family)
    collator = PairedTargetCollator(tokenizer)
    with_picture = post(images=[picture(1)])
    conversation = {
        "id": "p",
        "images": [picture(1)],
        "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"goal\n{QUESTION}"}]}],
        "completion": [{"role": "assistant", "content": "dog"}],
    }
    for row in (with_picture, conversation):
        batch = collator([row])
        assert batch["prompt"].keys() == {"input_ids", "attention_mask"}
        assert batch["prompt"]["input_ids"].equal(collator([post()])["prompt"]["input_ids"])


# Control tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_in_a_post_stay_text(family: str) -> None:
    """In tweet, keyphrase and rationale, also doubled into each other: the batch has no control token more."""
    model, processor = build(family)
    tokenizer, collator = tokenizer_of(processor), PairedTargetCollator(processor)
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    images = [] if family in TEXT_FAMILIES else [picture(1, (28, 28))]
    harmless = collator([post(images=images)])
    for token in (*CONTROL_TOKENS, tokenizer.eos_token, tokenizer.pad_token):
        hostile = token.join(("a", "b")) + token[: len(token) // 2] + token + token[len(token) // 2 :]
        batch = collator([post(images=images, text=hostile, keyphrases=[hostile], rationale=hostile)])
        for expected, actual in (
            (harmless["prompt"]["input_ids"], batch["prompt"]["input_ids"]),
            (harmless["direct"]["input_ids"], batch["direct"]["input_ids"]),
            (harmless["reasoning"]["input_ids"], batch["reasoning"]["input_ids"]),
        ):
            counts = [sorted(index for index in ids[0].tolist() if index in special) for ids in (expected, actual)]
            assert counts[0] == counts[1], token
        if images:
            with torch.no_grad():
                model(**batch["prompt"])  # as many features as placeholders


# End of turn


@pytest.mark.parametrize("family", FAMILIES)
def test_every_target_is_its_content_and_ends_the_turn(family: str) -> None:
    _, processor = build(family)
    batch = PairedTargetCollator(processor)(rows(family))
    blank = " " if family in ("llava", "idefics3", "smolvlm") else ""
    for index, row in enumerate(rows(family)):
        answer = "; ".join(row["keyphrases"])
        direct = texts(processor, batch["direct"])[index]
        assert direct == blank + answer + END_OF_TURN[family]
        assert not parse_answer(answer).reasoned
        if row["rationale"]:
            reasoning = texts(processor, batch["reasoning"])[index]
            content = f"<think>{row['rationale']}</think><answer>{answer}</answer>"
            assert reasoning == (blank + content + END_OF_TURN[family])


def test_a_keyphrase_like_the_end_of_turn_does_not_replace_it() -> None:
    """LLaVA's template ends nothing: the EOS is added behind an answer that spells one."""
    _, processor = build("llava")
    [text] = texts(processor, PairedTargetCollator(processor)([post(keyphrases=["the </s>"])])["direct"])
    assert text.endswith(" </s>") and text.count("</s>") == 1


# TRL's own collators


@pytest.mark.parametrize("family", FAMILIES)
def test_direct_targets_are_trls(family: str) -> None:
    """Prompt and completion of the same conversation through TRL's collator (text models: its rendering)."""
    _, processor = build(family)
    tokenizer, renderer = tokenizer_of(processor), KeyphraseRenderer(processor)
    for row in rows(family):
        if family in TEXT_FAMILIES:
            messages = renderer.prompt_messages(row, 0)
            reply = [{"role": "assistant", "content": "; ".join(row["keyphrases"])}]
            rendered = apply_chat_template({"prompt": messages, "completion": reply}, tokenizer)
            theirs = [tokenizer(rendered[name], add_special_tokens=False).input_ids for name in ("prompt", "completion")]
        else:
            text = f"{row['text']}\n{QUESTION}" if row["text"] else QUESTION
            conversation = {
                "images": list(row["images"]),
                "prompt": [{"role": "user", "content": text}],
                "completion": [{"role": "assistant", "content": "; ".join(row["keyphrases"])}],
            }
            output = DataCollatorForVisionLanguageModeling(processor, max_length=None, completion_only_loss=True)(
                [conversation]
            )
            labels = output["labels"][0]
            theirs = [output["input_ids"][0][labels == -100].tolist(), labels[labels != -100].tolist()]
        batch = PairedTargetCollator(processor)([row])
        ours = [batch["prompt"]["input_ids"][0].tolist(), batch["direct"]["input_ids"][0].tolist()]
        if family == "llava":
            theirs[1] += [tokenizer.eos_token_id]  # published without an end of turn
            theirs[0].insert(0, tokenizer.bos_token_id)  # nor a BOS, which TRL leaves out
        if family == "mllama":  # its processor writes a BOS before any text, so TRL's completions have one too
            assert theirs[1].pop(0) == tokenizer.bos_token_id
        if family == "qwen3":
            empty = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False).input_ids
            assert theirs[1][: len(empty)] == empty, "the template puts an empty block before an answer"
            theirs[1] = theirs[1][len(empty) :]
        assert tokenizer.decode(ours[0]) == tokenizer.decode(theirs[0])
        assert ours == theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_trl_rows_give_the_tokens_of_posts(family: str) -> None:
    """Prompt-completion rows, strings or parts as content, with, without and with an empty reasoning_completion."""
    _, processor = build(family)
    collator, task = PairedTargetCollator(processor), TASKS["dynamic_cot"]
    for row in rows(family):
        text = f"{row['text']}\n{QUESTION}" if row["text"] else QUESTION
        conversation = {
            "id": row["id"],
            "images": row["images"],
            "prompt": [{"role": "user", "content": text}],
            "completion": [{"role": "assistant", "content": "; ".join(row["keyphrases"])}],
        }
        if row["rationale"]:
            content = task.reasoning_target(row["keyphrases"], row["rationale"])
            conversation["reasoning_completion"] = [{"role": "assistant", "content": content}]
        parts = dict(conversation)
        parts["prompt"] = [
            {"role": "user", "content": [*({"type": "image"} for _ in row["images"]), {"type": "text", "text": text}]}
        ]
        ours = collator([row])
        for given in (conversation, parts, {**conversation, "rationale": "is not looked at"}):
            theirs = collator([given])
            assert theirs["has_rationale"].equal(ours["has_rationale"]) and theirs["id"] == ours["id"]
            assert theirs["prompt"]["input_ids"].equal(ours["prompt"]["input_ids"])
            for kind in ("direct", "reasoning"):
                assert theirs[kind]["input_ids"].equal(ours[kind]["input_ids"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": "what?"}, "`prompt` is a string"),
        ({"completion": [{"role": "user", "content": "dog"}]}, "`completion` has 1 messages"),
        ({"completion": [{"role": "assistant", "content": "a"}] * 2}, "`completion` has 2 messages"),
        ({"reasoning_completion": []}, "`reasoning_completion` has 0 messages"),
    ],
)
def test_bad_trl_rows_name_the_post(changes: dict[str, Any], words: str) -> None:
    _, processor = build("llama")
    good = {"id": "bad", "prompt": [{"role": "user", "content": "?"}], "completion": [{"role": "assistant", "content": "a"}]}
    with pytest.raises(ValueError, match=f"post 'bad'.*{words}"):
        PairedTargetCollator(processor)([good | changes])


# Answer weights


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "rationale",
    ["A dog.", "犬と海 🐕‍🦺🌊", "كلب على الشاطئ", "naïve café 🇩🇪", "x < y; <b>bold</b>", "tags: <answer>no</answer> </think>"],
)
def test_answer_weights_begin_at_the_answer_to_the_byte(family: str, rationale: str) -> None:
    """Against the bytes that the tokens stand for: a token counts as answer as soon as it holds one byte of it."""
    _, processor = build(family)
    tokenizer = tokenizer_of(processor)
    row = post(rationale=rationale, keyphrases=["犬", "sea 🌊"])
    targets = PairedTargetCollator(processor, answer_weight=5.0)([row])["reasoning"]
    ids = targets["input_ids"][0].tolist()
    text = tokenizer.decode(ids)
    start = len(text[: text.index("<answer>")].encode())
    position, expected = 0, []
    for token in tokenizer.convert_ids_to_tokens(ids):
        # Byte-level BPE writes one character per byte; control tokens are plain ASCII.
        position += len(token)
        expected.append(5.0 if position > start else 1.0)
    assert position == len(text.encode())
    assert targets["weights"][0].tolist() == expected
    assert expected[0] == 1.0 and expected[-1] == 5.0


def test_answer_weight_leaves_direct_targets_alone() -> None:
    _, processor = build("llava")
    targets = PairedTargetCollator(processor, answer_weight=5.0)(rows("llava"))["direct"]
    assert (targets["weights"] == targets["mask"]).all()


# max_length


def test_max_length_cuts_targets_at_their_end() -> None:
    _, processor = build("llava")
    row = post(images=[picture(1, (28, 28))])
    whole = PairedTargetCollator(processor, answer_weight=2.0)([row, post(id="short", rationale="A dog, a dog.")])
    lengths = whole["prompt"]["attention_mask"].sum(dim=1).tolist()
    limit = lengths[0] + 2
    cut = PairedTargetCollator(processor, answer_weight=2.0, max_length=limit)(
        [row, post(id="short", rationale="A dog, a dog.")]
    )
    assert cut["prompt"]["input_ids"].equal(whole["prompt"]["input_ids"]), "a prompt is never cut"
    for kind in ("direct", "reasoning"):
        for index, length in enumerate(lengths):
            remaining = min(limit - length, whole[kind]["lengths"][index])
            assert cut[kind]["lengths"][index] == remaining
            for name in ("input_ids", "weights"):
                assert cut[kind][name][index, :remaining].equal(whole[kind][name][index, :remaining])
            assert not cut[kind]["weights"][index, remaining:].any()


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "llama"])
def test_a_prompt_that_leaves_no_token_for_its_target_is_an_error(family: str) -> None:
    _, processor = build(family)
    posts = rows(family, 2)
    lengths = PairedTargetCollator(processor)(posts)["prompt"]["attention_mask"].sum(dim=1).tolist()
    longest = max(range(2), key=lengths.__getitem__)
    limit = lengths[longest]
    with pytest.raises(ValueError, match=f"post '{posts[longest]['id']}'.* {limit} tokens.*`max_length` is {limit}"):
        PairedTargetCollator(processor, max_length=limit)(posts)
    assert min(PairedTargetCollator(processor, max_length=limit + 1)(posts)["direct"]["lengths"]) == 1


# Tasks


def test_the_task_decides_question_and_separator() -> None:
    _, processor = build("llama")
    collator = PairedTargetCollator(processor, task="aimkp")
    batch = collator([post(keyphrases=["a", "b"])])
    assert texts(processor, batch["direct"]) == ["a, b<|eot_id|>"]
    assert TASKS["aimkp"].instruction in processor.decode(batch["prompt"]["input_ids"][0])
    with pytest.raises(ValueError, match="haiku"):
        PairedTargetCollator(processor, task="haiku")


def test_a_given_renderer_is_used_as_it_is() -> None:
    _, processor = build("llama")
    renderer = KeyphraseRenderer(processor, "aimkp")
    collator = PairedTargetCollator(renderer, kinds=("direct",))
    assert collator.renderer is renderer
    expected = PairedTargetCollator(processor, task="aimkp", kinds=("direct",))([post()])
    batch = collator([post()])
    assert batch["prompt"]["input_ids"].equal(expected["prompt"]["input_ids"])
    assert batch["direct"]["input_ids"].equal(expected["direct"]["input_ids"])
    with pytest.raises(ValueError, match="`task` is 'aimkp', but the given renderer has a task of its own"):
        PairedTargetCollator(renderer, task="aimkp")


def test_images_of_unusual_modes() -> None:
    """CMYK and 16-bit images become RGB too."""
    _, processor = build("llava")
    for mode in ("CMYK", "I;16", "F"):
        image = Image.new(mode, (28, 28))
        batch = PairedTargetCollator(processor)([post(images=[image])])
        assert batch["prompt"]["pixel_values"].shape[1] == 3
