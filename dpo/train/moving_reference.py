"""A reference that moves (TR-DPO, arXiv 2404.09656): every N steps the policy of that step becomes it.

An update exports the policy, whose files are its identity, and scores with the policy itself the completions
of the steps until the next one, into the cache of that identity. Each step then trains as it would with a
frozen copy beside the policy, and there is never a second model. A run that is killed meanwhile does the same
update again, to the same bits: what is in the cache stays.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from dpo import terminal
from dpo.config import ModelConfig, ReferenceConfig
from dpo.data.plan import BatchPlan, Int64s
from dpo.data.trees import TreeBatch
from dpo.engine.engine import Engine
from dpo.errors import UserError
from dpo.reference.identity import reference_model
from dpo.reference.store import ReferenceStore, reference_store
from dpo.reference.window import fill_window, sequences_of, window_values
from dpo.train.checkpoint import Progress
from dpo.train.preference_objective import PreferenceObjective


def num_updates(every: int, num_steps: int) -> int:
    """How often the reference of a run moves: not after the last step.

    Args:
        every: `reference.update_every`; 0: never.
        num_steps: Optimizer steps of the run.
    """
    return (num_steps - 1) // every if every else 0


def note_of_updates(every: int, num_steps: int) -> str:
    """How often the reference of a run moves and what that costs, for people."""
    times = num_updates(every, num_steps)
    if not times:
        return (
            f"reference.update_every: {every} steps, and the run has {num_steps}: the reference never moves"
        )
    return (
        f"reference.update_every: {every}: the reference moves {times} times; each takes one forward pass "
        f"over the completions of the next {every} steps, and one more model is on the disk"
    )


@dataclass(slots=True, kw_only=True)
class MovingReference:
    """What moves the reference of a run."""

    objective: PreferenceObjective
    """Receives the values."""
    plan: BatchPlan
    model: ModelConfig
    """The policy."""
    options: ReferenceConfig
    """How often, how large the batches are, and where the cache is."""
    folder: Path
    """Holds the present reference as a model."""
    finished_at: float | None = None
    """When the last update of this process was done, in seconds."""

    @property
    def exported_as(self) -> ModelConfig:
        """How the policy is written: an adapter alone, since its sum with the base would be rounded."""
        lora = self.model.lora
        return self.model if lora is None else replace(self.model, lora=replace(lora, export="adapter"))

    def update(
        self,
        progress: Progress,
        engine: Engine,
        export: Callable[[Path, ModelConfig], None],
        may_continue: Callable[[str], None],
    ) -> None:
        """Makes the policy the reference of the steps that follow. All ranks must call it.

        Args:
            progress: How far the run is; it receives what the reference is.
            engine: The policy.
            export: Writes the policy to a folder, as a model of this kind.
            may_continue: Is called before each forward pass, and may raise.

        Raises:
            UserError: The model or the cache could not be written.
        """
        started = time.monotonic()
        export(self.folder, self.exported_as)
        here = ReferenceConfig(model=str(self.folder))
        store = reference_store(reference_model(self.model, here), Path(self.options.cache_dir))
        sequences = self._sequences(progress.step)

        def score(batch: TreeBatch) -> Tensor:
            may_continue("updating the reference")
            return engine.score_only(batch, per_token=True)

        fill_window(
            score,
            self.objective.dataset,
            sequences,
            store,
            self.options,
            layout=engine.layout,
            windows=engine.windows,
        )
        digest = self._use(store, sequences)
        progress.reference_step, progress.reference = progress.step, store.identity.digest
        progress.reference_rows = digest
        now, since = time.monotonic(), self.finished_at
        share = "" if since is None else f", {(now - started) / (now - since):.0%} of the time since the last"
        self.finished_at = now
        terminal.note(
            f"reference: now the policy of step {progress.step} (identity {store.identity.digest[:16]}); its "
            f"{len(sequences)} completions until the next update took {now - started:.1f} s{share}"
        )

    def restore(self, progress: Progress) -> None:
        """Goes on with the reference of a checkpoint. All ranks must call it.

        Raises:
            UserError: The cache lacks values that the run has trained with, or has others.
        """
        moves_now = progress.step - progress.reference_step == self.options.update_every
        if not progress.reference_step or moves_now:
            return
        folder = Path(self.options.cache_dir) / progress.reference[:16]
        if not folder.is_dir():
            raise UserError(
                f"{folder}: the cache of the policy of step {progress.reference_step}, which the run trains "
                "against, is not there. Restore it, or resume from a checkpoint before that step "
                "(train.resume)"
            )
        store = ReferenceStore.at(folder)
        digest = self._use(store, self._sequences(progress.reference_step))
        if self.options.audit_rows and digest != progress.reference_rows:
            raise UserError(
                f"{folder}: the run trained with other values of the policy of step "
                f"{progress.reference_step} than the cache has now: it was rebuilt or pruned. Restore it, or "
                "resume from a checkpoint before that step (train.resume), or set reference.audit_rows: 0 to "
                "resume with values that differ by rounding"
            )

    def _sequences(self, step: int) -> Int64s:
        """What the steps after an update at `step` train on, until the next."""
        last = min(step + self.options.update_every, self.plan.num_steps)
        return sequences_of(self.objective.dataset, self.plan, range(step + 1, last + 1))

    def _use(self, store: ReferenceStore, sequences: Int64s) -> str:
        """Gives the objective these values; returns their digest."""
        found = window_values(self.objective.dataset, sequences, store, per_token=self.objective.per_token)
        self.objective.data = replace(self.objective.data, reference=found.values)
        return found.digest
