"""Evaluators of classifiers, of texts and of images: loss, accuracy, F1, calibration error, and which label was said
for which."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llm_quest.data.image_datasets import ImageDataset
from llm_quest.data.images import ImageProcessor
from llm_quest.data.loader import length_grouped_indices
from llm_quest.data.text_classification import TextClassificationDataset
from llm_quest.files import atomic_write_json
from llm_quest.objectives.classification import last_token_outputs

CALIBRATION_BINS = 10
TEXT_BATCH_SIZE, IMAGE_BATCH_SIZE = 32, 256

Outputs = Callable[[Any], Iterator[tuple[Tensor, Tensor]]]
"""A model -> its logits (R,C) for the held-out items, batch by batch, with their labels (R,), or (R,C) of 0 and 1."""


def text_outputs(held_out: TextClassificationDataset) -> Outputs:
    """Outputs of held-out texts; texts of similar length share a batch."""

    def batches(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(model.parameters()).device
        for numbers in length_grouped_indices(held_out, TEXT_BATCH_SIZE):
            batch = held_out.collate(numbers).to(device)
            yield last_token_outputs(model, batch.input_ids, batch.position_ids), batch.labels

    return batches


def image_outputs(images: ImageDataset, preprocess: ImageProcessor) -> Outputs:
    """Outputs of held-out images, without augmentation."""

    def batches(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        device = next(model.parameters()).device
        for first in range(0, len(images), IMAGE_BATCH_SIZE):
            here = slice(first, first + IMAGE_BATCH_SIZE)
            pixels = preprocess.normalize(images.pixels[here]).to(device)
            yield model(pixels).float(), torch.from_numpy(images.labels[here])

    return batches


@dataclass(frozen=True)
class ClassifierEvaluator:
    """`classification_metrics`, or `multi_label_metrics`, of held-out items. labels: the names of the classes. Which
    label was said for which is saved beside samples_dir, in confusion.json."""

    outputs: Outputs
    interval: int
    labels: Sequence[str] = ()
    samples_dir: Path | None = None
    name: str = "eval"

    @torch.no_grad()
    def evaluate(self, model: Any, step: int) -> Mapping[str, float]:
        predicted, wanted = [], []
        for logits, labels in self.outputs(model):
            predicted.append(logits.cpu().double())
            wanted.append(labels.cpu().numpy())
        logits, truth = torch.cat(predicted), np.concatenate(wanted)
        is_multi_label = truth.ndim == 2
        probabilities = (logits.sigmoid() if is_multi_label else logits.softmax(dim=1)).numpy()
        if self.samples_dir is not None:
            content = {"step": step, "labels": list(self.labels), **confusions(probabilities, truth)}
            atomic_write_json(self.samples_dir.parent / "confusion.json", content)
        return (
            multi_label_metrics(probabilities, truth)
            if is_multi_label
            else classification_metrics(probabilities, truth)
        )


def confusions(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """{"matrix": ...}, or {"counts": ...} of a multi-label classifier."""
    if labels.ndim == 2:
        return {"counts": label_confusions(probabilities > 0.5, labels > 0.5).tolist()}
    return {"matrix": confusion_matrix(probabilities.argmax(axis=1), labels, probabilities.shape[1]).tolist()}


def confusion_matrix(predicted: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """(classes, classes): how often class j was said for class i."""
    return np.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def label_confusions(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(C, 4) from (N, C) of true and false: how often each label was rightly said, wrongly said, wrongly left out and
    rightly left out."""
    cases = (predicted & labels, predicted & ~labels, ~predicted & labels, ~predicted & ~labels)
    return np.stack([case.sum(axis=0) for case in cases], axis=1)


def classification_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """From probabilities (N, classes) and class numbers (N,): loss, accuracy, macro F1, calibration error; and what
    always saying the commonest class would reach."""
    predicted, classes = probabilities.argmax(axis=1), probabilities.shape[1]
    right = predicted == labels
    return {
        "loss": float(-np.log(np.maximum(probabilities[np.arange(len(labels)), labels], 1e-300)).mean()),
        "accuracy": float(right.mean()),
        "macro_f1": float(
            np.mean([f1_score(predicted == c, labels == c) for c in range(classes) if (labels == c).any()])
        ),
        "calibration_error": expected_calibration_error(probabilities.max(axis=1), right),
        "commonest": float(np.bincount(labels).max() / len(labels)),
    }


def multi_label_metrics(probabilities: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """From probabilities (N, C) and targets (N, C) of 0 and 1; a label is said above 0.5. loss: binary cross-entropy,
    the mean over items and labels. accuracy: all labels of an item are right. micro_f1: over all decisions together;
    macro_f1: the mean over the labels that occur."""
    predicted, expected = probabilities > 0.5, targets > 0.5
    chosen = np.where(expected, probabilities, 1 - probabilities)
    each = [f1_score(predicted[:, c], expected[:, c]) for c in range(expected.shape[1]) if expected[:, c].any()]
    return {
        "loss": float(-np.log(np.maximum(chosen, 1e-300)).mean()),
        "accuracy": float((predicted == expected).all(axis=1).mean()),
        "micro_f1": f1_score(predicted.ravel(), expected.ravel()),
        "macro_f1": float(np.mean(each)) if each else 0.0,
        "calibration_error": expected_calibration_error(probabilities.ravel(), expected.ravel()),
    }


def f1_score(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of one class; 0 where it was never rightly said."""
    both = float((predicted & labels).sum())
    return 2 * both / float(predicted.sum() + labels.sum()) if both else 0.0


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = CALIBRATION_BINS) -> float:
    """Expected calibration error (Guo et al. 2017, arXiv:1706.04599): |accuracy - confidence| by bins of equal width,
    weighed by how many fall in each."""
    where = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps: Sequence[float] = [
        abs(float(correct[where == b].mean() - confidence[where == b].mean())) * float((where == b).mean())
        for b in np.unique(where)
    ]
    return float(sum(gaps))
