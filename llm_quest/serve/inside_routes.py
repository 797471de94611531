"""The inside view of `quest serve --inside`: a page and the numbers that it shows, of the last finished texts."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from importlib import resources
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from llm_quest.errors import QuestError
from llm_quest.generation.speculative.drafters import MAX_DRAFT_TOKENS
from llm_quest.serve.answers import AnswerWriter, spell
from llm_quest.serve.engine import ServingEngine
from llm_quest.serve.errors import ApiError
from llm_quest.serve.inside import TextInside, TokenView, WrittenText, attention_heads
from llm_quest.serve.inside_drafts import DraftCycle, DraftReplay
from llm_quest.serve.service import ServedModel

MAX_TEXTS = 64
MAX_ALTERNATIVES = 20
PAGE_FILES = {"/inside": ("page.html", "text/html"), "/inside/page.js": ("page.js", "text/javascript"),
              "/inside/page.css": ("page.css", "text/css")}  # fmt: skip
"""Path -> file of this package and its type. They hold no data, and need no key."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Found = TypeVar("Found")


class InsideViews:
    """The last texts that were finished, and views of them. Their passes run in the engine's thread, between two
    steps; activations are not kept."""

    def __init__(self, engine: ServingEngine):
        self.engine = engine
        self.texts: OrderedDict[tuple[str, int], tuple[ServedModel, WrittenText]] = OrderedDict()

    def keep(self, answer: AnswerWriter) -> None:
        """Remember the texts of a finished answer; the oldest go. Those about images are left out: their passes would
        need the images again."""
        for request in (one for one in answer.requests if not one.images):
            first = answer.first_choice(request)
            for copy, choice in enumerate(answer.choices[first : first + request.n]):
                if not choice.token_ids:
                    continue
                text = WrittenText(
                    answer.id, choice.index, (*request.prompt, *choice.token_ids), len(request.prompt),
                    request.sampling_params, request.stopping_criteria, request.make_grammar, request.seed, copy,
                )  # fmt: skip
                self.texts[answer.id, choice.index] = (answer.served, text)
        while len(self.texts) > MAX_TEXTS:
            self.texts.popitem(last=False)

    def routes(self) -> list[Route]:
        text = "/inside/texts/{id}/{choice:int}"
        return [
            *(Route(path, self.page) for path in PAGE_FILES),
            Route("/inside/texts", self.list_texts),
            Route(text, self.tokens),
            Route(f"{text}/attention", self.attention),
            Route(f"{text}/lens", self.lens),
            Route(f"{text}/routing", self.routing),
            Route(f"{text}/drafts", self.drafts),
        ]

    async def page(self, request: Request) -> Response:
        name, media = PAGE_FILES[request.url.path]
        content = resources.files("llm_quest.serve").joinpath(name).read_text(encoding="utf-8")
        return Response(content, media_type=media, headers={"content-security-policy": PAGE_POLICY})

    async def list_texts(self, request: Request) -> Response:
        """Newest first."""
        texts = [
            {"id": id, "choice": choice, "model": served.name, "tokens": len(text.token_ids) - text.prompt_length}
            for (id, choice), (served, text) in reversed(self.texts.items())
        ]
        return JSONResponse({"texts": texts})

    async def tokens(self, request: Request) -> Response:
        served, text = self.find(request)
        count = read_number(request, "top", 5, 1, MAX_ALTERNATIVES)
        views = await self.compute(lambda: TextInside(served.batch.model, text).tokens(count))
        model = served.batch.model
        return JSONResponse(
            {
                "prompt": [spell(served, token) for token in text.token_ids[: text.prompt_length]],
                "tokens": [describe_token(served, view) for view in views],
                "heads": attention_heads(model),
                "layers": len(model.blocks),
                "has_draft": served.draft is not None,
            }
        )

    async def attention(self, request: Request) -> Response:
        """Rows of float16, little endian; the shape is in a header."""
        served, text = self.find(request)
        layer, head = (read_number(request, name, 0, 0, 10**6) for name in ("layer", "head"))
        weights = await self.compute(lambda: TextInside(served.batch.model, text).attention(layer, head))
        raw = weights.half().cpu().numpy().astype("<f2").tobytes()
        shape = ",".join(map(str, weights.shape))
        return Response(raw, media_type="application/octet-stream", headers={"x-shape": shape})

    async def lens(self, request: Request) -> Response:
        served, text = self.find(request)
        count = read_number(request, "top", 3, 1, MAX_ALTERNATIVES)
        views = await self.compute(lambda: TextInside(served.batch.model, text).lens(count))
        layers = [[[{"token": spell(served, token), "p": p} for token, p in row] for row in layer] for layer in views]
        return JSONResponse({"layers": layers})

    async def routing(self, request: Request) -> Response:
        served, text = self.find(request)
        weights = await self.compute(lambda: TextInside(served.batch.model, text).routing())
        layers = [[[{"expert": one, "weight": w} for one, w in row] for row in layer] for layer in weights]
        return JSONResponse({"layers": layers})

    async def drafts(self, request: Request) -> Response:
        """What the server's draft proposes along the text. Each cycle runs between two steps of its own, for there may
        be as many as tokens."""
        served, text = self.find(request)
        if (draft := served.draft) is None:
            raise ApiError(400, "this server has no draft: start it with --draft MODEL, mtp or ngram")
        length = read_number(request, "length", 4, 1, MAX_DRAFT_TOKENS)
        replay = await self.compute(lambda: DraftReplay(TextInside(served.batch.model, text), draft, length))
        cycles: list[DraftCycle] = []
        while not replay.is_finished:
            cycles.append(await self.compute(replay.run_cycle))
        return JSONResponse({"cycles": [describe_cycle(served, cycle) for cycle in cycles]})

    def find(self, request: Request) -> tuple[ServedModel, WrittenText]:
        key = (request.path_params["id"], request.path_params["choice"])
        if key not in self.texts:
            raise ApiError(404, f"there is no such text here; the last {MAX_TEXTS} are kept", code="text_not_found")
        return self.texts[key]

    async def compute(self, job: Callable[[], Found]) -> Found:
        """The result of a pass in the engine's thread. ApiError 400 for what the model does not have."""
        try:
            return await asyncio.wrap_future(self.engine.call(job))
        except QuestError as error:
            raise ApiError(400, str(error)) from None


def read_number(request: Request, name: str, default: int, low: int, high: int) -> int:
    """A number of the query. ApiError 400 for anything else."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 8 and low <= int(text) <= high):
        raise ApiError(400, f"{name} is {text[:40]!r}: give a number from {low} to {high}", param=name)
    return int(text)


def describe_cycle(served: ServedModel, cycle: DraftCycle) -> dict[str, Any]:
    """A cycle with the texts of its tokens."""
    proposals = [asdict(proposal) | {"text": spell(served, proposal.token)} for proposal in cycle.proposals]
    return {"place": cycle.place, "num_taken": cycle.num_taken, "proposals": proposals}


def describe_token(served: ServedModel, view: TokenView) -> dict[str, Any]:
    """A view with the texts of its tokens."""
    description = view.as_json() | {"text": spell(served, view.token)}
    description["alternatives"] = [
        {
            "token": alternative.token,
            "text": spell(served, alternative.token),
            "probabilities": alternative.probabilities,
        }
        for alternative in view.alternatives
    ]
    return description
