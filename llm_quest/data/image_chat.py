"""Prompts with an image, as transformers' LlavaProcessor writes them: the placeholder in the text, or in the chat
template's, is repeated once for every vector that the decoder is given in its place.

      USER: <image> What is it? ASSISTANT:   ->   <s> USER : <image> <image> ... What is it ? ASSISTANT :

The text is encoded whole, so that it has the ids that transformers gives it; what somebody typed is never a control
token, the placeholder aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llm_quest.data.control_tokens import ControlTokenEncoder
from llm_quest.data.template_sandbox import render_prompt
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, UsageError


@dataclass(frozen=True)
class ImageChat:
    """Encodes prompts about one image. image_token_id: the placeholder, repeated `num_image_tokens` times."""

    tokenizer: Tokenizer
    image_token_id: int
    num_image_tokens: int

    @cached_property
    def image_token(self) -> str:
        """The placeholder as text. DataError where the tokenizer has no such id."""
        name = self.tokenizer.backend_tokenizer.id_to_token(self.image_token_id)
        if name is None:
            raise DataError(f"the tokenizer has no token {self.image_token_id}, which config.json has for images")
        return name

    @property
    def has_template(self) -> bool:
        """Whether the folder's chat template writes images."""
        return "image" in (self.tokenizer.chat_template or "")

    def encode_text(self, prompt: str) -> list[int]:
        """A prompt that has the placeholder where the image is."""
        begin = self.tokenizer.encode("")
        return [*begin, *self.encode_expanded(self.image_token.join(map(self.escape, prompt.split(self.image_token))))]

    def encode_turns(self, turns: Sequence[tuple[str, str]]) -> list[int]:
        """A conversation of (role, text) in the folder's chat template; its first user's message shows the image."""
        if not self.has_template:
            raise UsageError(
                f"this folder has no chat template with images; write the prompt whole, with {self.image_token} in it"
            )
        first = next(i for i, (role, _) in enumerate(turns) if role == "user")
        messages: list[Any] = []
        for i, (role, text) in enumerate(turns):
            content = [{"type": "text", "text": self.escape(text)}]
            messages.append({"role": role, "content": [{"type": "image"}, *content] if i == first else content})
        names = {key: name[0] if isinstance(name, list) else name for key, name in self.special_names.items()}
        return self.encode_expanded(render_prompt(str(self.tokenizer.chat_template), messages, special_tokens=names))

    @property
    def special_names(self) -> dict[str, Any]:
        return {key: name for key, name in self.tokenizer.special_token_names.items() if name}

    @cached_property
    def control_encoder(self) -> ControlTokenEncoder:
        return ControlTokenEncoder(self.tokenizer)

    def escape(self, text: str) -> str:
        """Text in which nothing spells a control token."""
        return self.control_encoder.escape(text)

    def encode_expanded(self, text: str) -> list[int]:
        """The ids of a text with one placeholder, repeated. UsageError for another number of them."""
        if (count := text.count(self.image_token)) != 1:
            raise UsageError(f"the prompt has {count} times {self.image_token}, and there is one image: write it once")
        return self.control_encoder.encode(text.replace(self.image_token, self.image_token * self.num_image_tokens))
