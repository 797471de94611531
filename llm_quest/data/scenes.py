"""Scenes of shapes, drawn, with captions and questions whose answers are known: sight that can be scored exactly.

A scene shows two groups, each so many of one colour and shape, one beside or above the other, never both at once:

      two red circles left of one blue square           how many circles? two
                                                        what colour are the squares? blue
                                                        where are the blue things? right

A question names a group by its colour, by its shape or by both, as the scene's key decides, and always so that one
group is meant. Commonly got wrong: where every question names the colour, 92 of 100 are answered by looking for it
alone, and a small model hardly ever learns to look for a shape.

Scene number i of a seed is a pure function of (seed, i). What is held out is *combinations* (both groups and how they
stand), chosen by their hash: no held-out combination is ever trained on, under any seed, and every word of it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
from PIL import Image, ImageDraw

from llm_quest.errors import UsageError

NUMBERS = ("one", "two", "three", "four")
COLOURS = {
    "red": (220, 50, 50),
    "green": (60, 180, 70),
    "blue": (60, 90, 230),
    "yellow": (235, 215, 60),
    "purple": (160, 60, 200),
}
SHAPES = ("circle", "square", "triangle", "cross")
RELATIONS = {"left of": ("left", "right"), "above": ("above", "below")}
FINER = 4  # drawn so many times larger, then reduced: soft edges
BACKGROUND = (18, 18, 24)
STATISTICS = {"mean": tuple(part / 255 for part in BACKGROUND), "std": (0.25, 0.25, 0.25)}
"""How a model of its own is shown scenes: where there is nothing it sees 0."""


@dataclass(frozen=True)
class Group:
    """So many of one colour and shape."""

    number: int
    colour: str
    shape: str

    @property
    def words(self) -> str:
        return f"{NUMBERS[self.number - 1]} {self.colour} {self.shape if self.number == 1 else self.shapes}"

    def told_from(self, other: Group) -> list[str]:
        """Names, many times, that mean this group and not the other."""
        names = [f"{self.colour} {self.shapes}"]
        names += [f"{self.colour} things"] if self.colour != other.colour else []
        return names + ([self.shapes] if self.shape != other.shape else [])

    @property
    def shapes(self) -> str:
        """The shape, many times."""
        return self.shape + ("es" if self.shape.endswith("s") else "s")


@dataclass(frozen=True)
class Turn:
    """A question and its only right answer. kind: caption, count, colour or relation."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """first stands `relation` second. key: what makes it the picture it is (where exactly things lie does not show in
    the words)."""

    first: Group
    second: Group
    relation: str
    key: int = 0

    @property
    def caption(self) -> str:
        return f"{self.first.words} {self.relation} {self.second.words}"

    @property
    def held_out(self) -> bool:
        """Does its combination belong to those that are never trained on? About one in five does."""
        return hashlib.sha256(self.caption.encode()).digest()[0] < 51

    @property
    def turns(self) -> list[Turn]:
        """The caption and every question that has one answer. A colour is asked for by its shape alone, so only where
        the shapes differ."""
        groups = (self.first, self.second)
        asked = [Turn("caption", "describe:", self.caption)]
        asked += [Turn("count", f"how many {self.name(group)}?", NUMBERS[group.number - 1]) for group in groups]
        if self.first.shape != self.second.shape:
            asked += [Turn("colour", f"what colour are the {group.shapes}?", group.colour) for group in groups]
        sides = zip(groups, RELATIONS[self.relation], strict=True)
        return asked + [Turn("relation", f"where are the {self.name(group)}?", side) for group, side in sides]

    def name(self, group: Group) -> str:
        """What the questions call this group."""
        names = group.told_from(self.second if group is self.first else self.first)
        return names[self.key % len(names)]

    def draw(self, size: int) -> Image.Image:
        """The picture, size x size pixels."""
        random = np.random.Generator(np.random.Philox(key=self.key))
        image = Image.new("RGB", (size * FINER, size * FINER), BACKGROUND)
        brush = ImageDraw.Draw(image)
        for group, lying in zip((self.first, self.second), layout(random, self), strict=True):
            for x, y, radius in lying:
                draw(brush, group, x * size * FINER, y * size * FINER, radius * size * FINER)
        return image.reduce(FINER)


Place = tuple[float, float, float]


def layout(random: np.random.Generator, scene: Scene) -> list[list[Place]]:
    """Where the things of both groups lie, drawn again until the groups are apart in one direction only.

    Commonly got wrong: what lies left of *and* above the other has two true captions, and one counts as a mistake (that
    was 8 % of these scenes)."""
    other = 1 if scene.relation == "left of" else 0
    while True:
        drawn = [
            places(random, group.number, half, scene.relation) for half, group in enumerate((scene.first, scene.second))
        ]
        if not apart(*drawn, axis=other):
            return drawn


def apart(first: Sequence[Place], second: Sequence[Place], *, axis: int) -> bool:
    """Does one group end before the other begins? axis: 0 across, 1 down."""
    begin = [min(place[axis] - place[2] for place in group) for group in (first, second)]
    end = [max(place[axis] + place[2] for place in group) for group in (first, second)]
    return end[0] < begin[1] or end[1] < begin[0]


def places(random: np.random.Generator, number: int, half: int, relation: str) -> list[Place]:
    """(across, down, radius) in parts of the picture: distinct cells of 2 x 4 in the group's half, each jittered."""
    cells = random.choice(8, size=number, replace=False)
    found = []
    for cell in cells:
        along, beside = (cell % 4 + 0.5) / 4, half / 2 + (cell // 4 + 0.5) / 4
        shake = random.uniform(-0.012, 0.012, 2)
        radius = random.uniform(0.09, 0.11)
        x, y = (beside, along) if relation == "left of" else (along, beside)
        found.append((x + shake[0], y + shake[1], radius))
    return found


def draw(brush: ImageDraw.ImageDraw, group: Group, x: float, y: float, r: float) -> None:
    """One shape of about radius r around (x, y)."""
    colour = COLOURS[group.colour]
    if group.shape == "circle":
        brush.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    elif group.shape == "square":
        brush.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), fill=colour)
    elif group.shape == "triangle":
        brush.polygon(((x, y - r), (x - r, y + 0.85 * r), (x + r, y + 0.85 * r)), fill=colour)
    else:
        brush.rectangle((x - r, y - 0.33 * r, x + r, y + 0.33 * r), fill=colour)
        brush.rectangle((x - 0.33 * r, y - r, x + 0.33 * r, y + r), fill=colour)


def any_scene(seed: int, index: int) -> Scene:
    """Scene number `index` of all that a seed draws, held out or not."""
    key = int.from_bytes(hashlib.sha256(f"scene/{seed}/{index}".encode()).digest()[:16], "big")
    random = np.random.Generator(np.random.Philox(key=key))
    numbers = random.integers(1, len(NUMBERS) + 1, 2)
    kinds = random.choice(len(COLOURS) * len(SHAPES), size=2, replace=False)
    groups = [
        Group(int(number), list(COLOURS)[kind // len(SHAPES)], SHAPES[kind % len(SHAPES)])
        for number, kind in zip(numbers, kinds, strict=True)
    ]
    return Scene(groups[0], groups[1], list(RELATIONS)[int(random.integers(2))], key ^ 1)


def scene(seed: int, index: int, *, held_out: bool = False) -> Scene:
    """Scene number `index` of one side of the split: the first of a row of tries that falls on that side."""
    for attempt in count():
        drawn = any_scene(seed, index * 2**20 + attempt)
        if drawn.held_out == held_out:
            return drawn
    raise AssertionError("one in five tries is held out")


def score(answer: str, turn: Turn) -> float:
    """1 for the right answer, word for word; spaces around it do not count."""
    return float(answer.strip() == turn.answer)


def pixels(scenes: Sequence[Scene], size: int) -> np.ndarray:
    """uint8 (N,3,size,size)."""
    if size < 16:
        raise UsageError(f"scenes of {size} pixels show nothing: give at least 16")
    return np.stack([np.asarray(each.draw(size)).transpose(2, 0, 1) for each in scenes])
