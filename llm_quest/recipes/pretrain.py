"""`quest train pretrain`: text -> tokenizer -> model -> next-token loss.

      run/  config.yaml  env.json  data.json  model.json  tokenizer/  metrics.jsonl  events.jsonl  samples/
            checkpoints/  summary.json

The same command again resumes the run and ends with the bits of a run that was never interrupted.

Commonly got wrong: a model that starts from trained weights, or learns from a teacher, does not begin at a loss of ln
V; a run with another teacher is another run, even if its folder has the same name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from llm_quest.contracts import Evaluator, LogFn, ParameterScale
from llm_quest.data.packing import PackedDocuments
from llm_quest.data.tokens import open_token_folder
from llm_quest.errors import UsageError
from llm_quest.eval.baselines import compute_baselines
from llm_quest.eval.evaluators import LossEvaluator, TextSampler
from llm_quest.hub.load_save import load, require_language_model
from llm_quest.models.build import build_meta_model, count_parameters
from llm_quest.models.decoder import Decoder
from llm_quest.models.parametrization import PARAMETRIZATIONS, scale_first_values_, scale_parameters
from llm_quest.models.resize import replace_sizes
from llm_quest.objectives.next_token import AuxiliaryLoss
from llm_quest.progress import phase
from llm_quest.recipes.assembly import (
    TextData,
    apply_techniques,
    count_epochs,
    fit_sequence_length,
    load_any_tokenizer,
    load_text_data,
    make_sharded_loader,
    micro_batch_rows,
    token_folder,
)
from llm_quest.recipes.auto import resolve_auto
from llm_quest.recipes.auxiliary_losses import (
    AuxiliaryLosses,
    NumberTokenLossConfig,
    TeacherConfig,
    build_distillation_terms,
    number_token_terms,
    teacher_hash,
)
from llm_quest.recipes.config_schema import (
    ModelConfig,
    NonNegativeInt,
    PositiveInt,
    SamplesConfig,
    TextBatchedConfig,
    TextDataConfig,
    TokenizerConfig,
)
from llm_quest.recipes.diagnostics import SUPERVISED_SYMPTOMS
from llm_quest.recipes.model_config import build_model_config, init_model, make_generation_config
from llm_quest.recipes.recipe import Context, Job, Recipe
from llm_quest.recipes.schema import Choice, StrictModel
from llm_quest.recipes.yaml_io import RawConfig
from llm_quest.rollouts.diagnostics import Diagnostics
from llm_quest.train.rng_state import derive_seed

MAX_BASELINE_BYTES = 20_000_000


class ParametrizationConfig(StrictModel):
    """Scaling of initial weights and learning rates with the model's size, so that a rate tuned on a base holds for it
    (`models/parametrization.py`)."""

    name: Annotated[str, Choice(PARAMETRIZATIONS)] = Field(
        default="standard", description="mup: the base's rate holds for a wider model; completep: a deeper one too"
    )
    base: dict[str, Any] = Field(
        default_factory=dict,
        description="config.json's fields of the base, where they differ from the model's: {hidden_size: 64, ...}",
    )

    @model_validator(mode="after")
    def check_base(self) -> ParametrizationConfig:
        if (self.name == "standard") == bool(self.base):
            raise ValueError(
                "base has no effect on the standard parametrization; name mup or completep"
                if self.base
                else f"{self.name} needs base: the sizes of the model whose learning rate was tuned, such as "
                "{hidden_size: 64, num_attention_heads: 2}"
            )
        return self


class PretrainConfig(TextBatchedConfig):
    """Text in, a language model out."""

    recipe: Literal["pretrain"]
    data: TextDataConfig = Field(default_factory=TextDataConfig)
    tokenizer: TokenizerConfig = TokenizerConfig()
    model: ModelConfig
    seed_per_module: bool = Field(
        default=False,
        description="each module's first values follow from the seed and its name alone, so that models that differ in "
        "one part share those of all others",
    )
    parametrization: ParametrizationConfig = ParametrizationConfig()
    router_aux_loss_coef: float | None = Field(
        default=None, ge=0, description="load-balancing loss of experts (Switch); null: the model's own"
    )
    router_aux_loss_pooled: bool = Field(
        default=False, description="that loss over all layers together, as transformers has it; false: in each layer"
    )
    router_seq_aux_loss_coef: float | None = Field(
        default=None, ge=0, description="DeepSeek-V3's balance loss within each sequence; null: the model's own"
    )
    router_z_loss_coef: float = Field(
        default=0.0, ge=0, description="ST-MoE's loss that keeps router logits small; 0.001 is usual"
    )
    expert_bias_update_speed: float | None = Field(
        default=None, ge=0, le=1, description="step of the bias that balances experts; null: 0.001 if there is one"
    )
    mtp_loss_weight: float | None = Field(
        default=None, gt=0, description="weight of the multi-token modules' loss; null: 0.3 if there are any"
    )
    number_token_loss: NumberTokenLossConfig | None = Field(
        default=None, description="adds the distance between numbers (weight, distance, multi_digit); null: no"
    )
    teacher: TeacherConfig | None = Field(
        default=None, description="a model to learn from (load, weight, beta, temperature, dtype); null: none"
    )
    eval_steps: NonNegativeInt = Field(default=200, description="steps between evaluations; 0: only at the end")
    eval_tokens: PositiveInt = Field(
        default=50_000, description="held-out tokens of each evaluation; the last one reads all of them"
    )
    eval_baselines: bool = Field(
        default=True, description="at the end, what n-gram models and compressors reach on the same bytes"
    )
    samples: SamplesConfig = SamplesConfig()

    @model_validator(mode="before")
    @classmethod
    def default_tokenizer(cls, given: Any) -> Any:
        """Set the tokenizer of a loaded model."""
        model = given.get("model") if isinstance(given, dict) else None
        if isinstance(model, dict) and model.get("load") and "tokenizer" not in given:
            return {**given, "tokenizer": {"load": model["load"]}}
        return given

    @model_validator(mode="after")
    def check_parametrization(self) -> PretrainConfig:
        if self.parametrization.name != "standard" and self.model.load is not None:
            raise ValueError("parametrization sets the first values of a new model, and model.load brings its own")
        return self

    @property
    def auxiliary_losses(self) -> AuxiliaryLosses:
        """Coefficients of the losses besides the next token's."""
        return AuxiliaryLosses(
            self.router_aux_loss_coef,
            self.router_seq_aux_loss_coef,
            self.router_z_loss_coef,
            self.expert_bias_update_speed,
            self.mtp_loss_weight,
            self.router_aux_loss_pooled,
        )


def build_pretrain(config: PretrainConfig, context: Context) -> Job:
    """Text, tokenizer, model, next-token loss."""
    parallel, log = context.parallel, context.log
    text = load_text_data(config.data, config.tokenizer, parallel, log)
    model = init_pretrain_model(config, context.settings, text)
    config = fit_sequence_length(config, context.settings, model.config.max_position_embeddings, log)
    rows = PackedDocuments(text.tokens.train, config.sequence_length)
    config = count_epochs(config, context.settings, rows.rows_per_epoch, log)
    scales = parametrize(config.parametrization, model)
    callbacks = apply_techniques(config.all_techniques, model, log)
    require_scaled(scales, model)
    flops = 6.0 * count_parameters(model) * config.batch_size * config.sequence_length * config.max_steps
    config = resolve_auto(config, context, flops / parallel.world_size)
    losses = config.auxiliary_losses.resolve(model)
    config = config.model_copy(update=vars(losses))
    distillation = build_distillation_terms(config, text.tokenizer, model.config.vocab_size, parallel, log)
    terms: list[AuxiliaryLoss] = [*number_token_terms(config.number_token_loss, text.tokenizer, model), *distillation]
    micro_rows = micro_batch_rows(config, parallel, config.sequence_length)
    random_weights = config.model.load is None and not distillation
    evaluators = list(build_evaluators(config, text, context, micro_rows))
    identity = {"tokenizer": text.tokenizer.hash, "data": text.tokens.train.hash, "held_out": text.tokens.val.hash}
    return Job(
        config,
        losses.build_objective(model, terms),
        make_sharded_loader(config, rows, parallel, micro_rows),
        evaluators,
        identity | teacher_hash(distillation),
        text.facts,
        text.tokenizer,
        callbacks=[*losses.build_callbacks(), *callbacks],
        watchers=[Diagnostics(symptoms=SUPERVISED_SYMPTOMS)],
        expected_loss=losses.initial_loss(model) if random_weights else None,
        baselines=lambda: baseline_bits_per_byte(text, log),
        with_baselines=config.eval_baselines,
        intervals=lambda model: document_intervals(evaluators, model),
        parameter_scales=scales,
    )


def init_pretrain_model(config: PretrainConfig, settings: RawConfig, text: TextData) -> Decoder:
    """Load the model, or build it with initial weights from a seed of their own."""
    if config.model.load is None:
        length = config.sequence_length
        return init_model(
            config.model, settings, text.tokenizer, context=length, seed=config.seed,
            seed_per_module=config.seed_per_module,
        )  # fmt: skip
    where = config.model.load
    model = require_language_model(load(where, dtype="float32", aligned=True), where)
    if model.config.vocab_size < text.tokenizer.vocab_size:
        raise UsageError(
            f"{config.model.load} knows {model.config.vocab_size} tokens, its tokenizer "
            f"{text.tokenizer.vocab_size}; set tokenizer.load={config.model.load}"
        )
    model.generation_config = make_generation_config(text.tokenizer)
    return model


def parametrize(part: ParametrizationConfig, model: Decoder) -> dict[str, ParameterScale]:
    """Scale the initial weights of a new model; return the scales for its optimizer."""
    if part.name == "standard":
        return {}
    scales = scale_parameters(model, build_meta_model(replace_sizes(model.config, part.base)), part.name)
    scale_first_values_(model, scales)
    return scales


def require_scaled(scales: Mapping[str, ParameterScale], model: Decoder) -> None:
    """Raise UsageError for parameters that a technique added or renamed: they have no scale."""
    unknown = [name for name, one in model.named_parameters() if one.requires_grad and name not in scales]
    if scales and unknown:
        raise UsageError(
            f"parametrization knows no rule for what a technique adds ({', '.join(unknown[:3])}): leave the technique "
            "out, or set parametrization.name=standard"
        )


def build_evaluators(config: PretrainConfig, text: TextData, context: Context, micro_rows: int) -> Iterator[Evaluator]:
    """Held-out loss and samples."""
    if text.tokens.val.num_documents:
        yield LossEvaluator(
            text.tokens.val.eval_part(config.data.eval_part),
            every=config.eval_steps,
            max_tokens=config.eval_tokens,
            last_step=config.max_steps,
            length=config.sequence_length,
            micro_rows=micro_rows,
        )
    part = config.samples
    if part.every_steps and part.prompts:
        yield TextSampler(
            text.tokenizer,
            context.samples_dir,
            part.prompts,
            part.every_steps,
            part.max_new_tokens,
            part.temperature,
            derive_seed(config.seed, "sampling"),
        )


def document_intervals(evaluators: Sequence[Evaluator], model: Decoder) -> dict[str, tuple[float, float]]:
    """The 95 % interval of bits per byte over all held-out documents."""
    interval = next(
        (evaluator.bits_per_byte_interval(model) for evaluator in evaluators if isinstance(evaluator, LossEvaluator)),
        None,
    )
    return {} if interval is None else {"bits_per_byte": interval}


def baseline_bits_per_byte(text: TextData, log: LogFn) -> dict[str, float]:
    """Bits per byte of the baselines; empty if the documents are not loaded or too many."""
    parts = text.split
    if parts is None or not parts.val or parts.corpus.nbytes > MAX_BASELINE_BYTES:
        return {}
    log("counting and compressing the same text, to compare")
    with phase("fitting n-grams and compressors"):
        baselines = compute_baselines(parts.train, parts.val, tokenizer=text.tokenizer)
    return {baseline.name: baseline.bits_per_byte for baseline in baselines}


def resolve_model_config(config: PretrainConfig, settings: RawConfig) -> Any:
    """Resolve the model's config without preparing the data: a tokenizer that is to be trained has its configured
    size."""
    if config.model.load is not None:
        return require_language_model(load(config.model.load, device="meta"), config.model.load).config
    return build_model_config(config.model, settings, vocab=resolve_vocab_size(config), context=config.sequence_length)


def resolve_vocab_size(config: PretrainConfig) -> int:
    """The number of tokens that the tokenizer has, or will have."""
    if (prepared := token_folder(config.data)) is not None:
        return int(open_token_folder(prepared, verify="size").manifest["vocab_size"])
    part = config.tokenizer
    return part.vocab_size if part.load is None else load_any_tokenizer(part.load).vocab_size


def check_pretrain(config: PretrainConfig, settings: RawConfig) -> PretrainConfig:
    """Return the config with a sequence_length that fits. UsageError for rows longer than the model's context, and for
    coefficients of parts that it lacks."""
    numbers = resolve_model_config(config, settings)
    if config.parametrization.base:
        base = replace_sizes(numbers, config.parametrization.base)
        scale_parameters(build_meta_model(numbers), build_meta_model(base), config.parametrization.name)
    config = fit_sequence_length(config, settings, numbers.max_position_embeddings)
    added = any(technique["name"] == "multi_token" for technique in config.techniques)
    losses = replace(config.auxiliary_losses, mtp_loss_weight=None) if added else config.auxiliary_losses
    losses.resolve(build_meta_model(numbers))
    return config


RECIPE = Recipe("pretrain", PretrainConfig, build_pretrain, check_pretrain)
