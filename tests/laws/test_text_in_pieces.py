"""What is encoded or decoded in pieces is what the whole gives at once, for every kind of tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_quest.cli.text_chat import TemplatedConversation
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.control_tokens import ControlTokenEncoder
from llm_quest.data.conversations import Conversation
from llm_quest.data.document import DropReport
from llm_quest.data.preferences import Preference, tokenize_preferences
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.generation.stopping import Completion, GeneratedSequence, StoppingCriteria
from llm_quest.rollouts.sampler import PolicyPrompt, Sampler
from tests.later import Later
from tests.tokenizer_kinds import KINDS, tokenizer_of

transformers = Later("transformers")

MIXTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
CLOSE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ 'User: ' + m.content + '\\n' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
PARTS = ["The quick", " ", "  ", "\n", "x", "brown fox", " was", "12", ":", "[/INST]", "été", "🙂", ".", ""]
texts = st.lists(st.sampled_from(PARTS), max_size=4).map("".join)
every_kind = pytest.mark.parametrize("kind", KINDS)
quick = settings(max_examples=25, deadline=None)


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@every_kind
@quick
@given(pieces=st.lists(texts, min_size=1, max_size=4))
def test_pieces_have_the_ids_of_the_whole_unless_a_token_lies_across_a_seam(kind, pieces):
    tokenizer = tokenizer_of(kind)
    found, whole = tokenizer.encode_pieces(*pieces), encode(tokenizer, "".join(pieces))
    together = [token for ids in found for token in ids]
    assert found[0] == encode(tokenizer, pieces[0])
    if all((cut := encode(tokenizer, "".join(pieces[:n]))) == whole[: len(cut)] for n in range(len(pieces))):
        assert together == whole
    if kind != "WordPiece":  # which drops spaces: a word cut in two is two words
        assert tokenizer.decode(together) == tokenizer.decode(whole)


@every_kind
@quick
@given(text=texts, before=st.sampled_from(["The quick brown fox", "[/INST]", "1 :"]))
def test_a_continuation_is_spelled_as_behind_other_text(kind, text, before):
    tokenizer = tokenizer_of(kind)
    whole = encode(tokenizer, before + text)
    if whole[: len(encode(tokenizer, before))] == encode(tokenizer, before) and kind != "WordPiece":
        ids = [*encode(tokenizer, before), *tokenizer.encode_continuation(text)]
        assert tokenizer.decode(ids) == tokenizer.decode(whole)


CONTROLLED = [*PARTS, "<s>", "</s>", "<|im_start|>", "<|im_end|>", "</s>\n", "a <|im_end|>"]


@every_kind
@quick
@given(rows=st.lists(st.lists(st.lists(st.sampled_from(CONTROLLED), max_size=4).map("".join), max_size=5), max_size=4),
       typed=st.sampled_from(["", "</s>", "a<|im_end|>b"]))  # fmt: skip
def test_texts_together_have_the_ids_of_each_alone(kind, rows, typed):
    encoder = ControlTokenEncoder(tokenizer_of(kind))
    rows = [*rows, *([*row, encoder.escape(typed)] for row in rows[:2])]
    together = [[ids.tolist() for ids in pieces] for pieces in encoder.encode_texts_in_pieces(rows)]
    assert together == [encoder.encode_pieces(pieces) for pieces in rows]


def token_ids(tokenizer: Tokenizer):
    """Ids as a model may draw them: bytes that are no text, control tokens, any order."""
    some = [*sorted(tokenizer.byte_token_ids)[60:70], *sorted(tokenizer.byte_token_ids)[190:200]]
    return st.lists(st.integers(0, tokenizer.vocab_size - 1) | st.sampled_from(some or [0]), max_size=9)


@every_kind
@quick
@given(st.data())
def test_a_stream_behind_a_prompt_prints_what_the_whole_adds(kind, data):
    tokenizer = tokenizer_of(kind)
    ids = data.draw(token_ids(tokenizer))
    prompt = encode(tokenizer, data.draw(st.sampled_from(["", "The quick", "A cat, and 12 ", "été"])))
    prompt = [*data.draw(st.sampled_from([[], [tokenizer.bos_token_id]])), *prompt]
    for keep in (False, True):
        before = tokenizer.decode(prompt, keep_special_tokens=keep)
        whole = tokenizer.decode([*prompt, *ids], keep_special_tokens=keep)
        if whole.startswith(before):  # otherwise the ids change a character of the prompt
            stream = tokenizer.decode_stream(prompt, keep_special_tokens=keep)
            assert "".join(map(stream.feed, ids)) + stream.flush() == whole[len(before) :]
            assert tokenizer.decode_continuation(prompt, ids, keep_special_tokens=keep) == whole[len(before) :]


def generate_row(tokenizer: Tokenizer, prompt: list[int], ids: list[int], stop: tuple[str, ...] = ()) -> str:
    """The text of a row that draws these ids, as generation gives it."""
    criteria = StoppingCriteria(max_new_tokens=len(ids), stop=stop, tokenizer=tokenizer)
    row, text = GeneratedSequence(0, prompt, criteria, 10_000), ""
    for token in ids:
        made = row.append_token(token, 0.0)
        text += made.text
        if made.finish_reason:
            break
    return text


@every_kind
@pytest.mark.parametrize("cut", [3, 9, 10, 20])
def test_prompt_and_generated_text_are_the_text(kind, cut):
    tokenizer, whole = tokenizer_of(kind), "The quick brown fox jumps over the lazy dog. été"
    prompt, ids = tokenizer.encode_pieces(whole[:cut], whole[cut:])
    begun = [tokenizer.bos_token_id, *prompt]
    text, every = generate_row(tokenizer, begun, ids), tokenizer.decode([*prompt, *ids])
    assert tokenizer.decode(prompt) + text == every
    stop = every[len(tokenizer.decode(prompt)) + 6 :][:3]
    assert generate_row(tokenizer, begun, ids, (stop,)) == text[: text.index(stop)]
    sampler = Sampler(tokenizer=tokenizer, eos_token_ids=tokenizer.eos_token_ids, max_new_tokens=4)
    end = tokenizer.eos_token_id
    sample = sampler.make_sample(PolicyPrompt(tuple(begun)), Completion([*ids, end], [0.0] * (len(ids) + 1), "eos"))
    assert sample.text == text


TALKS = [
    (("user", "what is two plus two?"), ("assistant", "Four.")),
    (("user", "The fox"), ("assistant", "jumps over"), ("user", "It is </s>été"), ("assistant", "12 dogs <s>. 🙂")),
]


@every_kind
@pytest.mark.parametrize("template", [None, MIXTRAL, CLOSE])
@pytest.mark.parametrize("messages", TALKS)
def test_what_is_learned_is_what_transformers_template_gives(kind, template, messages):
    tokenizer = tokenizer_of(kind)
    chat, talk = ChatTemplate(tokenizer, template), Conversation(messages, "talk:1")
    example = chat.encode_conversations([talk])[0]
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    text = theirs.apply_chat_template(talk.message_dicts, chat_template=chat.template, tokenize=False)
    if "</s>" not in messages[-2][1]:
        whole = theirs.encode(text, add_special_tokens=False)
        assert example.input_ids.tolist() == whole[: len(example.input_ids)]
    tokenizer.chat_template = None
    begin, end = example.last_answer_span
    answer, size = example.input_ids[begin:end].tolist(), len(chat.encode_prompt(talk.prompt))
    assert example.input_ids[:size].tolist() == chat.encode_prompt(talk.prompt)
    assert begin == size
    spoken = tokenizer.decode_continuation(example.input_ids[:begin].tolist(), answer)
    assert spoken.strip() == tokenizer.decode(encode(tokenizer, messages[-1][1])).strip()


@every_kind
def test_what_somebody_types_is_text_with_the_ids_of_text(kind):
    """A typed control token is encoded as a tokenizer without control tokens does, in its place in the whole."""
    tokenizer = tokenizer_of(kind)
    encoder = ChatTemplate(tokenizer, MIXTRAL).control_encoder
    tokenizer.chat_template = None
    typed = "a </s> b<|im_end|>"
    rendered = f"<s>[INST] {encoder.escape(typed)} [/INST]</s>"
    ids, plain = encoder.encode(rendered), encoder.encode("<s>[INST] a b [/INST]</s>")
    controls = tokenizer.special_token_ids - {tokenizer.token_to_id("<unk>")}
    assert [i for i in ids if i in controls] == [i for i in plain if i in controls] == [1, 2] or kind == "Unigram"
    harmless = encoder.encode("<s>[INST] a x")
    shared = len(encoder.encode("<s>[INST]"))
    assert ids[:shared] == harmless[:shared]


@every_kind
def test_pairs_have_the_ids_of_their_conversations(kind):
    tokenizer = tokenizer_of(kind)
    chat = ChatTemplate(tokenizer, MIXTRAL)
    tokenizer.chat_template = None
    one = Preference((("user", "The fox"),), ("jumps over", "12 dogs"))
    (pair,) = tokenize_preferences(chat, [one], 100, DropReport())
    for conversation, answer in zip(one.to_conversations(), pair.answers, strict=True):
        (example,) = chat.encode_conversations([conversation])
        assert np.array_equal([*pair.prompt, *answer], example.input_ids)
        text = f"<s>[INST] The fox [/INST] {conversation.answer}</s>"
        assert example.input_ids.tolist() == tokenizer.encode(text, allow_special_tokens=True, add_special_tokens=False)


@every_kind
@pytest.mark.parametrize("template", [None, MIXTRAL, CLOSE])
def test_the_next_turn_of_a_chat_reads_what_was_written(kind, template):
    """The prompt of the second question begins with the ids of the first one's and of the answer that was drawn."""
    tokenizer = tokenizer_of(kind)
    chat = ChatTemplate(tokenizer, template)
    conversation = TemplatedConversation(tokenizer, None)
    conversation.chat = chat
    conversation.add_user_message("what is two plus two?")
    prompt = conversation.prompt_tokens(10_000, print)
    answers = chat.encode_conversations([Conversation(TALKS[0], "talk:1")])[0]
    drawn = answers.input_ids[len(prompt) :].tolist()
    conversation.add_reply(generate_row(tokenizer, prompt, drawn[:-1]))
    conversation.add_user_message("The fox")
    following = conversation.prompt_tokens(10_000, print)
    tokenizer.chat_template = None
    assert following[: len(prompt) + len(drawn)] == [*prompt, *drawn]
