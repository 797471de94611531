import torch

import llm_quest as quest
from llm_quest.scope import Scope
from llm_quest.techniques.value_head import ValueHead, remove_value_head, values_from_hidden


def test_values_begin_at_zero_and_the_logits_stay_what_they_were():
    """The first advantages of PPO are those of the rewards alone."""
    tokens = torch.arange(6)[None]
    plain = quest.build("llama3.2-tiny", seed=0)
    before = plain(tokens)
    model = ValueHead()(plain)
    values = values_from_hidden(model, model.hidden_states(tokens, Scope.unpadded(tokens)))
    assert values.shape == (1, 6)
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.zeros(1, 6))
    assert torch.equal(model(tokens), before)
    assert not remove_value_head(model).spec.techniques
