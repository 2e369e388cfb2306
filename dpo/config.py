"""Every option once: meaning, unit and legal range, as frozen dataclasses.

`dpo.arguments` fills them from YAML and dotted overrides, `dpo.problems` checks the values. Defaults follow
the DPO paper (arXiv 2305.18290, appendix B) where it gives one.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A low-rank adapter (arXiv 2106.09685) that is trained instead of the model's weights; needs peft."""

    rank: int = 16
    """Rank of the product that is added to each adapted matrix, at least 1."""
    alpha: float = 32.0
    """That product is scaled by alpha / rank; > 0."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """all-linear: every linear layer but the output layer; or a list of names of layers, or of their ends."""
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
    """Compute type of policy and reference. Master weights, sums and log-softmax are float32 in either."""
    attention: Literal["auto", "sdpa", "flex", "eager"] = "auto"
    """Attention kernel: PyTorch's scaled dot product, FlexAttention, or the model's plain code; auto: flex on
    GPUs, sdpa on CPUs, eager for models that have nothing else."""
    share_prompts: bool = True
    """Compute each prompt once for all of its completions; false: one row a completion."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Run model code that comes with a hub repository. Off unless asked for by name."""
    lora: LoraConfig | None = None
    """Train an adapter and leave the weights as they are. Default: all weights are trained."""


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """One part of a data mixture."""

    path: str
    """A folder with train.parquet and test.parquet, a .parquet, .jsonl or .jsonl.gz file, or a hub name."""
    weight: float = 1.0
    """Share of the source's groups that is used: 0.5 is a fixed random half, 2 takes each group twice."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and held-out data, and how it becomes token ids."""

    train: str | list[DataSource]
    """Training preferences: a path, a hub name, or a list of {path, weight}. sft learns each chosen
    completion given its prompt, or text: a .txt, .txt.gz or .txt.xz file, one document per line, or a folder
    of such."""
    test: str | list[DataSource] | None = None
    """Held-out data of the same kind. Default: the test split beside preferences where there is one; else no
    evaluation."""
    max_length: int | None = None
    """Longest prompt + completion, or block of text, in tokens. Default: 1024 or the model's positions,
    whichever is less."""
    max_prompt_length: int | None = None
    """Longest prompt, in tokens; its end is kept. Default: what the group's completions leave, at least
    half."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """What becomes of a group that does not fit: cut (the prompt's end and the completion's start stay) or
    drop."""
    group_pairs: bool = True
    """Train all pairs of one prompt in the same step; false makes every pair a group of its own."""
    pairing: Literal["best-vs-rest", "best-vs-worst", "all"] = "best-vs-rest"
    """How scored completions become pairs, where the data has scores and no pairs."""
    min_margin: float = 0.0
    """Pairs whose scores differ by no more than this are not made."""
    append_eos: bool | None = None
    """End completions with EOS. Default: what the data's manifest says of them, else true."""
    strict: bool = False
    """Make a faulty row an error instead of a counted drop."""
    cache_dir: str = "cache/tokenized"
    """Where token ids are kept, memory-mapped by all ranks. Safe to delete."""


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen reference policy and the cache of its log-probabilities."""

    model: str | None = None
    """The reference model, a folder or a hub name. Default: the policy's start, model.name_or_path."""
    cache_dir: str = "cache/reference"
    """Root of the caches; each model has its own folder in it, named by its identity."""
    max_tokens_per_batch: int | None = None
    """Tokens of one forward pass, padding included. Independent of the number of ranks. Default: 1024 on
    CPUs, 16384 on GPUs."""
    flush_every_seconds: float = 60.0
    """How often a rank writes what it has computed: a crash loses at most this much work."""
    sharding: Literal["auto", "replicas", "zero3"] = "auto"
    """Precompute with the whole model on every rank, or with ZeRO-3; auto: ZeRO-3 if the weights need more
    than half of a device's memory."""
    store_token_logps: bool = False
    """Also store the log-prob of every completion token (4 bytes a token), for losses that weigh tokens."""
    audit_rows: int = 16
    """Rows of the cache that training recomputes when it starts, and stops if they differ; 0: trust the
    cache."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The preference loss."""

    type: list[str] | str = "sigmoid"
    """sigmoid (DPO), robust, exo_pair, ipo, hinge, nca_pair, sppo_hard, apo_zero, apo_down, discopop,
    sigmoid_norm, plackett_luce (over rankings), simpo and orpo (no reference); or a list of them, which add
    up. docs/losses.md has equations and advice."""
    weights: list[float] | None = None
    """Weight of each loss of a list. Default: 1 for each."""
    beta: float = 0.1
    """Strength of the pull towards the reference, > 0. Smaller drifts further. What else a loss calls by
    another name (tau, lambda, 1 / eta) is this one, too."""
    label_smoothing: float = 0.0
    """Assumed share of flipped labels, in [0, 0.5), for sigmoid (conservative DPO), robust, exo_pair and
    sigmoid_norm."""
    discopop_tau: float = 0.05
    """Temperature of discopop's mixing, in (0, 1)."""
    simpo_gamma: float = 0.5
    """Target margin of simpo, at least 0."""
    sft_weight: float = 0.0
    """Weight of the chosen completion's negative log-likelihood a token, added to any loss over pairs."""
    ld_alpha: float | None = None
    """Weight, in [0, 1], of the tokens by which a completion is longer than the other one of its pair
    (arXiv 2409.06411); needs a cache with reference.store_token_logps. Default: all tokens count."""
    pair_weights: Literal["equal", "score_margin"] = "equal"
    """score_margin: each pair counts by how far the scores of its completions are apart."""


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """What `train` and `sft` share: the optimizer, its schedule, the batches, and what is recorded."""

    learning_rate: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What follows the warm-up: constant, or a decay that would reach 0 one step after the last."""
    warmup_steps: int = 150
    """Linear warm-up, in optimizer steps; cut to a tenth of the run where that is shorter."""
    optimizer: Literal["adamw", "rmsprop"] = "adamw"
    """adamw, or rmsprop as in the paper."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the first and second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW) or L2 penalty (RMSprop) of matrices; biases and norms have none."""
    max_grad_norm: float = 1.0
    """Global gradient norm is clipped to this; 0 turns clipping off."""
    num_epochs: int = 1
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, also in the middle of an epoch."""
    max_tokens_per_micro_batch: int | None = None
    """Tokens of one forward and backward pass of one rank, padding included. Memory grows with it; results do
    not change. A longer group is a micro-batch of its own. Default: 1024 on CPUs, 16384 on GPUs."""
    seed: int = 0
    """Fixes the order of the data, and the start of an adapter."""
    evaluate_every: int = 0
    """Evaluate on held-out data every N steps, and at both ends; 0: only at both ends."""
    checkpoint_every: int = 0
    """Write a checkpoint every N steps; 0: none."""
    keep_last: int = 2
    """How many checkpoints stay, at least 1."""
    keep_best: bool = False
    """Also keep the weights of the evaluation with the lowest loss, in RUN_DIR/best/."""
    snapshot_every: int = 0
    """Keep the model of every N steps in RUN_DIR/snapshots/, to evaluate it later; 0: none."""
    resume: str = "auto"
    """auto: go on from the newest valid checkpoint; never: start, in an empty folder; or a checkpoint's
    path."""
    resume_allow: str = ""
    """Keys that may differ from the run that is resumed, such as loss.beta,train.seed; others are
    refused."""
    deterministic: bool = False
    """On GPUs, take kernels whose results do not vary, so that a resumed run is the same bit for bit;
    slower."""
    max_skipped_steps: int = 5
    """A step whose loss or gradient is not finite is skipped; after more than this in a row the run stops."""
    stuck_after_seconds: float = 1800.0
    """End the run, with the stacks of all ranks, when no part of a step has been done for so long."""
    peak_tflops: float | None = None
    """Peak of one device in the compute type, TFLOP/s, for perf/mfu. Default: that of common GPUs in
    bfloat16; of others no perf/mfu is recorded."""
    trackers: list[str] = field(default_factory=list)
    """Where curves go besides TensorBoard, such as wandb or mlflow: Accelerate's trackers, installed and
    logged in."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(OptimizationConfig):
    """Preference optimization."""

    pairs_per_step: int = 64
    """Pairs of one optimizer step, over all ranks and micro-batches."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Samples and scores of the finished model."""

    num_prompts: int = 64
    """Held-out prompts that are continued; 0: no samples."""
    completion_tokens: int = 64
    """Longest sampled continuation, in tokens."""
    temperature: float = 0.7
    """Sampling temperature of the compared samples; 0 takes the likeliest token. KL has samples of its own at
    1."""
    scorer: str | None = None
    """vader, or hf:MODEL (a text-classification model), or nothing."""
    seed: int = 0
    """Seed of the samples; policy and reference use the same one on the same prompt."""
    batch_size: int = 64
    """Sequences that are sampled together."""
    sharding: Literal["auto", "replicas", "zero3"] = "auto"
    """Evaluate with the whole model on every rank, or with ZeRO-3; auto: ZeRO-3 if the weights need more
    than half of a device's memory."""
    watched_prompts: int = 4
    """Held-out prompts that the policy continues at each evaluation of a training, for TensorBoard; 0:
    none."""
    reference_samples: int = 64
    """Continuations of each prompt that `best-of` draws from the reference, at temperature 1; at least 8."""
    snapshot: int | None = None
    """Evaluate the model of this step, which train.snapshot_every kept. Default: the last model."""
    table_rows: int = 10
    """Rows of the table query | reference | policy; always the first held-out prompts."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: precompute-ref, train and evaluate read the same file."""

    run_dir: str = "runs/default"
    """Everything a run writes."""
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
    vocab_size: int = 8192
    """Size of the vocabulary that is trained."""


@dataclass(frozen=True, kw_only=True)
class SftModelConfig(ModelConfig):
    """The model to fine-tune, or the plan of one to train from scratch."""

    name_or_path: str = ""
    """A local folder or a hub name; leave empty with `scratch`."""
    scratch: ScratchConfig | None = None
    """Start from random weights instead of a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class SftTrainConfig(OptimizationConfig):
    """Next-token training."""

    learning_rate: float = 1e-5
    """Peak learning rate."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates."""
    sequences_per_step: int = 64
    """Sequences (blocks of text, or completions) of one optimizer step, over all ranks."""


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """One supervised fine-tuning run."""

    run_dir: str = "runs/sft"
    """Everything the run writes; the model is in RUN_DIR/model."""
    model: SftModelConfig = field(default_factory=SftModelConfig)
    data: DataConfig
    train: SftTrainConfig = field(default_factory=SftTrainConfig)


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value of a configuration as nested dictionaries."""
    if not isinstance(settings, dict):
        return {prefix: settings}
    return {
        key: value
        for name, part in settings.items()
        for key, value in flat(part, f"{prefix}.{name}".strip(".")).items()
    }
