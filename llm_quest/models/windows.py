"""Layers of two kinds: config.json's `layer_types` and `sliding_window`, as most families spell them.

    layer     0        1        2        3        4        5
    type      sliding  sliding  sliding  full     sliding  sliding     layer_pattern(6, 4)

Commonly got wrong: layer i is full iff (i + 1) divides by the pattern, so a stack may end on a windowed layer; a window
of W counts the token itself.
"""

from __future__ import annotations

from typing import Any

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_pattern(num_hidden_layers: int, pattern: int, other: str = SLIDING) -> tuple[str, ...]:
    """Every `pattern`-th layer sees everything, the others are of the other type: their window."""
    return tuple(FULL if (layer + 1) % pattern == 0 else other for layer in range(num_hidden_layers))


def layer_window(config: Any, layer_idx: int) -> int | None:
    """How many tokens this layer sees, itself included; None: all."""
    return config.sliding_window if config.layer_types[layer_idx] == SLIDING else None


def require_layer_types(config: Any) -> None:
    """Raise ValueError unless every layer has a type, and the window, where there is one, holds a token."""
    window = config.sliding_window
    if window is not None and (type(window) is not int or window < 1):
        raise ValueError(f"sliding_window is {window!r}; a windowed layer sees at least itself: 1 or more")
    require_type_of_each_layer(config)


def require_type_of_each_layer(config: Any) -> None:
    """Raise ValueError unless `layer_types` is as long as the model is deep."""
    if len(config.layer_types) != config.num_hidden_layers:
        raise ValueError(f"layer_types has {len(config.layer_types)} entries for {config.num_hidden_layers} layers")
