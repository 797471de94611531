"""Vision models compile to one graph without a break (in a process of its own, without checked annotations)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CODE = """
import sys, torch
from llm_quest.models.build import build
torch.set_num_threads(1)
for name in sys.argv[1:]:
    torch.compiler.reset()
    model = build(name).double()
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    if name in ("llava-tiny", "gemma3-vision-tiny"):
        length = model.config.num_image_tokens(16, 16)
        tokens = torch.randint(90, (2, length + 8)); tokens[:, 2 : 2 + length] = 96
        plain = lambda t, i: model(t, image_features=model.get_image_features(i))
        inputs = (tokens, images)
    else:
        plain, inputs = model, (images,)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), plain(*inputs), atol=1e-10, rtol=0)
    compiled(*inputs).square().sum().backward()
    print(name, flush=True)
"""
NAMES = ("vit-tiny", "llava-tiny", "gemma3-vision-tiny")


def test_a_compiled_model_is_one_graph_with_the_same_logits():
    run = subprocess.run(
        [sys.executable, "-c", CODE, *NAMES], cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert tuple(run.stdout.split()) == NAMES
