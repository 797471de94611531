from __future__ import annotations

import pytest
import torch

from llm_quest.layers.embedding import TokenEmbedding, TokenPositionEmbedding
from llm_quest.layers.linear import LMHead
from llm_quest.scope import Scope


def test_a_token_and_its_position_are_added():
    embed = TokenPositionEmbedding(5, 2, 4)
    tokens, positions = torch.tensor([[3, 3, 1]]), torch.tensor([[0, 2, 3]])
    expected = embed.token.weight[tokens] + embed.position.weight[positions]
    torch.testing.assert_close(embed(tokens, Scope(positions)), expected)


def test_rows_may_stand_at_different_positions():
    embed = TokenPositionEmbedding(5, 2, 4)
    tokens = torch.tensor([[1], [1]])
    a, b = embed(tokens, Scope(torch.tensor([[0], [3]])))
    torch.testing.assert_close(b - a, embed.position.weight[3:] - embed.position.weight[:1])


def test_the_last_position_works_and_the_one_beyond_says_what_to_do():
    embed = TokenPositionEmbedding(5, 2, 4)
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    embed(tokens, Scope.unpadded(tokens))
    with pytest.raises(ValueError, match=r"position 4 is beyond this model's 4 learned positions: shorten the input"):
        embed(tokens, Scope.unpadded(tokens, start=1))


def test_a_token_embedding_is_a_row_of_its_table():
    embed = TokenEmbedding(5, 3)
    tokens = torch.tensor([[4, 0]])
    assert torch.equal(embed(tokens, Scope.unpadded(tokens))[0], embed.token.weight[[4, 0]])


def test_a_tied_head_is_the_embedding_itself():
    embed = TokenEmbedding(5, 3)
    head = LMHead(3, 5, tied_embedding=embed.token)
    assert head.weight is embed.token.weight
    x = torch.randn(2, 3)
    torch.testing.assert_close(head(x), x @ embed.token.weight.T)
