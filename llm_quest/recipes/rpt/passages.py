"""What RPT reads: documents as ids, those to learn from and those that are held out; the places in them that a proxy
finds hard, worked out once and kept in the run folder."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quest.data.problems import Problem, parse_task
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.whole_documents import hash_documents
from llm_quest.errors import DataError
from llm_quest.files import atomic_write_json
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.config_schema import TokenizerConfig
from llm_quest.recipes.rpt.config import PositionSelectionConfig, RptConfig, RptDataConfig
from llm_quest.recipes.rpt.demonstrations import encode_problem, unique_problems
from llm_quest.recipes.rpt.evaluation import sample_per_bucket
from llm_quest.recipes.rpt.positions import Position, select_positions, subsample_positions
from llm_quest.recipes.rpt.prompts import PromptBuilder, make_prompt_builder, max_document_length, split_documents
from llm_quest.recipes.text_data import LogFn, load_text_data
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.state_dict import derive_seed

Documents = list[list[int]]
NUM_HELD_OUT = 2000
NO_THRESHOLD = -1.0
POSITIONS_FILE = "positions.json"


@dataclass(frozen=True)
class RptDocuments:
    """Documents with their start tokens, no longer than leaves room to think, and how their places are asked for."""

    train: Documents
    held_out: Documents
    prompt_builder: PromptBuilder

    @property
    def hash(self) -> str:
        return hash_documents([*self.train, *self.held_out])


@dataclass(frozen=True)
class SelectedPositions:
    """What is asked in training, and what is asked to see how it goes; flops: what finding them cost."""

    train: list[Position]
    held_out: list[Position]
    flops: float
    facts: dict[str, Any]


def split_problems(config: RptDataConfig, seed: int) -> tuple[list[Problem], list[Problem]]:
    """A task's problems to learn from, and held-out ones."""
    task, stream = parse_task(config.source), derive_seed(seed, "documents")
    return unique_problems(task, "train", config.document_count, stream), unique_problems(
        task, "validation", NUM_HELD_OUT, stream
    )


def load_documents(
    config: RptConfig, tokenizer: Tokenizer, context: int, parallel: DistributedContext, log: LogFn
) -> RptDocuments:
    """The documents of this run in this tokenizer's ids."""
    if config.data.is_task:
        train, held = (
            [encode_problem(one, tokenizer) for one in part] for part in split_problems(config.data, config.seed)
        )
    else:
        train, held = documents_from_text(config, tokenizer, parallel, log)
    asking = make_prompt_builder(
        tokenizer,
        [*train, *held],
        prefix=config.prompt.prefix,
        suffix=config.prompt.suffix,
        max_target_tokens=config.prompt.max_target_tokens,
    )
    length = max_document_length(context, config.max_new_tokens, asking, config.data.max_document_tokens)
    return RptDocuments(
        split_documents(train, length, tokenizer.start_token_id),
        split_documents(held, length, tokenizer.start_token_id),
        asking,
    )


def documents_from_text(
    config: RptConfig, tokenizer: Tokenizer, parallel: DistributedContext, log: LogFn
) -> tuple[Documents, Documents]:
    """As pretraining reads it, in the model's own tokens."""
    folder = load_text_data(config.data, TokenizerConfig(load=config.model.load), parallel, log).tokens
    start, end = tokenizer.start_token_id, tokenizer.eos_token_id
    train, held = ([[start, *map(int, ids), end] for ids in side.documents()] for side in (folder.train, folder.val))
    if not train or not held:
        raise DataError(f"{config.data.source} holds too few documents to keep some of them out of training; add text")
    return train, held


def find_or_load_positions(
    config: RptConfig, proxy: Decoder, cost: float, text: RptDocuments, folder: Path
) -> SelectedPositions:
    """From the file where they were kept, or found now. cost: of a forward pass of the proxy over the training text."""
    key = {
        "documents": text.hash,
        "select": config.selection.model_dump(mode="json"),
        "each": config.eval_positions_per_bucket,
    }
    if (found := load_positions(folder, key)) is not None:
        return found
    part, seed = config.selection, derive_seed(config.seed, "positions")
    train, lost = text.prompt_builder.filter_positions(
        text.train, hard_positions(proxy, text.train, part, part.entropy_threshold)
    )
    held, _ = text.prompt_builder.filter_positions(
        text.held_out, hard_positions(proxy, text.held_out, part, NO_THRESHOLD)
    )
    train = train if part.max_positions is None else subsample_positions(train, part.max_positions, seed)
    held = sample_per_bucket(held, config.eval_positions_per_bucket, seed)
    short = sum(len(ids) < 2 for ids in text.train)
    facts = position_facts(text, train, held, lost, short)
    require_positions(config, train, held, lost, short)
    content = {
        "key": key,
        "train": positions_to_json(train),
        "held_out": positions_to_json(held),
        "flops": cost,
        "facts": facts,
    }
    atomic_write_json(folder / POSITIONS_FILE, content)
    return SelectedPositions(train, held, cost, facts)


def load_positions(folder: Path, key: Mapping[str, Any]) -> SelectedPositions | None:
    """The places that were found before, if what is in `key` (of all that decided them) is what it was."""
    if not (folder / POSITIONS_FILE).is_file():
        return None
    content = json.loads((folder / POSITIONS_FILE).read_text())
    if any(content["key"][name] != value for name, value in key.items()):
        return None
    return SelectedPositions(
        positions_from_json(content["train"]),
        positions_from_json(content["held_out"]),
        content["flops"],
        content["facts"],
    )


def hard_positions(
    proxy: Decoder, documents: Documents, selection: PositionSelectionConfig, above: float
) -> list[Position]:
    return select_positions(
        proxy, documents, min_entropy=above, top_k=selection.top_k, renormalised=selection.renormalize
    )


def position_facts(
    text: RptDocuments, train: Sequence[Position], held_out: Sequence[Position], lost: Counter[str], short: int
) -> dict[str, Any]:
    """For the report."""
    dropped = {**lost, **({"a document of one token": short} if short else {})}
    numbers = {"train_documents": len(text.train), "held_out_documents": len(text.held_out)}
    return {**numbers, "train_places": len(train), "held_out_places": len(held_out), "dropped_places": dropped}


def require_positions(
    config: RptConfig, train: Sequence[Position], held_out: Sequence[Position], lost: Counter[str], short: int
) -> None:
    if not train:
        why = "".join(f"; {number:,}: {reason}" for reason, number in lost.items())
        why += f"; {short:,} documents have nothing to foretell" if short else ""
        raise DataError(
            f"no place in {config.data.source} is left to think about: the proxy finds none harder than "
            f"{config.selection.entropy_threshold:g} nats{why}; lower selection.entropy_threshold, or take a smaller proxy or more text"
        )
    if not held_out:
        raise DataError(f"nothing of {config.data.source} that was held out can be asked for; add text")


def positions_to_json(found: Sequence[Position]) -> list[list[float]]:
    return [[one.document, one.place, round(one.entropy, 6)] for one in found]


def positions_from_json(rows: Sequence[Sequence[float]]) -> list[Position]:
    return [Position(int(document), int(place), entropy) for document, place, entropy in rows]
