"""Block types of llama.cpp that are read and not written: Q4_K_M, Q5_K_M, Q6_K and their like, MXFP4.

A K type has superblocks of 256 numbers: groups of 16 or 32 with a whole-number scale each, and a float16 for all.

      Q4_K   | d | dmin | 12 bytes: 8 scales, 8 minima of 6 bits | 128: nibbles |   x = d s q - dmin m, groups of 32
      Q5_K   | d | dmin | the same 12 | 32: fifth bits | 128: nibbles |             the same, q of 5 bits
      Q6_K   | 128: low nibbles | 64: upper two bits | 16: scales, int8 | d |       x = d s (q - 32), groups of 16
      Q3_K   | 32: third bits | 64: pairs | 12 bytes: 16 scales of 6 bits | d |     x = d (s - 32) (q - 4 (1 - bit))
      Q2_K   | 16: scale and minimum, a nibble each | 64: pairs | d | dmin |        x = d s q - dmin m
      Q4_1   | d | m | 16: nibbles |          x = d q + m; Q5_0, Q5_1: with 4 bytes of fifth bits before the nibbles
      IQ4_NL | d | 16: nibbles |              x = d table[q]; MXFP4: | e | 16: nibbles |, x = 2^(e - 128) table[q]

Commonly got wrong: the halves of a byte are 32 numbers apart in a K type (64 in Q6_K, 16 in the others), not
neighbors; scales 4 to 7 of Q4_K have their upper two bits in the bytes of scales 0 to 3.

(Definitions: ggml-quants.c of github.com/ggml-org/llama.cpp, equal bits in `gguf.quants`.)"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

NON_LINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
"""IQ4_NL's table."""
E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""MXFP4's table: twice the numbers, so that they are whole."""


def unpack_fields(data: Tensor, width: int, group: int) -> Tensor:
    """Fields of `width` bits, the lowest first: (N,bytes) -> (N,numbers). `group` bytes give their lowest fields one
    after another, then their next ones."""
    shifts = torch.arange(0, 8, width, dtype=torch.uint8)[:, None]
    return (data.unflatten(1, (-1, 1, group)) >> shifts & (1 << width) - 1).flatten(1)


def float16_scale(data: Tensor) -> Tensor:
    """(N,2) bytes of float16 -> (N,1)."""
    return data.contiguous().view(torch.float16).float()


def scale_blocks(scales: Tensor, q: Tensor) -> Tensor:
    """Scales (N,groups) times numbers (N,256), as (N,groups,size)."""
    return scales[:, :, None] * q.float().unflatten(1, (scales.shape[1], -1))


def scales_and_minima(data: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the 12 bytes of Q4_K and Q5_K: eight scales and eight minima, each (N,8)."""
    low, middle, mixed = data.split(4, dim=1)
    scales = torch.cat((low & 63, (mixed & 15) | (low >> 2 & 48)), dim=1)
    return scales.float(), torch.cat((middle & 63, (mixed >> 4) | (middle >> 2 & 48)), dim=1).float()


def dequantize_q4_k(data: Tensor) -> Tensor:
    d, dmin, packed, nibbles = data.split((2, 2, 12, 128), dim=1)
    return subtract_minima(
        float16_scale(d), float16_scale(dmin), scales_and_minima(packed), unpack_fields(nibbles, 4, 32)
    )


def dequantize_q5_k(data: Tensor) -> Tensor:
    d, dmin, packed, fifth, nibbles = data.split((2, 2, 12, 32, 128), dim=1)
    q = unpack_fields(nibbles, 4, 32) | unpack_fields(fifth, 1, 32) << 4
    return subtract_minima(float16_scale(d), float16_scale(dmin), scales_and_minima(packed), q)


def dequantize_q2_k(data: Tensor) -> Tensor:
    packed, pairs, d, dmin = data.split((16, 64, 2, 2), dim=1)
    return subtract_minima(
        float16_scale(d),
        float16_scale(dmin),
        ((packed & 15).float(), (packed >> 4).float()),
        unpack_fields(pairs, 2, 32),
    )


def subtract_minima(d: Tensor, dmin: Tensor, groups: tuple[Tensor, Tensor], q: Tensor) -> Tensor:
    """d s q - dmin m of each group."""
    scales, minima = groups
    return (scale_blocks(d * scales, q) - (dmin * minima)[:, :, None]).flatten(1)


def dequantize_q6_k(data: Tensor) -> Tensor:
    nibbles, upper, scales, d = data.split((128, 64, 16, 2), dim=1)
    q = (unpack_fields(nibbles, 4, 64) | unpack_fields(upper, 2, 32) << 4).to(torch.int8) - 32
    return scale_blocks(float16_scale(d) * scales.view(torch.int8).float(), q).flatten(1)


def dequantize_q3_k(data: Tensor) -> Tensor:
    third, pairs, packed, d = data.split((32, 64, 12, 2), dim=1)
    low, high = unpack_fields(packed[:, :8], 4, 8), unpack_fields(packed[:, 8:], 2, 4)
    scales = (low | high << 4).to(torch.int8) - 32
    q = unpack_fields(pairs, 2, 32).to(torch.int8) - 4 * (1 - unpack_fields(third, 1, 32).to(torch.int8))
    return scale_blocks(float16_scale(d) * scales.float(), q).flatten(1)


def dequantize_q4_1(data: Tensor) -> Tensor:
    d, m, nibbles = data.split((2, 2, 16), dim=1)
    return float16_scale(d) * unpack_fields(nibbles, 4, 16).float() + float16_scale(m)


def dequantize_q5_0(data: Tensor) -> Tensor:
    d, fifth, nibbles = data.split((2, 4, 16), dim=1)
    q = (unpack_fields(nibbles, 4, 16) | unpack_fields(fifth, 1, 1) << 4).to(torch.int8) - 16
    return float16_scale(d) * q.float()


def dequantize_q5_1(data: Tensor) -> Tensor:
    d, m, fifth, nibbles = data.split((2, 2, 4, 16), dim=1)
    return float16_scale(d) * (unpack_fields(nibbles, 4, 16) | unpack_fields(fifth, 1, 1) << 4).float() + float16_scale(
        m
    )


def decode_nibbles(table: Sequence[int], nibbles: Tensor) -> Tensor:
    """Look up the numbers of 16 bytes, two 4-bit indices each, in a table."""
    return torch.tensor(table, dtype=torch.float32)[unpack_fields(nibbles, 4, 16).long()]


def dequantize_iq4_nl(data: Tensor) -> Tensor:
    d, nibbles = data.split((2, 16), dim=1)
    return float16_scale(d) * decode_nibbles(NON_LINEAR, nibbles)


def dequantize_mxfp4(data: Tensor) -> Tensor:
    exponent, nibbles = data.split((1, 16), dim=1)
    return torch.ldexp(decode_nibbles(E2M1, nibbles), exponent.int() - 128)


DEQUANTIZE_ONLY: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_1": dequantize_q4_1,
    "Q5_0": dequantize_q5_0,
    "Q5_1": dequantize_q5_1,
    "Q2_K": dequantize_q2_k,
    "Q3_K": dequantize_q3_k,
    "Q4_K": dequantize_q4_k,
    "Q5_K": dequantize_q5_k,
    "Q6_K": dequantize_q6_k,
    "IQ4_NL": dequantize_iq4_nl,
    "MXFP4": dequantize_mxfp4,
}
"""Tensor type -> (N,bytes) to (N,numbers) float32."""
