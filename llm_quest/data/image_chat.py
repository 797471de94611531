"""Prompts with images, as transformers' processors write them: the marker in the text, or in the chat template's,
stands for everything that an image has there, with one placeholder for every vector that the decoder is given.

      LLaVA     USER: <image> What is it?    ->   <s> USER : <image> <image> ... What is it ?
      Gemma 3   <start_of_image> and then    ->   \\n\\n <start_of_image> <image_soft_token> ... <end_of_image> \\n\\n
      Qwen3.5   <|vision_start|><|image_pad|><|vision_end|>   ->   the middle one, as often as the image has vectors

The text is encoded whole, so that it has the ids that transformers gives it; what somebody typed is never a control
token, the marker of a plain prompt aside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol

from llm_quest.data.control_tokens import ControlTokenEncoder
from llm_quest.data.template_program import find_unread_arguments
from llm_quest.data.template_sandbox import render_prompt
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError


class ImagePromptConfig(Protocol):
    """What the Config of a model that reads images says of prompts. marker_token_id: what stands for an image;
    markup_token_ids: the marker with what a chat template writes around it."""

    @property
    def marker_token_id(self) -> int: ...

    @property
    def markup_token_ids(self) -> Sequence[int]: ...

    def expand_image(self, num_tokens: int) -> Sequence[int | str]:
        """What the marker of an image of so many vectors is replaced by: token ids and text."""


@dataclass(frozen=True)
class ImageTurn:
    """A message of a conversation, behind so many new images."""

    role: str
    text: str
    num_images: int = 0


@dataclass(frozen=True)
class ImageChat:
    """Encodes prompts about images. Every method takes how many vectors each image of the prompt has, in order.
    chat_template_kwargs: what the template reads besides messages, such as {"enable_thinking": False}."""

    tokenizer: Tokenizer
    config: ImagePromptConfig
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def image_token(self) -> str:
        """The marker as text."""
        return self.token_name(self.config.marker_token_id)

    @cached_property
    def image_markup(self) -> str:
        """The marker as a chat template writes it."""
        return "".join(map(self.token_name, self.config.markup_token_ids))

    @property
    def has_template(self) -> bool:
        """Whether the folder's chat template writes images."""
        return "image" in (self.tokenizer.chat_template or "")

    def encode_text(self, prompt: str, image_lengths: Sequence[int]) -> list[int]:
        """A prompt that has the marker where each image is, alone or as a chat template writes it."""
        written = self.image_markup if self.image_markup in prompt else self.image_token
        escaped = self.image_markup.join(map(self.escape, prompt.split(written)))
        return [*self.tokenizer.encode(""), *self.encode_expanded(escaped, image_lengths)]

    def encode_images(self, image_lengths: Sequence[int]) -> list[int]:
        """The beginning of a text: its start token and the images."""
        return [self.tokenizer.start_token_id, *(i for length in image_lengths for i in self.encode_image(length))]

    def encode_image(self, num_tokens: int) -> list[int]:
        """What an image of so many vectors is in a text."""
        ids: list[int] = []
        for token in self.config.markup_token_ids:
            is_marker = token == self.config.marker_token_id
            for piece in self.config.expand_image(num_tokens) if is_marker else [token]:
                is_text = isinstance(piece, str)
                ids += self.tokenizer.encode(piece, add_special_tokens=False) if is_text else [piece]  # type: ignore[arg-type, list-item]
        return ids

    def encode_turns(self, turns: Sequence[ImageTurn], image_lengths: Sequence[int]) -> list[int]:
        """A conversation in the folder's chat template."""
        if not self.has_template:
            raise UsageError(
                f"this folder has no chat template with images; write the prompt whole, with {self.image_token} in it"
            )
        messages: list[Any] = []
        for turn in turns:
            text = [{"type": "text", "text": self.escape(turn.text)}]
            messages.append({"role": turn.role, "content": [{"type": "image"}] * turn.num_images + text})
        names = {key: name[0] if isinstance(name, list) else name for key, name in self.special_names.items()}
        template, arguments = str(self.tokenizer.chat_template), self.chat_template_kwargs
        if unread := find_unread_arguments(template, arguments):
            raise UsageError(f"this chat template reads no {', '.join(unread)}: leave it out of chat_template_kwargs")
        rendered = render_prompt(template, messages, special_tokens=names, chat_template_kwargs=arguments)
        return self.encode_expanded(rendered, image_lengths)

    @property
    def special_names(self) -> dict[str, Any]:
        return {key: name for key, name in self.tokenizer.special_token_names.items() if name}

    @cached_property
    def control_encoder(self) -> ControlTokenEncoder:
        return ControlTokenEncoder(self.tokenizer)

    def escape(self, text: str) -> str:
        """Text in which nothing spells a control token."""
        return self.control_encoder.escape(text)

    def encode_expanded(self, text: str, image_lengths: Sequence[int]) -> list[int]:
        """The ids of a text with every marker replaced. UsageError for another number of markers than of images."""
        first, *others = text.split(self.image_token)
        if len(others) != len(image_lengths):
            images = "there is one image" if len(image_lengths) == 1 else f"there are {len(image_lengths)} images"
            raise UsageError(
                f"the prompt has {len(others)} times {self.image_token}, and {images}: write it once for each image"
            )
        parts = (self.expand(length) + part for length, part in zip(image_lengths, others, strict=True))
        return self.control_encoder.encode(first + "".join(parts))

    def expand(self, num_tokens: int) -> str:
        """What the marker of an image of so many vectors stands for."""
        pieces = self.config.expand_image(num_tokens)
        return "".join(piece if isinstance(piece, str) else self.token_name(piece) for piece in pieces)

    def token_name(self, token_id: int) -> str:
        """A token of images as text. DataError where the tokenizer has no such id."""
        name = self.tokenizer.backend_tokenizer.id_to_token(token_id)
        if name is None:
            raise DataError(f"the tokenizer has no token {token_id}, which config.json has for images")
        return name
