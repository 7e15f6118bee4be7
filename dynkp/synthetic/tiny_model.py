"""A LLaVA-shaped model of well under a million parameters, and its processor, built in code.

`build_tiny_vlm` trains a tokenizer on given texts and returns a stock `LlavaForConditionalGeneration` and `LlavaProcessor`.
Nothing is downloaded, no torchvision is needed, and everything that works with a real checkpoint (TRL's trainers, `generate`,
`save_pretrained`) works with these. It is used by default, where it is trained on drawn posts from scratch; for runs on real
posts without a named model; and in tests.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"
UNKNOWN_TOKEN = "<unk>"
BOS_TOKEN = "<s>"
EOS_TOKEN = "</s>"
ASSISTANT_TOKEN = "<assistant>"
# Single tokens, as in a real vocabulary that was extended for reasoning. They are not special tokens of the tokenizer, so
# `skip_special_tokens=True` keeps them and the answer parser finds them.
REASONING_TOKENS = ("<think>", "</think>", "<answer>", "</answer>")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}" + ASSISTANT_TOKEN + "{% endif %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}" + IMAGE_TOKEN + "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT_TOKEN + "{% endif %}"
)


def build_tiny_vlm(
    texts: Iterable[str],
    *,
    image_size: int = 32,
    patch_size: int = 8,
    hidden_size: int = 96,
    layers: int = 4,
    heads: int = 4,
    attention_dropout: float = 0.0,
    vision_hidden: int = 64,
    vision_layers: int = 2,
    vocab_size: int = 2048,
    word_level: bool = True,
    max_positions: int = 2048,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    r"""Build an untrained LLaVA-shaped model and a processor whose tokenizer is trained on `texts`.

    Input and output embeddings are tied (untied embeddings learn far worse at this size), and every linear layer is
    initialised with standard deviation 1/sqrt(fan-in), so that activations keep their scale through the untrained network.

    Args:
        texts: texts to train the tokenizer on: prompts, rationales and keyphrases. Read once.
        image_size: side of the square input image in pixels; a multiple of `patch_size`. Images of other sizes are resized
            to it without cropping.
        patch_size: side of a patch in pixels; an image becomes (image_size / patch_size)² tokens.
        hidden_size: width of the language model; a multiple of 2 * `heads`.
        layers: number of layers of the language model.
        heads: number of attention heads of the language model.
        attention_dropout: share of attention weights dropped in training. With few heads it drops whole words, which
            reduces memorisation of a few thousand posts.
        vision_hidden: width of the vision tower; a multiple of 32, the width of its heads.
        vision_layers: number of layers of the vision tower.
        vocab_size: greatest number of tokens of the tokenizer; byte-level BPE needs at least 256 and the special tokens.
        word_level: whether to use one token per word and per punctuation mark (a closed vocabulary of few words; others
            become `<unk>`). Otherwise byte-level BPE is used (an open vocabulary, for real posts).
        max_positions: greatest length of an input in tokens, image tokens included.
        seed: seed of the initial weights. PyTorch's global random generator keeps its state.

    Returns:
        The model, in float32 and training mode, and its processor, with a chat template of one turn per message, whose
        assistant turns end with `</s>`.

    Raises:
        ValueError: if a size is not a multiple as required above, or the vocabulary is too small for byte-level BPE.

    Example:
        >>> model, processor = build_tiny_vlm(["a red fish"])
        >>> prompt = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "a red fish"}]}]
        >>> processor.apply_chat_template(prompt, add_generation_prompt=True)
        '<s><image>a red fish\n<assistant>'
    """
    if image_size % patch_size:
        raise ValueError(f"`image_size` is {image_size}: choose a multiple of `patch_size` ({patch_size}).")
    if hidden_size % (2 * heads):
        raise ValueError(f"`hidden_size` is {hidden_size}: choose a multiple of 2 x `heads` ({2 * heads}).")
    if vision_hidden % 32:
        raise ValueError(f"`vision_hidden` is {vision_hidden}: choose a multiple of 32, the width of a vision head.")
    tokenizer = _train_tokenizer(texts, vocab_size=vocab_size, word_level=word_level)
    side = {"height": image_size, "width": image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=4 * vision_hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_hidden // 32,
            image_size=image_size,
            patch_size=patch_size,
            projection_dim=vision_hidden,
        ),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=5 * hidden_size // 2,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            attention_dropout=attention_dropout,
            max_position_embeddings=max_positions,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _scale_initial_weights(model)
    return model.train(), processor


def _train_tokenizer(texts: Iterable[str], *, vocab_size: int, word_level: bool) -> PreTrainedTokenizerFast:
    special = [PAD_TOKEN, UNKNOWN_TOKEN, BOS_TOKEN, EOS_TOKEN, IMAGE_TOKEN, ASSISTANT_TOKEN]
    trainer: trainers.Trainer
    if word_level:
        tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN_TOKEN))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(
            vocab_size=vocab_size - len(REASONING_TOKENS), special_tokens=special, show_progress=False
        )
    else:
        smallest = 256 + len(special) + len(REASONING_TOKENS)
        if vocab_size < smallest:
            raise ValueError(
                f"`vocab_size` is {vocab_size}, but byte-level BPE needs at least {smallest}: increase it, or set "
                "`word_level=True` for a closed vocabulary of few words."
            )
        tokenizer = Tokenizer(models.BPE())
        # A word must be the same token at the start of a target and inside a text, or the model cannot learn to copy it.
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(REASONING_TOKENS),
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in REASONING_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        unk_token=UNKNOWN_TOKEN,
        bos_token=BOS_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN, "assistant_token": ASSISTANT_TOKEN},
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def _scale_initial_weights(model: LlavaForConditionalGeneration) -> None:
    """Initialise linear layers and the patch embedding with 1/sqrt(fan-in), embeddings with 1/sqrt(width), biases with 0."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, nn.Embedding):
            module.weight.normal_(std=module.weight.shape[1] ** -0.5)
