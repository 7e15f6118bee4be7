"""Every post's own gradient, per variant of its input, from one backward per variant, whatever the batch size.

Given   a model and, per variant of the input (full, text masked, image masked), the posts' losses in one graph.
Gives   `cosines(variant)`: cos(g_0, g_m) of each post over all trainable parameters, and, once the caller has weighed
        the variants, `loss(weights)`: a scalar worth Σ w·ℓ whose backward delivers Σ_i Σ_m w_im·g_im.
Holds   both equal those of [`PlainPostGradients`], the twin that runs one forward and one backward per post and
        variant: to rounding, for unequal lengths, with and without gradient checkpointing. No post's gradient is ever
        attributed to another: a parameter used in a way that hides which post it served is an error.

The rows of a batch do not interact, so one backward of the summed losses gives every row's own gradient at the output
of every linear layer. What is left is the last product, that of output gradients and inputs, which autograd would sum
over the batch: it is taken per post inside an autograd function that replaces the layers' own (hooks would fire again
when a checkpointed layer is replayed). LoRA's products are small and kept. A projector's are large: its output
gradients and inputs are kept instead, since dot products and weighted sums can be taken from these factors.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from dynkp.mechanics.shared_prompt import REENTRANT, causal_lm_of, checkpointed_layers
from dynkp.objectives.filtering import gradient_cosine

Losses = Callable[[Sequence[int]], torch.Tensor]

_REMEDY = "Use `similarity_backend='plain'`."


class _Frame(NamedTuple):
    """Whose rows a module sees."""

    posts: Sequence[int]
    image_tokens: Sequence[int]


class _VariantGradients:
    """What the fast way and its plain twin have in common: the bookkeeping of losses, cosines and the update.

    Args:
        model: causal (vision-)language model, or a PEFT model around one.
        count: B, the number of posts.

    Raises:
        ValueError: for a model without trainable parameters, for float16, and for reentrant gradient checkpointing, under
            which gradients cannot be asked for.
    """

    def __init__(self, model: nn.Module, count: int):
        for layer in checkpointed_layers(model):
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", False):
                raise ValueError(f"Gradients of single posts are out of reach: {REENTRANT}.")
        self.model, self.count = model, count
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if half := next((name for name, weight in self.parameters.items() if weight.dtype == torch.float16), None):
            raise ValueError(
                f"{half} is trained in float16, whose loss scaling does not cover gradients of single posts: they would "
                "underflow unnoticed. Use bf16=True or float32."
            )
        if not self.parameters:
            raise ValueError("The model has no trainable parameters, so there are no gradients to compare.")
        self.losses: dict[str, torch.Tensor] = {}  # per variant (B,), detached; 0 for posts without it
        self._squared_lengths: dict[str, torch.Tensor] = {}

    def add(self, variant: str, losses: Losses, posts: Sequence[int] | None = None, retain_graph: bool = False) -> torch.Tensor:
        """Run a variant forward and backward; the first one added is what the others are compared with.

        Args:
            variant: its name.
            losses (`Callable`): given row numbers, computes these posts' losses, one each, in their order.
            posts (`Sequence[int]`, *optional*): the posts that have the variant; the others cost nothing. All, if `None`.
            retain_graph: keep the graph for variants to come which share a part of it.

        Returns:
            `torch.Tensor` of shape `(B,)`: the losses, detached; 0 for posts without the variant.

        Raises:
            ValueError: if the variant was added before, or `losses` does not return one loss per post.
            RuntimeError: if the backward cannot tell which post a parameter served.
        """
        if variant in self.losses:
            raise ValueError(f"variant={variant!r} was added before, and would be counted twice. Give each another name.")
        posts = range(self.count) if posts is None else posts
        spread = self._zeros()
        if len(posts):
            values = self._run(variant, losses, posts, retain_graph)
            spread[_index(posts, spread.device)] = values.to(spread.dtype)
        self.losses[variant] = spread
        return spread

    def cosines(self, variant: str) -> torch.Tensor:
        """cos(g_0, g_m) of each post, over all trainable parameters as one vector.

        Returns:
            `torch.Tensor` of shape `(B,)`: in [-1, 1]; float32, or float64 for a float64 model; 0 where a gradient is
            zero or the post does not have the variant.
        """
        reference = next(iter(self.losses))
        lengths = self._squared_length(reference), self._squared_length(variant)
        return gradient_cosine(self._dot(reference, variant), *lengths)

    def loss(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The update's loss, Σ_i Σ_m w_im·ℓ_im, with its gradient already at hand: `backward` only hands it over.

        The gradient goes through autograd, so that whoever listens there (DDP, ZeRO-2, gradient accumulation) gets it.
        Parameters which no weighted loss reached get none, as in an ordinary backward.

        Args:
            weights (`dict` of `torch.Tensor` of shape `(B,)`): per variant, each post's weight; 0 drops it, and so does
                leaving the variant out.

        Returns:
            `torch.Tensor`: scalar.

        Example: with `weights = {"full": kept / 2, "text": kept / 2}`, where `kept` is 0 or 1 per post, it is the sum over
        the kept posts of the mean of their two losses.
        """
        if unknown := weights.keys() - self.losses.keys():
            raise ValueError(f"weights for {', '.join(sorted(unknown))}, of which no loss was added.")
        value = torch.stack([(weights[variant] * self.losses[variant]).sum() for variant in weights]).sum()
        on_host = {variant: weight.tolist() for variant, weight in weights.items()}
        ready = {name: self._weighted_sum(name, on_host) for name in self.parameters}
        reached = {name: gradient for name, gradient in ready.items() if gradient is not None}
        gradients = [gradient.to(self.parameters[name].dtype) for name, gradient in reached.items()]
        return _Deliver.apply(value.detach(), gradients, *(self.parameters[name] for name in reached))

    def rows(self, posts: Sequence[int], image_tokens: Sequence[int] | None = None) -> contextlib.AbstractContextManager[None]:
        """Block in which the model is run for these posts; `add` opens one around the losses it computes.

        Needed around what several variants share, and within `losses` where a part is run for some of its posts only.

        Args:
            posts (`Sequence[int]`): the posts whose rows the model sees, in order.
            image_tokens (`Sequence[int]`, *optional*): one number per post of `posts`, in proportion to its rows in the
                vision tower and the projector. By default, what the constructor was given.
        """
        return contextlib.nullcontext()

    def _run(self, variant: str, losses: Losses, posts: Sequence[int], retain_graph: bool) -> torch.Tensor:
        raise NotImplementedError

    def _dot(self, one: str, other: str) -> torch.Tensor:
        raise NotImplementedError

    def _weighted_sum(self, name: str, weights: Mapping[str, list[float]]) -> torch.Tensor | None:
        raise NotImplementedError

    def _squared_length(self, variant: str) -> torch.Tensor:
        if variant not in self._squared_lengths:
            self._squared_lengths[variant] = self._dot(variant, variant)
        return self._squared_lengths[variant]

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(
            self.count,
            dtype=functools.reduce(torch.promote_types, (w.dtype for w in self.parameters.values()), torch.float32),
            device=next(iter(self.parameters.values())).device,
        )


class PlainPostGradients(_VariantGradients):
    """The plain twin of [`PostGradients`], and the published way: a forward and a backward per post and variant.

    It is the oracle of the tests and serves models with trainable parameters the fast way cannot follow. It keeps one
    full set of gradients per post and variant.
    """

    def __init__(self, model: nn.Module, count: int, image_tokens: Sequence[int] | None = None):
        super().__init__(model, count)
        self._gradients: dict[str, dict[int, dict[str, torch.Tensor]]] = {}

    def _run(self, variant: str, losses: Losses, posts: Sequence[int], retain_graph: bool) -> torch.Tensor:
        kept, values = self._gradients.setdefault(variant, {}), []
        for post in posts:
            loss = losses([post])
            _check_losses(loss, [post])
            found = torch.autograd.grad(
                loss.sum(), list(self.parameters.values()), allow_unused=True, retain_graph=retain_graph
            )
            kept[post] = {name: gradient for name, gradient in zip(self.parameters, found, strict=True) if gradient is not None}
            values.append(loss.detach())
        return torch.cat(values)

    def _dot(self, one: str, other: str) -> torch.Tensor:
        total = self._zeros()
        kept = self._gradients.get(other, {})
        for post, gradients in self._gradients.get(one, {}).items():
            others = kept.get(post, {})
            for name in gradients:  # in the parameters' order: a set's changes from process to process, and with it rounding
                if name in others:
                    total[post] += _wide(gradients[name].flatten()) @ _wide(others[name].flatten())
        return total

    def _weighted_sum(self, name: str, weights: Mapping[str, list[float]]) -> torch.Tensor | None:
        terms = (
            weights[variant][post] * _wide(gradients[name])
            for variant in weights
            for post, gradients in self._gradients.get(variant, {}).items()
            if weights[variant][post] and name in gradients
        )
        return _sum(terms)


class PostGradients(_VariantGradients):
    """Gradients of single posts from one backward per variant of the whole batch.

    Parameters of linear layers (LoRA's two, a projector's, any other) are followed at next to no cost; those of other
    modules (norms, embeddings) by running the module backward once per post.

    Dropout is taken as drawn: each variant draws its own, in training as in the plain way, which lowers cosines (by about
    0.02 at LoRA's 0.05); compare with dropout 0.

    Args:
        model: causal (vision-)language model (or a PEFT model around one) for which [`why_gradients_cannot_be_batched`] returns
            `None`.
        count: B, the number of posts.
        image_tokens (`Sequence[int]`, *optional*): B numbers of image tokens, 0 for a post without picture. They tell
            which rows of the vision tower and the projector belong to which post: rows are in the order of the posts,
            and each post has a part in proportion to its number.

    Raises:
        ValueError: as the plain twin.

    Example:

    ```python
    >>> gradients = PostGradients(model, count=2, image_tokens=[576, 576])
    >>> gradients.add("full", lambda posts: full.losses(posts))
    >>> gradients.add("text", lambda posts: text_masked.losses(posts))
    >>> kept = (gradients.cosines("text") > 0.1).float()
    >>> gradients.loss({"full": 1 / (1 + kept), "text": kept / (1 + kept)}).backward()
    ```
    """

    def __init__(self, model: nn.Module, count: int, image_tokens: Sequence[int] | None = None):
        super().__init__(model, count)
        self.image_tokens = [0] * count if image_tokens is None else image_tokens
        self._decoder = set(causal_lm_of(model).get_decoder().modules())
        # Mllama's language model also reads pictures, as many tiles for every post of a batch.
        self._cross_attends = bool(getattr(causal_lm_of(model).config.get_text_config(), "cross_attention_layers", None))
        self._followed = list(_followed_modules(model))
        self._names = {weight: name for name, weight in self.parameters.items()}
        self._frame: _Frame | None = None
        self._variant: str | None = None
        # Per variant and parameter, either (B, *shape) or, per post, inputs and output gradients of its calls.
        self._gradients: dict[str, dict[str, torch.Tensor]] = {}
        self._factors: dict[str, dict[str, dict[int, list[tuple[torch.Tensor, torch.Tensor]]]]] = {}
        self._in_factors: dict[str, bool] = {}

    @contextlib.contextmanager
    def rows(self, posts: Sequence[int], image_tokens: Sequence[int] | None = None) -> Iterator[None]:
        """As the plain twin's, which does without."""
        outer = self._frame
        tokens = [self.image_tokens[post] for post in posts] if image_tokens is None else image_tokens
        self._frame = _Frame(posts, tokens)
        try:
            if outer is None:
                with self._following():
                    yield
            else:
                yield
        finally:
            self._frame = outer

    @contextlib.contextmanager
    def _following(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for module in self._followed:
                function = _linear if _is_linear(module) else _module
                if "forward" in vars(module):
                    stack.callback(setattr, module, "forward", module.forward)
                else:
                    stack.callback(delattr, module, "forward")
                module.forward = functools.partial(function, self, module, module.forward)
            yield

    def _run(self, variant: str, losses: Losses, posts: Sequence[int], retain_graph: bool) -> torch.Tensor:
        self._gradients[variant], self._factors[variant] = {}, {}
        # The backward belongs into the block, because it replays checkpointed layers.
        with self.rows(posts):
            values = losses(posts)
            _check_losses(values, posts)
            self._variant = variant
            try:
                found = torch.autograd.grad(
                    values.sum(), list(self.parameters.values()), allow_unused=True, retain_graph=retain_graph
                )
            finally:
                self._variant = None
        if beside := [name for name, gradient in zip(self.parameters, found, strict=True) if gradient is not None]:
            raise RuntimeError(
                f"{beside[0]} (and {len(beside) - 1} others) is used outside its module's forward, where its gradient "
                f"cannot be told apart by post. {_REMEDY}"
            )
        return values.detach()

    def spans(self, frame: _Frame | None, module: nn.Module, inputs: torch.Tensor) -> list[tuple[int, int, int]]:
        """Whose rows these are: post, first row, last row + 1, in order and without gaps."""
        if frame is None or self._variant is None:
            raise RuntimeError("A recorded forward or its backward ran outside of `rows` and `add`.")
        rows = inputs.shape[0]
        if module in self._decoder:
            tiles = rows // len(frame.posts)
            if self._cross_attends and inputs.dim() > 2 and rows == tiles * len(frame.posts):
                return [(post, index * tiles, (index + 1) * tiles) for index, post in enumerate(frame.posts)]
            # Flat tokens (a mixture of experts) would be taken for posts where there happen to be as many.
            if inputs.dim() - inputs.is_floating_point() < 2 or rows != len(frame.posts):
                raise RuntimeError(
                    f"{type(module).__name__} of the language model got inputs of shape {tuple(inputs.shape)} for "
                    f"{len(frame.posts)} posts; one row per post was expected. {_REMEDY}"
                )
            return [(post, row, row + 1) for row, post in enumerate(frame.posts)]
        total = sum(frame.image_tokens)
        if not total or any(tokens * rows % total for tokens in frame.image_tokens):
            raise RuntimeError(
                f"{type(module).__name__} outside of the language model got {rows} rows, which cannot be divided among "
                f"posts {list(frame.posts)} with image_tokens={list(frame.image_tokens)}. {_REMEDY}"
            )
        spans, start = [], 0
        for post, tokens in zip(frame.posts, frame.image_tokens, strict=True):
            stop = start + tokens * rows // total
            if stop > start:
                spans.append((post, start, stop))
            start = stop
        return spans

    def keep(self, weight: nn.Parameter, posts: Sequence[int], gradients: torch.Tensor) -> None:
        """Add the gradients, of shape `(len(posts), *weight.shape)`, to those of the variant in its backward."""
        name, kept = self._names[weight], self._gradients[self._variant or ""]
        if name not in kept and list(posts) == list(range(self.count)):
            kept[name] = gradients
            return
        if name not in kept:
            kept[name] = gradients.new_zeros(self.count, *weight.shape)
        kept[name].index_add_(0, _index(posts, gradients.device), gradients.to(kept[name].dtype))

    def keep_product(
        self, weight: nn.Parameter, spans: Sequence[tuple[int, int, int]], inputs: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Keep each post's `outputsᵀ @ inputs`, or the factors where they take less memory."""
        name, size = self._names[weight], inputs[0].numel() // inputs.shape[-1]
        longest = size * max(stop - start for _, start, stop in spans)
        if self._in_factors.setdefault(name, longest * sum(weight.shape) <= weight.numel()):
            factors = self._factors[self._variant or ""].setdefault(name, {})
            for post, start, stop in spans:
                pair = (inputs[start:stop].flatten(0, -2), outputs[start:stop].flatten(0, -2))
                factors.setdefault(post, []).append(pair)
            return
        posts = [post for post, _, _ in spans]
        if len({stop - start for _, start, stop in spans}) == 1:
            outputs, inputs = (side.reshape(len(spans), -1, side.shape[-1]) for side in (outputs, inputs))
            self.keep(weight, posts, outputs.transpose(1, 2) @ inputs)
        else:
            products = [outputs[a:b].flatten(0, -2).T @ inputs[a:b].flatten(0, -2) for _, a, b in spans]
            self.keep(weight, posts, torch.stack(products))

    def _dot(self, one: str, other: str) -> torch.Tensor:
        total = self._zeros()
        for name, gradients in self._gradients[one].items() if one in self._gradients else ():
            if (others := self._gradients.get(other, {}).get(name)) is not None:
                total += torch.linalg.vecdot(_wide(gradients.flatten(1)), _wide(others.flatten(1)))
        for name, by_post in self._factors.get(one, {}).items():
            matching = self._factors.get(other, {}).get(name, {})
            for post in (post for post in by_post if post in matching):
                total[post] += sum(_dot_of_products(a, b) for a in by_post[post] for b in matching[post])
        return total

    def _weighted_sum(self, name: str, weights: Mapping[str, list[float]]) -> torch.Tensor | None:
        return _sum(self._terms(name, weights))

    def _terms(self, name: str, weights: Mapping[str, list[float]]) -> Iterator[torch.Tensor]:
        for variant, by_post in weights.items():
            # A dropped gradient is left out rather than multiplied by zero: it may be infinite.
            posts = [post for post, weight in enumerate(by_post) if weight]
            gradients = self._gradients.get(variant, {}).get(name)
            if gradients is not None and posts:
                gradients = gradients if len(posts) == self.count else gradients[_index(posts, gradients.device)]
                wide = _wide(gradients)
                yield torch.tensordot(wide.new_tensor([by_post[post] for post in posts]), wide, dims=1)
            factors = self._factors.get(variant, {}).get(name, {})
            for post in posts:
                for inputs, outputs in factors.get(post, ()):
                    yield by_post[post] * _wide(outputs.T @ inputs)


def why_gradients_cannot_be_batched(model: nn.Module) -> str | None:
    """Why gradients of this model's posts cannot be told apart in a batch; `None` if they can.

    Example: it is `None` for LLaVA with LoRA on its linear layers and a trained projector; it names the LM head where
    that is trained, because the head sees target tokens, not posts.
    """
    trained = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad]
    weights = dict(model.named_parameters(remove_duplicate=False))
    counts = Counter(id(weights[name]) for name in trained)
    if tied := next((name for name in trained if counts[id(weights[name])] > 1), None):
        return f"{tied} is trained and shared between modules"
    head = causal_lm_of(model).get_output_embeddings()
    if head is not None and any(weight.requires_grad for weight in head.parameters()):
        return "its LM head is trained, and sees target tokens rather than posts"
    for module in model.modules():
        if getattr(module, "lora_variant", None):
            return f"its {type(module).__name__} layers use a variant of LoRA (DoRA or the like)"
        bare = isinstance(module, (nn.ParameterDict, nn.ParameterList))
        if bare and any(weight.requires_grad for weight in module.parameters()):
            return "some of its trained parameters are in no layer of their own (AdaLoRA, IA3, VeRA, adapters of embeddings)"
        if parametrize.is_parametrized(module) or type(module).__name__ == "ParamWrapper":
            return f"some of its {type(module).__name__} layers compute their weights from trained parameters"
    for module in _followed_modules(model):
        if not _is_linear(module) and any(isinstance(part, nn.Dropout) and part.p for part in module.modules()):
            return f"its {type(module).__name__} is trained and draws dropout, which would be drawn anew per post"
    return None


def _followed_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules that own trainable parameters: linear layers and, taken whole, any others."""
    if any(weight.requires_grad for weight in model.parameters(recurse=False)):
        yield model
    else:
        for child in model.children():
            yield from _followed_modules(child)


def _is_linear(module: nn.Module) -> bool:
    plain = type(module).forward is nn.Linear.forward and "forward" not in vars(module)
    return isinstance(module, nn.Linear) and plain


def _linear(recorder: PostGradients, module: Any, forward: Callable[..., torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return forward(inputs)
    return _FollowedLinear.apply(inputs, module.weight, module.bias, recorder, recorder._frame, module)


def _module(
    recorder: PostGradients, module: nn.Module, forward: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    if len(args) != 1 or any(isinstance(value, torch.Tensor) for value in kwargs.values()):
        raise RuntimeError(f"{type(module).__name__} is trained and takes more than one tensor. {_REMEDY}")
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    return _FollowedModule.apply(args[0], recorder, recorder._frame, module, functools.partial(forward, **kwargs), *weights)


class _FollowedLinear(torch.autograd.Function):
    """A linear layer whose backward hands inputs and output gradients to the recorder.

    The parameters are inputs although they get no gradient: without them, a first layer behind frozen embeddings would
    have nothing to run backward for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        recorder: PostGradients,
        frame: _Frame | None,
        module: nn.Linear,
    ) -> torch.Tensor:
        outputs = nn.functional.linear(inputs, weight, bias)
        if outputs.dtype == torch.float16:
            raise ValueError("Gradients of single posts underflow in float16. Use bf16=True or float32.")
        ctx.save_for_backward(inputs.to(outputs.dtype))  # under autocast, what the product was taken of
        ctx.recorder, ctx.frame, ctx.module, ctx.dtype = recorder, frame, module, inputs.dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        (inputs,), (gradient,) = ctx.saved_tensors, outputs
        recorder, module = ctx.recorder, ctx.module
        with torch.autocast(gradient.device.type, enabled=False):
            spans = recorder.spans(ctx.frame, module, inputs)
            if ctx.needs_input_grad[1]:
                # Detached: a view of a tensor that has a graph would keep it, and the graph this recorder, for ever.
                recorder.keep_product(module.weight, spans, inputs.detach(), gradient.detach())
            if ctx.needs_input_grad[2]:
                sums = [gradient[start:stop].flatten(0, -2).sum(dim=0) for _, start, stop in spans]
                recorder.keep(module.bias, [post for post, _, _ in spans], torch.stack(sums))
            before = None
            if ctx.needs_input_grad[0]:
                before = (gradient @ module.weight.to(gradient.dtype)).to(ctx.dtype)
        return before, None, None, None, None, None


class _FollowedModule(torch.autograd.Function):
    """Any module of one tensor, row by row independent: its backward runs it again, one post at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: torch.Tensor,
        recorder: PostGradients,
        frame: _Frame | None,
        module: nn.Module,
        function: Callable[[torch.Tensor], torch.Tensor],
        *weights: nn.Parameter,
    ) -> torch.Tensor:
        outputs = function(inputs)
        if not isinstance(outputs, torch.Tensor) or outputs.shape[0] != inputs.shape[0]:
            raise RuntimeError(f"{type(module).__name__} is trained and does not keep its rows apart. {_REMEDY}")
        ctx.save_for_backward(inputs)
        ctx.recorder, ctx.frame, ctx.module, ctx.function, ctx.weights = recorder, frame, module, function, weights
        device = inputs.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return outputs

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        (inputs,), (gradient,), weights = ctx.saved_tensors, outputs, ctx.weights
        before = torch.zeros_like(inputs) if ctx.needs_input_grad[0] else None
        for post, start, stop in ctx.recorder.spans(ctx.frame, ctx.module, inputs):
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                rows = inputs[start:stop].detach().requires_grad_(before is not None)
                again = ctx.function(rows)
            sources = [*weights, rows] if before is not None else weights
            found = torch.autograd.grad(again, sources, gradient[start:stop], allow_unused=True)
            for weight, weight_gradient in zip(weights, found, strict=False):
                if weight_gradient is not None:
                    ctx.recorder.keep(weight, [post], weight_gradient[None])
            if before is not None:
                before[start:stop] = found[-1]
        return (before, None, None, None, None, *(None for _ in weights))


class _Deliver(torch.autograd.Function):
    """A value with ready gradients: those of `value + (p * g.detach()).sum()` at p, bit for bit."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, gradients: list[torch.Tensor], *weights: nn.Parameter) -> torch.Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        (factor,) = outputs
        return (None, None, *(gradient * factor.to(gradient.dtype) for gradient in ctx.gradients))


def _dot_of_products(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """⟨GᵀX, HᵀY⟩ of factors (X, G) and (Y, H), of two matrices at most as large as the product or the token pairs."""
    (x, g), (y, h) = (tuple(map(_wide, factors)) for factors in (one, other))
    if len(x) * len(y) <= x.shape[1] * g.shape[1]:
        return ((x @ y.T) * (g @ h.T)).sum()
    return ((g.T @ x) * (h.T @ y)).sum()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _sum(terms: Iterable[torch.Tensor]) -> torch.Tensor | None:
    total = None
    for term in terms:
        total = term if total is None else total.add_(term)
    return total


def _index(posts: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.as_tensor(list(posts), dtype=torch.long, device=device)


def _check_losses(losses: torch.Tensor, posts: Sequence[int]) -> None:
    if losses.shape != (len(posts),):
        raise ValueError(f"`losses` returned shape {tuple(losses.shape)} for {len(posts)} posts; one loss each is needed.")
