"""The suite `gpu`: the papers' models at their real shapes on one accelerator, within ten minutes.

Given   the models of `dynkp.bench.real_shapes` (random weights, bf16), trained by LoRA, and the smallest in full.
Gives   one row per case: seconds, tokens per second, FLOP utilisation and peak memory of one forward and backward per way.
Holds   ways of a case run in turn; a way that fails (out of memory, say) leaves the others alone, and its row says why; a
        case for which no time is left says so; the optimizer's step, equal for all, is left out.

The ways, for Dynamic CoT by share of easy posts, for AimKP by stride and batch size:

- sft: `SFTTrainer.compute_loss` on the targets a post is taught (known beforehand), in one padded batch.
- naive: Dynamic CoT by a pass to decide and a pass to learn, prompts computed twice.
- published: AimKP as published, a forward and a backward per post and view, masked tokens in their place. One post is
  timed; a batch takes as many times longer.
- ours: what the trainers compute.

Utilisation is the work that must be done (ours; for AimKP's sft its own), counted once without checkpointing, over time and
the device's dense bf16 peak.
"""

from __future__ import annotations

import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from dynkp.batches.targets import mixed_targets, select, targets_of
from dynkp.bench import dynamic_cot
from dynkp.bench.measure import Setting, Step, environment, median_seconds
from dynkp.bench.real_shapes import SHAPES, TINY, Lengths, Posts, batch_of, build_model, draw_posts, plain_inputs
from dynkp.mechanics.gradient_similarity import PlainPostGradients, PostGradients, why_gradients_cannot_be_batched
from dynkp.mechanics.masked_views import FULL, BatchedViews, PlainViews
from dynkp.mechanics.modality_masking import MODALITIES, Mask, image_token_counts, keep_mask, why_tokens_cannot_be_dropped
from dynkp.mechanics.shared_prompt import Scorer, causal_lm_of, score_targets
from dynkp.objectives.filtering import variant_weights
from dynkp.objectives.token_loss import target_loss
from dynkp.trainer.keyphrase_trainer import fused_score_targets

HEADINGS = ("model, trained", "case", "the other way", "other / SFT", "ours / SFT", "other / ours",
            "tokens/s: SFT, ours", "utilisation: SFT, ours", "peak GiB: SFT, other, ours")  # fmt: skip
# What there is time for, everything included: ten minutes, less the start of Python.
SECONDS = 560.0
POSTS = 4
BATCHES, STRIDES = (1, 4, 8, 16), (2, 4, 8)
# Dense bf16, FLOP/s, by a part of the device's name (the makers' data sheets; SXM modules).
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
CONFIGURATIONS = (*((name, "lora") for name in SHAPES), (SHAPES[0], "full"))


class Case(NamedTuple):
    """What is timed together: a share of easy posts, or a batch size under every stride."""

    method: str
    checkpointing: bool
    attention: str
    share: float | None = None
    batch: int = POSTS


def run(setting: Setting, seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
    """Measure the suite.

    Args:
        setting: device, rounds (fewer where time is short) and whether shapes are tiny.
        seconds: the time for everything; each model gets an equal part of what is left, each case of its model's.

    Yields:
        One row per case, and for AimKP per stride. Of a way that failed, `failed` has the reason and its figures are None.
    """
    deadline = time.perf_counter() + seconds
    for number, (name, trained) in enumerate(CONFIGURATIONS):
        now = time.perf_counter()
        yield from _configuration(setting, name, trained, now + (deadline - now) / (len(CONFIGURATIONS) - number))


def cases(trained: str, attentions: Sequence[str]) -> list[Case]:
    """The cases of a model, the most telling first."""
    dynamic = [
        Case("dynamic_cot", checkpointing, "sdpa", share=share)
        for checkpointing in (False, True)
        for share in (0.5, 0.0, 1.0, 0.25, 0.75)
    ]
    aimkp = [Case("aimkp", checkpointing, "sdpa", batch=batch) for checkpointing in (False, True) for batch in BATCHES]
    others = [Case("dynamic_cot", False, attention, share=0.5) for attention in attentions if attention != "sdpa"]
    if trained == "full":  # AimKP's paper trains adapters, and the whole model's gradients per post fit nowhere
        return [*dynamic, *others]
    others += [Case("aimkp", False, attention) for attention in attentions if attention != "sdpa"]
    return [case for pair in zip(dynamic, aimkp, strict=False) for case in pair] + dynamic[len(aimkp) :] + others


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the printed table, under `HEADINGS`."""

    def shown(name: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[name] is None else format(row[name] * scale, form)

    case = f"{row['method']}: " + (f"share {row['share']:g}" if row["stride"] is None else f"stride {row['stride']}")
    case += f", batch {row['batch']}" + ", checkpointing" * row["checkpointing"]
    case += f", {row['attention']}" * (row["attention"] != "sdpa")
    ratios = [shown(name, ".2f") for name in ("other_over_sft", "ours_over_sft", "other_over_ours")]
    speed, work = (", ".join(shown(f"{way}_{of}", form) for way in ("sft", "ours"))
                   for of, form in (("tokens_per_s", ",.0f"), ("utilisation", ".2f")))  # fmt: skip
    memory = ", ".join(shown(f"{way}_gib", ".1f") for way in ("sft", "other", "ours"))
    reasons = "; ".join(f"{way}: {reason}" for way, reason in row["failed"].items())
    return (f"{row['model']}, {row['trained']}", f"{case} ({reasons})" if reasons else case, row["other"], *ratios, speed,
            work, memory)  # fmt: skip


# One model


class _Bench:
    """A model with everything its cases share."""

    def __init__(self, setting: Setting, name: str, trained: str, folder: str):
        self.setting, self.name, self.trained = setting, name, trained
        self.lengths = TINY if setting.quick else Lengths()
        self.model = build_model(name, trained=trained, attention="sdpa", tiny=setting.quick, device=setting.device)
        self.trainer = sft_trainer(self.model, folder, setting.device)
        # As the trainers choose it.
        self.score: Scorer = score_targets if setting.device.type == "cpu" else fused_score_targets
        self.work: dict[Any, float] = {}  # FLOPs per post of a method, share and way


def _configuration(setting: Setting, name: str, trained: str, deadline: float) -> Iterator[dict[str, Any]]:
    attentions = ["sdpa", *["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)]
    todo = cases(trained, attentions)
    with tempfile.TemporaryDirectory(prefix="dynkp-bench-") as folder:
        try:
            bench = _Bench(setting, name, trained, folder)
        except Exception as error:  # out of memory, a family this version of transformers does not know
            for case in todo:
                yield from _rows(setting, name, trained, case, {}, {"model": reason_of(error)}, {}, {}, None)
            return
        bench_row = partial(_rows, setting, name, trained)
        for number, case in enumerate(todo):
            left = deadline - time.perf_counter()
            if left <= 0:
                yield from bench_row(case, {}, {"all": "not measured, no time left"}, {}, {}, bench)
                continue
            yield from bench_row(case, *measure(bench, case, left / (len(todo) - number)), bench)
        del bench_row, bench
    _release(setting.device)


def measure(
    bench: _Bench, case: Case, seconds: float
) -> tuple[dict[str, float], dict[str, str], dict[str, int], dict[str, float]]:
    """Run a case's ways.

    Returns:
        Median seconds per way, why others failed, peak bytes and the losses.
    """
    device, model = bench.setting.device, bench.model
    times: dict[str, float] = {}
    failed: dict[str, str] = {}
    memory: dict[str, int] = {}
    losses: dict[str, float] = {}
    steps: dict[str, Step] = {}
    try:
        causal_lm_of(model).set_attn_implementation(case.attention)
        if case.checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        ways = _dynamic_cot(bench, case) if case.method == "dynamic_cot" else _aimkp(bench, case)
        began = time.perf_counter()
        for way, step in ways.items():  # the first round, which is not timed
            try:
                memory[way], losses[way] = _first(step, device)
                steps[way] = step
            except Exception as error:
                failed[way] = reason_of(error)
                gc.collect()  # what the error's traceback holds
            model.zero_grad()
            _release(device)
        round_seconds = time.perf_counter() - began
        for way, step in steps.items():
            if way.startswith("ours") or (way, case.method) == ("sft", "aimkp"):
                _count(bench, case, way, step)
        rounds = min(bench.setting.repeats, max(1, int(seconds / max(round_seconds, 1e-9)) - 1))
        if steps:
            times = median_seconds(steps, bench.setting._replace(repeats=rounds))
    except Exception as error:  # of the case as a whole
        failed["all"] = reason_of(error)
    finally:
        if case.checkpointing:
            model.activation_checkpointing_disable()
        model.zero_grad()
        del steps
        _release(device)
    return times, failed, memory, losses


def reason_of(error: Exception) -> str:
    """An error in a cell's words."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def _first(step: Callable[[], torch.Tensor], device: torch.device) -> tuple[int, float]:
    """Peak bytes in use, the model's included, and the loss. A CPU's allocator does not tell its peak: there it is 0."""
    if device.type == "cpu":
        return 0, float(step())
    torch.cuda.reset_peak_memory_stats(device)
    loss = float(step())
    return torch.cuda.max_memory_allocated(device), loss


def _count(bench: _Bench, case: Case, way: str, step: Step) -> None:
    """Count a way's FLOPs per post, once; checkpointing would count what it computes again."""
    key = (case.method, case.share, way)
    if case.checkpointing or key in bench.work:
        return
    try:
        with FlopCounterMode(display=False) as counter:
            step()
        bench.work[key] = counter.get_total_flops() / case.batch
    except Exception:  # out of memory: the row does without
        bench.model.zero_grad()
        gc.collect()


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _rows(
    setting: Setting,
    name: str,
    trained: str,
    case: Case,
    times: dict[str, float],
    failed: dict[str, str],
    memory: dict[str, int],
    losses: dict[str, float],
    bench: _Bench | None,
) -> Iterator[dict[str, Any]]:
    """One row, for AimKP one per stride, with None where something was not measured."""
    lengths = TINY if setting.quick else Lengths()
    where = environment(setting)
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in where["device"]), None)
    for stride in (None,) if case.method == "dynamic_cot" else STRIDES:
        ours = "ours" if stride is None else f"ours_{stride}"
        other = "naive" if stride is None else "published"
        named = {"sft": "sft", "other": other, "ours": ours}
        seconds = {way: times.get(name) for way, name in named.items()}
        if stride is not None and seconds["other"] is not None:
            seconds["other"] *= case.batch  # one post was timed
        work: dict[str, float | None] = {}
        for way in ("sft", "ours"):
            # Of Dynamic CoT's sft, too, what must be computed: the padding need not be.
            counted = "ours" if stride is None else named[way]
            per_post = None if bench is None else bench.work.get((case.method, case.share, counted))
            work[way] = None if per_post is None else per_post * case.batch
        tokens = case.batch * (lengths.prompt + lengths.direct)
        if case.share is not None:
            tokens += round(case.share * case.batch) * (lengths.reasoning - lengths.direct)
        yield {
            "suite": "gpu",
            "model": name,
            "trained": trained,
            **case._asdict(),
            "stride": stride,
            "other": other,
            "failed": {way: reason for way, reason in failed.items() if not way.startswith("ours_") or way == ours},
            "other_over_sft": _ratio(seconds["other"], seconds["sft"]),
            "ours_over_sft": _ratio(seconds["ours"], seconds["sft"]),
            "other_over_ours": _ratio(seconds["other"], seconds["ours"]),
            **{f"{way}_s": value for way, value in seconds.items()},
            **{f"{way}_tokens_per_s": _ratio(tokens, value) for way, value in seconds.items()},
            **{f"{way}_flops": value for way, value in work.items()},
            **{f"{way}_utilisation": _ratio(_ratio(value, seconds[way]), peak) for way, value in work.items()},
            **{f"{way}_gib": memory[name] / 2**30 if memory.get(name) else None for way, name in named.items()},
            **{f"{way}_loss": losses.get(name) for way, name in named.items()},
            "tokens": tokens,
            **lengths._asdict(),
            "quick": setting.quick,
            **where,
            "clock": f"{setting.clock}, bf16",
        }


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


# The ways


def sft_trainer(model: Any, folder: str, device: torch.device) -> SFTTrainer:
    """An `SFTTrainer` of the model, for its loss: it reads no dataset, and its tokenizer has one word."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    args = SFTConfig(
        output_dir=folder, report_to="none", bf16=True, gradient_checkpointing=False, use_cpu=device.type == "cpu",
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": [0, 1]}])
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, data_collator=list)


def sft(trainer: SFTTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """TRL's step up to the optimizer."""
    trainer.model.zero_grad()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=(inputs["labels"] != -100).sum())
    loss.backward()
    return loss.detach()


def _dynamic_cot(bench: _Bench, case: Case) -> dict[str, Step]:
    posts = draw_posts(bench.name, bench.model, case.batch, bench.lengths)
    easy = [index < round((case.share or 0.0) * case.batch) for index in range(case.batch)]
    batch = batch_of(posts, easy)
    targets = mixed_targets(posts.direct, posts.reasoning, torch.tensor(easy, device=posts.direct["mask"].device))
    autocast = bench.trainer.accelerator.autocast

    def way(function: Callable[..., torch.Tensor]) -> torch.Tensor:
        with autocast():
            return function(bench.model, batch, bench.score)

    return {
        "sft": partial(sft, bench.trainer, plain_inputs(posts.prompt, targets)),
        "naive": partial(way, dynamic_cot.naive),
        "ours": partial(way, dynamic_cot.ours),
    }


def _aimkp(bench: _Bench, case: Case) -> dict[str, Step]:
    posts = draw_posts(bench.name, bench.model, case.batch, bench.lengths)
    single = draw_posts(bench.name, bench.model, 1, bench.lengths)
    autocast = bench.trainer.accelerator.autocast

    def way(function: Callable[..., torch.Tensor], posts: Posts, stride: int) -> torch.Tensor:
        with autocast():
            return function(bench.model, posts, stride, bench.score)

    return {
        "sft": partial(sft, bench.trainer, plain_inputs(posts.prompt, posts.direct)),
        "published": partial(way, published, single, STRIDES[0]),
        **{f"ours_{stride}": partial(way, masked_views, posts, stride) for stride in STRIDES},
    }


def published(model: nn.Module, posts: Posts, stride: int, score: Scorer = score_targets) -> torch.Tensor:
    """AimKP as published: for one post after the other, a forward and a backward per view, masked tokens in their place."""
    model.zero_grad()
    total = torch.zeros((), device=posts.direct["mask"].device)
    for post in range(len(posts.layouts)):
        prompt = {key: _post_of(value, post, len(posts.layouts)) for key, value in posts.prompt.items()}
        layouts, width = posts.layouts[post : post + 1], prompt["input_ids"].shape[1]
        masks = {name: Mask(keep_mask(layouts, name, [stride], width)) for name in MODALITIES}
        views = PlainViews(model, [prompt], [masks], score)
        total += _learn(PlainPostGradients(model, 1), views, posts, [post])
    return total / posts.direct["weights"].sum()


def masked_views(model: nn.Module, posts: Posts, stride: int, score: Scorer = score_targets) -> torch.Tensor:
    """AimKP as `AimKPTrainer` computes it."""
    if reason := why_gradients_cannot_be_batched(model):
        raise ValueError(reason)
    model.zero_grad()
    count, width = len(posts.layouts), posts.prompt["input_ids"].shape[1]
    masks = {name: Mask(keep_mask(posts.layouts, name, [stride] * count, width)) for name in MODALITIES}
    drop = why_tokens_cannot_be_dropped(model, width + max(posts.direct["lengths"])) is None
    starts = [layout.text.start for layout in posts.layouts] if drop else None
    gradients = PostGradients(model, count, image_token_counts(model, posts.prompt))
    with gradients.rows(range(count)):
        views = BatchedViews(model, posts.prompt, masks, starts, drop, score)
    return _learn(gradients, views, posts, list(range(count))) / posts.direct["weights"].sum()


def _learn(
    gradients: PostGradients | PlainPostGradients, views: BatchedViews | PlainViews, posts: Posts, rows: list[int]
) -> torch.Tensor:
    """Every view's gradients, their cosines, and the update; every variant is kept, so that all cases cost the same."""
    targets, names = targets_of(posts.direct, rows), (FULL, *MODALITIES)

    def losses(view: str, chosen: Sequence[int]) -> torch.Tensor:
        return target_loss(views.log_probs(view, targets, chosen), select(targets["weights"], list(chosen))).total

    for number, view in enumerate(names):
        gradients.add(view, partial(losses, view), retain_graph=number + 1 < len(names))
    cosines = torch.stack([gradients.cosines(name) for name in MODALITIES], dim=1)
    weights = variant_weights(cosines.isfinite()) / posts.direct["weights"].sum()
    loss = gradients.loss(dict(zip(names, weights.unbind(dim=1), strict=True)))
    loss.backward()
    return loss.detach() * posts.direct["weights"].sum()


def _post_of(value: torch.Tensor, post: int, count: int) -> torch.Tensor:
    """One post's part of a prompt's tensor; Qwen's patches stand one post after the other."""
    size = len(value) // count
    return value[post * size : (post + 1) * size]
