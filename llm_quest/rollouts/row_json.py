"""Rows as JSON and back, to the bit: what a bookmark in the middle of a rollout holds."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_quest.data.policy_batch import PolicyRow

ROW_ARRAYS = ("advantages", "sampler_log_probs", "old_log_probs", "reference_log_probs", "attention_maps")


def row_to_json(row: PolicyRow) -> dict[str, Any]:
    arrays = {name: getattr(row, name) for name in ROW_ARRAYS}
    encoded = {name: base64.b64encode(array.tobytes()).decode() for name, array in arrays.items() if array is not None}
    return {"prompt": list(row.prompt_ids), "tokens": list(row.completion_ids), **encoded}


def row_from_json(saved: Mapping[str, Any]) -> PolicyRow:
    arrays = {name: np.frombuffer(base64.b64decode(saved[name]), np.float32) for name in ROW_ARRAYS if name in saved}
    if "attention_maps" in arrays:  # a row of the matrix for each token
        arrays["attention_maps"] = arrays["attention_maps"].reshape(len(saved["tokens"]), -1)
    return PolicyRow(tuple(saved["prompt"]), tuple(saved["tokens"]), **arrays)
