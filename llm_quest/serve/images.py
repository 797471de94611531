"""Images in a conversation: parts of OpenAI's type `image_url` become pixels, and placeholders in the prompt.

      {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBOR..."}}

The bytes are in the request: the server fetches no address, so that nobody can make it ask others."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np

from llm_quest.data.image_chat import ImageChat
from llm_quest.data.images import ImageProcessor, decode_image
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import DataError
from llm_quest.models.multimodal import ImagePromptModel, VisionLanguageModel
from llm_quest.serve.errors import ApiError

IMAGE_PARTS = ("image_url", "input_image", "image")
BODY_BYTES = 32 * 2**20
"""The largest body of a request to a server that reads images, unless another limit was given."""

Pixels = np.ndarray
"""uint8 (C,H,W): an image as the processor resizes it."""


@dataclass(frozen=True, eq=False)
class ImageReader:
    """Reads the images of requests for a model. preprocess: what its folder says of images."""

    model: VisionLanguageModel
    preprocess: ImageProcessor
    chat: ImageChat

    @classmethod
    def of(cls, model: VisionLanguageModel, preprocess: ImageProcessor, tokenizer: Tokenizer) -> ImageReader:
        return cls(model, preprocess, ImageChat(tokenizer, model.config))

    def read(self, url: Any, param: str) -> Pixels:
        """The image of a data URL. ApiError 400 for another address, and for what is no image."""
        try:
            return self.preprocess.resize_to_pixels(decode_image(BytesIO(data_of_url(url, param)), "the image"))
        except DataError as error:
            raise ApiError(400, str(error), param=param, code="invalid_image") from None

    def num_tokens(self, pixels: Pixels) -> int:
        """How many tokens of the prompt an image takes."""
        return self.model.config.num_image_tokens(*pixels.shape[1:])  # type: ignore[no-any-return]

    def prompt_model(self, images: Sequence[Pixels]) -> ImagePromptModel:
        """The decoder with the images of one prompt in view."""
        return self.model.with_images([[self.preprocess.normalize(image[None])[0] for image in images]])


def is_image(part: Mapping[str, Any]) -> bool:
    return part.get("type") in IMAGE_PARTS


def image_url(part: Mapping[str, Any]) -> Any:
    """The address in a part: {"image_url": {"url": ...}} of chat completions, or a text as in OpenAI's responses."""
    url = part.get("image_url", part.get("image"))
    return url.get("url") if isinstance(url, Mapping) else url


def data_of_url(url: Any, param: str) -> bytes:
    """The bytes of `data:image/...;base64,...`. ApiError 400 for another address."""
    if not isinstance(url, str) or not url[:5].lower() == "data:":
        raise ApiError(
            400,
            "an image is given as a data URL, data:image/png;base64,...: this server fetches no address",
            param=param,
            code="invalid_image_url",
        )
    head, comma, data = url[5:].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(400, "the data URL is not in base64", param=param, code="invalid_image_url")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(
            400, f"the data URL's base64 is not valid: {error}", param=param, code="invalid_base64"
        ) from None
