"""POST /v1/embeddings: each text is read alone, in the engine's thread between two steps, so that its vector is the
same whatever else the server does."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field, StrictInt, StrictStr
from torch import Tensor

from llm_quest.hub.pooling import Pooling
from llm_quest.scope import Scope
from llm_quest.serve.engine import ServingEngine
from llm_quest.serve.errors import ApiError
from llm_quest.serve.protocol import Part, TokenIds
from llm_quest.serve.service import ServedModel, check_length

MAX_TEXTS_OF_A_BODY = 2048
"""OpenAI's limit; clients that read documents send hundreds at a time."""


class EmbeddingsBody(Part):
    """POST /v1/embeddings."""

    model: StrictStr | None = None
    input: (
        StrictStr
        | TokenIds
        | Annotated[list[StrictStr], Field(min_length=1, max_length=MAX_TEXTS_OF_A_BODY)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_TEXTS_OF_A_BODY)]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None


def read_inputs(served: ServedModel, body: EmbeddingsBody) -> list[list[int]]:
    """The ids of each text. ApiError 404 for a model that makes no embeddings, 400 for what cannot be read."""
    if served.pooling is None:
        message = (
            f"{served.name} makes no embeddings: its folder names no pooling by the last token or the mean "
            "(modules.json, 1_Pooling/config.json)"
        )
        raise ApiError(404, message, code="not_supported")
    require_dimensions(served.pooling, body.dimensions, int(served.batch.model.config.hidden_size))
    given: Any = body.input
    texts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
    ids = [served.tokenizer.encode(text) if isinstance(text, str) else list(text) for text in texts]
    for number, one in enumerate(ids):
        param = "input" if len(ids) == 1 else f"input.{number}"
        check_length(served, one, 0, True, param)
        limit = served.pooling.max_tokens
        if limit is not None and len(one) > limit:
            message = f"this model's embeddings read at most {limit} tokens; the text has {len(one)}: shorten it"
            raise ApiError(400, message, param=param, code="context_length_exceeded")
    return ids


def require_dimensions(pooling: Pooling, dimensions: int | None, width: int) -> None:
    """ApiError 400 for a number of dimensions that the model was not trained for."""
    if dimensions is None or pooling.allows(dimensions, width):
        return
    if pooling.shorter:
        others = "any fewer" if pooling.shorter == "any" else ", ".join(map(str, pooling.shorter))
        message = f"this model's vectors have {width}, or {others}"
    else:
        message = f"this model's vectors have {width}; its config.json names no matryoshka_dimensions"
    raise ApiError(400, f"dimensions is {dimensions}: {message}", param="dimensions")


def embed_text(
    served: ServedModel, pooling: Pooling, ids: Sequence[int], dimensions: int | None
) -> Float[Tensor, " d"]:
    """The embedding of one text, its first so many dimensions."""
    batch = served.batch
    with torch.inference_mode():
        tokens = torch.tensor([ids], device=batch.device)
        return pooling(batch.model.hidden_states(tokens, Scope.unpadded(tokens))[0], dimensions).cpu()


async def answer_embeddings(
    served: ServedModel, body: EmbeddingsBody, texts: Sequence[Sequence[int]], engine: ServingEngine
) -> dict[str, Any]:
    """The answer in OpenAI's form. One text at a time is in the engine's queue."""
    pooling, arrival = served.pooling, time.monotonic()
    assert pooling is not None, "read_inputs has refused such a model"
    jobs = (partial(embed_text, served, pooling, ids, body.dimensions) for ids in texts)
    vectors = [await asyncio.wrap_future(engine.call(job)) for job in jobs]
    data = [
        {"object": "embedding", "index": number, "embedding": encode_vector(vector, body.encoding_format)}
        for number, vector in enumerate(vectors)
    ]
    read = sum(map(len, texts))
    engine.call(partial(served.batch.metrics.count_read, read, arrival))
    usage = {"prompt_tokens": read, "total_tokens": read}
    return {"object": "list", "data": data, "model": served.name, "usage": usage}


def encode_vector(vector: Float[Tensor, " D"], form: str) -> list[float] | str:
    """Numbers, or the base64 of their float32, little endian."""
    if form == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
