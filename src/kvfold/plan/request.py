"""What ``kvfold plan`` is asked, checked value by value. No torch."""

from dataclasses import dataclass

from kvfold.arch.target import Latent
from kvfold.errors import InputError
from kvfold.numbers import (
    BANDWIDTH,
    BATCH,
    BUDGET,
    CONTEXT,
    FLOPS,
    GIGABYTES,
    GPUS,
    HEADS,
    Wholes,
)
from kvfold.plan.roofline import KV_BITS, Load
from kvfold.requests import Choice, Flag, Listed, Model, Request, Text, option


@dataclass(frozen=True)
class PlanRequest(Request):
    """A model, a machine and a load, and how many heads and which formats to compare.

    Attributes:
        source: None where only the machines are asked for. gpu: a machine by name, ``here`` or
            ``list``. gpus: that share each layer. latents: as ``160+32``, beside the heads.
        memory: GB; bandwidth: GB/s; flops: TFLOP/s, in place of the machine's own.
        probe: also time some layers. select: the share of the cache that steps read.
        evict: the share of the tokens that are kept.
        fit: show what fits rather than times.

    Raises:
        InputError: naming the option and what it expects.
    """

    command = "plan"

    source: str | None = option("SRC", Model(), None)
    context: int = option("--context", CONTEXT, 8192, "Tokens of each sequence.")
    batch: int = option("--batch", BATCH, 1, "Sequences at once.")
    gpu: str | None = option(
        "--gpu", Text(), None, "A machine by name (--gpu list shows them), or here."
    )
    probe: bool = option(
        "--probe", Flag(), False, "Also time a few made-up layers on this machine."
    )
    gpus: int = option("--gpus", GPUS, 1, "That share each layer.")
    memory: float | None = option("--memory", GIGABYTES, None, "GB, if it is not listed.")
    bandwidth: float | None = option("--bandwidth", BANDWIDTH, None, "GB/s, of such a machine.")
    flops: float | None = option("--flops", FLOPS, None, "TFLOP/s in bfloat16, of such.")
    kv_heads: tuple[int, ...] | None = option(
        "--kv-heads",
        Wholes(HEADS),
        None,
        "To compare, as 32,8,1.  [default: SRC's and usual ones]",
    )
    latents: tuple[str, ...] = option(
        "--latent",
        Listed(Text(Latent.spelled), none=True),
        (),
        "To compare beside them: a latent and a rotary key for all heads, as 160+32.",
        metavar="RANK+ROTARY,...",
    )
    kv_dtypes: tuple[str, ...] = option(
        "--kv-dtype", Listed(Choice(KV_BITS)), ("bf16", "int8", "int4")
    )
    select: float | None = option(
        "--select",
        BUDGET,
        None,
        "Of a cache that reads such a share of its pages in each step, as 0.25.",
    )
    evict: float | None = option(
        "--evict",
        BUDGET,
        None,
        "Of a cache that keeps such a share of the tokens, of each KV head its own.",
    )
    fit: bool = option("--fit", Flag(), False, "Show the largest context and batch that fit.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gpu == "list":
            return
        if self.source is None:
            raise InputError("no model given", "kvfold plan SRC --gpu h100, or --gpu list")
        if self.probe and self.gpu != "here":
            raise InputError("--probe times layers on this machine", "use it with --gpu here")
        for name, share in (("--select", self.select), ("--evict", self.evict)):
            if self.probe and share is not None:
                raise InputError(
                    "--probe times caches that are read as a whole", f"leave {name} out"
                )
        if self.probe and self.fit:
            raise InputError(
                "--fit shows no times, which --probe would measure", "leave one of them out"
            )

    @property
    def targets(self) -> list[Latent]:
        """The latents to compare."""
        return [Latent.read(words, "--latent") for words in self.latents]

    @property
    def load(self) -> Load:
        """What is asked of the model."""
        return Load(self.context, self.batch, gpus=self.gpus, select=self.select, evict=self.evict)
