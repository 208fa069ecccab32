"""Fitting a folded layer to its source, on the inputs it will really get."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import cos, pi
from typing import Any, cast

import torch
from torch import nn

from kvfold.errors import UnsupportedError
from kvfold.fold.hidden import FIRST, FITTED, TEXT, HiddenStates, Windows, median
from kvfold.fold.stream import LiveLayer
from kvfold.progress import Progress
from kvfold.quality.world import World

RIDGE = 0.1  # towards the closed form; less fits the calibration text better and others worse
_ERROR_TOKENS = 4096
STEP_TOKENS = 1024
STEP_FIRST = 64  # first tokens that a step sees beside them, and
_SHARES = {TEXT: 1.0, FIRST: STEP_FIRST / STEP_TOKENS}  # what they count
RATE = 1e-3  # for a tensor whose RMS is 0.05; others in proportion
_WARM_UP = 0.05


@dataclass
class FitTask:
    """One folded layer to be fitted in place.

    Attributes:
        live: the folded layer with its weights. output_name, mlp_output_name: the linear
            layers below it that write to the residual stream.
        source_inputs, source_attention, source_outputs, folded_inputs: ``[N, T, C]``.
        residual_scale: the factor on a block's output when it joins the residual stream.
        source_scale: the same of the source.
        drift: whether the attention's output adds to the residual stream linearly, so that it
            can make good what the stream has lost.
        fixed: modules of the attention that are left as they are.
        steps: of gradient descent. changed: names of the parameters that were fitted.
    """

    live: LiveLayer
    output_name: str
    mlp_output_name: str | None
    source_inputs: HiddenStates
    source_attention: HiddenStates
    source_outputs: HiddenStates
    folded_inputs: HiddenStates
    residual_scale: float
    source_scale: float
    drift: bool
    seed: int
    steps: int
    fixed: tuple[str, ...] = ()
    changed: set[str] = field(default_factory=set)

    @cached_property
    def damping(self) -> "Damping":
        """By the energy of what the source's layer puts out."""
        return Damping.of(self.source_outputs)

    def attention_target(self, windows: Windows) -> torch.Tensor:
        """The source's attention output, plus what the residual stream lacks by now."""
        target = self.source_attention[windows]
        if self.source_scale != self.residual_scale:
            target = target * (self.source_scale / self.residual_scale)
        if not self.drift:
            return target
        lack = self.source_inputs[windows] - self.folded_inputs[windows]
        return target + lack / self.residual_scale

    def linear(self, name: str) -> nn.Linear:
        module = self.live.module.get_submodule(name)
        if not isinstance(module, nn.Linear):
            raise UnsupportedError(
                f"{name} is a {type(module).__name__}; fitting needs a linear layer", "--fit none"
            )
        return module

    @torch.no_grad()
    def error(self) -> float:
        """Median over tokens of the squared error of the layer's output, relative to what
        the source layer adds, on windows spread over the text. (A mean would show a few tokens
        of giant norm only.)"""
        ratios = []
        count, tokens = self.folded_inputs.counts[TEXT], self.folded_inputs.shapes[TEXT][1]
        stride = -(-count * tokens // max(tokens, _ERROR_TOKENS))
        chosen = Windows(TEXT, torch.arange(0, count, stride, device="cpu"))
        here = self.folded_inputs.here(chosen)
        here = here[here >= 0]

        def measure(which: slice) -> None:
            windows = Windows(TEXT, here[which])
            wanted = self.source_outputs[windows]
            error = (self.live(self.folded_inputs[windows]) - wanted).square().sum(-1)
            added = (wanted - self.source_inputs[windows]).square().sum(-1)
            ratios.append((error / added.clamp_min(1e-30)).flatten())

        self.folded_inputs.room.each(len(here), tokens, measure)
        return median(self.folded_inputs.world, ratios)


@dataclass
class Damping:
    """How much less tokens of giant norm (attention sinks) count than usual ones.

    By the square root of their energy above the median: a plain loss would see little else, and
    equal relative weights break them.

    Attributes:
        usual: the median of the text's mean energies.
    """

    usual: float

    @classmethod
    def of(cls, states: HiddenStates) -> "Damping":
        energies = [states[batch].square().mean(-1).flatten() for batch in states.batches([TEXT])]
        return cls(max(median(states.world, energies), 1e-30))

    def factors(self, states: torch.Tensor) -> torch.Tensor:
        """``[N, T]`` of states ``[N, T, C]``, 1 for usual tokens."""
        return (states.square().mean(-1) / self.usual).clamp_min(1).rsqrt()


Stage = Callable[[FitTask, Progress], None]
Sample = tuple[torch.Tensor, torch.Tensor]  # inputs and wanted outputs [B, T, …] of windows


def refit_output(task: FitTask, progress: Progress) -> None:
    """Solve o_proj in closed form on the folded heads' own outputs."""
    linear = task.linear(task.output_name)

    def pair(batch: Windows) -> Sample:
        inputs = task.live.input_of(linear, task.folded_inputs[batch])
        return inputs, task.attention_target(batch)

    _solve(task, task.output_name, pair)


def refit_mlp(task: FitTask, progress: Progress) -> None:
    """Solve the MLP's last layer in closed form, for the source layer's output.

    Attention alone cannot make good all that the residual stream has lost; the MLP, which is
    wider, takes up much of the rest. Left as it is where a norm or several experts follow it.
    """
    if task.mlp_output_name is None:
        return
    linear = task.linear(task.mlp_output_name)

    def pair(batch: Windows) -> Sample:
        seen: list[tuple[torch.Tensor, torch.Tensor]] = []
        handle = linear.register_forward_hook(  # Falcon adds to the output in place
            lambda module, args, output: seen.append((args[0], output.clone()))
        )
        try:
            lack = task.source_outputs[batch] - task.live(task.folded_inputs[batch])
        finally:
            handle.remove()
        inputs, output = seen.pop()
        return inputs, output + lack / task.residual_scale

    _solve(task, task.mlp_output_name, pair)


@torch.no_grad()
def _solve(task: FitTask, name: str, pair: Callable[[Windows], Sample]) -> None:
    """Set the linear layer ``name`` to the ridge solution over inputs and wanted outputs.

    Of the text, tokens of giant norm count as they are. First tokens, which are many and all become
    such, are damped, not to drown it.
    """
    linear = task.linear(name)
    size = linear.in_features
    gram = linear.weight.new_zeros(size, size, dtype=torch.float64)
    cross = linear.weight.new_zeros(size, linear.out_features, dtype=torch.float64)

    def add(windows: Windows) -> None:
        x, y = (each.flatten(0, -2) for each in pair(windows))
        if linear.bias is not None:
            y = y - linear.bias
        if windows.text == FIRST:
            root = task.damping.factors(task.source_outputs[windows]).sqrt().reshape(-1, 1)
            x, y = root * x, root * y
        more_gram, more_cross = sums_of_products(x, y.float())
        gram.add_(more_gram)
        cross.add_(more_cross)

    task.folded_inputs.each(add, FITTED)
    task.folded_inputs.world.add(gram, cross)
    linear.weight.copy_(_ridge(gram, cross, linear.weight))
    task.changed.add(f"{name}.weight")


def sums_of_products(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x^T x and x^T y, float32, of rows x ``[N, n]`` in any dtype and y ``[N, m]`` in float32.

    Products of bfloat16 numbers are exact in float32. So where x is of them, hardware that
    multiplies in bfloat16 and sums in float32 loses nothing and is several times as fast; it is
    given y in two parts, which leave out 2^-18 of a number.
    """
    if x.dtype != torch.bfloat16:
        x = x.float()
        return x.T @ x, x.T @ y
    x = x.float()
    high = y.bfloat16().float()
    setting = cast(Any, torch.backends.mkldnn).matmul  # of CPUs; unknown to type checkers
    before = setting.fp32_precision
    setting.fp32_precision = "bf16"
    try:
        return x.T @ x, x.T @ high + x.T @ (y - high)
    finally:
        setting.fp32_precision = before


def _ridge(gram: torch.Tensor, cross: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """argmin_W sum |W h - y|^2 + r |W - start|^2, r = RIDGE * mean of diag(gram).

    Args:
        gram: ``[n, n]``, sum h h^T, which is used up: it is the largest array there is.
        cross: ``[n, m]``, sum h y^T. start: ``[m, n]``.
    """
    weight = RIDGE * float(gram.diagonal().mean())
    gram.diagonal().add_(weight)
    solution: torch.Tensor = torch.linalg.solve(gram, cross + weight * start.T.double())
    return solution.T


def fit_attention(task: FitTask, progress: Progress) -> None:
    """Train the layer's attention with Adam towards the source's layer output, MLP included.

    Looking through the layer's own frozen MLP lets the loss weigh the errors that matter to it.
    """
    attention = task.live.attention
    parameters = {
        name: parameter
        for name, parameter in attention.named_parameters()
        if name.partition(".")[0] not in task.fixed
    }
    size = _typical if task.fixed else _rms
    groups = [{"params": [p], "lr": RATE * size(p) / 0.05} for p in parameters.values()]
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_cosine, task.steps))
    damping, world = task.damping, task.folded_inputs.world
    for step in _draws(task.folded_inputs, task.steps, task.seed):
        optimizer.zero_grad()
        for windows in step:
            inputs = task.folded_inputs.anywhere(windows)
            wanted = task.source_outputs.anywhere(windows)
            share = _SHARES[windows.text] / len(inputs)
            mine = inputs[world.part()], wanted[world.part()]
            _descend(task, damping, *mine, share, list(parameters.values()))
        _add_gradients(world, parameters.values())
        optimizer.step()
        schedule.step()
    attention.requires_grad_(False)
    prefix = task.output_name.rpartition(".")[0]
    task.changed |= {f"{prefix}.{name}" for name in parameters}


def _descend(
    task: FitTask,
    damping: Damping,
    inputs: torch.Tensor,
    wanted: torch.Tensor,
    share: float,
    parameters: Sequence[nn.Parameter],
) -> None:
    """Add the gradients of some windows, each of which counts ``share``."""

    def backward(which: slice) -> None:
        error = task.live(inputs[which]) - wanted[which]
        weights = damping.factors(wanted[which]) / damping.usual
        loss = (error.square().mean(-1) * weights).mean(-1).sum()
        found = torch.autograd.grad(share * loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                before = parameter.grad
                parameter.grad = gradient if before is None else before.add_(gradient)

    task.folded_inputs.room.each(len(inputs), inputs.shape[1], backward)


def _add_gradients(world: World, parameters: Iterable[nn.Parameter]) -> None:
    """What all processes have found for their windows of a step."""
    if world.size == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        world.add(parameter.grad)


def _rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().square().mean().sqrt().clamp_min(1e-4))


def _typical(tensor: torch.Tensor) -> float:
    """The same of most rows: the one that makes a latent's constant is far larger than others."""
    rows = tensor.detach().reshape(len(tensor), -1)
    return float(rows.square().mean(-1).median().sqrt().clamp_min(1e-4))


def _cosine(steps: int, step: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    done = (step + 1) / steps
    return min(1.0, done / _WARM_UP) * 0.5 * (1 + cos(pi * min(1.0, done)))


def _draws(states: HiddenStates, steps: int, seed: int) -> Iterator[list[Windows]]:
    """Windows of every text that is fitted for each step."""
    sizes = {TEXT: STEP_TOKENS // states.shapes[TEXT][1], FIRST: STEP_FIRST}
    counts = {text: count for text in FITTED if (count := states.counts[text])}
    texts = [
        _epochs(count, min(count, max(1, sizes[text])), steps, seed)
        for text, count in counts.items()
    ]
    for step in zip(*texts, strict=True):
        yield [Windows(text, which) for text, which in zip(counts, step, strict=True)]


def _epochs(count: int, size: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Which windows for each step: epochs of a seeded shuffle, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    left: list[int] = []
    for _ in range(steps):
        if len(left) < size:
            left += torch.randperm(count, generator=generator, device="cpu").tolist()
        yield torch.tensor(left[:size], dtype=torch.int64, device="cpu")
        left = left[size:]


FITS: dict[str, tuple[Stage, ...]] = {
    "none": (),
    "refit": (refit_output, refit_mlp),
    "local": (fit_attention, refit_output, refit_mlp),
}
