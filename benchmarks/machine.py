"""What this machine can do at best: matrix products by size and dtype. Other benchmarks print their share of it.

python -m benchmarks.machine [--device cuda]
"""

from __future__ import annotations

import argparse

import torch

from llm_quest.cost.profile import matmul_peak

SIZES = (256, 512, 1024, 2048, 4096)
DTYPES = (torch.float32, torch.bfloat16)


def peaks(device: str = "cpu", sizes: tuple[int, ...] = SIZES) -> dict[torch.dtype, dict[int, float]]:
    """GFLOP/s by dtype and size."""
    return {dtype: {size: matmul_peak(size, dtype, device) for size in sizes} for dtype in DTYPES}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    measured = peaks(device)
    print(f"matrix products on {device}, {torch.get_num_threads()} threads, GFLOP/s\n")
    print("| size | " + " | ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES) + " |\n| --- | --- | --- |")
    for size in SIZES:
        print(f"| {size} | " + " | ".join(f"{measured[dtype][size]:,.0f}" for dtype in DTYPES) + " |")


if __name__ == "__main__":
    main()
