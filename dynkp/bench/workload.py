"""What the suites `dynamic_cot`, `aimkp` and `mulcot_rd` run: a small LLaVA-shaped model, random posts, and trainers.

The model has random weights and is trained as the papers' models are: LoRA on the language model's linear layers, the whole
projector, a frozen vision tower. Posts consist of random words and noise images. A trainer's own collator makes the batches,
so that a suite measures what a training step of that trainer computes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from dynkp.bench.measure import FirstRound, Setting, environment
from dynkp.data.reasoning_tasks import REASONING_TASKS
from dynkp.data.tasks import TASKS
from dynkp.synthetic.tiny_model import IMAGE_TOKEN, build_tiny_vlm
from dynkp.trainer.model_setup import freeze_vision_tower

PATCH_SIZE = 14  # pixels
LORA_RANK = 16
# Each is one token of the workload's tokenizer.
WORDS = [f"{first}{second}" for first in "bcdfghklmnprstvw" for second in ("ab", "ed", "ig", "ol", "up", "ox")]
# Tokens of a reasoning target beside rationale and keyphrases: four tags and the end of the turn.
_TAG_TOKENS = 5


class Sizes(NamedTuple):
    """Sizes of the model and of its posts.

    The proportions are those of the papers' smaller models. An image costs the vision tower about 0.85 times what its tokens
    cost the language model (Qwen2.5-VL-3B: 0.67 B parameters over four patches per token against 3.1 B; InternVL3-2B: 0.3 B
    over four against 1.5 B). A rationale of the Dynamic CoT paper has 157 words, a response chain of Twitter-2015 199 words or
    287 tokens.

    Attributes:
        batch: Posts in a batch.
        image_side: Patches along each side of the square image.
        text_tokens: Tokens of a post's text; the prompt's instruction and chat template add to them.
        direct_tokens: Tokens of a direct target, at least 2, end of turn included.
        reasoning_tokens: Tokens of a reasoning target, end of turn included; 0 for posts without a rationale.
        vocabulary: Token embeddings of the language model; more, if the tokenizer needs more.
        hidden: Width of the language model.
        layers: Layers of the language model.
        vision_hidden: Width of the vision tower, a multiple of 64.
        vision_layers: Layers of the vision tower.
    """

    batch: int = 4
    image_side: int = 24
    text_tokens: int = 30
    direct_tokens: int = 4
    reasoning_tokens: int = 256
    vocabulary: int = 32_000
    hidden: int = 512
    layers: int = 8
    vision_hidden: int = 512
    vision_layers: int = 7

    @property
    def image_tokens(self) -> int:
        """Tokens of an image, one per patch."""
        return self.image_side**2


QUICK = Sizes(image_side=4, text_tokens=8, reasoning_tokens=12, vocabulary=64, hidden=32, layers=2, vision_hidden=64,
              vision_layers=1)  # fmt: skip


def build_processor(sizes: Sizes) -> LlavaProcessor:
    """Build a processor for which every word of the posts, and of the tasks' prompts, is one token."""
    asked = {"id": "0", "text": "", "aspect": WORDS[0], "images": []}
    task = REASONING_TASKS["masc"]
    messages = [
        *TASKS["dynamic_cot"].prompt(""),
        *TASKS["aimkp"].prompt(""),
        *task.label_prompt(asked),
        *task.chain_prompt(asked),
    ]
    prompts = [part["text"] for message in messages for part in message["content"]]
    _, processor = build_tiny_vlm([*WORDS, *prompts], image_size=PATCH_SIZE * sizes.image_side, patch_size=PATCH_SIZE)
    return processor


def build_model(sizes: Sizes, processor: LlavaProcessor) -> PeftModel:
    """Build a model of LLaVA's architecture with random weights, in training mode, with adapters.

    Args:
        sizes: Sizes of the model.
        processor: The processor whose tokens the model reads.
    """
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=sizes.vision_hidden,
            intermediate_size=4 * sizes.vision_hidden,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_hidden // 64,
            image_size=PATCH_SIZE * sizes.image_side,
            patch_size=PATCH_SIZE,
        ),
        text_config=LlamaConfig(
            vocab_size=max(sizes.vocabulary, len(processor.tokenizer)),
            hidden_size=sizes.hidden,
            intermediate_size=11 * sizes.hidden // 4,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.hidden // 32 if sizes.hidden < 256 else sizes.hidden // 64,
            tie_word_embeddings=True,
        ),
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=sizes.image_tokens,
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    linear = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    # Adapters that start at zero would leave half of their gradients zero, and zeros agree whatever is computed.
    lora = LoraConfig(
        r=LORA_RANK,
        target_modules=linear,
        modules_to_save=["multi_modal_projector"],
        lora_dropout=0.0,
        init_lora_weights=False,
    )
    model = get_peft_model(LlavaForConditionalGeneration(config), lora)
    freeze_vision_tower(model)
    return model.train()


def draw_posts(sizes: Sizes, with_rationale: Sequence[bool] | None = None, unequal: bool = False) -> list[dict[str, Any]]:
    """Draw random posts, the same ones at every call.

    Args:
        sizes: How many posts, and how long their text and targets are.
        with_rationale: For each post, whether it has a rationale; all posts have one by default.
        unequal: Whether the lengths of a post's text and targets lie between half and one and a half times the usual ones
            rather than being equal.

    Returns:
        Posts that every trainer accepts: `id`, `text`, `images`, `keyphrases`, `aspect`, `label` and `rationale`.
    """
    generator = random.Random(1)
    pixels = np.random.default_rng(1)
    side = PATCH_SIZE * sizes.image_side

    def words(count: int) -> str:
        return " ".join(generator.choices(WORDS, k=count))

    def lengths(usual: int) -> list[int]:
        if not unequal:
            return [usual] * sizes.batch
        spread = np.linspace(0.5 * usual, 1.5 * usual, sizes.batch).astype(int).tolist()
        return generator.sample(spread, sizes.batch)

    posts = []
    columns = (lengths(getattr(sizes, name)) for name in ("text_tokens", "direct_tokens", "reasoning_tokens"))
    for index, (text, direct, reasoning) in enumerate(zip(*columns, strict=True)):
        keyphrase_words = max(1, direct - 1)  # the end of the turn is a token too
        rationale = words(max(1, reasoning - keyphrase_words - _TAG_TOKENS))
        taught = sizes.reasoning_tokens > 0 and (with_rationale is None or with_rationale[index])
        posts.append(
            {
                "id": str(index),
                "text": words(text),
                "images": [Image.fromarray(pixels.integers(0, 256, (side, side, 3), dtype=np.uint8))],
                "keyphrases": [words(keyphrase_words)],
                "aspect": WORDS[index],
                "label": "positive",
                "rationale": rationale if taught else None,
            }
        )
    return posts


def build_trainer(
    trainer_class: type, config_class: type, model: Any, posts: Any, processing_class: Any, folder: str, **options: Any
) -> Any:
    """Build a trainer around a model, to call single training steps of it.

    Args:
        trainer_class: Class of the trainer.
        config_class: Class of its options.
        model: The model, which other trainers may share.
        posts: The training posts.
        processing_class: Processor or tokenizer.
        folder: The trainer's `output_dir`; nothing is written to it.
        **options: Options of the config; `assistant` is passed to the trainer.
    """
    given = {name: options.pop(name) for name in ("assistant",) if name in options}
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": len(posts),
        "bf16": False,
        "gradient_checkpointing": False,  # the suites turn it on and off themselves
        "use_cpu": next(model.parameters()).device.type == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
        "eval_generation_posts": 0,
    }
    args = config_class(**(settings | options))
    return trainer_class(model=model, args=args, train_dataset=posts, processing_class=processing_class, **given)


def columns(
    setting: Setting, sizes: Sizes, model: nn.Module, seconds: Mapping[str, float], found: FirstRound
) -> dict[str, Any]:
    """Describe what a suite of the small model measured, as columns of a row.

    Args:
        setting: Setting of the suite.
        sizes: Sizes of model and posts.
        model: The trained model.
        seconds: Median seconds of each step: column `STEP_s`.
        found: What the first round found: columns `STEP_mib` and `largest_disagreement`.
    """
    parameters = list(model.parameters())
    return {
        **{f"{name}_s": value for name, value in seconds.items()},
        **{f"{name}_mib": value / 2**20 for name, value in found.memory.items()},
        "largest_disagreement": found.disagreement,
        **sizes._asdict(),
        "image_tokens": sizes.image_tokens,
        "parameters": sum(parameter.numel() for parameter in parameters),
        "trained_parameters": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "quick": setting.quick,
        **environment(setting),
    }
