"""`quest generate --image` and `quest chat` with images: answer prompts about images with a vision-language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from llm_quest.cli.chat import complete_prompts, load_text_model, print_text, require_room_in_context, stream_text
from llm_quest.cli.chat_session import ChatCommand, ChatSession
from llm_quest.cli.generation_options import CHAT_DEFAULTS, GENERATE_DEFAULTS, GenerationOptions
from llm_quest.cli.output import print_json
from llm_quest.contracts import LogFn
from llm_quest.data.image_chat import ImageChat, ImageTurn
from llm_quest.data.images import ImageProcessor, load_image
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError, QuestError, UsageError
from llm_quest.hub.load_save import read_model_config
from llm_quest.hub.load_tokenizer import find_preprocess, load_preprocess
from llm_quest.models import VISION_FAMILIES
from llm_quest.models.multimodal import VisionLanguageModel

TEXT_WITH_IMAGES = [family for family in VISION_FAMILIES if family.pipeline_tag == "image-text-to-text"]


def load_matching_preprocess(name_or_path: str, config: Any) -> ImageProcessor:
    """The image processor of a model. DataError if its size or channels are not those of the model."""
    preprocess = load_preprocess(name_or_path)
    if preprocess.resize_size is not None and not preprocess.crop and preprocess.do_resize:
        return preprocess  # of the image's own aspect ratio: the model says which shapes it reads
    declared, expected = (preprocess.size, len(preprocess.mean)), (config.image_size, config.num_channels)
    if declared != expected:
        raise DataError(
            f"{name_or_path}: preprocessor_config.json makes images of {declared[0]} pixels with {declared[1]} "
            f"channels, the model reads {expected[0]} with {expected[1]}; correct the file"
        )
    return preprocess


@dataclass
class ImagePrompt:
    """A vision-language model, the images of the prompt, and the encoding of prompts about them."""

    model: VisionLanguageModel
    tokenizer: Tokenizer
    preprocess: ImageProcessor
    images: list[Tensor] = field(default_factory=list)
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        name_or_path: str,
        images: Sequence[str],
        device: str,
        dtype: str,
        log: LogFn,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ImagePrompt:
        opened = [load_image(Path(image)) for image in images]  # a mistake is reported before a model is loaded
        model, tokenizer = load_text_model(name_or_path, device, dtype, log, vision=True)
        if not isinstance(model, VisionLanguageModel):
            raise UsageError(
                f"{name_or_path} does not read images: leave --image out, or train a model with quest train vlm"
            )
        preprocess = load_matching_preprocess(name_or_path, model.config.vision_config)
        pixels = [preprocess(image) for image in opened]
        return cls(model, tokenizer, preprocess, pixels, chat_template_kwargs or {})

    def add_image(self, file: str) -> None:
        """Show one more image."""
        self.images.append(self.preprocess(load_image(Path(file))))

    @property
    def image_lengths(self) -> list[int]:
        """The number of vectors that the decoder reads for each image."""
        return [self.model.config.num_image_tokens(*image.shape[1:]) for image in self.images]

    @property
    def chat(self) -> ImageChat:
        """Encodes prompts that say where the images are, and conversations in the folder's chat template."""
        return ImageChat(self.tokenizer, self.model.config, self.chat_template_kwargs)

    def encode_prompt(self, prompt: str, options: GenerationOptions) -> list[int]:
        """The ids of a prompt: a message in the chat template, a text with the marker where each image is, or a text
        after the images, as quest train vlm lays rows out."""
        if options.chat:
            system = [] if options.system is None else [ImageTurn("system", options.system)]
            return self.chat.encode_turns([*system, ImageTurn("user", prompt, len(self.images))], self.image_lengths)
        if self.chat.image_token in prompt:
            return self.chat.encode_text(prompt, self.image_lengths)
        rest = self.tokenizer.encode(prompt, add_special_tokens=False)
        return self.chat.encode_images(self.image_lengths) + rest

    @property
    def decoder(self) -> Any:
        """The decoder, with the images in place of their placeholder tokens."""
        return self.model.with_images([self.images])


def describe_images(
    name_or_path: str,
    images: Sequence[str],
    prompt: str,
    options: GenerationOptions,
    *,
    draft: str | None,
    device: str,
    dtype: str,
    as_json: bool,
    log: LogFn,
) -> None:
    """Print the continuation of a prompt about images; with as_json, one JSON document at the end."""
    require_image_options(options, draft)
    image_prompt = ImagePrompt.load(name_or_path, images, device, dtype, log, options.chat_template_kwargs)
    options = options.with_advice(image_prompt.model.generation_config, GENERATE_DEFAULTS, log)
    tokens = image_prompt.encode_prompt(prompt, options)
    until = options.stopping_criteria(image_prompt.decoder, image_prompt.tokenizer)
    require_room_in_context(tokens, image_prompt.decoder, False)
    if as_json:
        done = complete_prompts(image_prompt.decoder, [tokens], options, until)[0]
        print_json({"images": list(images), "prompt": prompt, **asdict(done)})
        return
    if not options.chat:
        print_text(prompt)
    for piece in stream_text(image_prompt.decoder, tokens, options, until):
        print_text(piece)
    print_text("\n")


def require_image_options(options: GenerationOptions, draft: str | None) -> None:
    """UsageError for options that prompts with images do not support."""
    if draft:
        raise UsageError("--draft does not work with --image: leave one of them out")
    if options.slide:
        raise UsageError("--slide would drop the image from the context; leave one of --slide and --image out")
    if options.compile:
        raise UsageError("--compile is for models that read text: leave one of --compile and --image out")
    if options.num_beams > 1:
        raise UsageError("--beams does not work with --image: leave one of them out")
    if options.special_tokens:
        raise UsageError("--special-tokens does not work with --image: a prompt may hold the image's own marker alone")


def reads_images(name_or_path: str) -> bool:
    """Whether a folder or a run has a language model that reads images and says how they are made."""
    with suppress(QuestError):
        published = read_model_config(name_or_path)
        is_known = any(family.matches(published) for family in TEXT_WITH_IMAGES)
        return is_known and find_preprocess(name_or_path) is not None
    return False


def chat_about_images(
    name_or_path: str,
    images: Sequence[str],
    options: GenerationOptions,
    *,
    system: str | None,
    template: bool,
    device: str,
    dtype: str,
    log: LogFn,
) -> None:
    """Answer questions in one conversation, about images given at its beginning or by /image: in the folder's chat
    template where that has images, otherwise in the layout of the rows of quest train vlm."""
    shown = ImagePrompt.load(name_or_path, images, device, dtype, log, options.chat_template_kwargs)
    options = options.with_advice(shown.model.generation_config, CHAT_DEFAULTS, log)
    until = options.stopping_criteria(shown.decoder, shown.tokenizer)
    has_template = template and shown.chat.has_template
    if system is not None and not has_template:
        raise UsageError("--system has no effect without a chat template that has images; leave it out")
    if options.chat_template_kwargs and not has_template:
        raise UsageError("--chat-template-kwargs has no effect without a chat template that has images; leave it out")
    history = TemplatedImageConversation(shown, system) if has_template else PlainImageConversation(shown)
    show = ChatCommand("FILE shows an image", lambda session, file: history.add_image(file))
    ChatSession(history, lambda: shown.decoder, options, until, log, {"/image": show}).run()


class TemplatedImageConversation:
    """A conversation in the folder's chat template, encoded whole for every answer. An image belongs to the next
    message; those of the command line to the first."""

    def __init__(self, shown: ImagePrompt, system: str | None):
        self.shown, self.system, self.first_images = shown, system, list(shown.images)
        self.reset()

    def reset(self) -> None:
        self.shown.images, self.num_new_images = list(self.first_images), len(self.first_images)
        self.turns = [] if self.system is None else [ImageTurn("system", self.system)]

    def set_system(self, text: str) -> None:
        self.system = text or None
        self.reset()

    def snapshot(self) -> tuple[list[ImageTurn], list[Any], int]:
        return list(self.turns), list(self.shown.images), self.num_new_images

    def restore(self, state: tuple[list[ImageTurn], list[Any], int]) -> None:
        turns, images, self.num_new_images = state
        self.turns, self.shown.images = list(turns), list(images)

    def add_image(self, file: str) -> None:
        self.shown.add_image(file)
        self.num_new_images += 1

    def add_user_message(self, line: str) -> None:
        self.turns.append(ImageTurn("user", line, self.num_new_images))
        self.num_new_images = 0

    def add_reply(self, reply: str) -> None:
        self.turns.append(ImageTurn("assistant", reply))

    def prompt_tokens(self, room: int, log: LogFn) -> list[int]:
        """The prompt. If it is longer than `room`, the oldest question is dropped with its images and its answer.
        UsageError where the last message alone is too long."""
        first = 0 if self.system is None else 1
        while len(tokens := self.shown.chat.encode_turns(self.turns, self.shown.image_lengths)) > room:
            if len(self.turns) - first < 3:
                return require_room(tokens, room)
            del self.shown.images[: self.turns[first].num_images]
            del self.turns[first : first + 2]
            log("(the oldest question and answer no longer fit in the context and are dropped)")
        return tokens


class PlainImageConversation:
    """A conversation in the layout of the rows of quest train vlm: images, then questions and answers."""

    system: str | None = None

    def __init__(self, shown: ImagePrompt):
        self.shown, self.first_images = shown, list(shown.images)
        self.reset()

    def reset(self) -> None:
        self.shown.images = list(self.first_images)
        self.tokens = self.shown.chat.encode_images(self.shown.image_lengths)

    def set_system(self, text: str) -> None:
        raise UsageError("a system message has no effect without a chat template that has images")

    def snapshot(self) -> tuple[list[int], list[Any]]:
        return list(self.tokens), list(self.shown.images)

    def restore(self, state: tuple[list[int], list[Any]]) -> None:
        tokens, images = state
        self.tokens, self.shown.images = list(tokens), list(images)

    def add_image(self, file: str) -> None:
        self.shown.add_image(file)
        self.tokens += self.shown.chat.encode_images(self.shown.image_lengths[-1:])[1:]

    def add_user_message(self, line: str) -> None:
        self.tokens += self.shown.tokenizer.encode(line, add_special_tokens=False)

    def add_reply(self, reply: str) -> None:
        tokenizer = self.shown.tokenizer
        self.tokens += [*tokenizer.encode_continuation(reply), tokenizer.eos_token_id]

    def prompt_tokens(self, room: int, log: LogFn) -> list[int]:
        return require_room(list(self.tokens), room)


def require_room(tokens: list[int], room: int) -> list[int]:
    """The prompt. UsageError for one that is too long."""
    if len(tokens) > room:
        raise UsageError(f"this conversation has {len(tokens)} tokens and there is room for {room}; /reset ends it")
    return tokens
