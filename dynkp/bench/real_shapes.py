"""The papers' models at their published shapes, with random weights, and random batches for them: nothing is downloaded.

Given   a name of `SHAPES`, what of the model is trained and how it attends.
Gives   the model, and batches as the trainers' collators make them, of posts with an image of 576 tokens (24 x 24), a text and
        both kinds of target.
Holds   every post of a batch has the same lengths, so that only a way which mixes kinds of targets pays for padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from dynkp.batches.image_grids import ImageGrid
from dynkp.batches.prompt_layout import PromptLayout
from dynkp.batches.targets import Targets
from dynkp.bench.workload import LORA_RANK
from dynkp.mechanics.shared_prompt import causal_lm_of
from dynkp.trainer.model_setup import freeze_vision_tower

SHAPES = ("Qwen2.5-VL-3B", "LLaVA-1.5-7B", "InternVL3-8B")
# Linear layers of the language model, and the layers between it and the vision tower, by the families' names.
_LINEAR = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
_PROJECTORS = {"Qwen2.5-VL-3B": "merger", "LLaVA-1.5-7B": "multi_modal_projector", "InternVL3-8B": "multi_modal_projector"}
# Tokens in front of the image (template), and behind the text (instruction, template).
_BEFORE, _BEHIND = 16, 32


class Lengths(NamedTuple):
    """Lengths of a post in tokens.

    A rationale of the Dynamic CoT paper has 157 words, a response chain of Twitter-2015 287 tokens.

    Attributes:
        side: Tokens along each side of the square image.
        text: Tokens of the text.
        direct: Tokens of the direct target.
        reasoning: Tokens of the reasoning target.
    """

    side: int = 24
    text: int = 30
    direct: int = 6
    reasoning: int = 256

    @property
    def prompt(self) -> int:
        """Tokens of a prompt: template, image, text, instruction."""
        return _BEFORE + self.side**2 + self.text + _BEHIND


TINY = Lengths(side=4, text=8, direct=3, reasoning=12)


def build_model(name: str, *, trained: str, attention: str, tiny: bool, device: torch.device) -> Any:
    """Build one of `SHAPES` with random weights in bf16, its vision tower frozen.

    Args:
        name: One of `SHAPES`.
        trained: `"lora"` (rank 16 on the language model's linear layers, and the whole projector) or `"full"` (language model
            and projector).
        attention: The attention implementation by transformers' name: `"sdpa"`, `"flash_attention_2"`, ...
        tiny: Whether to build the same architecture at a size that only shows that it runs.
        device: Where the weights are drawn; 7B on a CPU takes minutes.
    """
    torch.manual_seed(0)
    config = config_of(name, tiny)
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(
            config, attn_implementation=attention, dtype=torch.bfloat16
        )
    if trained == "lora":
        projector = [_PROJECTORS[name]]
        # Adapters that start at zero would leave half of their gradients zero.
        model = get_peft_model(
            model, LoraConfig(r=LORA_RANK, target_modules=_LINEAR, modules_to_save=projector, init_lora_weights=False)
        )
    freeze_vision_tower(model)
    return model.to(device).train()


def config_of(name: str, tiny: bool) -> Any:
    """Build the published configuration or, if `tiny`, one of the same architecture with two narrow layers."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    side = (TINY if tiny else Lengths()).side
    vision: dict[str, Any]
    if name == "Qwen2.5-VL-3B":
        # Qwen/Qwen2.5-VL-3B-Instruct
        text = small | {"num_key_value_heads": 2, "vocab_size": 128} if tiny else {
            "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "vocab_size": 151936,
        }  # fmt: skip
        sections = [2, 3, 3] if tiny else [16, 24, 24]
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        vision = {"out_hidden_size": text["hidden_size"], "patch_size": 14, "spatial_merge_size": 2, "window_size": 112}
        vision |= (
            {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4, "fullatt_block_indexes": [1]}
            if tiny
            else {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
                  "fullatt_block_indexes": [7, 15, 23, 31]}
        )  # fmt: skip
        last = text["vocab_size"]
        return transformers.Qwen2_5_VLConfig(
            text_config=text | {"rope_parameters": rope, "tie_word_embeddings": True},
            vision_config=vision, tie_word_embeddings=True, image_token_id=last - 1, video_token_id=last - 2,
            vision_start_token_id=last - 3, vision_end_token_id=last - 4,
        )  # fmt: skip
    tower: dict[str, Any] = {"image_size": 14 * side, "patch_size": 14}
    tower |= small if tiny else {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    }  # fmt: skip
    if name == "LLaVA-1.5-7B":
        # llava-hf/llava-1.5-7b-hf: Vicuna 7B behind CLIP ViT-L/14 at 336 pixels
        text = small | {"vocab_size": 128} if tiny else {"vocab_size": 32064}  # LlamaConfig's defaults are the 7B's
        return transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**text), vision_config=transformers.CLIPVisionConfig(**tower),
            image_token_index=text["vocab_size"] - 1, image_seq_length=side**2, vision_feature_layer=-2,
            vision_feature_select_strategy="default", tie_word_embeddings=False,
        )  # fmt: skip
    # OpenGVLab/InternVL3-8B-hf: Qwen2.5 7B behind InternViT 300M; one tile of 672 pixels, for 576 tokens rather than 256.
    text = small | {"num_key_value_heads": 2, "vocab_size": 128} if tiny else {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 151674,
    }  # fmt: skip
    pixels = 2 * 14 * side
    tower |= {"image_size": [pixels, pixels], "patch_size": [14, 14]}
    return transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **text, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        vision_config=tower, image_token_id=text["vocab_size"] - 1, image_seq_length=side**2, tie_word_embeddings=False,
    )  # fmt: skip


def draw_batch(name: str, model: nn.Module, count: int, lengths: Lengths, easy: int | None = None) -> dict[str, Any]:
    """Draw a random batch, as `MaskingCollator` makes it for both kinds of target.

    Args:
        name: One of `SHAPES`.
        model: The model of that name, on its device.
        count: Number of posts B.
        lengths: Lengths of every post.
        easy: The number of posts, from the first on, that have a rationale; all by default.

    Returns:
        `prompt`, `layouts`, `direct`, `reasoning`, `has_rationale` and `id`; tensors on the model's device.
    """
    generator = torch.Generator().manual_seed(1)
    device = next(model.parameters()).device
    image_token = causal_lm_of(model).config.image_token_id
    image, side = lengths.side**2, lengths.side

    def words(length: int) -> torch.Tensor:
        return torch.randint(1, image_token - 8, (count, length), generator=generator)

    def targets(length: int, posts: int = count) -> Targets:
        mask = (torch.arange(count) < posts)[:, None].expand(count, length).to(device)
        ids = words(length).to(device)
        return Targets(input_ids=ids, mask=mask, weights=mask.float(), lengths=[length] * posts + [0] * (count - posts))

    placeholders = torch.full((count, image), image_token)
    ids = torch.cat([words(_BEFORE), placeholders, words(lengths.text), words(_BEHIND)], dim=1).to(device)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if name == "Qwen2.5-VL-3B":
        patches = 4 * image  # merged two by two
        prompt["pixel_values"] = torch.randn(count * patches, 3 * 2 * 14 * 14, generator=generator)
        prompt["image_grid_thw"] = torch.tensor([[1, 2 * side, 2 * side]] * count, device=device)
        prompt["mm_token_type_ids"] = (ids == image_token).long()
    else:
        pixels = 14 * side * (2 if name == "InternVL3-8B" else 1)
        prompt["pixel_values"] = torch.randn(count, 3, pixels, pixels, generator=generator)
    prompt["pixel_values"] = prompt["pixel_values"].to(device, next(model.parameters()).dtype)
    text = range(_BEFORE + image, _BEFORE + image + lengths.text)
    layout = PromptLayout(text, (ImageGrid(tuple(range(_BEFORE, _BEFORE + image)), side, side),))
    easy = count if easy is None else easy
    return {
        "prompt": prompt,
        "layouts": [layout] * count,
        "direct": targets(lengths.direct),
        "reasoning": targets(lengths.reasoning, easy),
        "has_rationale": torch.arange(count, device=device) < easy,
        "id": [str(index) for index in range(count)],
    }


def labelled_inputs(prompt: dict[str, torch.Tensor], targets: Targets) -> dict[str, torch.Tensor]:
    """Join prompts and targets into one sequence per post, with `labels`, as TRL's collator does."""
    ids, mask = targets["input_ids"], targets["mask"]
    inputs = dict(prompt)
    inputs["input_ids"] = torch.cat([prompt["input_ids"], ids], dim=1)
    inputs["attention_mask"] = torch.cat([prompt["attention_mask"], mask.to(prompt["attention_mask"])], dim=1)
    if "mm_token_type_ids" in prompt:
        inputs["mm_token_type_ids"] = torch.cat([prompt["mm_token_type_ids"], torch.zeros_like(ids)], dim=1)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -ids.shape[1] :] = ids.masked_fill(~mask, -100)
    return {**inputs, "labels": labels}
