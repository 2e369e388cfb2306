"""dpo data: describes the preferences of a configuration, before anything is trained on them.

Tokenizes as training does, reads what the reference cache knows, and loads a model only for CHES.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.commands.inputs import open_data, quieten_libraries
from dpo.config import Config, ModelConfig, sources_of
from dpo.data.dataset import TokenizedDataset
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.engine.scoring import settle_layout, token_budget
from dpo.errors import UserError
from dpo.evaluate.ches import ChesScores, sample_pairs, score_ches
from dpo.evaluate.described_data import HELD_OUT, TRAINING, Float64s, describe
from dpo.model.files import base_of, weights_at_hand
from dpo.model.load import DTYPES
from dpo.model.probe_trees import probe_trees
from dpo.reference.identity import is_remembered, reference_identity, reference_model
from dpo.reference.store import ReferenceStore
from dpo.reference.values import known_logps
from dpo.report.data_sections import LISTED, data_sections
from dpo.report.terminal_table import section_text
from dpo.report.write import write_data_report

IN_FILE = 100
"""Pairs of a section that pairs.jsonl lists at most."""
IN_TERMINAL = 2


def data_report(config: Config, *, num_ches: int, output: Path, command: str) -> None:
    """Prints the description of training and held-out data, and writes it.

    Args:
        config: The experiment; its data, its model's tokenizer and its reference cache are read.
        num_ches: Training pairs that are scored with the model that training starts from; 0 loads no model.
        output: Where to write; made if it does not exist.
        command: As typed in a shell, for the page.
    """
    quieten_libraries()
    distributed.start()
    train_data, test_data, tokenizer = open_data(config.data, config.model)
    datasets = {TRAINING: train_data} | ({} if test_data is None else {HELD_OUT: test_data})
    if num_ches and not train_data.has_rivals.any():
        raise UserError(f"--ches: it compares pairs, and data.train has {train_data.contents}: leave it out")
    ches = _ches(config, train_data, num_ches) if num_ches else None
    distributed.on_main(lambda: _show(config, datasets, ches, tokenizer, output, command))


def _show(
    config: Config,
    datasets: Mapping[str, TokenizedDataset],
    ches: ChesScores | None,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    command: str,
) -> None:
    described = describe(datasets, cached_logps(config, datasets), ches)
    sections = data_sections(described, tokenizer, listed=IN_FILE)
    summary = described.summary()
    title = ", ".join(source.path for source in sources_of(config.data.train))
    write_data_report(sections, summary, output, title=title, command=command, shown=LISTED)
    width = shutil.get_terminal_size((80, 24)).columns
    terminal.note("\n\n".join(section_text(section, width, pairs=IN_TERMINAL) for section in sections))
    terminal.event("data", summary)
    terminal.summary("data", {"written": f"{output / 'data.html'}\ndata.md, pairs and figures are beside it"})


def cached_logps(config: Config, datasets: Mapping[str, TokenizedDataset]) -> dict[str, Float64s]:
    """What the reference cache knows of each data set; nothing where weights would have to be hashed first.

    One process may call it alone.
    """
    model, cache_dir = reference_model(config.model, config.reference), Path(config.reference.cache_dir)
    if not (weights_at_hand(base_of(model)) and is_remembered(model, cache_dir)):
        return {}
    store = ReferenceStore(cache_dir, reference_identity(model, cache_dir))
    found = known_logps([*datasets.values()], store)
    return dict(zip(datasets, found, strict=True))


def _ches(config: Config, data: TokenizedDataset, number: int) -> ChesScores:
    """Scores random training pairs under the model that training starts from. All ranks must call it."""
    model: ModelConfig = config.model
    budget = token_budget(config.train.max_tokens_per_micro_batch)
    with frozen_scorer(model, sharded=is_sharded(config.evaluate.sharding, model)) as scorer:
        layout = settle_layout(scorer, probe_trees([data]), DTYPES[model.dtype]).layout
        return score_ches(scorer, data, sample_pairs(data, number), layout=layout, budget=budget)
