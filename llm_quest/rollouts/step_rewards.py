"""Process supervision where a program can check the steps: which token ends each step, and what the step is worth."""

from __future__ import annotations

from llm_quest.generation.detokenizer import StreamingTokenizer
from llm_quest.rollouts.sampler import Sample
from llm_quest.rollouts.verifiers import verify_steps


def compute_step_rewards(tokenizer: StreamingTokenizer, sample: Sample) -> list[tuple[int, float]]:
    """(index of the step's last token, 1 or 0). The last step ends at the end-of-text token, so that ending is
    rewarded too; an answer that the budget cut has no last step that is right."""
    ends = token_end_offsets(tokenizer, sample)
    found = []
    steps = verify_steps(sample.problem, sample.text)
    for number, (place, worth) in enumerate(steps):
        last = number == len(steps) - 1
        at = len(sample.completion_ids) - 1 if last else next(i for i, end in enumerate(ends) if end >= place)
        found.append((at, 0.0 if last and sample.truncated else worth))
    return found or [(len(sample.completion_ids) - 1, 0.0)]


def token_end_offsets(tokenizer: StreamingTokenizer, sample: Sample) -> list[int]:
    """How many characters of the text are there after each token."""
    stream, length, ends = tokenizer.decode_stream(), 0, []
    for token in sample.completion_ids:
        length += len(stream.feed(token))
        ends.append(length)
    return ends
