"""`dpo check`: everything that can be known to be wrong before a model is in memory."""

import os
import sys
from contextlib import redirect_stdout
from pathlib import Path

from dpo import distributed, terminal
from dpo.commands.amount import unusual_rate
from dpo.commands.labels import check_labels, refuse_labels
from dpo.commands.settings import settings_of
from dpo.config import Config, DataConfig, LossConfig, ModelConfig, OptimizationConfig, SftConfig
from dpo.data.build import open_datasets, test_sources_of, train_sources_of
from dpo.data.preview import preview_data
from dpo.data.text import check_text, is_text
from dpo.engine.launcher import check_launcher, deepspeed_settings
from dpo.engine.optimizer import check_optimizer
from dpo.errors import UserError
from dpo.evaluate.checks import check_best_of, check_room
from dpo.evaluate.scoring import check_scorer
from dpo.model.files import base_of, check_model_path, check_token_ids, max_positions, num_parameters
from dpo.model.tokenizer import load_tokenizer
from dpo.model.trainable import check_family, is_plain, refuse_adapter
from dpo.reference.vocabulary import check_vocabulary
from dpo.tracking.hub import check_repository
from dpo.tracking.run_folder import RunFolder
from dpo.tracking.run_lock import refuse_if_in_use
from dpo.tracking.trackers import check_trackers
from dpo.train.mirror import Mirror
from dpo.train.resume import Refuse, Settings, find_start


def check(command: str, config: Config | SftConfig, *, exact: bool) -> None:
    """Raises UserError for everything that can be known to be wrong without a model in memory.

    Prints the run folder, for scripts that want RUN_DIR/exit.json afterwards.

    Args:
        command: The command that is checked for.
        config: Its configuration.
        exact: Read and tokenize all rows, which is then done for training too.
    """
    with redirect_stdout(sys.stderr):
        _check(command, config, exact=exact)
    if terminal.mode() == "plain":
        print(f"{command}: configuration, model files and data are in order", file=sys.stderr)
    terminal.answer("check", config.run_dir, {"command": command, "run_dir": config.run_dir})


def _check(command: str, config: Config | SftConfig, *, exact: bool) -> None:
    folder = RunFolder(Path(config.run_dir))
    launcher = os.environ.get("ACCELERATE_CONFIG")
    trained = config.model if command in ("train", "sft") else None
    check_launcher(os.environ, file=Path(launcher) if launcher else None, trained=trained)
    if config.model.name_or_path:
        check_model_path(config.model.name_or_path, "model.name_or_path")
    if (said := unusual_rate(config.train)) and not _stage_follows():
        terminal.warning(said)
    if command in ("train", "sft"):
        _check_policy(config.model)
        deepspeed = deepspeed_settings(os.environ, file=Path(launcher) if launcher else None)
        check_optimizer(config.train, deepspeed)
        check_trackers(config.train.trackers)
        if config.train.push_to_hub is not None:
            check_repository(config.train.push_to_hub)
        if config.train.mirror is not None:
            Mirror(config.train.mirror, folder).check()
        refuse_if_in_use(folder, patient=False)
        check_start(folder, settings_of(config), config.train)
    if isinstance(config, SftConfig):
        if is_text(config.data.train):
            if exact:
                raise UserError("--exact: data.train is text, which has no rows to check: leave it out")
            check_text(config.data)
        else:
            check_data(config.data, config.model, exact=exact)
    else:
        if config.reference.model is not None:
            check_model_path(config.reference.model, "reference.model")
            if Path(config.model.name_or_path).is_dir() and Path(config.reference.model).is_dir():
                check_vocabulary(config.model, config.reference)
        check_data(config.data, config.model, exact=exact, loss=config.loss)
        if command == "evaluate":
            finished_model(config)
        if command in ("evaluate", "best-of"):
            _check_samples(command, config)
    if command in ("train", "sft"):
        distributed.require_shared(folder.path, "run_dir")  # or it cannot be written to


def _check_policy(model: ModelConfig) -> None:
    """What is wrong with the model; only adapters, quantized weights and routers need its class for that."""
    is_here = bool(model.name_or_path) and Path(model.name_or_path).is_dir()
    if is_here:
        refuse_adapter(model)
    if not is_plain(model):
        from dpo.model.lora import check_policy

        check_policy(model, local=True)
    elif is_here:
        check_family(model)


def _check_samples(command: str, config: Config) -> None:
    if command == "evaluate":
        check_scorer(config.evaluate)
    else:
        check_best_of(config.evaluate)
    if config.evaluate.num_prompts:
        check_room(config.evaluate.completion_tokens, max_positions(config.model))


def check_data(data: DataConfig, model: ModelConfig, *, exact: bool, loss: LossConfig | None = None) -> None:
    """Reads and tokenizes some rows of every source, or all; says so, and what of them is not used.

    With a loss, also whether the rows are such as it needs.

    Raises:
        UserError: What training would refuse, of tokenizer, weights, lengths and these rows.
    """
    if exact and not model.name_or_path:
        raise UserError("--exact: model.scratch has no tokenizer yet, so some rows are read: leave it out")
    train, test = train_sources_of(data), test_sources_of(data)  # before anything of a model is looked for
    tokenizer = positions = None
    if model.name_or_path:
        tokenizer, positions = load_tokenizer(model), max_positions(model)
        if Path(base_of(model).name_or_path).is_dir():
            num_parameters(model)  # reads the headers of the weights
    if exact:
        assert tokenizer is not None
        found = open_datasets(data, tokenizer, positions)
        largest = max(data_set.largest_id for data_set in found if data_set is not None)
        if loss is not None:
            check_labels(loss, *found)
    else:
        notes, warnings, largest, labelled = preview_data(train, test, data, tokenizer, positions)
        if loss is not None and labelled:
            refuse_labels(loss, labelled, "labels")
        if not _stage_follows():
            terminal.note(*notes)
            terminal.warning(*warnings)
    if model.name_or_path:
        check_token_ids(model, largest, "model.name_or_path")


def _stage_follows() -> bool:
    """Whether launch/run checks for a stage, which will say notes and warnings itself."""
    return "ACCELERATE_CONFIG" in os.environ


def check_start(folder: RunFolder, settings: Settings, options: OptimizationConfig) -> None:
    """Raises UserError where a run may not start, as far as manifests tell."""
    start = find_start(folder, settings, options, thorough=False)
    if isinstance(start, Refuse):
        raise UserError(start.reason)


def finished_model(config: Config) -> ModelConfig:
    """The model that training left in the run folder; UserError where there is none."""
    run, snapshot = RunFolder(Path(config.run_dir)), config.evaluate.snapshot
    folder = run.model(snapshot)
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        if snapshot is not None:
            kept = [str(int(path.name[5:])) for path in sorted(run.snapshots.glob("step_*"))]
            raise UserError(
                f"evaluate.snapshot: no model in {folder}; train.snapshot_every keeps them, and there are: "
                + (", ".join(kept) or "none")
            )
        raise UserError(f"run_dir: no trained model in {folder}; run train first")
    is_adapter = (folder / "adapter_config.json").is_file()
    return ModelConfig(
        name_or_path=str(folder),
        quantization=config.model.quantization if is_adapter else None,
        dtype=config.model.dtype,
        attention=config.model.attention,
        trust_remote_code=config.model.trust_remote_code,
    )
