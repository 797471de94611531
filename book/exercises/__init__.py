"""Exercises of the book: `quest learn NAME` writes a stub into the reader's folder, `quest learn check NAME` runs what
the reader wrote and names the typical mistake that computes the same."""

from __future__ import annotations

from book.exercises import inference, layers, training
from book.exercises.exercise import Exercise

EXERCISES: dict[str, Exercise] = {
    one.name: one for one in (*layers.EXERCISES, *training.EXERCISES, *inference.EXERCISES)
}
