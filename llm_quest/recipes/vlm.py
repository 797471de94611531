"""`quest train vlm`: images with words -> an image encoder, an adapter and a Llama -> captions and answers.

Held-out sights (of scenes: combinations never trained on) are asked about one question at a time; an answer counts if
it is right word for word."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_quest.data.images import CLIP_STATISTICS, Preprocess
from llm_quest.data.scenes import STATISTICS, Turn, score
from llm_quest.data.sights import Captions, Scenes, SightFeed, Sights, Writer
from llm_quest.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_bpe
from llm_quest.errors import DataError, UsageError
from llm_quest.generation.generate import generate
from llm_quest.hub.files import load, load_preprocess, load_tokenizer
from llm_quest.layers.rotary import Rotary
from llm_quest.models import clip, llama
from llm_quest.models.build import build
from llm_quest.models.fusion import VisionLanguage
from llm_quest.models.generation import GenerationDefaults
from llm_quest.models.image_encoder import ImageEncoder
from llm_quest.models.vision_language import Config
from llm_quest.objectives.captioning import Captioning
from llm_quest.recipes.course import Outcome, company
from llm_quest.recipes.probes import keep_samples
from llm_quest.recipes.vision import Job, Say, carried_out
from llm_quest.recipes.vision_config import Vlm
from llm_quest.recipes.yaml import Settings
from llm_quest.train.parallel import Parallel
from llm_quest.train.state import derive_seed

PLACEHOLDER = "<image>"
AT_ONCE = 64
BY_ADAMW = ("tower.embed.positions", "decoder.embed.", "decoder.head.")


def train_vlm(
    config: Vlm, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder. Every process of a torchrun calls this."""
    with company(config, config.batch.rows) as parallel:
        tell = say if parallel.leader else lambda text: None
        job = assembled(config, parallel, tell, out / "samples" if parallel.leader else None)
        return carried_out(job, config, out, resume, env or {}, quiet, tell, parallel)


def assembled(config: Vlm, parallel: Parallel, say: Say, samples: Path | None = None) -> Job:
    """Data, tokenizer, model, objective and feed. samples: where some answers are kept."""
    preprocess = statistics(config)
    sights = read_sights(config, preprocess)
    tokenizer = words(config, sights)
    model = first_model(config, tokenizer, preprocess).train_only(config.trained)
    model.generation = GenerationDefaults(tokenizer.bos_id, tuple(tokenizer.eos_ids), tokenizer.pad_id)
    numbers = model.config
    say(
        f"an image is {numbers.image_tokens} of the {config.batch.length} tokens of a row; "
        f"{', '.join(config.trained)} trained"
    )
    writer = Writer(tokenizer, numbers.image_token, numbers.image_tokens, config.batch.length)
    feed = SightFeed(
        sights,
        writer,
        preprocess,
        rows=config.batch.rows,
        micro_rows=min(config.batch.micro_rows or config.batch.rows, config.batch.rows // parallel.world),
        seed=derive_seed(config.seed, "order"),
        turns=config.batch.turns,
        captions=config.batch.captions,
        share=parallel.share,
    )
    probe = Answering(sights, writer, preprocess, config.evaluate.sights, config.evaluate.every, samples)
    identity = {"sights": sights.hash, "tokenizer": tokenizer.hash}
    facts = {"corpus": {"name": config.sights.file or config.sights.source}}
    slower = (config.batch.captions, config.questions_rate)
    return Job(Captioning(model), feed, probe, preprocess, identity, facts, BY_ADAMW, tokenizer, slower)


def statistics(config: Vlm) -> Preprocess:
    """How images are made: as the loaded model or tower wants them; scenes so that nothing is 0; others scaled to
    -1..1."""
    for where in (config.load, config.tower.load):
        if where is not None:
            try:
                return load_preprocess(where)
            except DataError:
                size = load_config(where).image
                return Preprocess(size, **CLIP_STATISTICS) if config.load else Preprocess(size)  # type: ignore[arg-type]
    told: dict[str, Any] = STATISTICS if config.sights.source == "scenes" else {}
    return Preprocess(config.sights.size, **told)


def load_config(where: str) -> Any:
    """The vision part's numbers of a model that does not say how its images are made."""
    config = load(where, device="meta").config
    return config.vision if isinstance(config, Config) else config


def read_sights(config: Vlm, preprocess: Preprocess) -> Sights:
    if config.sights.source == "scenes":
        return Scenes(preprocess.size)
    assert config.sights.file is not None, "the config asks for a file with this source"
    return Captions(config.sights.file, preprocess, config.sights.held_out)


def words(config: Vlm, sights: Sights) -> Tokenizer:
    """The loaded model's tokenizer, or one trained on the training text, with a placeholder among its control
    tokens."""
    where = config.load or config.decoder.load
    if where is None:
        return train_bpe(sights.texts(), config.decoder.vocab, (*SPECIAL_TOKENS, PLACEHOLDER))
    tokenizer = load_tokenizer(where)
    if PLACEHOLDER not in tokenizer.special_tokens:
        tokenizer.engine.add_special_tokens([PLACEHOLDER])
        tokenizer = Tokenizer(
            tokenizer.engine,
            ends=tokenizer.names["eos_token"] or (),
            begin=tokenizer.names["bos_token"],  # type: ignore[arg-type]
            pad=tokenizer.names["pad_token"],  # type: ignore[arg-type]
            chat_template=tokenizer.chat_template,
        )
    return tokenizer


def first_model(config: Vlm, tokenizer: Tokenizer, preprocess: Preprocess) -> VisionLanguage:
    """Loaded whole; or put together from parts, each loaded or built with first values."""
    if config.load is not None:
        loaded: Any = load(config.load, dtype="float32", aligned=True)
        if not isinstance(loaded, VisionLanguage):
            raise UsageError(
                f"load={config.load} is no vision-language model; set tower.load or decoder.load to begin with a part"
            )
        return loaded
    tower = load(config.tower.load, dtype="float32", aligned=True) if config.tower.load else None
    decoder = load(config.decoder.load, dtype="float32", aligned=True) if config.decoder.load else None
    vision = tower.config if tower is not None else new_tower(config, preprocess)
    text = decoder.config if decoder is not None else new_decoder(config, tokenizer)
    if tokenizer.vocab_size > text.vocab:
        text = replace(text, vocab=tokenizer.vocab_size)
    depth = config.tower.depth or vision.layers
    numbers = Config(
        vision, text, tokenizer.id(PLACEHOLDER), depth, config.adapter == "mlp", keep_class=config.tower.keep_class
    )
    seed = derive_seed(config.seed, "init")
    model: Any = build(numbers, seed=seed)
    if tower is not None:
        put(model.tower, tower)
    else:
        place(model.tower, seed)
    if decoder is not None:
        put(model.decoder, decoder)
    return model


def new_tower(config: Vlm, preprocess: Preprocess) -> clip.Config:
    part, size = config.tower, preprocess.size
    return clip.Config(size, part.patch, len(preprocess.mean), part.width, part.layers, part.heads, part.hidden)


def new_decoder(config: Vlm, tokenizer: Tokenizer) -> llama.Config:
    part = config.decoder
    head = part.width // part.heads
    rotary = Rotary(head, 10_000.0)
    return llama.Config(
        tokenizer.vocab_size,
        part.width,
        part.layers,
        part.heads,
        part.heads,
        head,
        part.hidden,
        config.batch.length,
        rotary,
        tied=True,
    )


@torch.no_grad()
def place(tower: ImageEncoder, seed: int) -> None:
    """Positions N(0,1), as large as what the first norm makes of a patch. Commonly got wrong: at CLIP's 0.02, right for
    its millions of steps, a tower from scratch sees for thousands of steps what there is but not where."""
    nn.init.normal_(tower.embed.positions, generator=torch.Generator().manual_seed(seed + 1))  # type: ignore[arg-type]


@torch.no_grad()
def put(part: nn.Module, trained: nn.Module) -> None:
    """A trained model's numbers into a part; a vocabulary that has grown keeps its new rows, a classifier's head stays
    behind."""
    theirs = dict(trained.named_parameters())
    for name, parameter in part.named_parameters():
        rows = theirs[name].shape[0] if parameter.dim() else 1
        (parameter[:rows] if parameter.dim() else parameter).copy_(theirs[name])


@dataclass(frozen=True)
class Answering:
    """Exact match on held-out sights: the share of answers that are right word for word, by kind of question. The
    answers about the first sight are kept in `samples`, if that is a folder."""

    sights: Sights
    writer: Writer
    preprocess: Preprocess
    number: int
    every: int
    samples: Path | None = None
    name: str = "eval"

    def measure(self, model: VisionLanguage, step: int) -> Mapping[str, float]:
        asked = [(sight, turn) for sight in map(self.sights.held_out, range(self.number)) for turn in sight.turns]
        parts = [asked[first : first + AT_ONCE] for first in range(0, len(asked), AT_ONCE)]
        said = [answer for part in parts for answer in self.answers(model, part)]
        right: dict[str, list[float]] = defaultdict(list)
        for answer, (_, turn) in zip(said, asked, strict=True):
            right[turn.kind].append(score(answer, turn))
        if self.samples is not None:
            first = asked[: len(asked[0][0].turns)]
            told = [
                {"prompt": turn.question, "text": f" {answer}", "wanted": turn.answer}
                for (_, turn), answer in zip(first, said[: len(first)], strict=True)
            ]
            keep_samples(self.samples, step, told)
        return {kind: sum(marks) / len(marks) for kind, marks in sorted(right.items())}

    def answers(self, model: VisionLanguage, asked: list[tuple[Any, Turn]]) -> list[str]:
        """What the model says, greedily."""
        prompts = [self.writer.prompt(turn.question) for _, turn in asked]
        images = [self.preprocess.normalized(sight.pixels[None]) for sight, _ in asked]
        longest = max(len(self.writer.tokenizer.encode(turn.answer)) for _, turn in asked) + 4
        room = model.config.context - max(map(len, prompts))
        if room < 1:
            raise UsageError("a question leaves no room for its answer: set a larger batch.length")
        said = generate(
            model.looking(images),  # type: ignore[arg-type]
            prompts,
            max_new_tokens=min(longest, room),
            temperature=0.0,
            eos=self.writer.tokenizer.eos_ids,
        )
        ends = set(self.writer.tokenizer.eos_ids)
        return [self.writer.tokenizer.decode([token for token in one.tokens if token not in ends]) for one in said]
