"""Synthetic scenes of shapes with captions and questions whose answers are known, so that vision can be scored exactly.

A scene shows two groups, each so many of one color and shape, one beside or above the other, never both at once:

      two red circles left of one blue square           how many circles? two
                                                        what colour are the squares? blue
                                                        where are the blue things? right

A question names a group by its color, by its shape or by both, as the scene's key decides, and always so that one
group is meant. Commonly got wrong: where every question names the color, 92 of 100 are answered by looking for it
alone, and a small model hardly ever learns to look for a shape.

Scene i of a seed is a pure function of (seed, i). What is held out is *combinations* (both groups and their relation),
chosen by their hash: no held-out combination is ever trained on, under any seed, and every word of it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from PIL import Image, ImageDraw

from llm_quest.errors import UsageError

COUNT_WORDS = ("one", "two", "three", "four")
COLORS = {
    "red": (220, 50, 50),
    "green": (60, 180, 70),
    "blue": (60, 90, 230),
    "yellow": (235, 215, 60),
    "purple": (160, 60, 200),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = {"left of": ("left", "right"), "above": ("above", "below")}
SUPERSAMPLING = 4  # drawn so many times larger, then reduced: soft edges
BACKGROUND_COLOR = (18, 18, 24)
SCENE_STATISTICS = {"mean": tuple(part / 255 for part in BACKGROUND_COLOR), "std": (0.25, 0.25, 0.25)}
"""How a model of its own is shown scenes: where there is nothing it sees 0."""


@dataclass(frozen=True)
class ShapeGroup:
    """A number of shapes of one color and kind."""

    count: int
    color: str
    shape: str

    @property
    def phrase(self) -> str:
        return f"{COUNT_WORDS[self.count - 1]} {self.color} {self.shape if self.count == 1 else self.plural}"

    def distinguishing_names(self, other: ShapeGroup) -> list[str]:
        """Names that mean this group and not the other."""
        names = [f"{self.color} {self.plural}"]
        names += [f"{self.color} things"] if self.color != other.color else []
        return names + ([self.plural] if self.shape != other.shape else [])

    @property
    def plural(self) -> str:
        """The plural of the shape."""
        return self.shape + ("es" if self.shape.endswith("s") else "s")


@dataclass(frozen=True)
class QuestionAnswer:
    """A question and its only right answer. kind: caption, count, color or relation."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """Two groups: first `relation` second. key: what identifies the picture (where exactly the shapes are is not
    part of the text)."""

    first: ShapeGroup
    second: ShapeGroup
    relation: str
    key: int = 0

    @property
    def caption(self) -> str:
        return f"{self.first.phrase} {self.relation} {self.second.phrase}"

    @property
    def is_held_out(self) -> bool:
        """Whether its combination is held out; about one in five is."""
        return hashlib.sha256(self.caption.encode()).digest()[0] < 51

    @property
    def question_answers(self) -> list[QuestionAnswer]:
        """The caption and every question that has one answer. The color is asked by the shape alone, so only where
        the shapes differ."""
        groups = (self.first, self.second)
        pairs = [QuestionAnswer("caption", "describe:", self.caption)]
        pairs += [
            QuestionAnswer("count", f"how many {self.name_of(group)}?", COUNT_WORDS[group.count - 1])
            for group in groups
        ]
        if self.first.shape != self.second.shape:
            pairs += [QuestionAnswer("color", f"what colour are the {group.plural}?", group.color) for group in groups]
        sides = zip(groups, RELATIONS[self.relation], strict=True)
        return pairs + [
            QuestionAnswer("relation", f"where are the {self.name_of(group)}?", side) for group, side in sides
        ]

    def name_of(self, group: ShapeGroup) -> str:
        """The name of this group in the questions."""
        names = group.distinguishing_names(self.second if group is self.first else self.first)
        return names[self.key % len(names)]

    def render(self, size: int) -> Image.Image:
        """The picture, size x size pixels."""
        random = np.random.Generator(np.random.Philox(key=self.key))
        image = Image.new("RGB", (size * SUPERSAMPLING, size * SUPERSAMPLING), BACKGROUND_COLOR)
        brush = ImageDraw.Draw(image)
        for group, lying in zip((self.first, self.second), sample_layout(random, self), strict=True):
            for x, y, radius in lying:
                draw_shape(
                    brush, group, x * size * SUPERSAMPLING, y * size * SUPERSAMPLING, radius * size * SUPERSAMPLING
                )
        return image.reduce(SUPERSAMPLING)


ShapePosition = tuple[float, float, float]


def sample_layout(random: np.random.Generator, scene: Scene) -> list[list[ShapePosition]]:
    """Positions of the shapes of both groups, sampled until the groups are apart in one direction only.

    Commonly got wrong: what is left of *and* above the other has two true captions, and one counts as a mistake
    (that was 8 % of these scenes)."""
    other = 1 if scene.relation == "left of" else 0
    while True:
        drawn = [
            sample_shape_positions(random, group.count, half, scene.relation)
            for half, group in enumerate((scene.first, scene.second))
        ]
        if not are_separated(*drawn, axis=other):
            return drawn


def are_separated(first: Sequence[ShapePosition], second: Sequence[ShapePosition], *, axis: int) -> bool:
    """Whether one group ends before the other begins. axis: 0 across, 1 down."""
    begin = [min(place[axis] - place[2] for place in group) for group in (first, second)]
    end = [max(place[axis] + place[2] for place in group) for group in (first, second)]
    return end[0] < begin[1] or end[1] < begin[0]


def sample_shape_positions(random: np.random.Generator, number: int, half: int, relation: str) -> list[ShapePosition]:
    """(across, down, radius) as fractions of the picture: distinct cells of 2 x 4 in the group's half, each
    jittered."""
    cells = random.choice(8, size=number, replace=False)
    positions = []
    for cell in cells:
        along, beside = (cell % 4 + 0.5) / 4, half / 2 + (cell // 4 + 0.5) / 4
        shake = random.uniform(-0.012, 0.012, 2)
        radius = random.uniform(0.09, 0.11)
        x, y = (beside, along) if relation == "left of" else (along, beside)
        positions.append((x + shake[0], y + shake[1], radius))
    return positions


def draw_shape(brush: ImageDraw.ImageDraw, group: ShapeGroup, x: float, y: float, r: float) -> None:
    """One shape of about radius r around (x, y)."""
    color = COLORS[group.color]
    if group.shape == "circle":
        brush.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif group.shape == "square":
        brush.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=color)
    elif group.shape == "triangle":
        brush.polygon(((x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)), fill=color)
    else:
        brush.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=color)
        brush.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=color)


def generate_scene(seed: int, index: int) -> Scene:
    """Scene `index` of a seed, held out or not."""
    key = int.from_bytes(hashlib.sha256(f"scene/{seed}/{index}".encode()).digest()[:16], "big")
    random = np.random.Generator(np.random.Philox(key=key))
    numbers = random.integers(1, len(COUNT_WORDS) + 1, 2)
    kinds = random.choice(len(COLORS) * len(SHAPES), size=2, replace=False)
    groups = [
        ShapeGroup(int(number), list(COLORS)[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)])
        for number, kind in zip(numbers, kinds, strict=True)
    ]
    return Scene(groups[0], groups[1], list(RELATIONS)[int(random.integers(2))], key ^ 1)


def split_scene(seed: int, index: int, *, held_out: bool = False) -> Scene:
    """Scene `index` of one side of the split: the first of a sequence of scenes that is on that side."""
    for attempt in count():
        drawn = generate_scene(seed, index * 2**20 + attempt)
        if drawn.is_held_out == held_out:
            return drawn
    raise AssertionError("one in five tries is held out")


def exact_match(answer: str, question_answer: QuestionAnswer) -> float:
    """1 for the right answer, word for word, apart from spaces around it."""
    return float(answer.strip() == question_answer.answer)


def render_scenes(scenes: Sequence[Scene], size: int) -> np.ndarray:
    """uint8 (N,3,size,size)."""
    if size < 16:
        raise UsageError(f"scenes of {size} pixels show nothing: give at least 16")
    return np.stack([np.asarray(each.render(size)).transpose(2, 0, 1) for each in scenes])
