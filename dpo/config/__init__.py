"""Every option once: meaning, unit and range, as frozen dataclasses.

`dpo.cli.parse` fills them from YAML and dotted overrides, `dpo.cli.validate` checks the ranges. Defaults
follow the DPO paper (arXiv 2305.18290, appendix B) where it gives one.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal

from dpo.config.data import FIELDS as FIELDS
from dpo.config.data import DataConfig as DataConfig
from dpo.config.data import DataSource as DataSource
from dpo.config.data import Sources as Sources
from dpo.config.data import sources_of as sources_of
from dpo.config.loss import LossConfig as LossConfig
from dpo.config.ranges import Count as Count
from dpo.config.ranges import CountOrZero as CountOrZero
from dpo.config.ranges import Decay as Decay
from dpo.config.ranges import NotNegative as NotNegative
from dpo.config.ranges import Positive as Positive
from dpo.config.ranges import Tokens as Tokens
from dpo.config.ranges import Within as Within

Optimizers = Literal[
    "adamw", "rmsprop", "lion", "adafactor", "muon", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"
]


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter (arXiv 2106.09685) that is trained instead of the model's weights; needs peft."""

    start: Literal["new", "continue", "merge"] = "new"
    """Of a name_or_path that is an adapter: train it on, or merge it into its base and train a new one."""
    rank: Count = 16
    """Rank of the product that is added to each adapted matrix."""
    alpha: Positive = 32.0
    """That product is scaled by alpha / rank."""
    rank_stabilized: bool = False
    """Scale it by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    dora: bool = False
    """Train the length of each row of a matrix apart from its direction (DoRA, arXiv 2402.09353)."""
    learning_rate_ratio: Positive = 1.0
    """Learning rate of the product's half that starts at zero over that of the other (LoRA+, 2402.12354)."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """all-linear: every linear layer but the output layer and experts; or a list of names or endings."""
    target_parameters: list[str] = field(default_factory=list)
    """Names or endings of stacked weights of experts to adapt too, such as mlp.experts.down_proj."""
    modules_to_save: list[str] = field(default_factory=list)
    """Names or endings of modules that are trained whole and kept with the adapter, such as norm."""
    export: Literal["merged", "adapter"] = "merged"
    """What RUN_DIR/model holds: the whole model with the adapter in its weights, or the adapter alone."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The causal language model to train."""

    name_or_path: str
    """A local folder with config.json, safetensors and tokenizer, or a hub name such as gpt2."""
    revision: str | None = None
    """Hub revision: a branch, tag or commit. Default: the hub's main branch."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute type of policy and reference; master weights, sums and log-softmax are float32 in either."""
    attention: Literal["auto", "sdpa", "flex", "eager"] = "auto"
    """sdpa (PyTorch's), flex (FlexAttention), eager (the model's code); auto: flex on GPUs, sdpa on CPUs."""
    share_prompts: bool = True
    """Compute each prompt once for all of its completions; false: one row a completion."""
    gradient_checkpointing: bool | Literal["full", "selective"] = False
    """Recompute activations: full (or true), a third more time; selective, all but those of attention."""
    compile: bool = False
    """Compile the model's blocks with torch.compile, at the first step; needs a C++ compiler on CPUs."""
    router_aux_loss_weight: NotNegative = 0.0
    """Adds the model's own load-balancing loss times this, over the tokens of the step's trees, a prompt's
    once for each completion. The step is then scored once before, as with train.backward cached. 0: none.
    """
    offload_activations: bool = False
    """Keep activations in the host's memory until the backward pass, for GPUs; not under ZeRO-3."""
    trust_remote_code: bool = False
    """Run model code that comes with a hub repository. Off unless asked for by name."""
    quantization: Literal["nf4", "int8"] | None = None
    """Keep an adapter's frozen base in 4 (nf4) or 8 bits, reference too; needs bitsandbytes. Default: no."""
    lora: LoraConfig | None = None
    """Train an adapter and leave the weights as they are. Default: all weights are trained."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen reference policy and the cache of its log-probabilities."""

    model: str | None = None
    """The reference model, a folder or a hub name. Default: the policy's start, model.name_or_path."""
    cache_dir: str = "cache/reference"
    """Root of the caches; each model has its own folder in it, named by its identity."""
    max_tokens_per_batch: Tokens | None = None
    """Tokens of one forward pass, padding included. Default: 1024 on CPUs, 16384 on GPUs."""
    flush_every_seconds: NotNegative = 60.0
    """How often a rank writes what it has computed; a crash loses at most this much work."""
    sharding: Literal["auto", "replicas", "zero3"] = "auto"
    """The whole model on every rank, or ZeRO-3; auto: ZeRO-3 if it fills more than half of a device."""
    store_token_logps: bool = False
    """Also store the log-prob of every completion token (4 bytes per token), for losses that weigh tokens."""
    audit_rows: CountOrZero = 16
    """Rows of the cache that training recomputes at start, stopping if they differ; 0: trust the cache."""
    update_every: CountOrZero = 0
    """Make the policy the reference every N optimizer steps (TR-DPO, arXiv 2404.09656); 0: never."""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """What `train` and `sft` share: the optimizer, its schedule, the batches, and what is recorded."""

    learning_rate: Positive = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or a decay that ends one step after the last."""
    min_learning_rate: NotNegative = 0.0
    """Where a decay ends."""
    warmup_steps: CountOrZero = 150
    """Linear warm-up, in optimizer steps, at most a tenth of the run."""
    warmup_ratio: Annotated[float, Within("[0, 1)")] | None = None
    """The warm-up as a share of the run, instead of warmup_steps."""
    optimizer: Optimizers = "adamw"
    """docs/optimizers.md says what each keeps in memory, and under which sharding it runs."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    adam_epsilon: Positive = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay (RMSprop: an L2 penalty) of matrices, not of biases and norms."""
    max_grad_norm: NotNegative = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    num_epochs: Count = 1
    """Passes over the data."""
    max_steps: Count | None = None
    """Stop after this many optimizer steps."""
    backward: Literal["auto", "direct", "cached"] = "auto"
    """cached: score the step, then backward in pieces, of one group too; auto: where the loss needs that."""
    max_tokens_per_micro_batch: Tokens | None = None
    """Tokens per pass and rank, padding included; changes no result. Default: 1024 on CPUs, 16384 on GPUs."""
    dither_masters: bool = True
    """In bfloat16, start master weights at random between bfloat16 values, so that small updates count."""
    seed: CountOrZero = 0
    """Fixes the order of the data, the initialization of an adapter, and that of master weights."""
    evaluate_every: CountOrZero = 0
    """Evaluate on held-out data every N steps, and at both ends; 0: only at both ends."""
    checkpoint_every: CountOrZero = 0
    """Write a checkpoint every N steps; 0: none."""
    checkpoint_async: bool | None = None
    """Train on while a checkpoint is written, from a copy. Default: if the copy fits the host's memory."""
    keep_last: Count = 2
    """How many checkpoints are kept."""
    keep_best: bool = False
    """Also keep the weights of the evaluation with the lowest loss, in RUN_DIR/best/."""
    snapshot_every: CountOrZero = 0
    """Keep the model every N steps in RUN_DIR/snapshots/, to evaluate it later; 0: none."""
    resume: str = "auto"
    """auto: from the newest valid checkpoint; never: start in an empty folder; or a checkpoint's path."""
    resume_allow: str = ""
    """Keys that may differ from the resumed run, such as loss.beta,train.seed; other changes are refused."""
    deterministic: bool = False
    """On GPUs, use deterministic kernels, so that a resumed run is the same bit for bit; slower."""
    max_skipped_steps: CountOrZero = 5
    """A step whose loss or gradient is not finite is skipped; after more than this in a row the run stops."""
    stuck_after_seconds: Positive = 1800.0
    """End the run, writing the stacks of all ranks, after this long without progress."""
    peak_tflops: Positive | None = None
    """Of one device in the compute type, for perf/mfu. Default: known for common GPUs in bfloat16."""
    push_to_hub: str | None = None
    """Upload the finished model to this hub repository, such as user/name, private if it is new."""
    mirror: str | None = None
    """A URL (s3://, gs://, ...) that the run folder is copied to after each checkpoint, and back on an empty
    disk, to resume there. Keep it private: a checkpoint from there is loaded.
    """
    trackers: list[str] = field(default_factory=list)
    """Accelerate's trackers to use besides TensorBoard, such as wandb or mlflow, installed and logged in."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimizationConfig):
    """Preference optimization."""

    pairs_per_step: Count = 64
    """Pairs per optimizer step, over all ranks and micro-batches."""


SCORER_KINDS = ("hf", "reward", "reward-plain", "python", "command")
"""What stands before the colon in `evaluate.scorer`."""
SCORER_NAMES = "vader, hf:MODEL, reward:MODEL, python:module.function or command:PROGRAM"
"""For messages."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Samples and scores of the finished model."""

    num_prompts: CountOrZero = 64
    """Held-out prompts that are continued; 0: no samples."""
    completion_tokens: Count = 64
    """Longest sampled continuation, in tokens."""
    temperature: NotNegative = 0.7
    """Of the compared samples; 0 takes the likeliest token. The KL has separate samples at temperature 1."""
    scorer: str | None = None
    """vader, hf:MODEL (a text classifier), reward:MODEL (a reward model), python:module.function or
    command:PROGRAM. Default: no scores."""
    judge: str | None = None
    """MODEL@URL: a language model on an OpenAI-compatible server that compares the samples of policy and
    reference, in both orders. Default: none."""
    judge_rubric: str | None = None
    """A text file with what the judge is asked: with {conversation}, {answer_a} and {answer_b}; it asks
    for [[A]], [[B]] or [[C]] (a tie). Default: which one is more helpful, correct and harmless."""
    seed: CountOrZero = 0
    """Seed of the samples; policy and reference use the same one on the same prompt."""
    batch_size: Count = 64
    """Sequences that are sampled together."""
    sharding: Literal["auto", "replicas", "zero3"] = "auto"
    """As reference.sharding."""
    watched_prompts: CountOrZero = 4
    """Held-out prompts that training shows continued at each evaluation, in TensorBoard; 0: none."""
    reference_samples: Annotated[int, Within("[8, inf)")] = 64
    """Continuations of each prompt that `best-of` draws from the reference, at temperature 1."""
    snapshot: Count | None = None
    """Evaluate the snapshot of this step (see train.snapshot_every). Default: the last model."""
    table_rows: CountOrZero = 10
    """Rows of the table query | reference | policy: the first held-out prompts."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: precompute-ref, train and evaluate read the same file."""

    run_dir: str = "runs/default"
    """Where a run writes everything. Default with --config FILE: runs/ and FILE's name, so that all commands
    agree; a second run of the same FILE needs another.
    """
    model: ModelConfig
    data: DataConfig
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


@dataclass(frozen=True, kw_only=True)
class ScratchConfig:
    """A model that does not exist yet."""

    config: str
    """A config.json in transformers' format: model_type and sizes. vocab_size comes from the tokenizer."""
    tokenizer: str | None = None
    """An existing tokenizer, a folder or a hub name. Default: byte-level BPE trained on the text."""
    vocab_size: Count = 8192
    """Size of the vocabulary that is trained."""


@dataclass(frozen=True, kw_only=True)
class SftModelConfig(ModelConfig):
    """The model to fine-tune, or to train from scratch."""

    name_or_path: str = ""
    """A local folder or a hub name; leave empty with `scratch`."""
    scratch: ScratchConfig | None = None
    """Start from random weights instead of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class SftTrainConfig(OptimizationConfig):
    """Next-token training."""

    learning_rate: Positive = 1e-5
    """Peak learning rate."""
    adam_betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW's decay rates."""
    sequences_per_step: Count = 64
    """Sequences (blocks of text, or completions) per optimizer step, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """One supervised fine-tuning run."""

    run_dir: str = "runs/sft"
    """Where the run writes everything; the model is in RUN_DIR/model. Default: as for train."""
    model: SftModelConfig = field(default_factory=SftModelConfig)
    data: DataConfig
    train: SftTrainConfig = field(default_factory=SftTrainConfig)


def resolved(config: Config | SftConfig) -> dict[str, Any]:
    """A configuration as nested dictionaries of plain types: what config.yaml holds."""
    settings = dict(json.loads(json.dumps(asdict(config))))
    data = settings["data"]
    return settings | {"data": data | {key: _given(data[key]) for key in ("train", "test")}}


def _given(sources: Any) -> Any:
    """Sources with the options that they have: those without a value are left out."""
    if isinstance(sources, list):
        return [_given(source) for source in sources]
    if isinstance(sources, dict):
        return {name: value for name, value in sources.items() if value is not None}
    return sources


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a configuration as nested dictionaries."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    parts = (flat(part, f"{prefix}.{name}".strip(".")) for name, part in settings.items())
    return {key: value for part in parts for key, value in part.items()}
