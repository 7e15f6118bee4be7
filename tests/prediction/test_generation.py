"""Invariants of generation:

- predictions are the plain greedy decoding of the training prompt, for every family, at any batch size;
- they are in the posts' order with the posts' ids, and depend on text and images only, never on gold columns;
- tags survive decoding, control tokens do not, and nothing after the end of turn is read;
- an output begins with <think> in mode "think", and never in mode "direct", whatever the model prefers;
- the model is unchanged afterwards: modes, gradient checkpointing, PEFT;
- all of this holds for reasoning tasks too, whose prompts also depend on the aspect.
"""

from __future__ import annotations

import logging

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image

from dynkp.batches.collators import PairedTargetCollator
from dynkp.batches.keyphrase_renderer import KeyphraseRenderer
from dynkp.batches.reasoning_renderer import ReasoningRenderer
from dynkp.prediction.generation import generate_keyphrases, generate_reasoning
from tests.support.tiny_models import FAMILIES, build


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def posts(count: int = 7) -> list[dict]:
    """Unequal lengths, one post in three without image, gold columns as in training."""
    words = "sunset at the old harbour with a dog and a new phone".split()
    return [
        {
            "id": f"post-{index}",
            "text": " ".join(words[: 1 + (5 * index) % 11]),
            "images": [picture(index)] if index % 3 else [],
            "keyphrases": ["sunset"],
            "rationale": "The sun sets.",
        }
        for index in range(count)
    ]


def predict(model, processor, rows, **options):
    return list(generate_keyphrases(model, processor, rows, **{"max_new_tokens": 6, "progress": False, **options}))


@torch.no_grad()
def greedy(model, processor, post: dict, steps: int) -> list[int]:
    """One post, no padding, no cache, no `generate`."""
    renderer = KeyphraseRenderer(processor)
    text = renderer.prompt(post, len(post["images"]))
    inputs = processor(text=[text], images=[post["images"]], add_special_tokens=False, return_tensors="pt")
    prompt_length = inputs["input_ids"].shape[1]
    for _ in range(steps):
        token = model(**inputs).logits[:, -1].argmax(dim=-1, keepdim=True)
        if token.item() == renderer.tokenizer.eos_token_id:
            break
        inputs["input_ids"] = torch.cat([inputs["input_ids"], token], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs["input_ids"][0, prompt_length:].tolist()


def test_equals_plain_greedy_decoding():
    model, processor = build("llava")
    rows = [row for row in posts() if row["images"]]
    predictions = predict(model, processor, rows, batch_size=3)
    expected = [greedy(model, processor, row, steps=6) for row in rows]
    assert [row["output_tokens"] for row in predictions] == [len(tokens) for tokens in expected]
    special = set(processor.tokenizer.all_special_ids)
    raws = [processor.tokenizer.decode([token for token in tokens if token not in special]) for tokens in expected]
    assert [row["raw"] for row in predictions] == raws
    assert len(set(raws)) > 1  # the posts do make a difference


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_size_makes_no_difference(family):
    model, processor = build(family)
    rows = posts()
    one = predict(model, processor, rows, batch_size=1)
    assert predict(model, processor, rows, batch_size=5) == one
    assert [row["id"] for row in one] == [row["id"] for row in rows]


def test_order_across_windows(monkeypatch):
    monkeypatch.setattr("dynkp.prediction.generation._BATCHES_PER_WINDOW", 2)
    model, processor = build("llava")
    rows = posts(9)
    windowed = predict(model, processor, iter(rows), batch_size=2)  # a stream: no length, read once
    assert [row["id"] for row in windowed] == [row["id"] for row in rows]
    assert windowed == predict(model, processor, rows, batch_size=9)


def test_the_gold_is_not_looked_at():
    model, processor = build("llava")
    rows = posts(4)
    bare = [{name: row[name] for name in ("id", "text", "images")} for row in rows]
    assert predict(model, processor, rows) == predict(model, processor, bare)


def test_prompts_are_those_of_training(monkeypatch):
    model, processor = build("qwen2_vl")
    row = posts(2)[1]
    trained = PairedTargetCollator(processor, task="aimkp")([row])["prompt"]
    generated = {}

    def record(**inputs):
        generated.update(inputs)
        return inputs["input_ids"]

    monkeypatch.setattr(model, "generate", record)
    predict(model, processor, [row], task="aimkp")
    assert torch.equal(generated["input_ids"], trained["input_ids"])
    assert torch.equal(generated["pixel_values"], trained["pixel_values"])


def test_modalities():
    model, processor = build("llava")
    rows = posts(5)
    without_pictures = [{**row, "images": []} for row in rows]
    without_text = [{**row, "text": ""} for row in rows]
    for modality, equivalent in (("text", without_pictures), ("image", without_text)):
        expected = [{**row, "modality": modality} for row in predict(model, processor, equivalent)]
        assert predict(model, processor, rows, modality=modality) == expected
        assert [row["raw"] for row in expected] != [row["raw"] for row in predict(model, processor, rows)]


def test_a_datasets_dataset_and_conversational_rows():
    model, processor = build("llama")
    rows = [{"id": str(index), "text": text, "images": []} for index, text in enumerate(["a dog", "the sea"])]
    expected = predict(model, processor, rows)
    assert predict(model, processor, Dataset.from_list(rows)) == expected
    task = KeyphraseRenderer(processor).task
    conversations = [{"id": row["id"], "prompt": task.prompt(row["text"])} for row in rows]
    assert predict(model, processor, conversations) == expected
    with pytest.raises(ValueError, match="post '0': modality='text' needs posts with `text` and `images`"):
        predict(model, processor, conversations, modality="text")


def favouring(model, processor, text: str):
    """Make the model want to write `text`, and its end of turn after it, above all else."""
    wanted = processor(text, add_special_tokens=False)["input_ids"] + [processor.eos_token_id]

    def prefer(module, arguments, output):
        step = prefer.step
        output.logits[:, -1, wanted[min(step, len(wanted) - 1)]] += 1e4
        prefer.step += 1

    prefer.step = 0
    return model.register_forward_hook(prefer)


@pytest.mark.parametrize("single_tokens", [True, False])
@pytest.mark.parametrize("text", ["<think>a dog</think><answer>dog</answer>", "  \n<think>", "</think>dog"])
def test_direct_never_begins_to_reason(single_tokens, text):
    model, processor = build("llama")
    if single_tokens:
        processor.add_tokens(["<think>", "</think>", "<answer>", "</answer>"])
        model.resize_token_embeddings(len(processor))
    rows = [{"id": "x", "text": "t"}]
    options = {"max_new_tokens": 24, "batch_size": 1}
    for mode, reasons in (("auto", True), ("direct", False)):
        hook = favouring(model, processor, text)
        (prediction,) = predict(model, processor, rows, mode=mode, **options)
        hook.remove()
        assert prediction["mode"] == mode
        if reasons:
            assert prediction["reasoned"] and prediction["raw"].strip() == text.strip()
        else:
            assert not prediction["raw"].lstrip().startswith("<think>")
            assert not (single_tokens and prediction["reasoned"])
    beams = predict(model, processor, rows, mode="direct", generation_kwargs={"num_beams": 3}, **options)
    assert not beams[0]["raw"].lstrip().startswith("<think>")


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_think_begins_with_the_tag(family):
    model, processor = build(family)
    rows = [{**row, "images": []} for row in posts(3)] if family == "llama" else posts(3)
    auto = predict(model, processor, rows)
    think = predict(model, processor, rows, mode="think", batch_size=2)
    assert all(row["raw"].startswith("<think>") and row["reasoned"] for row in think)
    assert [row["prompt_tokens"] for row in think] == [row["prompt_tokens"] for row in auto]
    assert {row["output_tokens"] for row in think} == {6}


def test_a_template_that_opens_the_reasoning(monkeypatch):
    model, processor = build("llama")
    opening = "{% if add_generation_prompt %}<think>\n{% endif %}"
    monkeypatch.setattr(processor, "chat_template", processor.chat_template + opening)
    rows = [{"id": "x", "text": "t"}]
    (auto,), (think,) = (predict(model, processor, rows, mode=mode) for mode in ("auto", "think"))
    assert {**auto, "mode": "think"} == think
    assert auto["reasoned"] and auto["keyphrases"] == []  # cut off inside its reasoning
    (direct,) = predict(model, processor, rows, mode="direct")
    assert not direct["reasoned"] and direct["prompt_tokens"] == auto["prompt_tokens"]


@pytest.mark.parametrize("special", [True, False])
def test_tags_survive_and_control_tokens_do_not(monkeypatch, special):
    model, processor = build("llama")
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    processor.add_tokens(tags, special_tokens=special)
    eos, pad = processor.eos_token, processor.pad_token
    output = processor(f"<think>a dog</think>{pad}<answer>dog; park</answer>{eos}{pad}<think>", add_special_tokens=False)[
        "input_ids"
    ]
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, torch.tensor([output])], dim=1))
    (prediction,) = predict(model, processor, [{"id": "x", "text": "t"}])
    assert prediction == {
        "id": "x",
        "keyphrases": ["dog", "park"],
        "raw": "<think>a dog</think><answer>dog; park</answer>",
        "reasoned": True,
        "output_tokens": output.index(processor.eos_token_id),
        "prompt_tokens": prediction["prompt_tokens"],
        "output_words": 4,
        "mode": "auto",
        "modality": "both",
    }


def test_stops_at_the_end_of_turn_that_training_writes(monkeypatch):
    model, processor = build("qwen2")
    # A base checkpoint knows its end of text only, not its chat template's end of turn.
    end_of_text, end_of_turn = processor.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
    processor.eos_token = "<|endoftext|>"
    model.generation_config.eos_token_id = end_of_text
    output = torch.tensor([[*processor("dog")["input_ids"], end_of_turn, *processor("park")["input_ids"]]])
    options = {}

    def fake(input_ids, **more):
        options.update(more)
        return torch.cat([input_ids, output], dim=1)

    monkeypatch.setattr(model, "generate", fake)
    (prediction,) = predict(model, processor, [{"id": "x", "text": "t"}])
    assert set(options["eos_token_id"]) == {end_of_text, end_of_turn}
    assert prediction["raw"] == "dog"


def test_the_model_is_left_as_it_was():
    model, processor = build("llava")
    model.train()
    model.model.vision_tower.eval()
    model.activation_checkpointing_enable()
    model.config.use_cache = False
    modes = [module.training for module in model.modules()]
    expected = predict(*build("llava"), posts(3))
    assert predict(model, processor, posts(3)) == expected
    assert [module.training for module in model.modules()] == modes
    assert model.is_activation_checkpointing
    assert model.config.use_cache is False

    def fail(**_):
        raise RuntimeError("out of memory")

    model.generate = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        predict(model, processor, posts(3))
    assert [module.training for module in model.modules()] == modes


def test_peft_models_with_dropout():
    model, processor = build("llava")
    expected = predict(model, processor, posts(3))
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config).train()
    assert predict(adapted, processor, posts(3)) == expected  # LoRA starts at zero


def test_images_follow_the_model_s_dtype():
    model, processor = build("llava", dtype=torch.bfloat16)
    assert len(predict(model, processor, posts(3))) == 3


def test_a_checkpoint_s_own_way_of_decoding_is_not_taken():
    model, processor = build("llava")
    expected = predict(model, processor, posts(3), max_new_tokens=12)
    model.generation_config.update(do_sample=True, num_beams=3, repetition_penalty=5.0, no_repeat_ngram_size=1)
    assert predict(model, processor, posts(3), max_new_tokens=12) == expected
    # They would have changed the outputs.
    own = {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    assert predict(model, processor, posts(3), max_new_tokens=12, generation_kwargs=own) != expected


def test_generation_kwargs_win():
    model, processor = build("llava")
    rows = posts(3)
    long = predict(model, processor, rows, generation_kwargs={"min_new_tokens": 6})
    assert {row["output_tokens"] for row in long} == {6}
    short = predict(model, processor, rows, generation_kwargs={"max_new_tokens": 2})
    assert max(row["output_tokens"] for row in short) <= 2
    assert len(predict(model, processor, rows, generation_kwargs={"num_beams": 2})) == 3


def test_outputs_cut_off_are_reported(caplog):
    model, processor = build("llava")
    with caplog.at_level(logging.WARNING, logger="dynkp.prediction.generation_tasks"):
        predict(model, processor, posts(3), generation_kwargs={"min_new_tokens": 6})
    assert "3 outputs were cut off at 6 tokens" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"modality": "audio"}, "modality='audio' is not known"),
        ({"mode": "slow"}, "mode='slow' is not known"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "num_return_sequences must be 1"),
        ({"task": "tags"}, "task='tags' is not known"),
    ],
)
def test_arguments_are_checked_before_anything_runs(options, message):
    model, processor = build("llama")
    with pytest.raises(ValueError, match=message):
        generate_keyphrases(model, processor, [], **options)


# Reasoning tasks


def reason(model, processor, rows, **options):
    given = {"task": "masc", "max_new_tokens": 6, "progress": False, **options}
    return list(generate_reasoning(model, processor, rows, **given))


def aspect_posts(count: int = 5) -> list[dict]:
    return [{**row, "aspect": f"dog {index}", "label": "neutral"} for index, row in enumerate(posts(count))]


@pytest.mark.parametrize("family", FAMILIES)
def test_reasoning_does_not_depend_on_batch_or_gold(family):
    model, processor = build(family)
    rows = aspect_posts()
    for prompt in ("label", "chain"):
        one = reason(model, processor, rows, prompt=prompt, batch_size=1)
        bare = [{name: row[name] for name in ("id", "text", "images", "aspect")} for row in rows]
        assert reason(model, processor, bare, prompt=prompt, batch_size=4) == one
        assert [row["id"] for row in one] == [row["id"] for row in rows]
        assert all(row["prompt"] == prompt and row["modality"] == "both" for row in one)


def test_reasoning_prompts_are_those_of_training(monkeypatch):
    model, processor = build("qwen2_vl")
    row = aspect_posts(2)[1]
    for prompt in ("label", "chain"):
        renderer = ReasoningRenderer(processor, "masc", prompt)
        text = renderer.prompt(row, 1)
        expected = processor(text=[text], images=[renderer.images(row)], add_special_tokens=False, return_tensors="pt")
        generated = {}

        def record(generated=generated, **inputs):
            generated.update(inputs)
            return inputs["input_ids"]

        monkeypatch.setattr(model, "generate", record)
        reason(model, processor, [row], prompt=prompt)
        assert torch.equal(generated["input_ids"], expected["input_ids"])
        assert torch.equal(generated["pixel_values"], expected["pixel_values"])


def test_reasoning_looks_at_the_aspect_and_at_modalities():
    model, processor = build("llava")
    rows = aspect_posts(2)
    other = [{**row, "aspect": "another aspect altogether"} for row in rows]
    lengths = [[row["prompt_tokens"] for row in reason(model, processor, given)] for given in (rows, other)]
    assert lengths[0] != lengths[1]
    assert reason(model, processor, rows, task="msc") == reason(model, processor, other, task="msc")
    pictureless = [{**row, "images": []} for row in rows]
    assert [row["raw"] for row in reason(model, processor, rows, modality="text")] == [
        row["raw"] for row in reason(model, processor, pictureless)
    ]
    with pytest.raises(ValueError, match=r"post 'post-0': aspect="):
        reason(model, processor, posts(1))
    for options, message in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"prompt": "both"}, "kind='both'"),
        ({"modality": "sound"}, "modality='sound'"),
        ({"task": "dynamic_cot"}, "task='dynamic_cot' is not known: use one of msc"),
    ):
        with pytest.raises(ValueError, match=message):
            reason(model, processor, rows, **options)
