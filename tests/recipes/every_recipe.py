"""Every recipe, tiny and of two steps, by its name: on one process, or on one of several."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from llm_quest.data.problems import parse_task
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.hub.load_save import save
from llm_quest.models.build import build, preset
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from llm_quest.train.parallel import DistributedContext
from tests.recipes.tuned import WORDS, base, write_rows

COMMON = """
max_steps: 2
save_steps: 1
save_total_limit: 9
logging_steps: 1
warmup_steps: 0
lr_scheduler_type: constant
learning_rate: 1e-3
precision: fp32
compile: false
threads: 1
device: cpu
"""
TASK = "reverse:shortest=3,longest=3,letters=26"
FRESH = (
    "{family: llama, config: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2, "
    "intermediate_size: 32}}"
)
BATCH = "batch_size: 4\nsequence_length: 40\neval_steps: 0\n"
EASY = "reverse:shortest=1,longest=1,letters=26"
ROLLOUTS = "prompts_per_rollout: 4\nnum_generations: 4\nmax_new_tokens: 5\nmicro_batch_tokens: 60\neval_steps: 0\n"
TEXTS: dict[str, str] = {
    "pretrain": "data: {source: FOLDER/text.jsonl}\ntokenizer: {load: FOLDER/base}\n"
    + "model: {preset: deepseek-v3-tiny, config: {num_hidden_layers: 2}}\n"
    + "samples: {every_steps: 0}\neval_baselines: false\ntechniques: [qk_clip]\n" + BATCH,
    "sft": "model: {load: FOLDER/base}\ndata: {source: FOLDER/pairs.jsonl}\nsamples: {every_steps: 0}\n" + BATCH,
    "classify": "model: {load: FOLDER/modules}\ndata: {source: FOLDER/labels.jsonl}\n" + BATCH,
    "reward": "model: {load: FOLDER/modules}\ndata: {source: FOLDER/pairs.jsonl}\n" + BATCH,
    "dpo": "model: {load: FOLDER/modules}\ndata: {source: FOLDER/pairs.jsonl}\n" + BATCH,
    "kto": "model: {load: FOLDER/modules}\ndata: {source: FOLDER/labeled.jsonl}\n" + BATCH,
    "prm": "model: {load: FOLDER/modules}\ndata: {source: FOLDER/steps.jsonl}\n" + BATCH,
    "gkd": "model: {load: FOLDER/base}\nteacher: {load: FOLDER/taller, beta: 0.5}\nmax_new_tokens: 8\n"
    + "data: {source: FOLDER/pairs.jsonl}\n" + BATCH,
    "grpo": f"task: {TASK}\nmodel: {{load: FOLDER/policy}}\nkl_coef: 0.05\nnum_iterations: 2\neval_problems: 8\n"
    + "rewards: [{name: random}]\ntechniques: [{name: lora, rank: 2}]\n" + ROLLOUTS,
    "iterative": f"task: {EASY}\nmodel: {FRESH}\nwarmup: {{max_steps: 25, batch_size: 16, learning_rate: 1e-2}}\n"
    + "num_outer_iterations: 1\neval_problems: 2\nreward_model: {max_steps: 2, batch_size: 4, num_prompts: 9}\n"
    + ROLLOUTS,
    "rpt": "model: {load: FOLDER/short}\ndata: {source: FOLDER/few.jsonl}\nreward: random\n"
    + "selection: {entropy_threshold: 0.5}\neval_positions_per_bucket: 4\n" + ROLLOUTS.replace("60", "400"),
    "rpt_control": "rpt_run: FOLDER/rpt\nbatch_size: 32\nmicro_batch_tokens: 300\neval_steps: 0\n",
    "vit": "data: {source: folder, path: FOLDER/images, image_size: 8, image_mean: [0.5], image_std: [0.5]}\n"
    + "model: {patch_size: 4, hidden_size: 16, num_hidden_layers: 1, intermediate_size: 32}\nbatch_size: 4\n",
    "vlm": "data: {image_size: 24}\nvision_tower: {patch_size: 12, hidden_size: 16, num_hidden_layers: 1, "
    + "intermediate_size: 32}\nlanguage_model: {hidden_size: 16, num_hidden_layers: 1, intermediate_size: 32}\n"
    + "batch_size: 4\neval_images: 2\n",
}  # fmt: skip
"""FOLDER: what `prepare` made."""


def prepare(folder: Path) -> None:
    """Models, rows and images that the recipes begin with."""
    base(folder / "base")
    base(folder / "taller", num_hidden_layers=3)
    base(folder / "short", max_position_embeddings=64, num_hidden_layers=1)
    base(folder / "modules", "deepseek-v3-tiny", num_hidden_layers=2, num_nextn_predict_layers=1)  # one of each kind
    tokenizer = character_tokenizer(parse_task(TASK).alphabet)
    numbers = replace(preset("llama3.2-tiny").config, vocab_size=tokenizer.vocab_size)
    save(build(numbers, seed=1), folder / "policy", tokenizer=tokenizer)
    pairs = [
        {"prompt": f"say {w}", "chosen": w, "rejected": v, "completion": w} for w in WORDS for v in WORDS if v != w
    ]
    write_rows(folder / "pairs.jsonl", pairs)
    labeled = [
        {"prompt": one["prompt"], "completion": one["rejected"], "label": n % 3 > 0} for n, one in enumerate(pairs)
    ]
    write_rows(folder / "labeled.jsonl", labeled)
    steps = [{"prompt": f"say {w}", "completions": [w, v], "labels": [True, w > v]} for w in WORDS for v in WORDS]
    write_rows(folder / "steps.jsonl", steps)
    write_rows(folder / "labels.jsonl", [{"text": f"say {w} {v}", "label": str(w > v)} for w in WORDS for v in WORDS])
    write_rows(folder / "few.jsonl", [{"text": f"say {w} user dog"} for w in WORDS])
    write_rows(folder / "text.jsonl", [{"text": f"say {w} user {v}\n" * 9} for w in WORDS for v in WORDS])
    chance = np.random.default_rng(0)
    for kind in ("above", "below"):
        (folder / "images" / kind).mkdir(parents=True)
        for i in range(20):
            pixels = chance.integers(0, 255, (8, 8)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / kind / f"{i}.png")


def run_tiny(recipe: str, folder: Path, out: Path, *pairs: str) -> None:
    """`quest train RECIPE`, in this process or in all of its group. rpt_control reads the run of rpt on one process."""
    text = f"recipe: {recipe}\n{COMMON}{TEXTS[recipe]}".replace("FOLDER", str(folder))
    if recipe == "rpt_control":
        text = text.replace("max_steps: 2\n", "").replace(f"{folder}/rpt", f"{folder}/alone/rpt")
    settings = apply_overrides(read_yaml(text, f"{recipe}.yaml"), list(pairs))
    found = get_recipe(recipe)
    run_recipe(found, parse_config(found.Config, settings), settings, out, quiet=True, log=lambda line: None)


def metric_rows(out: Path) -> dict[str, list[tuple[float, ...]]]:
    """Loss, norm and largest ratio of every step of every run in a folder (iterative has several)."""
    return {
        str(file.parent.relative_to(out)): [
            (row["loss"], row["grad_norm"], row.get("ratio/max", 1.0))
            for row in map(json.loads, file.read_text().splitlines())
        ]
        for file in sorted(out.rglob("metrics.jsonl"))
    }


def copy_up_to_step_1(source: Path, target: Path) -> None:
    """The run as if it had been killed in its second step."""
    shutil.copytree(source, target)
    for later in target.rglob("checkpoints/step-*"):
        if "warmup" not in later.parts and int(later.name[5:]) > 1:
            shutil.rmtree(later)
    for config in target.rglob("config.yaml"):  # the runs of iterative name each other
        config.write_text(config.read_text().replace(str(source), str(target)))


NAMES = tuple(RECIPES)


def make_every_run(folder: Path) -> None:
    """What the recipes begin with, and in `alone` the run of each on one process."""
    prepare(folder)
    for name in NAMES:
        run_tiny(name, folder, folder / "alone" / name)


def run_all_by_two(folder: str, out: str) -> None:
    """On each of two processes: every recipe by FSDP2, and by DDP from what one process left at step 1."""
    here, two, parallel = Path(folder), Path(out), DistributedContext.from_environment("cpu")
    for name in NAMES:
        run_tiny(name, here, two / "fsdp" / name, "parallel=fsdp")
        if parallel.is_main_process:
            copy_up_to_step_1(here / "alone" / name, two / "ddp" / name)
        parallel.wait_for_main_process()
        run_tiny(name, here, two / "ddp" / name, "parallel=ddp")
    parallel.destroy_process_group()
