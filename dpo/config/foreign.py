"""What other trainers call our options and their values: TRL, transformers' TrainingArguments, DeepSpeed.

One table for two readers: a key or value that is unknown here is answered with ours, and `dpo convert` turns
a whole file of theirs into one of ours.
"""

import difflib
from collections.abc import Collection
from typing import Any

PAIRS = "pairs of one optimizer step, over all GPUs and accumulated micro-batches"

KEYS: dict[str, tuple[str, ...]] = {
    "model_name": ("model.name_or_path",),
    "model_name_or_path": ("model.name_or_path",),
    "model_revision": ("model.revision",),
    "trust_remote_code": ("model.trust_remote_code",),
    "torch_dtype": ("model.dtype",),
    "dtype": ("model.dtype",),
    "bf16": ("model.dtype",),
    "attn_implementation": ("model.attention",),
    "use_flash_attention_2": ("model.attention",),
    "gradient_checkpointing": ("model.gradient_checkpointing",),
    "activation_checkpointing": ("model.gradient_checkpointing",),
    "torch_compile": ("model.compile",),
    "router_aux_loss_coef": ("model.router_aux_loss_weight",),
    "use_peft": ("model.lora.rank",),
    "lora_r": ("model.lora.rank",),
    "lora_rank": ("model.lora.rank",),
    "lora_alpha": ("model.lora.alpha",),
    "lora_target_modules": ("model.lora.target_modules",),
    "lora_target_parameters": ("model.lora.target_parameters",),
    "lora_modules_to_save": ("model.lora.modules_to_save",),
    "use_rslora": ("model.lora.rank_stabilized",),
    "use_dora": ("model.lora.dora",),
    "loraplus_lr_ratio": ("model.lora.learning_rate_ratio",),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), ("model.quantization",)),
    "ref_model": ("reference.model",),
    "ref_model_name_or_path": ("reference.model",),
    "dataset": ("data.train",),
    "dataset_name": ("data.train",),
    "dataset_config": ("data.train",),
    "dataset_train_split": ("data.train",),
    "dataset_mixer": ("data.train",),
    "dataset_mixture": ("data.train",),
    "dataset_splits": ("data.train", "data.test"),
    "datasets": ("data.train",),
    "dataset_test_split": ("data.test",),
    "eval_dataset": ("data.test",),
    "max_length": ("data.max_length",),
    "max_seq_length": ("data.max_length",),
    "max_prompt_length": ("data.max_prompt_length",),
    "dataset_num_proc": ("data.num_workers",),
    "preprocessing_num_workers": ("data.num_workers",),
    "beta": ("loss.beta",),
    "loss_type": ("loss.type",),
    "loss_weights": ("loss.weights",),
    "label_smoothing": ("loss.label_smoothing",),
    "discopop_tau": ("loss.discopop_tau",),
    "simpo_gamma": ("loss.simpo_gamma",),
    "rpo_alpha": ("loss.sft_weight",),
    "ld_alpha": ("loss.ld_alpha",),
    "f_divergence_type": ("loss.f_divergence",),
    "f_alpha_divergence_coef": ("loss.f_alpha",),
    "use_weighting": ("loss.pair_weights",),
    "desirable_weight": ("loss.desirable_weight",),
    "undesirable_weight": ("loss.undesirable_weight",),
    "lr": ("train.learning_rate",),
    "learning_rate": ("train.learning_rate",),
    "lr_scheduler_type": ("train.schedule",),
    "lr_scheduler": ("train.schedule",),
    "scheduler": ("train.schedule",),
    "warmup_ratio": ("train.warmup_ratio",),
    "warmup_steps": ("train.warmup_steps",),
    "num_warmup_steps": ("train.warmup_steps",),
    "optim": ("train.optimizer",),
    "adam_beta1": ("train.adam_betas",),
    "adam_beta2": ("train.adam_betas",),
    "adam_epsilon": ("train.adam_epsilon",),
    "weight_decay": ("train.weight_decay",),
    "max_grad_norm": ("train.max_grad_norm",),
    "gradient_clipping": ("train.max_grad_norm",),
    "epochs": ("train.num_epochs",),
    "num_train_epochs": ("train.num_epochs",),
    "max_steps": ("train.max_steps",),
    "batch_size": ("train.pairs_per_step", "train.sequences_per_step"),
    "train_batch_size": ("train.pairs_per_step", "train.sequences_per_step"),
    "per_device_train_batch_size": ("train.pairs_per_step", "train.sequences_per_step"),
    "per_gpu_train_batch_size": ("train.pairs_per_step", "train.sequences_per_step"),
    "train_micro_batch_size_per_gpu": ("train.pairs_per_step", "train.sequences_per_step"),
    "gradient_accumulation_steps": ("train.pairs_per_step", "train.sequences_per_step"),
    "seed": ("train.seed",),
    "eval_steps": ("train.evaluate_every",),
    "eval_strategy": ("train.evaluate_every",),
    "evaluation_strategy": ("train.evaluate_every",),
    "save_steps": ("train.checkpoint_every",),
    "save_strategy": ("train.checkpoint_every",),
    "save_total_limit": ("train.keep_last",),
    "load_best_model_at_end": ("train.keep_best",),
    "report_to": ("train.trackers",),
    "resume_from_checkpoint": ("train.resume",),
    "full_determinism": ("train.deterministic",),
    "output_dir": ("run_dir",),
}
"""Their key -> ours; where the command has not the first, the next."""

_LAUNCH = "belongs to the launch configuration: see launch/README.md"
_BATCHES = "micro-batches are filled by tokens, train.max_tokens_per_micro_batch"
_RECORDED = "every optimizer step is recorded"
_COMMANDS = "training, evaluation and reference are commands"
_HUB = "models stay in RUN_DIR/model: upload that folder"
_MOVES = "a reference that moves takes the policy whole: reference.update_every"
_NO_NOISE = "policy and reference always run without noise"

BUILT_IN: dict[str, str] = {
    **dict.fromkeys(("logging_steps", "logging_strategy", "logging_first_step"), _RECORDED),
    **dict.fromkeys(
        ("include_num_input_tokens_seen", "logging_nan_inf_filter", "batch_eval_metrics"), _RECORDED
    ),
    **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm"), "see --quiet"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "prediction_loss_only"), _COMMANDS),
    **dict.fromkeys(("precompute_ref_log_probs", "precompute_ref_batch_size"), "always: dpo precompute-ref"),
    "force_use_ref_model": "reference.model may be any model",
    "disable_dropout": _NO_NOISE,
    **dict.fromkeys(("padding_free", "padding_value", "pad_to_multiple_of", "pad_token"), _BATCHES),
    **dict.fromkeys(("label_pad_token_id", "group_by_length", "train_sampling_strategy"), _BATCHES),
    **dict.fromkeys(("length_column_name", "auto_find_batch_size", "eval_accumulation_steps"), _BATCHES),
    **dict.fromkeys(("eval_do_concat_batches", "eval_use_gather_object", "dataloader_drop_last"), _BATCHES),
    "per_device_eval_batch_size": _BATCHES,
    **dict.fromkeys(("truncation_mode",), "a prompt keeps its end, a completion its start: data.too_long"),
    **dict.fromkeys(("remove_unused_columns", "label_names"), "columns that are not used are named"),
    "overwrite_output_dir": "a folder with another run is refused, and a run resumes by itself",
    "eval_on_start": "always",
    **dict.fromkeys(
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"), "as the model needs it"
    ),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "logits are never held as a whole"),
    "use_cache": "not used in training",
    "lora_task_type": "always CAUSAL_LM",
    **dict.fromkeys(
        ("deepspeed", "fsdp", "fsdp_config", "accelerator_config", "parallelism_config"), _LAUNCH
    ),
    **dict.fromkeys(("ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), _LAUNCH),
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_static_graph", "local_rank", "use_cpu"), _LAUNCH),
    **dict.fromkeys(("save_on_each_node", "average_tokens_across_devices"), _LAUNCH),
    **dict.fromkeys(("skip_memory_metrics", "torch_empty_cache_steps", "include_for_metrics"), _RECORDED),
    **dict.fromkeys(("dataloader_num_workers", "dataloader_pin_memory", "dataloader_in_order"), _BATCHES),
    **dict.fromkeys(("dataloader_persistent_workers", "dataloader_prefetch_factor"), _BATCHES),
    "dataloader_multiprocessing_context": _BATCHES,
    **dict.fromkeys(("ignore_data_skip", "restore_callback_states_from_checkpoint"), "a run resumes exactly"),
    "enable_jit_checkpoint": "a signal makes a run save and end with status 3",
    "run_name": "a run is named by run_dir",
    "data_seed": "train.seed orders the data too",
    "chat_template": "the tokenizer's own is used",
}
"""Their keys that need no option here, and why."""

MISSING: dict[str, str] = {
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), _MOVES),
    "fp16": "float16 is not supported: model.dtype is bfloat16 or float32",
    "lora_dropout": _NO_NOISE,
    "neftune_noise_alpha": _NO_NOISE,
    **dict.fromkeys(("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo"), _HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision", "hub_model_revision"), _HUB),
}
"""Their keys for what cannot be had here, and why."""

VALUES: dict[str, dict[str, str]] = {
    "model.dtype": {
        **dict.fromkeys(("bf16", "bfloat", "torch.bfloat16", "auto"), "bfloat16"),
        **dict.fromkeys(("fp32", "float", "torch.float32", "full"), "float32"),
    },
    "model.attention": {
        **dict.fromkeys(("flash_attention_2", "flash_attention_3", "flash", "flash_attention"), "auto"),
        "flex_attention": "flex",
    },
    "train.schedule": {"constant_with_warmup": "constant", "none": "constant"},
    "train.optimizer": {
        **dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "fused_adam"), "adamw"),
        **dict.fromkeys(("adamw_apex_fused", "adamw_anyprecision"), "adamw"),
        "adamw_bnb_8bit": "adamw_8bit",
        "paged_adamw_32bit": "paged_adamw",
        "lion_32bit": "lion",
    },
    "loss.f_divergence": {"js_divergence": "js", "alpha_divergence": "alpha"},
    "loss.type": {
        "dpo": "sigmoid",
        "rdpo": "robust",
        "slic": "hinge",
        "exo": "exo_pair",
        "nca": "nca_pair",
        "sppo": "sppo_hard",
        "apo": "apo_zero",
        "aot_pair": "aot_unpaired",
        "apo_zero_unpaired": "apo_zero",
        "bco": "bco_pair",
        "kto_pair": "kto",
    },
    "data.pairing": {"best_vs_rest": "best-vs-rest", "best_vs_worst": "best-vs-worst"},
    "train.resume": {"true": "auto", "last": "auto", "latest": "auto", "false": "never"},
}
"""Our key -> their value -> ours, where both mean the same."""


def nearest(key: str, legal: Collection[str]) -> str:
    """What to say of a key that is not legal: `; did you mean X?`, `; nothing to set: ...`, or nothing."""
    name = key.rpartition(".")[2]
    if ours := [known for known in KEYS.get(name, ()) if known in legal]:
        means = f" ({PAIRS})" if ours[0] == "train.pairs_per_step" else ""
        return f"; did you mean {ours[0]}{means}?"
    if same := [known for known in sorted(legal) if known.rpartition(".")[2] == name]:
        return f"; did you mean {same[0]}?"
    if name in BUILT_IN:
        return f"; nothing to set: {BUILT_IN[name]}"
    if name in MISSING:
        return f"; {MISSING[name]}"
    close = difflib.get_close_matches(key, sorted(legal), n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else ""


def meant(key: str, value: Any, legal: Collection[str]) -> str:
    """`; did you mean X?` for a value that is not legal, where it is close or another trainer's name."""
    text = str(value).lower()
    ours = VALUES.get(key, {}).get(text)
    close = [ours] if ours in legal else [word for word in legal if text.startswith(word)]
    close = close or difflib.get_close_matches(text, sorted(legal), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
