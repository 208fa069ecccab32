"""The training loop: one step is sequences in, one update of the weights out.

All of distillation is here, in order; what it calls says what, this says when.
"""

from dataclasses import dataclass, field
from math import cos, pi
from pathlib import Path
from typing import Any

import torch

from kvfold.errors import InputError
from kvfold.healing import saves
from kvfold.healing.line import Line, best_share
from kvfold.healing.models import ParameterGroup
from kvfold.healing.objective import Objective, distillation, hidden_error
from kvfold.healing.packing import Batch, TrainingStream
from kvfold.healing.parallel import gather_again, gradients_later
from kvfold.healing.request import HealRequest
from kvfold.healing.watch import Guard, Row, StopSignal, Stopwatch, Watch
from kvfold.progress import Progress
from kvfold.quality.world import World


@dataclass
class Distillation:
    """A student, its teacher and the text they read.

    Attributes:
        student, teacher: as ``parallel.distribute`` returns them.
        held_out: name -> batch, evaluated every ``request.eval_tokens`` tokens.
        deciding: held-out text that nothing else is measured on; decides how much of what training
            changed is kept (``healing.line``). None keeps all.
        folder: where checkpoints are kept. at_once: sequences per forward pass. step: updates made
            so far. last: what was measured at the step that was taken up.
        kept: how much was kept, and the KL of every share that was tried; None until then.
    """

    request: HealRequest
    student: Any
    teacher: Any
    groups: list[ParameterGroup]
    stream: TrainingStream
    held_out: dict[str, Batch]
    deciding: Batch | None
    world: World
    dtype: torch.dtype
    folder: Path
    watch: Watch
    at_once: int
    step: int = 0
    last: Row = field(default_factory=dict)
    guard: Guard = field(default_factory=Guard)
    kept: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        r = self.request
        self.objective = Objective(r.temperature, r.cross_entropy, r.hidden)
        settings = [{"params": g.parameters, "peak": g.lr, "lr": g.lr} for g in self.groups]
        fused = self.world.kind != "fsdp"
        self.optimizer = torch.optim.AdamW(
            settings, betas=(0.9, 0.95), weight_decay=0.0, fused=fused
        )
        self.stopwatch = Stopwatch()
        self.line: Line | None = None
        if self.deciding is not None:
            self.line = Line(p for group in self.groups for p in group.parameters)

    # -- the loop ---------------------------------------------------------------------------

    def run(self, progress: Progress) -> None:
        """Train to the last step, saving and evaluating on the way.

        Raises:
            RunError: if it diverges. KeyboardInterrupt: after a checkpoint was saved.
        """
        r = self.request
        if self.step == 0:
            self.report(self.evaluate())
        elif self.last:  # the run may have been killed before it was reported, or evaluated
            self.report(self.last | (self.evaluate() if self._is_due() else {}))
        with StopSignal().listening() as stop:
            self.stopwatch.reset()
            while self.step < r.steps:
                row = self.one_step(stop)
                done = self.step == r.steps
                progress("healing", self.step * r.sequences * r.context, r.tokens)
                if row["stop"] or done or self.step % r.every(r.save_tokens) == 0:
                    with self.stopwatch.apart():
                        self.save(row)
                if not row["stop"] and self._is_due():
                    with self.stopwatch.apart():
                        row |= self.evaluate()
                self.report(row)
                if row["stop"]:
                    raise KeyboardInterrupt
        self.choose(progress)

    def _is_due(self) -> bool:
        """Whether this step is one after which to evaluate."""
        r = self.request
        return self.step == r.steps or self.step % r.every(r.eval_tokens) == 0

    def one_step(self, stop: StopSignal) -> Row:
        """Read a batch, compute, look, update."""
        r = self.request
        batch = self.stream.batch(r.sequences)
        with self.stopwatch.compute():
            loss, kl = self.backward(batch)
            norm = self.clip()
        loss, kl, asked = self.world.sum([loss, kl, float(stop.asked)])
        loss, kl = loss / batch.targets, kl / batch.targets
        self.guard.check(self.step + 1, loss, norm, self.last_save())
        with self.stopwatch.compute():
            rate = self.update()
        self.step += 1
        spent, overhead = self.stopwatch.elapsed, self.stopwatch.overhead
        self.stopwatch.reset()
        return {
            "step": self.step,
            "tokens": self.step * r.sequences * r.context,
            "loss": loss,
            "kl": kl,
            "gradient_norm": norm,
            "lr": rate,
            "tokens_per_second": r.sequences * r.context / spent,
            "overhead": overhead,
            "stop": asked > 0,
        }

    def backward(self, batch: Batch) -> tuple[float, float]:
        """Gradients of the loss over this process's sequences; the sums of loss and KL."""
        own = batch[self.world.share(len(batch))]
        size = self.at_once
        # Processes average their gradients, so each scales its sum by their number.
        scale = self.world.size / batch.targets
        total_loss = total_kl = 0.0
        for start in range(0, len(own), size):
            part = own[slice(start, start + size)].to(self.world.device)
            with gradients_later(self.student, later=start + size < len(own)):
                loss, kl = self.losses(part)
                (loss * scale).backward()
            total_loss, total_kl = total_loss + float(loss.detach()), total_kl + float(kl)
        return total_loss, total_kl

    def losses(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and KL(teacher || student), summed over the batch's predictions."""
        wants_hidden = self.objective.hidden > 0
        with self.precision():
            with torch.no_grad():
                wanted = _forward(self.teacher, batch, wants_hidden)
            got = _forward(self.student, batch, wants_hidden)
        loss, kl = distillation(
            got.logits.flatten(0, 1),
            wanted.logits.flatten(0, 1),
            batch.ids.roll(-1, 1).flatten(),
            self.objective,
            counted=torch.nn.functional.pad(batch.valid, (0, 1)).flatten(),
        )
        if wants_hidden:
            error = hidden_error(got.hidden_states, wanted.hidden_states)
            loss = loss + self.objective.hidden * error[:, :-1][batch.valid].sum()
        return loss, kl

    def precision(self) -> Any:
        """bfloat16 arithmetic on float32 weights where it was asked for."""
        wanted = self.dtype == torch.bfloat16 and self.world.kind != "fsdp"
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=wanted)

    def clip(self) -> float:
        """Clip the gradient; its norm before that."""
        parameters = [p for group in self.groups for p in group.parameters]
        norm: Any = torch.nn.utils.clip_grad_norm_(parameters, self.request.clip or float("inf"))
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def update(self) -> float:
        """One step of AdamW at the scheduled rate; attention's rate."""
        factor = rate_factor(self.step, self.request.steps, self.request.warm_up)
        for group, wanted in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = factor * wanted.lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return factor * self.request.lr

    # -- beside the loop --------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> Row:
        """Mean KL to the teacher and both models' nats per token, on each held-out text."""
        row: Row = {"step": self.step, "tokens": self.tokens}
        for name, batch in self.held_out.items():
            kl, student, teacher, count = self.world.sum(self._scores(batch))
            row[f"kl {name}"] = kl / count
            row[f"nats lost {name}"] = (student - teacher) / count
        return row

    def choose(self, progress: Progress) -> None:
        """Keep so much of what training changed as does best on the deciding text."""
        if self.line is None or self.deciding is None:
            return
        line, deciding, label = self.line, self.deciding, "choosing how much to keep"
        line.end()
        progress(label, 0, 1)

        def measure(share: float) -> float:
            line.go(share)
            gather_again(self.student)
            kl, _, _, count = self.world.sum(self._scores(deciding))
            return kl / count

        share, found = best_share(measure)
        line.go(share)
        gather_again(self.student)
        self.kept = {"share": share, "kl": {f"{each:g}": found[each] for each in sorted(found)}}
        progress(label, 1, 1)
        if share != 1.0:
            self.report(self.evaluate() | {"share": share})

    @torch.no_grad()
    def _scores(self, batch: Batch) -> list[float]:
        totals = torch.zeros(4, dtype=torch.float64)
        world = self.world
        # Sharded models need every process in every forward pass, so the last sequences may be
        # read twice; they count once.
        for number in range(-(-len(batch) // world.size)):
            index = number * world.size + world.rank
            row = min(index, len(batch) - 1)
            part = batch[slice(row, row + 1)].to(world.device)
            with self.precision():
                s, t = (_forward(m, part, False).logits for m in (self.student, self.teacher))
            if index < len(batch):
                totals += _compare(s, t, part)
        return totals.tolist()

    @property
    def tokens(self) -> int:
        return self.step * self.request.sequences * self.request.context

    def report(self, row: Row) -> None:
        """Tell the watchers, in the first process."""
        if self.world.first:
            self.watch(_told(row))

    def save(self, row: Row) -> None:
        """Keep everything needed to go on from this step, of which ``row`` tells."""
        state = {
            "step": self.step,
            "row": _told(row),
            "stream": self.stream.state(),
            "history": self.guard.history,
        }
        saves.save(self.folder, self.student, self.optimizer, state, self.world, self.request.keep)

    def last_save(self) -> str:
        """Where the last checkpoint is, in words."""
        found = saves.saved(self.folder)
        return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"

    def take_up(self) -> bool:
        """Go back to the last checkpoint, if there is one."""
        found = saves.saved(self.folder)
        if not found:
            return False
        state = saves.load(found[-1], self.student, self.optimizer, self.world)
        if state["step"] > self.request.steps:
            raise InputError(
                f"{found[-1]} is beyond the {self.request.steps} steps asked for",
                "raise --tokens, or --force to start over",
            )
        self.step, self.guard.history = state["step"], state["history"]
        self.last = state["row"]
        self.stream.restore(state["stream"])
        return True


def _told(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "stop"}


def _forward(model: Any, batch: Batch, hidden: bool) -> Any:
    return model(
        input_ids=batch.ids,
        position_ids=batch.positions,
        use_cache=False,
        output_hidden_states=hidden,
    )


def _compare(student: torch.Tensor, teacher: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Sums of KL, the student's and the teacher's nats, and how many predictions they are of."""
    s = student[:, :-1][batch.valid].float().log_softmax(-1)
    t = teacher[:, :-1][batch.valid].float().log_softmax(-1)
    targets = batch.ids[:, 1:][batch.valid][:, None]
    kl = (t.exp() * (t - s)).sum()
    sums = [kl, -s.gather(-1, targets).sum(), -t.gather(-1, targets).sum()]
    return torch.tensor([*map(float, sums), len(targets)], dtype=torch.float64)


def rate_factor(step: int, steps: int, warm_up: float) -> float:
    """The learning rate of a step as a fraction of its peak: up in a line, down in a cosine.

    >>> [round(rate_factor(s, 10, 0.2), 2) for s in (0, 1, 2, 9)]
    [0.5, 1.0, 0.97, 0.03]
    """
    rising = max(1, round(warm_up * steps))
    if step < rising:
        return (step + 1) / rising
    done = (step + 1 - rising) / (steps + 1 - rising)
    return 0.5 * (1 + cos(pi * done))
