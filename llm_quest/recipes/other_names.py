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
    "block_size": ("sequence_length",),
    "cutoff_len": ("sequence_length",),
    "max_completion_length": ("max_new_tokens",),
    "max_tokens": ("max_new_tokens", "samples.max_new_tokens"),
    "group_size": ("num_generations",),
    "n_generations": ("num_generations",),
    "reward_funcs": ("rewards",),
    "reward_fn": ("rewards",),
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
    "fsdp": ("parallel=fsdp",),
    "ddp": ("parallel=ddp",),
    "activation_checkpointing": ("gradient_checkpointing",),
    "model_name_or_path": ("model.load",),
    "model_name": ("model.load",),
    "base_model": ("model.load",),
    "pretrained": ("model.load",),
    "tokenizer_name": ("tokenizer.load",),
    "dataset": ("data.source",),
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
    "resume_from_checkpoint": ("--resume FOLDER",),
    "eval_strategy": ("eval_steps",),
    "evaluation_strategy": ("eval_steps",),
    "eval_interval": ("eval_steps",),
    "save_strategy": ("save_steps",),
    "save_interval": ("save_steps",),
    "log_interval": ("logging_steps",),
    "wandb": ("report_to",),
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
"""Another name -> settings of ours, the first that a recipe has is meant; options of the command begin with --."""


ONLY_WITH = {
    "neftune_noise_alpha": "batch_size",
    **dict.fromkeys(("epsilon", "epsilon_high", "cliprange", "clip_range"), "num_generations"),
}
"""A name that is answered in recipes alone that have this key: policies are trained without noise, and other losses
have no clip range."""


def setting_of(name: str, knows: Callable[[str], bool]) -> str | None:
    """The setting that is meant by another name; None if there is none. knows: whether the recipe has a key."""
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
"""What other programs call a recipe -> ours, with what makes it that method."""


def command_of_method(name: str) -> str | None:
    """The recipe and setting of a method that other programs have a trainer for: dpo loss_type=orpo."""
    from llm_quest.objectives.kto import UNPAIRED_LOSSES
    from llm_quest.objectives.policy_gradient import POLICY_VARIANTS
    from llm_quest.objectives.preference_losses import PREFERENCE_LOSSES

    tables: dict[str, Mapping[str, Any]] = {
        "dpo loss_type": PREFERENCE_LOSSES,
        "kto loss_type": UNPAIRED_LOSSES,
        "grpo loss_type": POLICY_VARIANTS,
    }
    found = [f"{setting}={name}" for setting, table in tables.items() if name in table]
    return METHODS.get(name) or (found[0] if found else None)
