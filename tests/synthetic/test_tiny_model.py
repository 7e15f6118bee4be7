"""Invariants of the tiny model:

- its classes are stock LLaVA classes, with tied embeddings and scaled initial weights;
- the reasoning tags are single tokens that decoding keeps; the chat template's prompt is a prefix of the whole turn, and turns
  end in EOS;
- posts with and without image, and images of any size, are processed;
- weights depend on the seed only; a saved folder loads with the Auto classes and gives the same outputs.
"""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from dynkp.synthetic.tiny_model import REASONING_TOKENS, build_tiny_vlm

TEXTS = ["a red fish on the left ; so cosy", "left red fish , right blue star ."]
SMALL = {"hidden_size": 32, "layers": 2, "vision_hidden": 32, "vision_layers": 1}


def picture(width=32, height=32):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def turns(answer=None, images=1):
    question = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": "a red fish"}]
    messages = [{"role": "user", "content": question}]
    return messages if answer is None else [*messages, {"role": "assistant", "content": answer}]


@pytest.fixture(scope="module", params=[True, False], ids=["words", "bpe"])
def tiny(request):
    return build_tiny_vlm(TEXTS, word_level=request.param, vocab_size=400, **SMALL)


def test_stock_classes_with_tied_embeddings(tiny):
    model, processor = tiny
    assert type(model) is LlavaForConditionalGeneration
    assert type(processor) is LlavaProcessor
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.text_config.vocab_size == len(processor.tokenizer) <= 400


def test_linear_maps_start_at_one_over_root_fan_in():
    model, _ = build_tiny_vlm(TEXTS)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and module is not model.lm_head:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() * fan_in**0.5 == pytest.approx(1, abs=0.06)
            assert module.bias is None or not module.bias.any()


def test_weights_depend_on_the_seed_alone():
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, _ = build_tiny_vlm(TEXTS, seed=1, **SMALL)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(456)
    again, _ = build_tiny_vlm(TEXTS, seed=1, **SMALL)
    other, _ = build_tiny_vlm(TEXTS, seed=2, **SMALL)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_reasoning_tags_are_single_tokens_that_decoding_keeps(tiny):
    tokenizer = tiny[1].tokenizer
    for token in REASONING_TOKENS:
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    ids = tokenizer("<think>a red fish</think><answer>fish</answer></s>", add_special_tokens=False)["input_ids"]
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert decoded.replace(" ", "") == "<think>aredfish</think><answer>fish</answer>"


def test_byte_level_tokenizer_reads_back_any_text_but_for_whitespace():
    _, processor = build_tiny_vlm(TEXTS, word_level=False, vocab_size=400, **SMALL)
    text = "Ünïcode 😀 #Tag\n<think>x</think>; y"
    ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    # A blank is put in front of each piece between tags, so that a word has one spelling wherever it stands.
    assert processor.tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == text.replace(" ", "")
    assert processor.tokenizer.unk_token_id not in ids


def test_unknown_words_of_a_closed_world_become_unk():
    _, processor = build_tiny_vlm(TEXTS, **SMALL)
    ids = processor.tokenizer("a zeppelin", add_special_tokens=False)["input_ids"]
    assert ids[1] == processor.tokenizer.unk_token_id != ids[0]


def test_prompt_is_a_prefix_and_turns_end_in_eos(tiny):
    processor = tiny[1]
    prompt = processor.apply_chat_template(turns(), add_generation_prompt=True)
    assert prompt == "<s><image>a red fish\n<assistant>"
    assert processor.apply_chat_template(turns("left")) == prompt + "left</s>"
    # TRL adds the image itself where content is a plain string.
    plain = [{"role": "user", "content": "a red fish"}]
    assert processor.apply_chat_template(plain, add_generation_prompt=True) == "<s>a red fish\n<assistant>"
    assert processor.apply_chat_template(turns([{"type": "text", "text": "left"}])) == prompt + "left</s>"


@pytest.mark.parametrize(("image_size", "patch_size", "given"), [(32, 8, (32, 32)), (32, 16, (120, 40)), (64, 16, (30, 90))])
def test_images_of_any_size_become_the_stated_number_of_tokens(image_size, patch_size, given):
    model, processor = build_tiny_vlm(TEXTS, image_size=image_size, patch_size=patch_size, **SMALL)
    prompt = processor.apply_chat_template(turns(), add_generation_prompt=True)
    inputs = processor(images=[picture(*given)], text=[prompt], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, image_size, image_size)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == (image_size // patch_size) ** 2
    assert torch.isfinite(model(**inputs).logits).all()


def test_image_and_text_both_reach_the_logits(tiny):
    model, processor = tiny
    prompt = processor.apply_chat_template(turns(), add_generation_prompt=True)
    inputs = processor(images=[picture()], text=[prompt], return_tensors="pt")
    blank = {**inputs, "pixel_values": torch.zeros_like(inputs["pixel_values"])}
    model.eval()
    with torch.no_grad():
        moved = (model(**inputs).logits[:, -1] - model(**blank).logits[:, -1]).abs().max()
    model.train()
    assert moved > 1e-3


def test_text_only_posts_generate(tiny):
    model, processor = tiny
    prompt = processor.apply_chat_template(turns(images=0), add_generation_prompt=True)
    inputs = processor(text=[prompt, prompt], return_tensors="pt", padding=True)
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[0] == 2
    assert inputs["input_ids"].shape[1] < output.shape[1] <= inputs["input_ids"].shape[1] + 3


def test_every_parameter_that_is_used_gets_a_gradient(tiny):
    model, processor = tiny
    text = processor.apply_chat_template(turns("left"))
    inputs = processor(images=[picture()], text=[text], return_tensors="pt")
    model.zero_grad()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    model.zero_grad()
    # LLaVA takes the hidden states in front of CLIP's last norm.
    assert all("post_layernorm" in name for name in without)


def test_saved_folder_loads_with_auto_classes_and_answers_alike(tiny, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, loaded_processor = AutoModelForImageTextToText.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    text = processor.apply_chat_template(turns("<think>red</think><answer>fish</answer>"))
    assert loaded_processor.apply_chat_template(turns("<think>red</think><answer>fish</answer>")) == text
    inputs = processor(images=[picture(50, 40)], text=[text], return_tensors="pt")
    again = loaded_processor(images=[picture(50, 40)], text=[text], return_tensors="pt")
    assert inputs.keys() == again.keys()
    assert all(torch.equal(inputs[key], again[key]) for key in inputs)
    assert loaded_processor.tokenizer.decode(inputs["input_ids"][0], skip_special_tokens=True).count("think>") == 2
    model.eval()
    with torch.no_grad():
        assert torch.equal(loaded(**again).logits, model(**inputs).logits)
    model.train()
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 30}, "`image_size` is 30"),
        ({"hidden_size": 36}, "`hidden_size` is 36"),
        ({"vision_hidden": 40}, "`vision_hidden` is 40"),
        ({"word_level": False, "vocab_size": 200}, "`vocab_size` is 200"),
    ],
)
def test_sizes_that_do_not_fit_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        build_tiny_vlm(TEXTS, **wrong)
