"""`quest generate --image` and `quest chat --image`: a vision-language model answers prompts about an image."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.cli.chat import (
    complete_prompts,
    load_text_model,
    print_text,
    read_user_line,
    require_room_in_context,
    stream_answer,
    stream_text,
)
from llm_quest.cli.generation_options import CHAT_DEFAULTS, GENERATE_DEFAULTS, GenerationOptions
from llm_quest.cli.output import print_json
from llm_quest.contracts import LogFn
from llm_quest.data.image_chat import ImageChat
from llm_quest.data.image_text import ImageTextCollator
from llm_quest.data.images import ImageProcessor, load_image
from llm_quest.errors import DataError, UsageError
from llm_quest.generation.stopping import StoppingCriteria
from llm_quest.hub.load_save import load_preprocess
from llm_quest.models.multimodal import VisionLanguageModel


def load_matching_preprocess(name_or_path: str, config: Any) -> ImageProcessor:
    """The image processor of a model. DataError if its size or channels are not those of the model."""
    preprocess = load_preprocess(name_or_path)
    declared, expected = (preprocess.size, len(preprocess.mean)), (config.image_size, config.num_channels)
    if preprocess.resize_size is not None and not preprocess.crop and preprocess.do_resize:
        return preprocess  # of the image's own aspect ratio: the model says which shapes it reads
    if declared != expected:
        raise DataError(
            f"{name_or_path}: preprocessor_config.json makes images of {declared[0]} pixels with {declared[1]} "
            f"channels, the model reads {expected[0]} with {expected[1]}; correct the file"
        )
    return preprocess


@dataclass(frozen=True)
class ImagePrompt:
    """A vision-language model, an image, and the collator that builds prompts about it."""

    model: VisionLanguageModel
    image: Tensor
    writer: ImageTextCollator

    @classmethod
    def load(cls, name_or_path: str, image: str, device: str, dtype: str, log: LogFn) -> ImagePrompt:
        pixels = load_image(Path(image))
        model, tokenizer = load_text_model(name_or_path, device, dtype, log)
        if not isinstance(model, VisionLanguageModel):
            raise UsageError(
                f"{name_or_path} does not read images: leave --image out, or train a model with quest train vlm"
            )
        numbers = model.config
        seen = load_matching_preprocess(name_or_path, numbers.vision_config)(pixels)[None]
        return cls(
            model,
            seen,
            ImageTextCollator(
                tokenizer, numbers.image_token_id, numbers.image_seq_length, numbers.max_position_embeddings
            ),
        )

    @property
    def chat(self) -> ImageChat:
        """Encodes prompts that say where the image is, and conversations in the folder's chat template."""
        return ImageChat(self.writer.tokenizer, self.writer.image_token_id, self.writer.num_image_tokens)

    def encode_prompt(self, prompt: str, options: GenerationOptions) -> list[int]:
        """The ids of a prompt: a message in the chat template, a text with the placeholder where the image is, or a
        text after the image, as quest train vlm lays rows out."""
        if options.chat:
            system = [] if options.system is None else [("system", options.system)]
            return self.chat.encode_turns([*system, ("user", prompt)])
        return self.chat.encode_text(prompt) if self.chat.image_token in prompt else self.writer.encode_prompt(prompt)

    @property
    def decoder(self) -> Any:
        """The decoder, with the image in place of its placeholder tokens."""
        return self.model.with_images([self.image])


def describe_image(
    name_or_path: str,
    image: str,
    prompt: str,
    options: GenerationOptions,
    *,
    device: str,
    dtype: str,
    as_json: bool,
    log: LogFn,
) -> None:
    """Print the continuation of a prompt about an image; with as_json, one JSON document at the end."""
    require_image_options(options)
    image_prompt = ImagePrompt.load(name_or_path, image, device, dtype, log)
    options = options.with_advice(image_prompt.model.generation_config, GENERATE_DEFAULTS, log)
    tokens, until = (
        image_prompt.encode_prompt(prompt, options),
        options.stopping_criteria(image_prompt.decoder, image_prompt.writer.tokenizer),
    )
    require_room_in_context(tokens, image_prompt.decoder, False)
    if as_json:
        done = complete_prompts(image_prompt.decoder, [tokens], options, until)[0]
        print_json({"image": image, "prompt": prompt, **asdict(done)})
        return
    if not options.chat:
        print_text(prompt)
    for piece in stream_text(image_prompt.decoder, tokens, options, until):
        print_text(piece)
    print_text("\n")


def require_image_options(options: GenerationOptions) -> None:
    if options.slide:
        raise UsageError("--slide would drop the image from the context; leave one of --slide and --image out")
    if options.compile:
        raise UsageError("--compile is for models that read text: leave one of --compile and --image out")
    if options.num_beams > 1:
        raise UsageError("--beams does not work with --image: leave one of them out")


def chat_about_image(
    name_or_path: str,
    image: str,
    options: GenerationOptions,
    *,
    system: str | None,
    device: str,
    dtype: str,
    log: LogFn,
) -> None:
    """Answer questions about one image in one conversation: in the folder's chat template where that has images,
    otherwise in the layout of the training rows."""
    image_prompt = ImagePrompt.load(name_or_path, image, device, dtype, log)
    options = options.with_advice(image_prompt.model.generation_config, CHAT_DEFAULTS, log)
    tokenizer, until = (
        image_prompt.writer.tokenizer,
        options.stopping_criteria(image_prompt.decoder, image_prompt.writer.tokenizer),
    )
    if system is not None and not image_prompt.chat.has_template:
        raise UsageError("--system has no effect without a chat template that has images; leave it out")
    log("/reset starts a new conversation, /quit or Ctrl-D leaves; Ctrl-C stops an answer")
    if image_prompt.chat.has_template:
        chat_in_template(image_prompt, options, until, system)
        return
    tokens = image_prompt.writer.row_prefix
    while (line := read_user_line()) is not None:
        if line == "/reset":
            tokens = image_prompt.writer.row_prefix
        elif line:
            tokens = tokens + tokenizer.encode(line, add_special_tokens=False)
            require_room_in_context(tokens, image_prompt.decoder, False)
            answer = stream_answer(image_prompt.decoder, tokens, options, until)
            tokens = [*tokens, *tokenizer.encode_continuation(answer), tokenizer.eos_token_id]


def chat_in_template(
    image_prompt: ImagePrompt, options: GenerationOptions, until: StoppingCriteria, system: str | None
) -> None:
    """The conversation in the folder's chat template; it is encoded whole for every answer."""
    begin = [] if system is None else [("system", system)]
    turns = list(begin)
    while (line := read_user_line()) is not None:
        if line == "/reset":
            turns = list(begin)
        elif line:
            turns.append(("user", line))
            tokens = image_prompt.chat.encode_turns(turns)
            require_room_in_context(tokens, image_prompt.decoder, False)
            turns.append(("assistant", stream_answer(image_prompt.decoder, tokens, options, until)))
