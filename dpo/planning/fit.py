"""Which sharding fits a machine, with which micro-batches, and which one `dpo plan` advises.

Combines the memory of each sharding (`memory`) with rehearsed micro-batches (`rehearsal`).
"""

from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from dpo.config import ModelConfig, TrainConfig
from dpo.engine.optimizer import OPTIMIZERS
from dpo.engine.scoring import GPU_TOKENS
from dpo.model.load import DTYPES
from dpo.model.recomputation import Recomputed
from dpo.planning.cut import Blocks
from dpo.planning.data_sample import SampledData
from dpo.planning.memory import (
    SHARDINGS,
    Memory,
    Name,
    Shape,
    is_offered,
    largest_fitting,
    rank_memory,
)
from dpo.planning.rehearsal import Rehearsal, policy_blocks, rehearse_with
from dpo.planning.speed import expected_mfu

USABLE = 0.9
"""Share of a GPU's memory that is planned; the rest is for the CUDA context, workspaces of libraries and
fragmentation."""
LARGEST_CUT = 4
"""Micro-batches that are more than this many times smaller than requested cost more than recomputing
activations does."""
MOST_TOKENS = 262_144
"""Larger micro-batches are not advised: from some 16,384 tokens on they are no faster."""
ROUNDED = 1024
"""Advised micro-batches are a multiple of this many tokens."""
LAUNCHERS = {
    "no DeepSpeed": "launch/{place}_ddp.yaml",
    "ZeRO-2": "launch/{place}.yaml",
    "ZeRO-3": "launch/{place}_zero3.yaml",
    "ZeRO-3 offload": "launch/{place}_zero3.yaml with configs/ds_zero3_offload.json",
}
"""Configuration files of each sharding on several GPUs."""
ONE_PROCESS = "launch/one_process.yaml"
GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The GPUs that the run is planned for."""

    num_gpus: int
    gpu_memory: int
    """Bytes per GPU."""
    gpu_flops: float
    """Peak of one GPU in the compute type, in operations per second."""
    mfu: float | None = None
    """Share of that peak that the model's useful operations reach; None until the model's size is known."""

    def running(self, parameters: int) -> "Machine":
        """The machine with the share that a model of this size reaches, unless one was given."""
        return self if self.mfu else replace(self, mfu=expected_mfu(parameters))

    @property
    def useful_flops(self) -> float:
        """Useful operations of one GPU per second."""
        assert self.mfu is not None
        return self.gpu_flops * self.mfu

    @property
    def flops_per_hour(self) -> float:
        """Useful operations of all GPUs per hour."""
        return self.num_gpus * self.useful_flops * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A sharding of the policy on this machine."""

    sharding: Name
    memory: Memory
    fits: bool
    largest_micro_batch: int
    """Tokens of the largest micro-batch that fits; 0 if none does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """The advised settings, and why."""

    sharding: Name | None
    """None if nothing fits."""
    max_tokens_per_micro_batch: int
    gradient_checkpointing: Recomputed
    launcher: str
    reason: str
    cached: bool
    """Whether steps compute their gradient the cached way, in which a group may be cut into pieces."""


class Fit:
    """A run on a machine. Every micro-batch is rehearsed at most once."""

    def __init__(
        self,
        model: ModelConfig,
        train: TrainConfig,
        described: PreTrainedConfig,
        shape: Shape,
        data: SampledData,
        machine: Machine,
        *,
        state_bytes: float,
        most_tokens: int,
        cached: bool = False,
    ) -> None:
        """Does not rehearse yet.

        Args:
            model: The policy.
            train: The optimizer, and the micro-batches that are requested.
            described: The model's own configuration.
            shape: Of the model.
            data: The training data.
            machine: Where the run is to take place.
            state_bytes: What the optimizer keeps per trained parameter.
            cached: With a cached gradient: a micro-batch may be a piece of a group.
            most_tokens: What a rank gets of a step at most: no micro-batch is larger.
        """
        self._model, self._described, self._shape = model, described, shape
        self._trees = data.piece if cached else data.trees
        self._cached, self._machine = cached, machine
        self._longest = data.longest_sequence if cached else data.longest
        self._optimizer, self._state_bytes = OPTIMIZERS[train.optimizer], state_bytes
        self._dtype = DTYPES[model.dtype]
        self._room = int(USABLE * machine.gpu_memory)
        self._blocks: Blocks | None = None
        self._done: dict[tuple[int, Recomputed], Rehearsal] = {}
        budget = train.max_tokens_per_micro_batch or GPU_TOKENS
        self.requested = max(min(budget, most_tokens), self._longest)
        """Tokens of a micro-batch: those of the configuration, or fewer where the data makes no larger one,
        or the fewest possible if that is more.
        """

    def ways(self, *, recomputed: Recomputed) -> list[Way]:
        """Every sharding that is possible with this number of GPUs, compute type and optimizer."""
        whole = bool(self._optimizer.not_sharded)
        unsharded = whole or self._model.quantization is not None or self._model.offload_activations
        impossible = {
            "no DeepSpeed": self._machine.num_gpus > 1 and not whole,
            "ZeRO-0": whole or not is_offered("ZeRO-0", self._dtype),
            "ZeRO-2": whole,
            "ZeRO-3": unsharded,
            "ZeRO-3 offload": unsharded or not self._optimizer.may_be_offloaded,
        }
        return [
            self._way(sharding, recomputed=recomputed)
            for sharding in SHARDINGS
            if not impossible.get(sharding, False)
        ]

    def advice(self) -> Advice:
        """The first sharding that fits, those with the least communication first.

        Tried in this order: with activations kept, recomputed but those of attention, all recomputed; each as
        requested, then with smaller micro-batches.
        """
        asked = self._model.gradient_checkpointing
        given = "full" if asked is True else asked
        kinds: tuple[Recomputed, ...] = (given,) if given else (False, "selective", "full")
        for recomputed in kinds:
            ways = self._in_order(recomputed=recomputed)
            for least in (self.requested, self.requested // LARGEST_CUT):
                for way in ways:
                    budget = min(self.requested, way.largest_micro_batch)
                    if budget >= max(least, self._longest) and (way.fits or least < self.requested):
                        return self._take(way, budget, ways, recomputed=recomputed)
        for way in ways:
            if way.largest_micro_batch >= self._longest:
                return self._take(way, way.largest_micro_batch, ways, recomputed=kinds[-1])
        return Advice(
            sharding=None,
            max_tokens_per_micro_batch=self.requested,
            gradient_checkpointing=kinds[-1],
            launcher="",
            reason=f"nothing fits, not even one {'completion' if self._cached else 'group'} at a time with "
            "recomputed activations: use more or larger GPUs",
            cached=self._cached,
        )

    def _in_order(self, *, recomputed: Recomputed) -> list[Way]:
        alone: tuple[Name, ...] = ("no DeepSpeed", "ZeRO-3 offload")
        several: tuple[Name, ...] = ("no DeepSpeed", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload")
        order = alone if self._machine.num_gpus == 1 else several
        by_name = {way.sharding: way for way in self.ways(recomputed=recomputed)}
        return [by_name[name] for name in order if name in by_name]

    def _take(self, way: Way, budget: int, ways: list[Way], *, recomputed: Recomputed) -> Advice:
        before = ways[: ways.index(way)]
        reason = [
            f"{other.sharding} would need {other.memory.total / 1e9:,.0f} GB per GPU with "
            f"{self.requested:,} tokens"
            for other in before
        ]
        if recomputed and not self._model.gradient_checkpointing:
            some = "but those of attention " if recomputed == "selective" else ""
            reason.insert(0, f"activations do not fit and {some}are recomputed")
        if budget < self.requested:
            reason.append(f"{budget:,} tokens are the most that fit")
        if before:
            kind = "the first that fits"
        elif self._machine.num_gpus == 1:
            kind = "it fits"
        else:
            kind = "it fits, and no weights are sent during a pass"
        place = "one_node" if self._machine.num_gpus <= GPUS_PER_NODE else "multi_node"
        launcher = LAUNCHERS[way.sharding].format(place=place)
        if way.sharding == "no DeepSpeed" and self._machine.num_gpus == 1:
            launcher = ONE_PROCESS
        return Advice(
            sharding=way.sharding,
            max_tokens_per_micro_batch=budget,
            gradient_checkpointing=recomputed,
            launcher=launcher,
            reason="; ".join([*reason, kind]),
            cached=self._cached,
        )

    def _way(self, sharding: Name, *, recomputed: Recomputed) -> Way:
        def memory(tokens: int) -> Memory:
            return rank_memory(
                sharding,
                self._shape,
                self._rehearsed(tokens, recomputed=recomputed),
                world_size=self._machine.num_gpus,
                dtype=self._dtype,
                state_bytes=self._state_bytes,
            )

        requested, longest = memory(self.requested), self._longest
        # The line starts at the smallest micro-batch: its slope then includes the projection's peak, and is
        # too steep rather than too flat.
        sizes = [longest, max(self.requested, 2 * longest)]
        most = largest_fitting([(tokens, memory(tokens).total) for tokens in sizes], self._room)
        rounded = min(most, MOST_TOKENS) // ROUNDED * ROUNDED
        return Way(
            sharding=sharding,
            memory=requested,
            fits=requested.total <= self._room,
            largest_micro_batch=max(rounded, longest) if most else 0,
        )

    def operations(self, advice: Advice) -> int:
        """What the host launches for the forward and backward pass of an advised micro-batch."""
        tokens, recomputed = advice.max_tokens_per_micro_batch, advice.gradient_checkpointing
        return self._rehearsed(tokens, recomputed=recomputed).operations

    def _rehearsed(self, tokens: int, *, recomputed: Recomputed) -> Rehearsal:
        key = tokens, recomputed
        if key not in self._done:
            self._blocks = self._blocks or policy_blocks(self._described, self._model, self._dtype)
            self._done[key] = rehearse_with(
                self._blocks,
                replace(self._model, gradient_checkpointing=recomputed),
                self._trees(tokens),
                gpu=True,
            )
        return self._done[key]
