"""Steps shared by recipes that start from a trained model: loading it with its tokenizer, and preparing conversations
or preferences."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field

from llm_quest.contracts import Callback, LogFn
from llm_quest.data.builtin_qa import builtin_preferences as builtin
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.conversation_forms import RowForm
from llm_quest.data.document import DropReport
from llm_quest.data.loader import ShardedLoader, epoch_indices, repeat_by_weight, shuffle_indices
from llm_quest.data.preference_pairs import PreferenceDataset
from llm_quest.data.preferences import Preference, TokenizedPreference, read_preferences, tokenize_preferences
from llm_quest.data.records import Record
from llm_quest.data.row_forms import CONVERSATION_FORMS, PREFERENCE_FORMS
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.models.build import count_parameters, family_of
from llm_quest.models.decoder import Decoder, GenerationConfig
from llm_quest.recipes.assembly import (
    apply_techniques,
    count_epochs,
    fit_sequence_length,
    iter_config_records,
    load_any_tokenizer,
    load_split_rows,
    log_remarks,
    make_sharded_loader,
    micro_batch_rows,
    require_run_exists,
    source_name,
)
from llm_quest.recipes.auto import LENGTH_KEYS, RESOLVERS, resolve_auto
from llm_quest.recipes.chat_template_config import ChatTemplateConfig, fix_template_date, open_chat_template
from llm_quest.recipes.config_schema import BatchedConfig, ModelConfig, PositiveInt, RunConfig, TokenizerConfig
from llm_quest.recipes.model_config import init_model
from llm_quest.recipes.recipe import Context
from llm_quest.recipes.row_source import RowsConfig
from llm_quest.techniques import TECHNIQUES
from llm_quest.techniques.token_rows import add_tokens
from llm_quest.techniques.value_head import remove_value_head
from llm_quest.train.parallel import DistributedContext


class StartModelConfig(ModelConfig):
    """The model to go on from, with its tokenizer and chat template; or a fresh one (preset, family)."""

    add_tokens: tuple[str, ...] = Field(
        default=(), description="tokens to add to its tokenizer, such as [<think>, </think>]; their rows begin as means"
    )
    add_special_tokens: tuple[str, ...] = Field(
        default=(), description="the same for control tokens, which are never read from a user's text"
    )


class ConversationDataConfig(RowsConfig, ChatTemplateConfig):
    """Conversations and their chat template."""

    forms: ClassVar[Sequence[RowForm]] = CONVERSATION_FORMS
    held_out: float = Field(
        default=0.1, ge=0, lt=0.5, description="the part of the questions that is never trained on; 0: none"
    )
    max_samples: PositiveInt | None = Field(default=None, description="use so many rows; null: all")


FreshTokenizer = Annotated[
    TokenizerConfig | None,
    Field(description="of a fresh model: trained on the rows (vocab_size), or an existing one (load); null: 4,096"),
]


class PairBatchedConfig(BatchedConfig):
    """Preference pairs in rows."""

    tokenizer: FreshTokenizer = None

    batch_size: PositiveInt = Field(default=16, description="pairs in an optimizer step, over all processes")
    sequence_length: int = Field(default=256, ge=4, description="tokens of a prompt with an answer, at most")

    @property
    def scores_without_dropout(self) -> bool:
        return True


def load_for_finetuning(config: StartModelConfig) -> tuple[Decoder, Tokenizer]:
    """The model in float32, ready to be trained, and its tokenizer."""
    assert config.load is not None, "a fresh model is not loaded"
    command = "quest quickstart" if config.load.endswith("quickstart") else f"quest train sft --out {config.load}"
    require_run_exists(config.load, "model.load", command)
    model = load(config.load, dtype="float32", aligned=True)
    if not isinstance(model, Decoder):
        raise UsageError(f"model.load must name a language model; {config.load} is a {family_of(model.config).name}")
    tokenizer = load_tokenizer(config.load)
    if tokenizer.base_vocab_size > model.config.vocab_size:
        raise DataError(
            f"{config.load} knows {model.config.vocab_size} tokens and its tokenizer has {tokenizer.base_vocab_size}"
        )
    return add_tokens(model, tokenizer, config.add_tokens, config.add_special_tokens)


def begin_finetuning(
    config: Any, context: Context, builtin_rows: Callable[[], Iterator[Record]]
) -> tuple[Any, Decoder, Tokenizer]:
    """Resolve the config, except what `count_steps` resolves when the rows are counted, and load or build the model
    with its tokenizer. UsageError for rows longer than its context.
    config: of a recipe with `model`, `tokenizer` and `sequence_length`. builtin_rows: the recipe's own, from which the
    tokenizer of a fresh model is trained where data.source says builtin."""
    config = resolve_auto(config, context, keys=[key for key in RESOLVERS if key not in LENGTH_KEYS])
    require_trained_token_rows(config)
    if config.model.load is None:
        model, tokenizer = init_fresh_model(config, context, builtin_rows)
    else:
        require_no_tokenizer(config)
        model, tokenizer = load_for_finetuning(config.model)
        remove_value_head(model)  # of a run of PPO
    config = fit_sequence_length(config, context.settings, model.config.max_position_embeddings, context.log)
    return fix_template_date(config, context, tokenizer), model, tokenizer


def count_steps(config: Any, context: Context, model: Decoder, rows: int) -> Any:
    """Replace num_train_epochs of a config by max_steps, and resolve what follows from the length of the run. rows: of
    an epoch."""
    config = count_epochs(config, context.settings, rows, context.log)
    return resolve_auto(config, context, estimate_run_flops(config, model, context), keys=LENGTH_KEYS)


def estimate_run_flops(config: Any, model: Decoder, context: Context) -> float | None:
    """About the FLOPs of a process in the whole run, with rows of `sequence_length` tokens. None for a plan."""
    tokens = config.batch_size * config.sequence_length * config.max_steps
    return None if context.planning else 6.0 * count_parameters(model) * tokens / context.parallel.world_size


def init_fresh_model(
    config: Any, context: Context, builtin_rows: Callable[[], Iterator[Record]]
) -> tuple[Decoder, Tokenizer]:
    """A model with random weights, and a tokenizer that is loaded or trained on the rows."""
    choice = config.tokenizer or TokenizerConfig()
    if choice.load is not None:
        tokenizer = load_any_tokenizer(choice.load)
    else:
        rows = iter_config_records(config.data, DropReport(), builtin_rows)
        tokenizer = train_bpe((text for record in rows for text in row_texts(record.row)), choice.vocab_size)
    length = config.sequence_length
    model = init_model(config.model, context.settings, tokenizer, context=length, seed=config.seed)
    context.log(f"a fresh model with random weights, and a tokenizer of {tokenizer.vocab_size:,} tokens")
    return add_tokens(model, tokenizer, config.model.add_tokens, config.model.add_special_tokens)


def row_texts(value: Any) -> Iterator[str]:
    """Every text in a row, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from row_texts(inner)


def require_no_tokenizer(config: Any) -> None:
    """Raise UsageError for a tokenizer beside a loaded model, which has its own."""
    if config.tokenizer is not None:
        raise UsageError(
            f"tokenizer has no effect on a model that is loaded: {config.model.load} brings its own; leave it out"
        )


def require_trained_token_rows(config: Any) -> None:
    """Raise UsageError for new tokens whose rows an adapter would freeze."""
    if not (config.model.add_tokens or config.model.add_special_tokens):
        return
    for entry in config.techniques:
        keys = {field.name for field in fields(TECHNIQUES[entry["name"]])} if entry["name"] in TECHNIQUES else set()
        if "targets" in keys and "embed.token" not in entry.get("modules_to_save", ()):
            raise UsageError(
                f"techniques: {entry['name']} freezes the embedding, so the rows of model.add_tokens would not be "
                "trained: add modules_to_save [embed.token], and head where that is a matrix of its own"
            )


def set_generation_eos(model: Decoder, tokenizer: Tokenizer, ends: Iterable[int]) -> None:
    """Set the model's end tokens: those that ended answers in training, and the tokenizer's."""
    known = {int(end) for end in ends} | set(tokenizer.eos_token_ids)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_ids=tuple(sorted(known)), pad_token_id=tokenizer.pad_token_id
    )


def data_facts(
    config: ConversationDataConfig, chat: ChatTemplate, drop_report: DropReport, train: int, held_out: int, log: LogFn
) -> dict[str, Any]:
    """Facts about the rows, for the report; logs a line about them."""
    dropped = {reason: count for reason, (count, _) in sorted(drop_report.dropped.items())}
    lost = "".join(f"; dropped, {reason}: {count:,}" for reason, count in dropped.items())
    log(f"rows: {train:,} to train on, {held_out:,} held out{lost}")
    log_remarks(drop_report, log)
    facts = {"source": source_name(config), "train_rows": train, "held_out_rows": held_out, **drop_report.row_facts()}
    facts |= {"chat_template": chat.template, "tokenizer_sha256": chat.tokenizer.hash}
    return facts | ({"python": platform.python_version()} if config.source == "builtin" else {})


def can_share_prompts(config: RunConfig) -> bool:
    """Whether rows may share a prompt that is read once into a cache. Not with gradient checkpointing, which would
    write the cache twice, nor compiled, where every shape would be another graph."""
    return config.compile is not True and all(
        technique["name"] != "checkpointing" for technique in config.all_techniques
    )


def apply_config_techniques(config: RunConfig, model: Decoder, log: LogFn, *, scores: bool = False) -> list[Callback]:
    """Apply the techniques of a recipe (`apply_techniques`)."""
    return apply_techniques(config.all_techniques, model, log, scores=scores)


@dataclass(frozen=True)
class PreferenceData:
    """Pairs to train on and held-out ones, as ids."""

    chat: ChatTemplate
    train: Sequence[TokenizedPreference]
    held_out: Sequence[TokenizedPreference]
    drop_report: DropReport


class PreferenceDataConfig(ConversationDataConfig):
    """Preferences: a question, the better answer and the worse one."""

    forms: ClassVar[Sequence[RowForm]] = PREFERENCE_FORMS
    label_flip_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="fraction of training pairs with chosen and rejected swapped, to test noise",
    )


def prepare_preferences(config: PreferenceDataConfig, tokenizer: Tokenizer, length: int, seed: int) -> PreferenceData:
    """Prepare the pairs of a source; what is left out is in the drop report. seed: decides which labels are flipped."""
    chat = open_chat_template(config, tokenizer)
    drop_report = DropReport()
    train, held_out = load_split_rows(config, read_preferences, drop_report, builtin=builtin, limit=config.max_samples)
    train = flip_labels(train, config.label_flip_fraction, seed)
    if config.label_flip_fraction:
        drop_report.note(
            f"{round(config.label_flip_fraction * len(train))} of the training pairs are swapped on purpose"
        )
    train = repeat_by_weight(train)
    return PreferenceData(
        chat,
        tokenize_preferences(chat, train, length, drop_report),
        tokenize_preferences(chat, held_out, length, drop_report),
        drop_report,
    )


def flip_labels(pairs: Sequence[Preference], fraction: float, seed: int) -> list[Preference]:
    """Swap chosen and rejected in a fraction of the pairs."""
    flipped = set(shuffle_indices(len(pairs), seed)[: round(fraction * len(pairs))].tolist())
    return [replace(pair, answers=pair.answers[::-1]) if n in flipped else pair for n, pair in enumerate(pairs)]


def pairs_loader(
    config: PairBatchedConfig, data: PreferenceData, parallel: DistributedContext
) -> ShardedLoader[PreferenceDataset]:
    longest = max(len(one.answers) * one.length for one in data.train)
    rows = micro_batch_rows(config, parallel, longest)
    return make_sharded_loader(config, PreferenceDataset(data.train), parallel, rows)


def pairs_read(config: PairBatchedConfig, loader: ShardedLoader[PreferenceDataset]) -> list[int]:
    """The numbers of the pairs that a run of `max_steps` reads."""
    size = len(loader.source)
    return sorted(epoch_indices(size, loader.seed, range(min(size, config.max_steps * config.batch_size))))
