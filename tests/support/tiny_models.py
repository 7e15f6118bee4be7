"""Tiny random models of every supported family, with processor and chat template, built in code.

Nothing is downloaded, nothing needs a GPU or torchvision, and building a pair takes a fraction of a second. Models
have 0.05-0.15 million parameters; what makes families differ is kept: grouped-query attention everywhere, 3-D rope
(Qwen-VL), deepstack (Qwen3-VL), window attention in the vision tower (Qwen2.5-VL), tiles (Idefics3, SmolVLM, InternVL,
Mllama), sliding windows and bidirectional image blocks (Gemma 3), cross-attention (Mllama), a beginning-of-sequence
token that both template and tokenizer would add (Llama 3, Gemma 3, Idefics3: hence add_special_tokens=False below) or
that only the tokenizer adds (LLaVA), and LLaVA-1.5's template without any end-of-turn token.

    model, processor = build("qwen2_vl")
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(images=[[image]], text=[text], padding=True, add_special_tokens=False, return_tensors="pt")

Every processor takes batches that mix numbers of images, given as one list of images per text (None when all lists
are empty), and every model but Mllama then computes for each post what it computes for the post alone. With Mllama,
batch posts of equal numbers of images only: transformers lets a post's tokens before its first image (all tokens, if
it has none) attend evenly to every tile, also to those that pad the post to the batch's largest number of images.

Importing this module has two effects, needed because the tests run without torchvision: processors are built and
loaded without a video processor, and SmolVLM's wish for num2words (it spells out the number of video frames) is
granted by ``str``.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.smolvlm import processing_smolvlm

VISION_FAMILIES: tuple[str, ...] = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "llava",
    "idefics3",
    "smolvlm",
    "gemma3",
    "mllama",
)
TEXT_FAMILIES: tuple[str, ...] = ("llama", "qwen2", "qwen3")
FAMILIES: tuple[str, ...] = VISION_FAMILIES + TEXT_FAMILIES

# What the byte-level BPE is trained on: enough for merges of several letters, so that token borders fall inside words.
_SENTENCES = (
    "What phrases should be used to tag the media? Answer with keyphrases separated by semicolons.",
    "sunset at the beach; golden hour; summer holidays; sea view from the old harbour",
    "The new phone has a great camera and the battery lasts two days #tech #review",
    "You are a helpful assistant. user assistant system",
    "<think> the picture shows a dog </think><answer>dog; park</answer>",
    "Breaking: the home team wins the cup final 3:2 after extra time! What a match!",
)


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Any]:
    """Builds a tiny model of a family and the processor (text families: the tokenizer) that belongs to it.

    Args:
        family: One of ``FAMILIES``.
        seed: Equal seeds give equal weights. The global random state is left as it was.
        dtype: Of the weights.

    Returns:
        The model, in eval mode and with sdpa attention (``model.set_attn_implementation("eager")`` changes it), and a
        fresh processor or tokenizer, which the caller may alter.

    Raises:
        ValueError: If the family is unknown.

    Example:
        >>> model, tokenizer = build("llama")
        >>> tokenizer.decode(tokenizer("dog").input_ids)
        '<|begin_of_text|>dog'
    """
    if family not in _BUILDERS:
        raise ValueError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    config, processor = _BUILDERS[family]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vision = family in VISION_FAMILIES
        auto = transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM
        model = auto.from_config(config, attn_implementation="sdpa")
        _add_noise_to_constants(model)
    tokenizer = getattr(processor, "tokenizer", processor)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model.to(dtype).eval(), processor


@contextlib.contextmanager
def exact_float64(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Turns the model to float64 and, within the block, every cast to float32 into one to float64.

    transformers computes norms, rope, softmax and the loss in float32 whatever the weights are, which leaves float64
    runs with errors of 1e-7 and (eager attention: float64's lowest number cast to float32) with NaN. Forward and
    backward (which recomputes under gradient checkpointing) belong inside the block. The model stays float64.

    Args:
        model: Converted in place. Floating inputs such as ``pixel_values`` may be float32 or float64.

    Example:
        with exact_float64(model):
            loss = model(**batch).loss  # float64
            loss.backward()
    """
    model.double()
    # Not a TorchFunctionMode: torch switches that off within `backward`, where checkpointed layers run again.
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(torch.Tensor, "float", torch.Tensor.double))
        for owner, name in ((torch.Tensor, "to"), (torch.nn.functional, "softmax"), (torch, "softmax")):
            patches.enter_context(mock.patch.object(owner, name, _asking_for_float64(getattr(owner, name))))
        yield model


def _asking_for_float64(function: Callable) -> Callable:
    @functools.wraps(function)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in kwargs.items()}
        return function(*args, **kwargs)

    return replaced


def _add_noise_to_constants(model: torch.nn.Module) -> None:
    """Norm weights of one, biases, gates and projections of zero get noise.

    Mllama's gates and Gemma 3's projector start at zero, where the image has no influence and no gradient; and a test
    on unit norm weights cannot see a norm that is left out.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter += 0.1 * torch.randn_like(parameter)


# Processors ----------------------------------------------------------------------------------------------------------

_stock_attributes = ProcessorMixin.get_attributes.__func__


def _attributes_without_video(cls: type[ProcessorMixin]) -> list[str]:
    return [name for name in _stock_attributes(cls) if name != "video_processor"]


ProcessorMixin.get_attributes = classmethod(_attributes_without_video)
# SmolVLM's apply_chat_template asks its video processor for these two, images or not.
transformers.SmolVLMProcessor.video_processor = SimpleNamespace(num_frames=None, fps=None)
if processing_smolvlm.num2words is None:
    processing_smolvlm.num2words = str


@functools.cache
def _trained_bpe(special_tokens: tuple[str, ...]) -> str:
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(special_tokens) + len(alphabet) + 96,
        special_tokens=list(special_tokens),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_SENTENCES, trainer)
    return tokenizer.to_str()


def _tokenizer(
    *,
    pad: str,
    eos: str,
    bos: str | None = None,
    adds_bos: bool = False,
    others: tuple[str, ...] = (),
    named: dict[str, str] | None = None,
    chat_template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose special tokens come first; ``named`` ones become attributes (``tokenizer.image_token``).

    Those in ``named`` only are appended to the vocabulary.
    """
    named = named or {}
    special = tuple(token for token in (pad, bos, eos, *others) if token)
    backend = Tokenizer.from_str(_trained_bpe(special))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, special.index(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        bos_token=bos,
        extra_special_tokens=named,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        model_max_length=4096,
        chat_template=chat_template,
    )


_NORMALIZE = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

# Chat templates ------------------------------------------------------------------------------------------------------
# As published with the families' instruction models, less tools and video, but lenient: content may be a string or a
# list of parts everywhere, where the published text-only templates want strings and LLaVA's and Idefics3's want lists.

_TEXT_OF_CONTENT = """\
{%- macro text_of(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
"""

_CHATML = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' and default_system -%}
{{ '<|im_start|>system\\n' + default_system + '<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string -%}{{ message.content }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ image_placeholder }}{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def _chatml(image_placeholder: str = "", default_system: str = "") -> str:
    return (
        f"{{%- set image_placeholder = {image_placeholder!r} -%}}\n"
        f"{{%- set default_system = {default_system!r} -%}}\n" + _CHATML
    )


_QWEN_VISION = "<|vision_start|><|image_pad|><|vision_end|>"

# Reasoning is cut out of the assistant's content and rendered anew, and only after the last user message; there the
# conversation's last message gets an empty block if it has none.
_QWEN3 = (
    _TEXT_OF_CONTENT
    + """\
{%- set ns = namespace(last_user=messages | length - 1, found=false) -%}
{%- for message in messages[::-1] -%}
{%- if not ns.found and message.role == 'user' -%}
{%- set ns.found = true -%}{%- set ns.last_user = messages | length - 1 - loop.index0 -%}
{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = text_of(message.content) -%}
{%- if message.role == 'assistant' -%}
{%- set reasoning = '' -%}
{%- if message.reasoning_content is string -%}
{%- set reasoning = message.reasoning_content -%}
{%- elif '</think>' in content -%}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{ '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last_user and (loop.last or reasoning) -%}
{{ '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
{%- else -%}{{ content }}{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- else -%}
{{ '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
"""
)

_LLAMA3 = """\
{{ bos_token }}
{%- for message in messages -%}
{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.content is string -%}{{ message.content | trim }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<|image|>' }}{%- elif part.type == 'text' -%}{{ part.text }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<|eot_id|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif -%}
"""

# Images first, then texts, each followed by a blank. No end-of-turn token, as published.
_LLAVA = """\
{%- for message in messages -%}
{%- if message.role != 'system' -%}{{ message.role.upper() + ': ' }}{%- endif -%}
{%- if message.content is string -%}{{ message.content + ' ' }}{%- else -%}
{%- for part in message.content if part.type == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message.content if part.type == 'text' -%}{{ part.text + ' ' }}{%- endfor -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""

_IDEFICS = """\
{{ bos_token }}
{%- for message in messages -%}
{{ message.role | capitalize }}
{%- if message.content is string -%}{{ ': ' + message.content }}{%- else -%}
{{ ':' if message.content and message.content[0].type == 'image' else ': ' }}
{%- for part in message.content -%}
{%- if part.type == 'text' -%}{{ part.text }}{%- elif part.type == 'image' -%}{{ '<image>' }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<end_of_utterance>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'Assistant:' }}{%- endif -%}
"""

# The system message goes before the first user message's text; roles must alternate.
_GEMMA = (
    _TEXT_OF_CONTENT
    + """\
{{ bos_token }}
{%- set ns = namespace(prefix='', messages=messages) -%}
{%- if messages[0].role == 'system' -%}
{%- set ns.prefix = text_of(messages[0].content) + '\\n\\n' -%}{%- set ns.messages = messages[1:] -%}
{%- endif -%}
{%- for message in ns.messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif -%}
{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\\n' }}
{%- if loop.first -%}{{ ns.prefix }}{%- endif -%}
{%- if message.content is string -%}{{ message.content | trim }}{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{ '<start_of_image>' }}
{%- elif part.type == 'text' -%}{{ part.text | trim }}{%- endif -%}
{%- endfor -%}{%- endif -%}
{{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\\n' }}{%- endif -%}
"""
)

# Families ------------------------------------------------------------------------------------------------------------

# Not the usual 0.02: with 32 hidden units that leaves activations, and the differences between them, too small.
_SPREAD = {"initializer_range": 0.1}


def _text_config(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **_SPREAD,
        **changes,
    }


def _vision_config(**changes: Any) -> dict[str, Any]:
    """Towers that see 28 x 28 pixels as 4 x 4 patches."""
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 7,
        **_SPREAD,
        **changes,
    }


def _qwen_tokenizer(chat_template: str, named: dict[str, str] | None = None, **kwargs: Any) -> PreTrainedTokenizerFast:
    return _tokenizer(
        pad="<|endoftext|>",
        eos="<|im_end|>",
        others=("<|im_start|>", *kwargs.pop("others", ())),
        named=named,
        chat_template=chat_template,
    )


def _qwen_vl(family: str) -> tuple[Any, Any]:
    """28 x 28 pixels give 4 image tokens, 56 x 56 give 16; larger images are scaled down."""
    template = _chatml(_QWEN_VISION, "" if family == "qwen3_vl" else "You are a helpful assistant.")
    tokenizer = _qwen_tokenizer(
        template,
        named={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    rope = {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]}
    text = _text_config(tokenizer)
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 7, "hidden_size": 32, **_SPREAD}
    if family == "qwen2_vl":
        config_class, processor_class = transformers.Qwen2VLConfig, transformers.Qwen2VLProcessor
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    elif family == "qwen2_5_vl":
        config_class, processor_class = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLProcessor
        vision |= {"intermediate_size": 48, "out_hidden_size": 32, "window_size": 28, "fullatt_block_indexes": [1]}
    else:
        config_class, processor_class = transformers.Qwen3VLConfig, transformers.Qwen3VLProcessor
        vision |= {"intermediate_size": 48, "out_hidden_size": 32, "num_position_embeddings": 64}
        vision |= {"deepstack_visual_indexes": [0]}
        rope["mrope_interleaved"] = True
        text["head_dim"] = 8
    config = config_class(
        text_config=text | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )
    image_processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=7, merge_size=2, size={"shortest_edge": 28 * 28, "longest_edge": 56 * 56}, **_NORMALIZE
    )
    return config, processor_class(image_processor, tokenizer, chat_template=template)


def _internvl() -> tuple[Any, Any]:
    """4 image tokens a tile; one tile for small square images, up to 2 tiles and a thumbnail for others."""
    template = _chatml("<IMG_CONTEXT>\n")
    tokenizer = _qwen_tokenizer(
        template,
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    )
    config = transformers.InternVLConfig(
        text_config={"model_type": "qwen2", **_text_config(tokenizer)},
        vision_config=_vision_config(image_size=[28, 28], patch_size=[7, 7]),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    image_processor = transformers.GotOcr2ImageProcessorPil(
        size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=2, **_NORMALIZE
    )
    return config, transformers.InternVLProcessor(image_processor, tokenizer, image_seq_length=4, chat_template=template)


def _llava() -> tuple[Any, Any]:
    """16 image tokens, a grid of 4 x 4."""
    tokenizer = _tokenizer(
        pad="<pad>", bos="<s>", eos="</s>", adds_bos=True, named={"image_token": "<image>"}, chat_template=_LLAVA
    )
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **_text_config(tokenizer)},
        vision_config={"model_type": "clip_vision_model", **_vision_config(num_hidden_layers=3, projection_dim=32)},
        image_token_index=tokenizer.image_token_id,
        image_seq_length=16,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    image_processor = transformers.LlavaImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **_NORMALIZE
    )
    return config, transformers.LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_LLAVA,
    )


def _idefics3_or_smolvlm(family: str) -> tuple[Any, Any]:
    """4 image tokens a tile; a square image gives 2 x 2 tiles, one of 2:1 two, and both a tile of the whole image."""
    idefics3 = family == "idefics3"
    tiles = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    image_tokens = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
    }
    if idefics3:
        tokenizer = _tokenizer(
            pad="<|pad|>",
            bos="<|begin_of_text|>",
            eos="<end_of_utterance>",
            adds_bos=True,
            others=tiles,
            named=image_tokens,
            chat_template=_IDEFICS,
        )
        config_class = transformers.Idefics3Config
    else:
        tokenizer = _tokenizer(
            pad="<|im_end|>",
            bos="<|im_start|>",
            eos="<end_of_utterance>",
            others=tiles,
            named=image_tokens | {"end_of_utterance_token": "<end_of_utterance>", "video_token": "<video>"},
            chat_template=_IDEFICS,
        )
        config_class = transformers.SmolVLMConfig
    config = config_class(
        text_config={"model_type": "llama", **_text_config(tokenizer)},
        vision_config=_vision_config(),
        image_token_id=tokenizer.image_token_id,
        pad_token_id=tokenizer.pad_token_id,
        scale_factor=2,
        tie_word_embeddings=False,
    )
    image_options = {"size": {"longest_edge": 56}, "max_image_size": {"longest_edge": 28}, **_NORMALIZE}
    if idefics3:
        image_processor = transformers.Idefics3ImageProcessorPil(**image_options)
        return config, transformers.Idefics3Processor(image_processor, tokenizer, image_seq_len=4, chat_template=_IDEFICS)
    image_processor = transformers.SmolVLMImageProcessorPil(**image_options)
    return config, transformers.SmolVLMProcessor(image_processor, tokenizer, None, image_seq_len=4, chat_template=_IDEFICS)


def _gemma3() -> tuple[Any, Any]:
    """4 image tokens; one layer with a sliding window of 48 tokens, which test prompts outgrow, and one without."""
    tokenizer = _tokenizer(
        pad="<pad>",
        eos="<eos>",
        bos="<bos>",
        adds_bos=True,
        others=("<start_of_turn>", "<end_of_turn>"),
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        chat_template=_GEMMA,
    )
    text = _text_config(
        tokenizer,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention"],
        tie_word_embeddings=True,
    )
    config = transformers.Gemma3Config(
        text_config=text,
        vision_config={"model_type": "siglip_vision_model", "vision_use_head": False, **_vision_config()},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")],
        **_SPREAD,
    )
    image_processor = transformers.Gemma3ImageProcessorPil(size={"height": 28, "width": 28}, **_NORMALIZE)
    return config, transformers.Gemma3Processor(image_processor, tokenizer, image_seq_length=4, chat_template=_GEMMA)


def _llama3_tokenizer(**named: str) -> PreTrainedTokenizerFast:
    return _tokenizer(
        pad="<|finetune_right_pad_id|>",
        bos="<|begin_of_text|>",
        eos="<|eot_id|>",
        adds_bos=True,
        others=("<|start_header_id|>", "<|end_header_id|>"),
        named=named,
        chat_template=_LLAMA3,
    )


def _mllama() -> tuple[Any, Any]:
    """One image token; the 1-4 tiles of 17 states it stands for are seen by cross-attention in the middle layer."""
    tokenizer = _llama3_tokenizer(image_token="<|image|>")
    config = transformers.MllamaConfig(
        # As published: the image token, the last of all, has an embedding but no place in the output layer.
        text_config=_text_config(
            tokenizer, vocab_size=tokenizer.image_token_id, num_hidden_layers=3, cross_attention_layers=[1]
        ),
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 64,
            "max_num_tiles": 4,
            **_SPREAD,
        },
        image_token_index=tokenizer.image_token_id,
    )
    image_processor = transformers.MllamaImageProcessorPil(size={"height": 28, "width": 28}, max_image_tiles=4, **_NORMALIZE)
    return config, transformers.MllamaProcessor(image_processor, tokenizer, chat_template=_LLAMA3)


def _llama() -> tuple[Any, Any]:
    tokenizer = _llama3_tokenizer()
    return transformers.LlamaConfig(**_text_config(tokenizer)), tokenizer


def _qwen2() -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer(_chatml(default_system="You are a helpful assistant."))
    return transformers.Qwen2Config(**_text_config(tokenizer)), tokenizer


def _qwen3() -> tuple[Any, Any]:
    tokenizer = _qwen_tokenizer(_QWEN3)
    return transformers.Qwen3Config(**_text_config(tokenizer, head_dim=8)), tokenizer


_BUILDERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "qwen2_vl": functools.partial(_qwen_vl, "qwen2_vl"),
    "qwen2_5_vl": functools.partial(_qwen_vl, "qwen2_5_vl"),
    "qwen3_vl": functools.partial(_qwen_vl, "qwen3_vl"),
    "internvl": _internvl,
    "llava": _llava,
    "idefics3": functools.partial(_idefics3_or_smolvlm, "idefics3"),
    "smolvlm": functools.partial(_idefics3_or_smolvlm, "smolvlm"),
    "gemma3": _gemma3,
    "mllama": _mllama,
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
