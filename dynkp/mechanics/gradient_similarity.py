"""Each post's own gradient, per variant of its input, from one backward pass per variant, whatever the batch size.

Given a model and, per variant of the input (full, text masked, image masked), the posts' losses in one graph, [`PostGradients`]
computes

- the cosines c_m = cos(g_0, g_m) of each post, over all trainable parameters, and
- the losses as tensors whose backward pass delivers any weighted sum of the posts' gradients, without another pass through the
  model.

Guarantees:

- Both equal those of [`PlainPostGradients`], the reference that runs one forward and one backward pass per post and variant:
  to rounding, for unequal lengths, with and without gradient checkpointing.
- No post's gradient is ever attributed to another post: a parameter whose use hides which post it served is an error.

How: the posts of a batch do not interact, so one backward pass of the summed losses gives each post's own gradient at the
output of every linear layer. What is left is the last product, of output gradients and inputs, which autograd would sum over
the batch: it is taken per post, in an autograd function that replaces the layers' own (hooks would fire again when a
checkpointed layer is replayed). LoRA's products are small and are stored. A projector's are large: its output gradients and
inputs are stored instead, since dot products and weighted sums can be computed from these factors.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrize

from dynkp.mechanics.shared_prompt import REENTRANT, causal_lm_of, checkpointed_layers
from dynkp.objectives.filtering import gradient_cosine

Losses = Callable[[Sequence[int]], torch.Tensor]
"""Given the indices of some posts of the batch, computes their losses, one each, in their order."""

_REMEDY = "Use `similarity_backend='plain'`."


class _Frame(NamedTuple):
    """The posts whose rows a module is computing."""

    indices: Sequence[int]
    image_tokens: Sequence[int]


class VariantGradients:
    """Gradients of B posts per variant of their inputs: the interface of both implementations, and what they share.

    Args:
        model (`torch.nn.Module`): causal (vision-)language model, or a PEFT model around one.
        count (`int`): B, the number of posts.

    Attributes:
        values (`dict[str, torch.Tensor]`): per variant the losses, (B,), without graph; 0 for posts without the variant.

    Raises:
        ValueError: for a model without trainable parameters, for float16, and for reentrant gradient checkpointing, under
            which gradients cannot be asked for.
    """

    def __init__(self, model: nn.Module, count: int):
        for layer in checkpointed_layers(model):
            function = getattr(layer, "_gradient_checkpointing_func", None)
            if isinstance(function, functools.partial) and function.keywords.get("use_reentrant", False):
                raise ValueError(f"Gradients of single posts cannot be computed: {REENTRANT}.")
        self.model, self.count = model, count
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        if half := next((name for name, weight in self.parameters.items() if weight.dtype == torch.float16), None):
            raise ValueError(
                f"{half} is trained in float16, whose loss scaling does not cover gradients of single posts: they would "
                "underflow unnoticed. Use bf16=True or float32."
            )
        if not self.parameters:
            raise ValueError("The model has no trainable parameters, so there are no gradients to compare.")
        self.values: dict[str, torch.Tensor] = {}
        self._squares: dict[str, torch.Tensor] = {}

    def add(
        self, variant: str, losses: Losses, indices: Sequence[int] | None = None, retain_graph: bool = False
    ) -> torch.Tensor:
        """Run a variant forward and backward. The first variant added is g_0, which the others are compared with.

        Args:
            variant (`str`): its name.
            losses (`Callable`): computes the losses of the posts whose indices it is given, (len(indices),), in their order.
            indices (`Sequence[int]`, *optional*): the posts that have the variant; the others cost nothing. All, if `None`.
            retain_graph (`bool`, *optional*, defaults to `False`): keep the graph, for later variants that share a part of it.

        Returns:
            `torch.Tensor` of shape `(B,)`: the losses, without graph; 0 for posts without the variant.

        Raises:
            ValueError: if the variant was added before, or `losses` does not return one loss per post.
            RuntimeError: if the backward pass cannot tell which post a parameter served.
        """
        if variant in self.values:
            raise ValueError(f"variant={variant!r} was added before, and would be counted twice. Use a different name.")
        indices = range(self.count) if indices is None else indices
        spread = self._zeros()
        if len(indices):
            values = self._run(variant, losses, indices, retain_graph)
            spread[_index(indices, spread.device)] = values.to(spread.dtype)
        self.values[variant] = spread
        return spread

    def cosines(self, variant: str) -> torch.Tensor:
        """Compute cos(g_0, g_m) of each post, over all trainable parameters as one vector.

        Args:
            variant (`str`): the name of a variant that was added.

        Returns:
            `torch.Tensor` of shape `(B,)`: in [-1, 1]; float32, or float64 for a float64 model; 0 where a gradient is zero or
            the post does not have the variant.
        """
        reference = next(iter(self.values))
        squares = self._square(reference), self._square(variant)
        return gradient_cosine(self._dot(reference, variant), *squares)

    def losses(self, variants: Sequence[str]) -> tuple[torch.Tensor, ...]:
        """Return the losses of some variants as tensors with a gradient: the one that [`add`] has recorded.

        The backward pass delivers Σ_i Σ_m f_im g_im to the parameters, with f_im the gradient that arrives at the loss of post
        i given variant m. It goes through autograd, so that DDP, ZeRO-2 and gradient accumulation work as for any loss.
        Parameters that no loss with f_im ≠ 0 reached get none, as in an ordinary backward pass.

        Args:
            variants (`Sequence[str]`): names of variants that were added.

        Returns:
            `tuple[torch.Tensor, ...]`: per variant (B,); 0 for posts without the variant.

        Raises:
            ValueError: if a variant was not added.

        Example: `full, text = gradients.losses(["full", "text"])` and `((full + text) / 2).sum().backward()` give every
        parameter the mean of both gradients, summed over the posts.
        """
        if unknown := [variant for variant in variants if variant not in self.values]:
            raise ValueError(f"no losses were added for {', '.join(unknown)}; there are losses of {', '.join(self.values)}.")
        reached = {name: weight for name, weight in self.parameters.items() if self._reaches(name, variants)}
        return _RecordedLosses.apply(self, tuple(variants), tuple(reached), *reached.values())

    def rows(self, indices: Sequence[int], image_tokens: Sequence[int] | None = None) -> AbstractContextManager[None]:
        """Within the block, the model computes these posts; [`add`] opens one around the losses it computes.

        It is needed around what several variants share, and within `losses` where a part is computed for some posts only.

        Args:
            indices (`Sequence[int]`): the posts whose rows the model computes, in order.
            image_tokens (`Sequence[int]`, *optional*): one number per post of `indices`, in proportion to its rows in the
                vision tower and the projector. By default, those given to the constructor.
        """
        return contextlib.nullcontext()

    def _run(self, variant: str, losses: Losses, indices: Sequence[int], retain_graph: bool) -> torch.Tensor:
        raise NotImplementedError

    def _dot(self, one: str, other: str) -> torch.Tensor:
        raise NotImplementedError

    def _reaches(self, name: str, variants: Sequence[str]) -> bool:
        """Whether any post's gradient of a parameter was recorded for one of the variants."""
        raise NotImplementedError

    def _weighted_sum(self, name: str, weights: Mapping[str, list[float]]) -> torch.Tensor | None:
        raise NotImplementedError

    def _square(self, variant: str) -> torch.Tensor:
        if variant not in self._squares:
            self._squares[variant] = self._dot(variant, variant)
        return self._squares[variant]

    def _zeros(self) -> torch.Tensor:
        return torch.zeros(
            self.count,
            dtype=functools.reduce(torch.promote_types, (w.dtype for w in self.parameters.values()), torch.float32),
            device=next(iter(self.parameters.values())).device,
        )


class PlainPostGradients(VariantGradients):
    """The reference of [`PostGradients`], and the published method: a forward and a backward pass per post and variant.

    The tests compare with it, and it serves models with trainable parameters that [`PostGradients`] does not support. It stores
    one full set of gradients per post and variant.

    Args:
        model (`torch.nn.Module`): causal (vision-)language model, or a PEFT model around one.
        count (`int`): B, the number of posts.
        image_tokens (`Sequence[int]`, *optional*): not used; for the same signature as [`PostGradients`].
    """

    def __init__(self, model: nn.Module, count: int, image_tokens: Sequence[int] | None = None):
        super().__init__(model, count)
        self._gradients: dict[str, dict[int, dict[str, torch.Tensor]]] = {}

    def _run(self, variant: str, losses: Losses, indices: Sequence[int], retain_graph: bool) -> torch.Tensor:
        kept, values = self._gradients.setdefault(variant, {}), []
        for index in indices:
            loss = losses([index])
            _check_losses(loss, [index])
            found = torch.autograd.grad(
                loss.sum(), list(self.parameters.values()), allow_unused=True, retain_graph=retain_graph
            )
            named = zip(self.parameters, found, strict=True)
            kept[index] = {name: gradient for name, gradient in named if gradient is not None}
            values.append(loss.detach())
        return torch.cat(values)

    def _dot(self, one: str, other: str) -> torch.Tensor:
        total = self._zeros()
        kept = self._gradients.get(other, {})
        for index, gradients in self._gradients.get(one, {}).items():
            others = kept.get(index, {})
            for name in gradients:  # in the parameters' order: that of a set, and with it rounding, varies between processes
                if name in others:
                    total[index] += _wide(gradients[name].flatten()) @ _wide(others[name].flatten())
        return total

    def _reaches(self, name: str, variants: Sequence[str]) -> bool:
        return any(name in gradients for variant in variants for gradients in self._gradients.get(variant, {}).values())

    def _weighted_sum(self, name: str, weights: Mapping[str, list[float]]) -> torch.Tensor | None:
        terms = (
            weights[variant][index] * _wide(gradients[name])
            for variant in weights
            for index, gradients in self._gradients.get(variant, {}).items()
            if weights[variant][index] and name in gradients
        )
        return _sum(terms)


class PostGradients(VariantGradients):
    """Gradients of single posts from one backward pass of the whole batch per variant.

    The gradients of linear layers' parameters (LoRA's two, a projector's, any other) cost next to nothing; those of other
    modules (norms, embeddings) cost a backward pass of the module per post.

    Each variant draws its own dropout, as it does when variants are computed one after the other; this lowers the cosines, by
    about 0.02 at LoRA's 0.05.

    Args:
        model (`torch.nn.Module`): causal (vision-)language model (or a PEFT model around one) for which
            [`why_gradients_cannot_be_batched`] returns `None`.
        count (`int`): B, the number of posts.
        image_tokens (`Sequence[int]`, *optional*): B numbers of image tokens, 0 for a post without image. They tell which rows
            of the vision tower and the projector belong to which post: rows are in the order of the posts, and each post has a
            part in proportion to its number.

    Raises:
        ValueError: for a model without trainable parameters, for float16, and for reentrant gradient checkpointing.

    Example:
    ```python
    gradients = PostGradients(model, count=2, image_tokens=[576, 576])
    gradients.add("full", lambda indices: full_losses(indices))
    gradients.add("text", lambda indices: text_masked_losses(indices))
    kept = gradients.cosines("text") > 0.1
    full, text = gradients.losses(["full", "text"])
    torch.where(kept, (full + text) / 2, full).sum().backward()
    ```
    """

    def __init__(self, model: nn.Module, count: int, image_tokens: Sequence[int] | None = None):
        super().__init__(model, count)
        self.image_tokens = [0] * count if image_tokens is None else image_tokens
        self._decoder = set(causal_lm_of(model).get_decoder().modules())
        # Mllama's language model also reads images, with the same number of tiles for every post of a batch.
        self._cross_attends = bool(getattr(causal_lm_of(model).config.get_text_config(), "cross_attention_layers", None))
        self._followed = list(_followed_modules(model))
        self._names = {weight: name for name, weight in self.parameters.items()}
        self._frame: _Frame | None = None
        self._variant: str | None = None
        # Per variant and parameter, either (B, *shape) or, per post, the inputs and output gradients of its calls.
        self._gradients: dict[str, dict[str, torch.Tensor]] = {}
        self._factors: dict[str, dict[str, dict[int, list[tuple[torch.Tensor, torch.Tensor]]]]] = {}
        self._in_factors: dict[str, bool] = {}

    @contextlib.contextmanager
    def rows(self, indices: Sequence[int], image_tokens: Sequence[int] | None = None) -> Iterator[None]:
        """Within the block, the model computes these posts; see [`VariantGradients.rows`]."""
        outer = self._frame
        tokens = [self.image_tokens[index] for index in indices] if image_tokens is None else image_tokens
        self._frame = _Frame(indices, tokens)
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

    def _run(self, variant: str, losses: Losses, indices: Sequence[int], retain_graph: bool) -> torch.Tensor:
        self._gradients[variant], self._factors[variant] = {}, {}
        # The backward pass belongs in the block, because it replays checkpointed layers.
        with self.rows(indices):
            values = losses(indices)
            _check_losses(values, indices)
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
        """Divide the rows of a module's inputs among the posts.

        Args:
            frame (`_Frame` or `None`): the posts that the module is computing.
            module (`torch.nn.Module`): the module.
            inputs (`torch.Tensor` of shape `(rows, ...)`): its inputs.

        Returns:
            `list[tuple[int, int, int]]`: index of the post, first row, last row + 1; in order and without gaps.

        Raises:
            RuntimeError: if the rows cannot be divided among the posts.
        """
        if frame is None or self._variant is None:
            raise RuntimeError("A recorded forward pass, or its backward pass, ran outside of `rows` and `add`.")
        rows = inputs.shape[0]
        if module in self._decoder:
            tiles = rows // len(frame.indices)
            if self._cross_attends and inputs.dim() > 2 and rows == tiles * len(frame.indices):
                return [(index, place * tiles, (place + 1) * tiles) for place, index in enumerate(frame.indices)]
            # Flat tokens (a mixture of experts) would be taken for posts where there happen to be as many.
            if inputs.dim() - inputs.is_floating_point() < 2 or rows != len(frame.indices):
                raise RuntimeError(
                    f"{type(module).__name__} of the language model got inputs of shape {tuple(inputs.shape)} for "
                    f"{len(frame.indices)} posts; one row per post was expected. {_REMEDY}"
                )
            return [(index, row, row + 1) for row, index in enumerate(frame.indices)]
        total = sum(frame.image_tokens)
        if not total or any(tokens * rows % total for tokens in frame.image_tokens):
            raise RuntimeError(
                f"{type(module).__name__} outside of the language model got {rows} rows, which cannot be divided among "
                f"posts {list(frame.indices)} with image_tokens={list(frame.image_tokens)}. {_REMEDY}"
            )
        spans, start = [], 0
        for index, tokens in zip(frame.indices, frame.image_tokens, strict=True):
            stop = start + tokens * rows // total
            if stop > start:
                spans.append((index, start, stop))
            start = stop
        return spans

    def keep(self, weight: nn.Parameter, indices: Sequence[int], gradients: torch.Tensor) -> None:
        """Add some posts' gradients of a parameter to those recorded for the variant that is running backward.

        Args:
            weight (`torch.nn.Parameter`): the parameter.
            indices (`Sequence[int]`): the posts.
            gradients (`torch.Tensor` of shape `(len(indices), *weight.shape)`): their gradients.
        """
        name, kept = self._names[weight], self._gradients[self._variant or ""]
        if name not in kept and list(indices) == list(range(self.count)):
            kept[name] = gradients
            return
        if name not in kept:
            kept[name] = gradients.new_zeros(self.count, *weight.shape)
        kept[name].index_add_(0, _index(indices, gradients.device), gradients.to(kept[name].dtype))

    def keep_product(
        self, weight: nn.Parameter, spans: Sequence[tuple[int, int, int]], inputs: torch.Tensor, outputs: torch.Tensor
    ) -> None:
        """Record the gradient of a linear layer's weight, each post's `outputsᵀ @ inputs`, or its factors if they are smaller.

        Args:
            weight (`torch.nn.Parameter`): the weight.
            spans (`Sequence[tuple[int, int, int]]`): the posts' rows, as [`spans`] returns them.
            inputs (`torch.Tensor` of shape `(rows, ..., D_in)`): inputs of the layer.
            outputs (`torch.Tensor` of shape `(rows, ..., D_out)`): gradients of its outputs.
        """
        name, size = self._names[weight], inputs[0].numel() // inputs.shape[-1]
        longest = size * max(stop - start for _, start, stop in spans)
        if self._in_factors.setdefault(name, longest * sum(weight.shape) <= weight.numel()):
            factors = self._factors[self._variant or ""].setdefault(name, {})
            for index, start, stop in spans:
                pair = (inputs[start:stop].flatten(0, -2), outputs[start:stop].flatten(0, -2))
                factors.setdefault(index, []).append(pair)
            return
        indices = [index for index, _, _ in spans]
        if len({stop - start for _, start, stop in spans}) == 1:
            outputs, inputs = (side.reshape(len(spans), -1, side.shape[-1]) for side in (outputs, inputs))
            self.keep(weight, indices, outputs.transpose(1, 2) @ inputs)
        else:
            products = [outputs[a:b].flatten(0, -2).T @ inputs[a:b].flatten(0, -2) for _, a, b in spans]
            self.keep(weight, indices, torch.stack(products))

    def _dot(self, one: str, other: str) -> torch.Tensor:
        total = self._zeros()
        for name, gradients in self._gradients[one].items() if one in self._gradients else ():
            if (others := self._gradients.get(other, {}).get(name)) is not None:
                total += torch.linalg.vecdot(_wide(gradients.flatten(1)), _wide(others.flatten(1)))
        for name, by_post in self._factors.get(one, {}).items():
            matching = self._factors.get(other, {}).get(name, {})
            for index in (index for index in by_post if index in matching):
                total[index] += sum(_dot_of_products(a, b) for a in by_post[index] for b in matching[index])
        return total

    def _reaches(self, name: str, variants: Sequence[str]) -> bool:
        return any(name in self._gradients.get(variant, {}) or name in self._factors.get(variant, {}) for variant in variants)

    def _weighted_sum(self, name: str, weights: Mapping[str, list[float]]) -> torch.Tensor | None:
        return _sum(self._terms(name, weights))

    def _terms(self, name: str, weights: Mapping[str, list[float]]) -> Iterator[torch.Tensor]:
        for variant, by_post in weights.items():
            # A gradient with weight zero is left out rather than multiplied by zero: it may be infinite.
            indices = [index for index, weight in enumerate(by_post) if weight]
            gradients = self._gradients.get(variant, {}).get(name)
            if gradients is not None and indices:
                gradients = gradients if len(indices) == self.count else gradients[_index(indices, gradients.device)]
                wide = _wide(gradients)
                yield torch.tensordot(wide.new_tensor([by_post[index] for index in indices]), wide, dims=1)
            factors = self._factors.get(variant, {}).get(name, {})
            for index in indices:
                for inputs, outputs in factors.get(index, ()):
                    yield by_post[index] * _wide(outputs.T @ inputs)


def why_gradients_cannot_be_batched(model: nn.Module) -> str | None:
    """Return the reason why gradients of single posts cannot be computed in one batch.

    Args:
        model (`torch.nn.Module`): causal (vision-)language model, or a PEFT model around one.

    Returns:
        `str` or `None`: a clause that names the trained parameters which [`PostGradients`] does not support; `None` if there
        are none, as for LLaVA with LoRA on its linear layers and a trained projector.
    """
    trained = [name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad]
    weights = dict(model.named_parameters(remove_duplicate=False))
    counts = Counter(id(weights[name]) for name in trained)
    if tied := next((name for name in trained if counts[id(weights[name])] > 1), None):
        return f"{tied} is trained and shared between modules"
    head = causal_lm_of(model).get_output_embeddings()
    if head is not None and any(weight.requires_grad for weight in head.parameters()):
        return "its LM head is trained, whose inputs are target tokens rather than posts"
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
    """Iterate over the outermost modules that own trainable parameters: linear layers and, taken whole, any others."""
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
    """A linear layer whose backward pass gives inputs and output gradients to the recorder.

    The parameters are inputs of the function although they get no gradient from it: without them, the first layer behind frozen
    embeddings would have no backward pass.
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
        ctx.save_for_backward(inputs.to(outputs.dtype))  # under autocast, the inputs of the product
        ctx.recorder, ctx.frame, ctx.module, ctx.dtype = recorder, frame, module, inputs.dtype
        return outputs

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        (inputs,), (gradient,) = ctx.saved_tensors, outputs
        recorder, module = ctx.recorder, ctx.module
        with torch.autocast(gradient.device.type, enabled=False):
            spans = recorder.spans(ctx.frame, module, inputs)
            if ctx.needs_input_grad[1]:
                # Detached: a view of a tensor with a graph would keep that graph, and the graph this recorder, for ever.
                recorder.keep_product(module.weight, spans, inputs.detach(), gradient.detach())
            if ctx.needs_input_grad[2]:
                sums = [gradient[start:stop].flatten(0, -2).sum(dim=0) for _, start, stop in spans]
                recorder.keep(module.bias, [index for index, _, _ in spans], torch.stack(sums))
            before = None
            if ctx.needs_input_grad[0]:
                before = (gradient @ module.weight.to(gradient.dtype)).to(ctx.dtype)
        return before, None, None, None, None, None


class _FollowedModule(torch.autograd.Function):
    """Any module with one tensor as input and independent rows: its backward pass runs it again, one post at a time."""

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
        for index, start, stop in ctx.recorder.spans(ctx.frame, ctx.module, inputs):
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                rows = inputs[start:stop].detach().requires_grad_(before is not None)
                again = ctx.function(rows)
            sources = [*weights, rows] if before is not None else weights
            found = torch.autograd.grad(again, sources, gradient[start:stop], allow_unused=True)
            for weight, weight_gradient in zip(weights, found, strict=False):
                if weight_gradient is not None:
                    ctx.recorder.keep(weight, [index], weight_gradient[None])
            if before is not None:
                before[start:stop] = found[-1]
        return (before, None, None, None, None, *(None for _ in weights))


class _RecordedLosses(torch.autograd.Function):
    """Losses per variant, (B,) each, whose backward pass delivers weighted sums of the recorded gradients."""

    @staticmethod
    def forward(
        ctx: Any, recorder: VariantGradients, variants: tuple[str, ...], names: tuple[str, ...], *weights: nn.Parameter
    ) -> tuple[torch.Tensor, ...]:
        ctx.recorder, ctx.variants, ctx.names, ctx.weights = recorder, variants, names, weights
        return tuple(recorder.values[variant].clone() for variant in variants)

    @staticmethod
    def backward(ctx: Any, *factors: torch.Tensor) -> Any:
        on_host = {variant: factor.tolist() for variant, factor in zip(ctx.variants, factors, strict=True)}
        sums = (ctx.recorder._weighted_sum(name, on_host) for name in ctx.names)
        found = zip(sums, ctx.weights, strict=True)
        gradients = (None if total is None else total.to(weight.dtype) for total, weight in found)
        return (None, None, None, *gradients)


def _dot_of_products(one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Compute ⟨GᵀX, HᵀY⟩ of factors (X, G) and (Y, H), by pairs of tokens or by the products, whichever are fewer."""
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


def _index(indices: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.as_tensor(list(indices), dtype=torch.long, device=device)


def _check_losses(losses: torch.Tensor, indices: Sequence[int]) -> None:
    if losses.shape != (len(indices),):
        raise ValueError(f"`losses` returned shape {tuple(losses.shape)} for {len(indices)} posts; one loss each is needed.")
