"""Prompts with images in the chat templates that TRL ships, against transformers' rendering of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from llm_quest.data.image_chat import ImageChat, ImageTurn
from llm_quest.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError, UsageError
from llm_quest.models import gemma3, llava, qwen3_5
from tests.data.test_published_templates import templates
from tests.oracles import transformers

CONTROL = (
    *("<start_of_image>", "<image_soft_token>", "<end_of_image>", "<start_of_turn>", "<end_of_turn>"),
    *("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<image>", "<think>", "</think>"),
)
TOKENIZER = train_bpe(["What is it? Be brief. And now this one. A cat.\n"], 320, (*SPECIAL_TOKENS, *CONTROL))


@dataclass(frozen=True)
class Layout:
    """A model's Config with this tokenizer's ids: only what it says of prompts is read."""

    config: type
    marker: str
    markup: tuple[str, ...]
    ids: dict[str, str]

    @property
    def marker_token_id(self) -> int:
        return TOKENIZER.token_to_id(self.marker)

    @property
    def markup_token_ids(self) -> list[int]:
        return [TOKENIZER.token_to_id(name) for name in self.markup]

    def expand_image(self, num_tokens: int) -> list[int | str]:
        numbered = type("Ids", (), {name: TOKENIZER.token_to_id(token) for name, token in self.ids.items()})
        return list(self.config.expand_image(numbered, num_tokens))  # type: ignore[attr-defined]


QWEN = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
LAYOUTS = {
    "gemma3": Layout(
        gemma3.Config,
        "<start_of_image>",
        ("<start_of_image>",),
        {"boi_token_index": CONTROL[0], "image_token_id": CONTROL[1], "eoi_token_index": CONTROL[2]},
    ),
    "qwen3_5_nothink": Layout(qwen3_5.Config, QWEN[1], QWEN, {"image_token_id": QWEN[1]}),
    "qwen3_5_think": Layout(qwen3_5.Config, QWEN[1], QWEN, {"image_token_id": QWEN[1]}),
    "qwen2_5_vl": Layout(qwen3_5.Config, QWEN[1], QWEN, {"image_token_id": QWEN[1]}),
    "llava_next": Layout(llava.Config, "<image>", ("<image>",), {"image_token_id": "<image>"}),
}
WRITTEN = {
    "gemma3": "\n\n<start_of_image>{0}<end_of_image>\n\n",
    **dict.fromkeys(("qwen3_5_nothink", "qwen3_5_think", "qwen2_5_vl", "llava_next"), "{0}"),
}
PLACEHOLDER = {name: layout.ids["image_token_id"] for name, layout in LAYOUTS.items()}
TURNS = [
    ImageTurn("user", "What is it?", 2),
    ImageTurn("assistant", "A cat."),
    ImageTurn("user", "And now this one.", 1),
]


def chat(name: str, **arguments: Any) -> ImageChat:
    template = templates()[name]
    tokenizer = Tokenizer(
        TOKENIZER.backend_tokenizer, eos_tokens=["<|im_end|>"], bos_token="<|im_start|>", chat_template=template
    )
    return ImageChat(tokenizer, LAYOUTS[name], arguments)


def transformers_text(name: str, turns: list[ImageTurn], **arguments: Any) -> str:
    """By transformers, with its own way of writing images in messages."""
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>"
    )
    messages = [
        {"role": turn.role, "content": [{"type": "image"}] * turn.num_images + [{"type": "text", "text": turn.text}]}
        for turn in turns
    ]
    template = templates()[name]
    return str(
        theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True, **arguments
        )
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", [name for name in LAYOUTS if name in templates()])
def test_a_conversation_with_images_in_several_turns_has_the_ids_of_transformers(name: str, system: str | None):
    turns = ([] if system is None else [ImageTurn("system", system)]) + TURNS
    counts = [2, 5, 3]
    first, *parts = transformers_text(name, turns).split(LAYOUTS[name].marker)
    assert len(parts) == 3, "the template writes every image"
    text = first + "".join(
        WRITTEN[name].format(PLACEHOLDER[name] * count) + part for count, part in zip(counts, parts, strict=True)
    )
    expected = TOKENIZER.encode(text, allow_special_tokens=True, add_special_tokens=False)
    assert chat(name).encode_turns(turns, counts) == expected


def test_a_template_s_arguments_are_given_to_it_and_others_refused():
    turns, name = [ImageTurn("user", "What is it?", 1)], "qwen3_5_nothink"
    texts = {}
    for thinks in (True, False):
        text = transformers_text(name, turns, enable_thinking=thinks).replace("<|image_pad|>", "<|image_pad|>" * 2)
        texts[thinks] = TOKENIZER.encode(text, allow_special_tokens=True, add_special_tokens=False)
        assert chat(name, enable_thinking=thinks).encode_turns(turns, [2]) == texts[thinks]
    assert texts[True] != texts[False]
    with pytest.raises(UsageError, match="this chat template reads no enable_thoughts: leave it out"):
        chat(name, enable_thoughts=True).encode_turns(turns, [2])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_plain_prompt_may_have_the_marker_alone_or_as_a_template_writes_it(name: str):
    whole = "".join(LAYOUTS[name].markup)
    alone, written = (chat(name).encode_text(f"a {mark} b", [3]) for mark in (LAYOUTS[name].marker, whole))
    assert alone == written
    assert alone.count(TOKENIZER.token_to_id(PLACEHOLDER[name])) == 3
    assert chat(name).encode_images([3])[1:] == chat(name).encode_text(whole, [3])


def test_mistakes_are_told():
    with pytest.raises(UsageError, match="there is one image: write it once for each image"):
        chat("gemma3").encode_text("no image", [4])
    plain = ImageChat(Tokenizer(TOKENIZER.backend_tokenizer, eos_tokens=["<|im_end|>"]), LAYOUTS["gemma3"])
    with pytest.raises(
        UsageError, match=r"no chat template with images; write the prompt whole, with <start_of_image>"
    ):
        plain.encode_turns(TURNS, [1, 1, 1])
    with pytest.raises(DataError, match=r"the tokenizer has no token 9999, which config.json has for images"):
        plain.token_name(9999)
