"""Names that TRL, transformers, PEFT, axolotl and others have for settings of ours: an unknown key is answered with the
setting that the recipe has for it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from typing import Any

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "lr": ("learning_rate",),
    "steps": ("max_steps",),
    "num_steps": ("max_steps",),
    "max_iters": ("max_steps",),
    "epochs": ("num_train_epochs", "max_steps"),
    "num_epochs": ("num_train_epochs", "max_steps"),
    "n_epochs": ("num_train_epochs", "max_steps"),
    "batch_size": ("prompts_per_rollout",),
    "per_device_train_batch_size": ("micro_batch_size", "micro_batch_tokens"),
    "micro_batch_tokens": ("micro_batch_size",),
    "micro_batch_size": ("micro_batch_tokens",),
    "train_batch_size": ("batch_size", "prompts_per_rollout"),
    "global_batch_size": ("batch_size", "prompts_per_rollout"),
    "gradient_accumulation_steps": ("batch_size=32 micro_batch_size=4", "micro_batch_tokens"),
    "grad_accum": ("batch_size=32 micro_batch_size=4", "micro_batch_tokens"),
    "max_length": ("sequence_length", "max_new_tokens"),
    "max_seq_length": ("sequence_length", "max_new_tokens"),
    "max_seq_len": ("sequence_length", "max_new_tokens"),
    "seq_len": ("sequence_length", "max_new_tokens"),
    "sequence_len": ("sequence_length",),
    "block_size": ("sequence_length",),
    "cutoff_len": ("sequence_length",),
    "max_completion_length": ("max_new_tokens", "sequence_length"),
    "max_tokens": ("max_new_tokens", "samples.max_new_tokens"),
    "group_size": ("num_generations",),
    "n_generations": ("num_generations",),
    "reward_funcs": ("rewards",),
    "reward_fn": ("rewards",),
    "reward_weights": ("rewards='[{name: correct, weight: 0.5}, {name: format, weight: 0.5}]'",),
    "scale_rewards": ("advantage_estimator=mean",),
    "importance_sampling_level": ("loss_type=gspo",),
    "steps_per_generation": ("num_mini_batches",),
    "num_ppo_epochs": ("num_iterations",),
    "ppo_epochs": ("num_iterations",),
    "simpo_gamma": ("loss_kwargs='{simpo_gamma: 0.5}'",),
    "cpo_alpha": ("rpo_alpha",),
    "sft_weight": ("rpo_alpha",),
    "pref_beta": ("beta",),
    "pref_loss": ("loss_type",),
    "label_smoothing_factor": ("label_smoothing",),
    "beta": ("kl_coef", "teacher.beta"),
    "kl_coeff": ("kl_coef",),
    "kl_beta": ("kl_coef",),
    "epsilon": ("loss_kwargs.epsilon_low",),
    "epsilon_high": ("loss_kwargs.epsilon_high",),
    "cliprange": ("loss_kwargs.epsilon_low",),
    "clip_range": ("loss_kwargs.epsilon_low",),
    "value_model_path": ("value_model.load",),
    "ref_model_sync": ("sync_ref_model",),
    "loss": ("loss_type",),
    "lr_scheduler": ("lr_scheduler_type",),
    "scheduler": ("lr_scheduler_type",),
    "lr_decay": ("lr_scheduler_type",),
    "warmup": ("warmup_steps",),
    "warmup_ratio": ("warmup_steps",),
    "min_lr": ("min_lr_ratio",),
    "optimizer": ("optim",),
    "adam_beta1": ("adam_betas",),
    "adam_beta2": ("adam_betas",),
    "betas": ("adam_betas",),
    "eps": ("adam_epsilon",),
    "wd": ("weight_decay",),
    "grad_clip": ("max_grad_norm",),
    "gradient_clip": ("max_grad_norm",),
    "clip_grad_norm": ("max_grad_norm",),
    "bf16": ("precision=bf16",),
    "fp16": ("precision=bf16",),
    "dtype": ("precision",),
    "torch_dtype": ("precision",),
    "mixed_precision": ("precision",),
    "torch_compile": ("compile",),
    "tf32": ("precision",),
    "fsdp": ("parallel=fsdp",),
    "deepspeed": ("parallel=fsdp",),
    "ddp": ("parallel=ddp",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing",),
    "model_name_or_path": ("model.load",),
    "model_name": ("model.load",),
    "base_model": ("model.load",),
    "pretrained": ("model.load",),
    "tokenizer_name": ("tokenizer.load",),
    "dataset": ("data.source",),
    "datasets": ("data.source",),
    "chat_template": ("data.chat_template_path",),
    "chat_template_path": ("data.chat_template_path",),
    "chat_template_kwargs": ("data.chat_template_kwargs",),
    "data_seed": ("seed",),
    "dataset_name": ("data.source",),
    "dataset_path": ("data.source",),
    "train_file": ("data.source",),
    "data_path": ("data.source",),
    "file": ("data.source",),
    "validation_file": ("data.validation", "data.held_out"),
    "eval_file": ("data.validation", "data.held_out"),
    "val_split": ("data.held_out",),
    "val_set_size": ("data.held_out",),
    "test_size": ("data.held_out",),
    "max_train_samples": ("data.max_samples",),
    "limit": ("data.max_samples",),
    "output_dir": ("--out FOLDER",),
    "out": ("--out FOLDER",),
    "run_name": ("--out FOLDER",),
    "resume_from_checkpoint": ("--resume FOLDER",),
    "eval_strategy": ("eval_steps",),
    "evaluation_strategy": ("eval_steps",),
    "eval_interval": ("eval_steps",),
    "save_strategy": ("save_steps",),
    "save_interval": ("save_steps",),
    "log_interval": ("logging_steps",),
    "evals_per_epoch": ("eval_steps",),
    "saves_per_epoch": ("save_steps",),
    "wandb": ("report_to='[wandb]'",),
    "wandb_project": ("report_to='[wandb]'",),
    "early_stopping_callback": ("early_stopping_patience",),
    "load_best_model": ("load_best_model_at_end",),
    "patience": ("early_stopping_patience",),
    "frozen": ("freeze",),
    "freeze_layers": ("freeze",),
    "use_peft": ("techniques='[lora]'",),
    "lora": ("techniques='[lora]'",),
    "peft": ("techniques='[lora]'",),
    "adapter": ("techniques='[lora]'",),
    "lora_r": ("techniques='[{name: lora, rank: 8}]'",),
    "lora_rank": ("techniques='[{name: lora, rank: 8}]'",),
    "lora_alpha": ("techniques='[{name: lora, alpha: 16}]'",),
    "lora_dropout": ("techniques='[{name: lora, dropout: 0.05}]'",),
    "lora_target_modules": ("techniques='[{name: lora, targets: [all]}]'",),
    "lora_target_linear": ("techniques='[{name: lora, targets: [all]}]'",),
    "target_modules": ("techniques='[{name: lora, targets: [all]}]'",),
    "load_in_4bit": ("techniques='[{name: quantize, format: nf4}, lora]'",),
    "load_in_8bit": ("techniques='[{name: quantize, format: int8}, lora]'",),
    "neftune_noise_alpha": ("techniques='[{name: neftune, noise_alpha: 5}]'",),
    "n_layer": ("model.config.num_hidden_layers", "model.num_hidden_layers", "language_model.num_hidden_layers"),
    "num_hidden_layers": ("model.config.num_hidden_layers", "model.num_hidden_layers"),
    "n_head": ("model.config.num_attention_heads", "model.num_attention_heads"),
    "n_embd": ("model.config.hidden_size", "model.hidden_size"),
    "hidden_size": ("model.config.hidden_size", "model.hidden_size"),
    "d_model": ("model.config.hidden_size", "model.hidden_size"),
    "vocab_size": ("tokenizer.vocab_size", "language_model.vocab_size"),
}  # fmt: skip
"""Name elsewhere -> our settings, of which the first that the recipe has is meant; options of the command begin with
--."""


PACKED = "whole documents and conversations always share rows, and do not attend to one another; leave it out"
BATCHED_BY_LENGTH = "rows of like length share a micro-batch, so that little is padded; leave it out"
ROWS_IN_PROCESS = "the run reads and prepares its rows itself; leave it out"
FUSED = "PyTorch's fused attention is taken wherever it applies; leave it out"
ANSWERS_ALONE = "the loss is of answers alone (train: false in a message leaves one out); leave it out"
REMARKS: list[tuple[str, dict[str, str]]] = [
    (
        "packing sample_packing packing_strategy padding_free eval_packing group_by_length",
        {"pretrain": PACKED, "sft": PACKED, "": BATCHED_BY_LENGTH},
    ),
    ("assistant_only_loss completion_only_loss train_on_inputs", {"sft": ANSWERS_ALONE}),
    ("dataset_num_proc dataloader_num_workers dataloader_pin_memory preprocessing_num_workers", {"": ROWS_IN_PROCESS}),
    ("attn_implementation flash_attention flash_attn sdpa_attention", {"": FUSED}),
    ("use_liger_kernel use_liger_loss", {"": "there are no Liger kernels here; leave it out"}),
    ("remove_unused_columns", {"": "keys of rows that nothing reads are counted and named; leave it out"}),
    ("dataset_text_field text_column", {"": "name the column of the text: data.columns='{text: body}'"}),
    ("shuffle", {"": "rows are shuffled anew in every epoch, by seed; leave it out"}),
    ("push_to_hub hub_model_id", {"": "leave it out; then quest export RUN FOLDER and quest push FOLDER OWNER/NAME"}),
    ("use_vllm vllm_mode", {"grpo": "the policy samples in this process itself; leave it out"}),
    (
        "reward_model reward_model_path reward_model_name_or_path",
        {"grpo": "a reward model is a reward: rewards='[{name: model, load: FOLDER}]'"},
    ),
    ("ref_model", {"dpo": "the reference is the model as the run finds it in model.load; leave it out"}),
    ("reference_free", {"dpo": "losses without a reference are loss_type=simpo, cpo and orpo; leave it out"}),
    ("num_processes nproc_per_node", {"": "leave it out, and start torchrun --nproc-per-node 2 --no-python quest"}),
]
NO_SETTING = {name: remarks for names, remarks in REMARKS for name in names.split()}
"""A name that no setting has -> by recipe ("": all others), what happens instead and what to do."""
OTHER_VALUES: dict[tuple[str, ...], str] = {
    ("dpo", "loss_type", "sigmoid"): "dpo",
    ("lr_scheduler_type", "constant_with_warmup"): "constant",
    ("lr_scheduler_type", "warmup_stable_decay"): "wsd",
    ("lr_scheduler_type", "cosine_with_min_lr"): "cosine",
}
"""(recipe, where one alone is meant,) key and value of other programs -> our value."""


def setting_remark(name: str, recipe: str) -> str | None:
    """A remark on a setting that other programs have and no recipe does; None for an unknown name."""
    remarks = NO_SETTING.get(name, {})
    return remarks.get(recipe, remarks.get(""))


def our_value(recipe: str, key: str, value: str) -> str | None:
    """Our name for another program's value of a setting."""
    return OTHER_VALUES.get((recipe, key, value)) or OTHER_VALUES.get((key, value))


ONLY_WITH = {
    "neftune_noise_alpha": "batch_size",
    "simpo_gamma": "label_smoothing",
    **dict.fromkeys(("epsilon", "epsilon_high", "cliprange", "clip_range"), "num_generations"),
}
"""Name elsewhere -> a key without which the recipe has no such setting: only preference losses have SimPO's margin,
only policy losses a clip range."""


def our_setting(name: str, knows: Callable[[str], bool]) -> str | None:
    """Our setting for a name that other programs use; None if there is none. knows: whether the recipe has a key."""
    if name in ONLY_WITH and not knows(ONLY_WITH[name]):
        return None
    for ours in OTHER_NAMES.get(name, ()):
        if ours.startswith("--") or all(knows(pair.partition("=")[0]) for pair in shlex.split(ours)):
            return ours
    return None


METHODS = {
    "lora": "sft techniques='[lora]'", "qlora": "sft techniques='[lora]'", "peft": "sft techniques='[lora]'",
    "finetune": "sft", "full": "sft", "pt": "pretrain", "rm": "reward", "rlhf": "grpo", "distillation": "gkd",
    "online_dpo": "iterative", "rloo": "grpo advantage_estimator=leave_one_out", "vision": "vit",
}  # fmt: skip
"""Method -> our recipe, with the settings that make it that method."""


def method_command(name: str) -> str | None:
    """The recipe and setting of a method that other programs have a trainer for: dpo loss_type=orpo."""
    from llm_quest.objectives.kto import UNPAIRED_LOSSES
    from llm_quest.objectives.policy_gradient import POLICY_VARIANTS
    from llm_quest.objectives.preference_losses import PREFERENCE_LOSSES

    tables: dict[str, Mapping[str, Any]] = {
        "dpo loss_type": PREFERENCE_LOSSES,
        "kto loss_type": UNPAIRED_LOSSES,
        "grpo loss_type": POLICY_VARIANTS,
    }
    settings = [f"{setting}={name}" for setting, table in tables.items() if name in table]
    return METHODS.get(name) or (settings[0] if settings else None)
