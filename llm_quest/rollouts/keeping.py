"""Rows as JSON and back, to the bit: what a bookmark in the middle of a rollout holds."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_quest.data.policy_batch import PolicyRow

ARRAYS = ("advantages", "sampled", "old", "reference", "looks")


def kept(row: PolicyRow) -> dict[str, Any]:
    arrays = {name: getattr(row, name) for name in ARRAYS}
    told = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items() if array is not None}
    return {"prompt": list(row.prompt), "tokens": list(row.tokens), **told}


def taken(saved: Mapping[str, Any]) -> PolicyRow:
    arrays = {name: np.frombuffer(base64.b64decode(saved[name]), np.float32) for name in ARRAYS if name in saved}
    if "looks" in arrays:  # a row of the matrix for each token
        arrays["looks"] = arrays["looks"].reshape(len(saved["tokens"]), -1)
    return PolicyRow(tuple(saved["prompt"]), tuple(saved["tokens"]), **arrays)
