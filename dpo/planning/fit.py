"""Which way of sharding fits a machine, with which micro-batches, and which one to take."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig

from dpo.config import Config
from dpo.engine.optimizer import OPTIMIZERS
from dpo.engine.scoring import GPU_TOKENS
from dpo.model.load import DTYPES
from dpo.planning.data_sample import SampledData
from dpo.planning.memory import (
    SHARDINGS,
    Memory,
    Name,
    Shape,
    is_offered,
    largest_fitting,
    rank_memory,
    weight_dtype,
)
from dpo.planning.rehearsal import Rehearsal, rehearse

USABLE = 0.9
"""Of a GPU's memory: the rest is the CUDA context, workspaces of libraries and what the allocator cannot
use."""
FEW = 4
"""Micro-batches this much smaller than asked for waste a GPU more than recomputing activations does."""
ROUNDED = 1024
LAUNCHERS = {
    "no DeepSpeed": "launch/one_gpu.yaml",
    "ZeRO-2": "launch/{place}.yaml",
    "ZeRO-3": "launch/{place}_zero3.yaml",
    "ZeRO-3 offload": "launch/{place}_zero3.yaml with configs/ds_zero3_offload.json",
}
GPUS_OF_A_MACHINE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is to be rented."""

    num_gpus: int
    gpu_memory: int
    """Bytes of one."""
    gpu_flops: float
    """Peak of one in the compute type, in operations a second."""
    mfu: float
    """Share of that peak that the model's useful operations reach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A way of sharding the policy on this machine."""

    sharding: Name
    memory: Memory
    fits: bool
    largest_micro_batch: int
    """Most tokens of a micro-batch that fits; 0 if none does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What to take, and why."""

    sharding: Name | None
    max_tokens_per_micro_batch: int
    gradient_checkpointing: bool
    launcher: str
    reason: str


class Fit:
    """A run on a machine; micro-batches are rehearsed once each."""

    def __init__(
        self, config: Config, described: PreTrainedConfig, shape: Shape, train: SampledData, machine: Machine
    ) -> None:
        """Rehearses nothing yet.

        Args:
            config: The experiment.
            described: Configuration of its model.
            shape: Of the model.
            train: The training data.
            machine: Where it is to run.
        """
        self._config, self._described, self._shape = config, described, shape
        self._train, self._machine = train, machine
        self._dtype = DTYPES[config.model.dtype]
        self._room = int(USABLE * machine.gpu_memory)
        self._done: dict[tuple[int, torch.dtype, bool], Rehearsal] = {}
        asked = config.train.max_tokens_per_micro_batch or GPU_TOKENS
        self.asked = max(asked, train.longest)
        """Tokens of a micro-batch that the configuration asks for, or of the longest group."""

    def ways(self, *, checkpointing: bool) -> list[Way]:
        """Every way of sharding that there is for this number of GPUs, compute type and optimizer."""
        moments = OPTIMIZERS[self._config.train.optimizer].moments
        left_out = {
            "no DeepSpeed": self._machine.num_gpus > 1,
            "ZeRO-0": not is_offered("ZeRO-0", self._dtype),
            "ZeRO-3 offload": moments == 1,  # only AdamW runs on the host
        }
        return [
            self._way(sharding, moments, checkpointing=checkpointing)
            for sharding in SHARDINGS
            if not left_out.get(sharding, False)
        ]

    def advice(self) -> Advice:
        """The first way that fits, those that wait least for others before the rest: as asked, with smaller
        micro-batches, with recomputed activations, with both.
        """
        given = self._config.model.gradient_checkpointing
        enough = self.asked // FEW
        for checkpointing in (given,) if given else (False, True):
            ways = self._in_order(checkpointing=checkpointing)
            for least in (self.asked, enough):
                for way in ways:
                    budget = min(self.asked, way.largest_micro_batch)
                    if budget >= max(least, self._train.longest) and (way.fits or least < self.asked):
                        return self._take(way, budget, ways, checkpointing=checkpointing)
        for way in ways:
            if way.largest_micro_batch >= self._train.longest:
                return self._take(way, way.largest_micro_batch, ways, checkpointing=True)
        return Advice(
            sharding=None,
            max_tokens_per_micro_batch=self.asked,
            gradient_checkpointing=True,
            launcher="",
            reason="nothing fits, not even one group at a time with recomputed activations: take more or "
            "larger GPUs",
        )

    def _in_order(self, *, checkpointing: bool) -> list[Way]:
        alone: tuple[Name, ...] = ("no DeepSpeed", "ZeRO-3 offload")
        order = alone if self._machine.num_gpus == 1 else ("ZeRO-2", "ZeRO-3", "ZeRO-3 offload")
        by_name = {way.sharding: way for way in self.ways(checkpointing=checkpointing)}
        return [by_name[name] for name in order if name in by_name]

    def _take(self, way: Way, budget: int, ways: list[Way], *, checkpointing: bool) -> Advice:
        before = ways[: ways.index(way)]
        reason = [
            f"{other.sharding} would need {other.memory.total / 1e9:,.0f} GB a GPU with {self.asked:,} tokens"
            for other in before
        ]
        if checkpointing and not self._config.model.gradient_checkpointing:
            reason.insert(0, "activations do not fit and are recomputed")
        if budget < self.asked:
            reason.append(f"{budget:,} tokens are the most that fit")
        alone = self._machine.num_gpus == 1
        kind = "it fits" if alone else "it fits, and no weights travel in a pass"
        if before:
            kind = "the first that fits"
        place = "one_node" if self._machine.num_gpus <= GPUS_OF_A_MACHINE else "multi_node"
        return Advice(
            sharding=way.sharding,
            max_tokens_per_micro_batch=budget,
            gradient_checkpointing=checkpointing,
            launcher=LAUNCHERS[way.sharding].format(place=place),
            reason="; ".join([*reason, kind]),
        )

    def _way(self, sharding: Name, moments: int, *, checkpointing: bool) -> Way:
        def memory(tokens: int) -> Memory:
            return rank_memory(
                sharding,
                self._shape,
                self._rehearsed(tokens, sharding, checkpointing=checkpointing),
                world_size=self._machine.num_gpus,
                dtype=self._dtype,
                moments=moments,
            )

        asked, longest = memory(self.asked), self._train.longest
        # From the longest group on: what the projection keeps at most is in the slope, which is rather steep.
        sizes = [longest, max(self.asked, 2 * longest)]
        most = largest_fitting([(tokens, memory(tokens).total) for tokens in sizes], self._room)
        rounded = most // ROUNDED * ROUNDED
        return Way(
            sharding=sharding,
            memory=asked,
            fits=asked.total <= self._room,
            largest_micro_batch=max(rounded, longest) if most else 0,
        )

    def _rehearsed(self, tokens: int, sharding: Name, *, checkpointing: bool) -> Rehearsal:
        weights = weight_dtype(sharding, self._dtype)
        key = tokens, weights, checkpointing
        if key not in self._done:
            self._done[key] = rehearse(
                self._described,
                replace(self._config.model, gradient_checkpointing=checkpointing),
                self._train.trees(tokens),
                dtype=weights,
                autocast=weights != self._dtype,
                gpu=True,
            )
        return self._done[key]
