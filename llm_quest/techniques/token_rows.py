"""Rows of the embedding and of the output matrix for tokens that were added to a tokenizer.

A new row is the mean of the old ones (Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"):
its logit is then the mean logit, so the new token gets little of the probability. Commonly got wrong: small random rows
have logits near 0, which is far above the others' where those are all negative, and the model writes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.layers.linear import LMHead
from llm_quest.models.decoder import Decoder


def resize_token_embeddings(model: Decoder, vocab_size: int) -> None:
    """Give the embedding and the output matrix rows for `vocab_size` tokens, in place; new rows are the mean of the old
    ones. A tied matrix stays one parameter. UsageError for fewer rows than there are, and for a model with
    techniques."""
    rows = model.config.vocab_size
    if vocab_size < rows:
        raise UsageError(f"the model has {rows} rows for tokens: it can get more, not {vocab_size}")
    if vocab_size == rows:
        return
    if model.spec.techniques:
        names = ", ".join(type(technique).__name__ for technique in model.spec.techniques)
        raise UsageError(f"rows for tokens are added before techniques are applied; this model has {names}")
    table, head = token_table(model), cast(LMHead, model.head)
    grown = nn.Parameter(append_mean_rows(table.weight, vocab_size), requires_grad=table.weight.requires_grad)
    if head.weight is not table.weight:
        head.weight = nn.Parameter(append_mean_rows(head.weight, vocab_size), requires_grad=head.weight.requires_grad)
    else:
        head.weight = grown
    table.weight, table.num_embeddings, head.out_features = grown, vocab_size, vocab_size
    model.spec = replace(model.spec, config=replace(model.config, vocab_size=vocab_size))


def append_embedding_rows(model: Decoder, vocab_size: int) -> None:
    """Rows of the embedding alone, for a model whose head gives scores; none where there are so many already."""
    if vocab_size <= model.config.vocab_size:
        return
    table = token_table(model)
    table.weight = nn.Parameter(append_mean_rows(table.weight, vocab_size), requires_grad=table.weight.requires_grad)
    table.num_embeddings = vocab_size
    model.spec = replace(model.spec, config=replace(model.config, vocab_size=vocab_size))


@torch.no_grad()
def append_mean_rows(weight: Tensor, rows: int) -> Tensor:
    """The matrix with rows appended until it has so many; each is the mean."""
    return torch.cat([weight.detach(), mean_row(weight.detach()).expand(rows - weight.shape[0], -1)])


def mean_row(weight: Tensor) -> Tensor:
    """The mean of the rows, summed in float32 at least."""
    return weight.mean(dim=0, dtype=torch.promote_types(weight.dtype, torch.float32)).to(weight.dtype)


@torch.no_grad()
def add_token_rows(model: Decoder, ids: Sequence[int]) -> None:
    """Rows for these new tokens: appended, or, where the embedding was padded, existing ones that no token had; each is
    the mean of the rows of all other tokens."""
    if not ids:
        return
    rows = model.config.vocab_size
    resize_token_embeddings(model, max(rows, *(token + 1 for token in ids)))
    padding = [token for token in ids if token < rows]
    if padding:
        head = cast(LMHead, model.head)
        for weight in {id(one): one for one in (token_table(model).weight, head.weight)}.values():
            others = torch.ones(weight.shape[0], dtype=torch.bool, device=weight.device)
            others[list(ids)] = False
            weight[padding] = mean_row(weight[others])


def token_table(model: Decoder) -> nn.Embedding:
    """The embedding's table. UsageError for a model that has none of its own."""
    table = getattr(model.embed, "token", None)
    if not isinstance(table, nn.Embedding):
        raise UsageError(f"a {model.spec.family} model has no table of tokens to which rows could be added")
    return table


def add_tokens(
    model: Decoder, tokenizer: Tokenizer, plain: Sequence[str], special: Sequence[str] = ()
) -> tuple[Decoder, Tokenizer]:
    """The model with rows for new tokens, and its tokenizer with them. plain: tokens that every text may spell.
    special: control tokens. An end or begin token that was named and has no row gets one too, for answers end with
    it."""
    named = [number for number in (tokenizer.bos_token_id, *tokenizer.eos_token_ids) if number is not None]
    lacking = [number for number in named if number >= model.config.vocab_size]
    if plain:
        tokenizer = tokenizer.with_added_tokens(plain)
    if special:
        tokenizer = tokenizer.with_added_tokens(special, special=True)
    add_token_rows(model, [*lacking, *(tokenizer.token_to_id(token) for token in (*plain, *special))])
    return model, tokenizer
