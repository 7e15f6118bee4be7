"""The suite `gpu`: the papers' models at their published shapes on one accelerator, within ten minutes.

Given   the models of `dynkp.bench.real_shapes` (random weights, bf16), trained by LoRA, and the smallest in full.
Gives   one row per case: seconds, tokens per second, FLOP utilisation and peak memory of one forward and backward per way.
Holds   ways of a case run in turn; a way that fails (out of memory, say) does not stop the others, and its row gives the
        reason; a case for which no time is left is a row that says so; the optimizer's step, equal for all, is left out.

The ways, for Dynamic CoT by share of easy posts, for AimKP by stride and batch size:

- sft: `SFTTrainer.compute_loss` on the targets that a post is taught (known beforehand), in one padded batch.
- naive: Dynamic CoT by a pass to decide and a pass to train ([`~dynkp.bench.steps.TwoPassTrainer`]).
- published: AimKP's training step with `similarity_backend="plain"`, a forward and a backward per post and view, masked
  tokens in their place. One post is timed; a batch takes as many times longer.
- ours: the training step of `DynamicCoTTrainer` and `AimKPTrainer`. AimKP keeps every variant, so that all cases cost the same.

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
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from dynkp.batches.targets import mixed_targets
from dynkp.bench.measure import Setting, Step, environment, median_seconds
from dynkp.bench.real_shapes import SHAPES, TINY, Lengths, build_model, draw_batch, labelled_inputs
from dynkp.bench.steps import TwoPassTrainer, train, train_masked
from dynkp.bench.workload import build_trainer
from dynkp.mechanics.shared_prompt import causal_lm_of
from dynkp.trainer.aimkp_config import AimKPConfig
from dynkp.trainer.aimkp_trainer import AimKPTrainer
from dynkp.trainer.dynamic_cot_config import DynamicCoTConfig
from dynkp.trainer.dynamic_cot_trainer import DynamicCoTTrainer

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
    """What is timed together: a share of easy posts, or a batch size under every stride.

    Attributes:
        method: `"dynamic_cot"` or `"aimkp"`.
        checkpointing: Whether gradient checkpointing is on.
        attention: The attention implementation by transformers' name.
        share: Share of easy posts; None for AimKP.
        batch: Posts in a batch.
    """

    method: str
    checkpointing: bool
    attention: str
    share: float | None = None
    batch: int = POSTS


def run(setting: Setting, seconds: float = SECONDS) -> Iterator[dict[str, Any]]:
    """Measure the suite.

    Args:
        setting: Device, rounds (fewer where time is short) and whether shapes are tiny.
        seconds: Time for the whole suite; each model gets an equal part of what is left, and each case an equal part of its
            model's.

    Yields:
        One row per case, and for AimKP per stride. If a way failed, `failed` holds the reason and its figures are None.
    """
    deadline = time.perf_counter() + seconds
    for number, (name, trained) in enumerate(CONFIGURATIONS):
        now = time.perf_counter()
        yield from _configuration(setting, name, trained, now + (deadline - now) / (len(CONFIGURATIONS) - number))


def cases(trained: str, attentions: Sequence[str]) -> list[Case]:
    """List the cases of a model, the most informative first."""
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
    """Format a row for the printed table, under `HEADINGS`."""

    def shown(name: str, spec: str) -> str:
        return "-" if row[name] is None else format(row[name], spec)

    case = f"{row['method']}: " + (f"share {row['share']:g}" if row["stride"] is None else f"stride {row['stride']}")
    case += f", batch {row['batch']}" + ", checkpointing" * row["checkpointing"]
    case += f", {row['attention']}" * (row["attention"] != "sdpa")
    ratios = [shown(name, ".2f") for name in ("other_over_sft", "ours_over_sft", "other_over_ours")]
    speed, work = (", ".join(shown(f"{way}_{of}", spec) for way in ("sft", "ours"))
                   for of, spec in (("tokens_per_s", ",.0f"), ("utilisation", ".2f")))  # fmt: skip
    memory = ", ".join(shown(f"{way}_gib", ".1f") for way in ("sft", "other", "ours"))
    reasons = "; ".join(f"{way}: {reason}" for way, reason in row["failed"].items())
    return (f"{row['model']}, {row['trained']}", f"{case} ({reasons})" if reasons else case, row["other"], *ratios, speed,
            work, memory)  # fmt: skip


# One model


class Bench:
    """A model with its trainers and what is counted of its cases.

    Args:
        setting: Device, rounds and whether shapes are tiny.
        name: One of `SHAPES`.
        trained: `"lora"` or `"full"`.
        folder: The trainers' `output_dir`; nothing is written to it.
    """

    def __init__(self, setting: Setting, name: str, trained: str, folder: str):
        self.setting, self.name, self.trained, self.folder = setting, name, trained, folder
        self.lengths = TINY if setting.quick else Lengths()
        self.model = build_model(name, trained=trained, attention="sdpa", tiny=setting.quick, device=setting.device)
        self.sft_trainer = build_sft_trainer(self.model, folder, setting.device)
        self._trainers: dict[Any, Any] = {}
        self.work: dict[Any, float] = {}  # FLOPs per post of a method, share and way

    def trainer(self, trainer_class: type, config_class: type, **options: Any) -> Any:
        """Return the trainer with these options around the model, for batches of [`draw_batch`]; built at the first call."""
        key = (trainer_class, *sorted(options.items()))
        if key not in self._trainers:
            ids = map(str, range(max(BATCHES)))
            posts = [{"id": name, "text": "text", "keyphrases": ["keyphrase"], "rationale": "rationale"} for name in ids]
            settings = {"bf16": True, **options}
            self._trainers[key] = build_trainer(
                trainer_class, config_class, self.model, posts, one_word_tokenizer(), self.folder, **settings
            )
        return self._trainers[key]


def _configuration(setting: Setting, name: str, trained: str, deadline: float) -> Iterator[dict[str, Any]]:
    attentions = ["sdpa", *["flash_attention_2"] * (importlib.util.find_spec("flash_attn") is not None)]
    todo = cases(trained, attentions)
    with tempfile.TemporaryDirectory(prefix="dynkp-bench-") as folder:
        try:
            bench = Bench(setting, name, trained, folder)
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
    bench: Bench, case: Case, seconds: float
) -> tuple[dict[str, float], dict[str, str], dict[str, int], dict[str, float]]:
    """Run a case's ways.

    Args:
        bench: The model and its trainers.
        case: The case.
        seconds: Time for the case; the number of rounds follows from it.

    Returns:
        By way: median seconds; the reason of those that failed; peak bytes; losses.
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
    """Describe an error in the words of a table's cell."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]


def _first(step: Callable[[], torch.Tensor], device: torch.device) -> tuple[int, float]:
    """Run a step; return the peak of bytes in use, the model's included (0 on a CPU), and the loss."""
    if device.type == "cpu":
        return 0, float(step())
    torch.cuda.reset_peak_memory_stats(device)
    loss = float(step())
    return torch.cuda.max_memory_allocated(device), loss


def _count(bench: Bench, case: Case, way: str, step: Step) -> None:
    """Count a way's FLOPs per post, once, and without checkpointing, whose recomputation would count too."""
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
    bench: Bench | None,
) -> Iterator[dict[str, Any]]:
    """Yield a case's row, for AimKP one per stride, with None where something was not measured."""
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


def one_word_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer of trainers that get their batches ready-made."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="{% for message in messages %}{{ message.content }}{% endfor %}",
    )


def build_sft_trainer(model: Any, folder: str, device: torch.device) -> SFTTrainer:
    """Build an `SFTTrainer` around the model, to call its `compute_loss`."""
    args = SFTConfig(
        output_dir=folder, report_to="none", bf16=True, gradient_checkpointing=False, use_cpu=device.type == "cpu",
        dataset_kwargs={"skip_prepare_dataset": True}, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": [0, 1]}])
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=one_word_tokenizer(), data_collator=list)


def sft(trainer: SFTTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Run TRL's training step up to the optimizer."""
    trainer.model.zero_grad()
    with trainer.accelerator.autocast():
        loss = trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=(inputs["labels"] != -100).sum())
    loss.backward()
    return loss.detach()


def _dynamic_cot(bench: Bench, case: Case, **options: Any) -> dict[str, Step]:
    easy = round((case.share or 0.0) * case.batch)
    # As in the suite dynamic_cot. A γ between two losses would leave the choice to bf16's rounding.
    batch = draw_batch(bench.name, bench.model, case.batch, bench.lengths, easy or None)
    gamma = "inf" if easy else "0"
    taught = mixed_targets(batch["direct"], batch["reasoning"], batch["has_rationale"] & (easy > 0))
    ours = bench.trainer(DynamicCoTTrainer, DynamicCoTConfig, gamma=gamma, **options)
    options |= {"strategy": "direct", "prompt_backend": "plain"}
    naive = bench.trainer(TwoPassTrainer, DynamicCoTConfig, gamma=gamma, **options)
    return {
        "sft": partial(sft, bench.sft_trainer, labelled_inputs(batch["prompt"], taught)),
        "naive": partial(train, naive, batch),
        "ours": partial(train, ours, batch),
    }


def _aimkp(bench: Bench, case: Case) -> dict[str, Step]:
    batch = draw_batch(bench.name, bench.model, case.batch, bench.lengths)
    single = draw_batch(bench.name, bench.model, 1, bench.lengths)
    ours, published = (
        bench.trainer(AimKPTrainer, AimKPConfig, similarity_backend=backend, filter_gradients=False)
        for backend in ("batched", "plain")
    )
    return {
        "sft": partial(sft, bench.sft_trainer, labelled_inputs(batch["prompt"], batch["direct"])),
        "published": partial(train_masked, published, {**single, "single_posts": [single]}, STRIDES[0]),
        **{f"ours_{stride}": partial(train_masked, ours, batch, stride) for stride in STRIDES},
    }
