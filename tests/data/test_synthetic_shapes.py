"""Scenes: pure functions, a clean split of combinations, words that fit what is drawn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_quest.data.synthetic_shapes import (
    COLORS,
    COUNT_WORDS,
    SHAPES,
    Scene,
    ShapeGroup,
    are_separated,
    exact_match,
    render_scenes,
    sample_layout,
    split_scene,
)

indices = st.integers(0, 10_000)
SCENE = Scene(ShapeGroup(2, "red", "circle"), ShapeGroup(1, "blue", "square"), "left of", key=5)


def question_answers(key: int, scene: Scene = SCENE) -> list[tuple[str, str]]:
    return [(turn.question, turn.answer) for turn in replace(scene, key=key).question_answers]


def test_a_scene_in_words():
    """By color and shape, by color, by shape, as the key says."""
    assert SCENE.caption == "two red circles left of one blue square"
    both, colors, shapes = (question_answers(key) for key in (0, 1, 2))
    assert both == [
        ("describe:", "two red circles left of one blue square"),
        ("how many red circles?", "two"),
        ("how many blue squares?", "one"),
        ("what colour are the circles?", "red"),
        ("what colour are the squares?", "blue"),
        ("where are the red circles?", "left"),
        ("where are the blue squares?", "right"),
    ]
    assert colors == [
        (q.replace("red circles", "red things").replace("blue squares", "blue things"), a) for q, a in both
    ]
    assert shapes == [(q.replace("red circles", "circles").replace("blue squares", "squares"), a) for q, a in both]


def test_a_name_that_fits_both_groups_is_never_used():
    """Alike in color they are told apart by shape, alike in shape by color."""
    alike = Scene(ShapeGroup(2, "red", "circle"), ShapeGroup(1, "red", "square"), "above")
    assert {question_answers(key, alike)[1][0] for key in range(6)} == {"how many red circles?", "how many circles?"}
    alike = Scene(ShapeGroup(2, "red", "circle"), ShapeGroup(1, "blue", "circle"), "above")
    assert {question_answers(key, alike)[1][0] for key in range(6)} == {"how many red circles?", "how many red things?"}


@given(indices, indices, st.booleans())
def test_a_scene_is_a_pure_function_of_seed_and_index(seed: int, index: int, held_out: bool):
    drawn = split_scene(seed, index, held_out=held_out)
    assert drawn == split_scene(seed, index, held_out=held_out)
    assert drawn.is_held_out == held_out


def test_no_held_out_combination_is_ever_trained_on_and_about_one_in_five_is_held_out():
    train = {split_scene(seed, i).caption for seed in range(3) for i in range(300)}
    held_out = {split_scene(0, i, held_out=True).caption for i in range(300)}
    assert not train & held_out
    words = {word for caption in train for word in caption.split()}
    assert {word for caption in held_out for word in caption.split()} <= words
    kinds = [
        Scene(ShapeGroup(n, c, s), ShapeGroup(1, "red", "circle"), "above").is_held_out
        for n in (1, 2, 3, 4)
        for c in COLORS
        for s in SHAPES
    ]
    assert 0.05 < np.mean(kinds) < 0.4


@given(indices)
def test_the_answer_scores_1_and_another_answer_0(index: int):
    for turn in split_scene(0, index).question_answers:
        assert exact_match(f" {turn.answer} ", turn) == 1
        assert exact_match(turn.answer + " and", turn) == 0


@given(indices)
def test_a_question_has_one_answer(index: int):
    questions = [turn.question for turn in split_scene(1, index).question_answers]
    assert len(set(questions)) == len(questions)
    one = split_scene(1, index)
    assert any(turn.kind == "color" for turn in one.question_answers) == (one.first.shape != one.second.shape)


def blobs(picture: np.ndarray, color: tuple[int, int, int]) -> list[tuple[float, float]]:
    """(down, across) of every connected patch of about this color."""
    near = np.abs(picture.astype(int) - np.array(color)).sum(axis=2) < 60
    found = []
    while near.any():
        stack, members = [tuple(np.argwhere(near)[0])], []
        near[stack[0]] = False
        while stack:
            y, x = stack.pop()
            members.append((y, x))
            for other in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= other[0] < near.shape[0] and 0 <= other[1] < near.shape[1] and near[other]:
                    near[other] = False
                    stack.append(other)
        if len(members) > 20:
            found.append(tuple(np.mean(members, axis=0)))
    return found


@pytest.mark.parametrize("index", range(25))
def test_what_is_drawn_is_what_the_words_say(index: int):
    drawn = next(one for i in range(10) if (one := split_scene(index, i)).first.color != one.second.color)
    picture = np.asarray(drawn.render(96))
    first, second = (blobs(picture, COLORS[group.color]) for group in (drawn.first, drawn.second))
    assert (len(first), len(second)) == (drawn.first.count, drawn.second.count)
    axis = 1 if drawn.relation == "left of" else 0
    assert max(place[axis] for place in first) < 48 < min(place[axis] for place in second)


@given(indices)
def test_no_picture_has_two_true_captions(index: int):
    one = split_scene(2, index)
    lying = sample_layout(np.random.Generator(np.random.Philox(key=one.key)), one)
    assert are_separated(*lying, axis=0) == (one.relation == "left of")
    assert are_separated(*lying, axis=1) == (one.relation == "above")


def test_many_of_a_shape_are_spelled_as_they_are():
    assert ShapeGroup(2, "red", "cross").phrase == "two red crosses"
    assert ShapeGroup(1, "red", "cross").phrase == "one red cross"


def test_shapes_differ_and_pictures_vary():
    pictures = {
        shape: np.asarray(Scene(ShapeGroup(1, "red", shape), ShapeGroup(1, "blue", "square"), "above", 3).render(48))
        for shape in SHAPES
    }
    assert len({picture.tobytes() for picture in pictures.values()}) == len(SHAPES)
    assert not np.array_equal(SCENE.render(48), Scene(SCENE.first, SCENE.second, SCENE.relation, key=6).render(48))
    assert render_scenes([SCENE], 48).shape == (1, 3, 48, 48)
    assert len(COUNT_WORDS) == 4
