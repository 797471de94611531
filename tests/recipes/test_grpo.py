"""`quest train grpo`, real and tiny: it learns from a true reward and not from a random one, resumes in the middle of a
rollout with the same bits, and refuses what has no effect."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from llm_quest.cli.main import app
from llm_quest.data.chat import ChatTemplate
from llm_quest.data.problems import Problem, parse_task
from llm_quest.data.problems.strings import Reverse
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.data.whole_documents import Demonstrations
from llm_quest.errors import DataError, GuardStop, UsageError
from llm_quest.eval.problems import evaluate_problems
from llm_quest.eval.self_refinement import RefinePrompts, SelfRefinement
from llm_quest.hub.load_save import load, save
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.objectives.surrogates import POLICY_VARIANTS
from llm_quest.papers.paper import FOLDER
from llm_quest.recipes.config import load_raw_config, parse_config
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.grpo import GrpoConfig
from llm_quest.recipes.model_config import WARMUP_CONTEXT, init_model
from llm_quest.recipes.policy_prompts import PromptEncoder, problems_of_task
from llm_quest.recipes.recipe import get_recipe, load_recipe
from llm_quest.recipes.sft_warmup import WarmupConfig, require_demonstrations_fit, run_sft_warmup
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from llm_quest.rollouts.rewards import compute_step_rewards
from llm_quest.rollouts.sampler import Sample
from llm_quest.train.parallel import DistributedContext
from llm_quest.train.rng_state import derive_seed
from tests.recipes.tuned import metrics, weights
from tests.shared_folder import shared_folder

RECIPE = """
recipe: grpo
task: reverse:shortest=3,longest=3,letters=8,noise=0.5
model:
  family: llama
  config:
    hidden_size: 48
    num_hidden_layers: 2
    num_attention_heads: 2
    num_key_value_heads: 2
    intermediate_size: 96
warmup: {batch_size: 48, learning_rate: 5e-3, target_accuracy: 0.3}
prompts_per_rollout: 16
num_generations: 8
max_new_tokens: 5
max_steps: 4
learning_rate: 1e-3
weight_decay: 0.0
lr_scheduler_type: constant
warmup_steps: 0
eval_steps: 0
eval_problems: 40
save_steps: 0
save_total_limit: 9
precision: fp32
logging_steps: 1
"""


def run_grpo(out: Path, *pairs: str, say=lambda line: None):
    settings = apply_overrides(read_yaml(RECIPE, "recipe.yaml"), list(pairs))
    return run_recipe(get_recipe("grpo"), parse_config(GrpoConfig, settings), settings, out, quiet=True, log=say)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose teacher copied half of the words where it should have reversed them."""
    made = shared_folder(tmp_path_factory, "policy", lambda folder: run_grpo(folder / "first", "max_steps=1"))
    return made / "first/warmup"


def from_(warm: Path, *pairs: str) -> list[str]:
    return ["model=null", f"model.load={warm}", "warmup=null", *pairs]


def rewards(out: Path) -> list[float]:
    return [row["reward"] for row in metrics(out)]


def test_the_reward_rises_and_not_by_chance(warm: Path, tmp_path: Path):
    """Held-out accuracy rises with it; under a reward that knows nothing, neither does."""
    said: list[str] = []
    run_grpo(tmp_path / "true", *from_(warm, "max_steps=30"), say=said.append)
    told = [float(line.split("accuracy ")[1].split()[0]) for line in said if line.startswith("held out")]
    found = rewards(tmp_path / "true")
    assert sum(found[-5:]) / 5 - sum(found[:5]) / 5 >= 0.2
    assert told[1] - told[0] >= 0.2
    run_grpo(tmp_path / "random", *from_(warm, "max_steps=30", "rewards=[{name: random}]"), say=said.append)
    told = [float(line.split("accuracy ")[1].split()[0]) for line in said if line.startswith("held out")]
    assert told[3] - told[2] < 0.1


def test_held_out_answers_are_refined_as_the_command_does(warm: Path, tmp_path: Path):
    """The same answers, feedback and rounds as `quest eval --refine`, and a policy without conversations is refused."""
    tokenizer = load_tokenizer(warm)
    tokenizer.chat_template = (FOLDER / "bare_chat.jinja").read_text()
    talking = save(load(warm), tmp_path / "talking", tokenizer=tokenizer)
    words, said = {"feedback": "a", "refine": "b", "stop": "c"}, list[str]()
    pairs = [
        *from_(talking, "max_steps=1", "learning_rate=1e-9", "apply_chat_template=true", 'system_prompt=""'),
        f"eval_refinement={json.dumps({'rounds': 2, **words})}",
    ]
    run_grpo(tmp_path / "run", *pairs, say=said.append)
    found = metrics(tmp_path / "run")[-1]
    chat = ChatTemplate(tokenizer)
    encode = PromptEncoder(tokenizer, chat, "")
    problems = problems_of_task(yaml.safe_load(RECIPE)["task"], "", "strict", 40, derive_seed(0, "order")).held_out
    loop = SelfRefinement(2, encode.messages, chat.encode_prompts, 128, RefinePrompts(**words))
    told = evaluate_problems(
        load(talking), tokenizer, problems, max_new_tokens=5, encode_prompt=encode, refinement=loop
    )
    assert told.refined[0].broken > 0, "what was asked for is nothing that this policy has seen"
    lines = [one.line(number) for number, one in enumerate(told.refined, start=1)]
    assert all(line in said[-1] for line in lines)
    assert [found["eval/refine@1"], found["eval/refine@2"]] == [one.accuracy.share for one in told.refined]
    assert found["eval/accuracy"] == told.greedy_accuracy.share
    with pytest.raises(UsageError, match="set apply_chat_template=true"):
        run_grpo(tmp_path / "other", *pairs, "apply_chat_template=false", "system_prompt=null")


@pytest.mark.parametrize("variant", POLICY_VARIANTS)
def test_every_variant_runs_with_updates_minibatches_and_a_reference(variant: str, warm: Path, tmp_path: Path):
    pairs = ["num_iterations=2", "num_mini_batches=2", "kl_coef=0.01", f"loss_type={variant}"]
    run_grpo(tmp_path / "run", *from_(warm, *pairs))
    rows = metrics(tmp_path / "run")
    assert all(row["grad_norm"] > 0 for row in rows)
    assert rows[0]["log_ratio"] < 1e-5 < rows[1]["log_ratio"]
    assert rows[0]["kl"] < 1e-6 < rows[-1]["kl"]


def test_a_run_resumed_in_the_middle_of_a_rollout_has_the_same_bits(warm: Path, tmp_path: Path):
    pairs = from_(warm, "num_iterations=2", "num_mini_batches=2", "kl_coef=0.01", "save_steps=1", "max_steps=6")
    run_grpo(tmp_path / "straight", *pairs)
    for stopped in (2, 4):
        out = tmp_path / f"stopped-{stopped}"
        shutil.copytree(tmp_path / "straight", out)
        for step in range(stopped + 1, 7):
            shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
        run_grpo(out, *pairs)
        assert weights(out, 6) == weights(tmp_path / "straight", 6)
    assert [row["step"] for row in metrics(out)] == list(range(1, 7))


def test_attention_is_learned_beside_the_tokens_and_a_resumed_run_has_the_same_bits(warm: Path, tmp_path: Path):
    """At the first update of a rollout the policy is the old one: no divergence, and the step of the plain run."""
    pairs = from_(warm, "num_iterations=2", "save_steps=1", "max_steps=4")
    run_grpo(tmp_path / "plain", *pairs, "attention_coef=0")
    run_grpo(tmp_path / "looking", *pairs, "attention_coef=4.0")
    rows = metrics(tmp_path / "looking")
    assert rows[0]["attention_divergence"] < 1e-7 < 1e-5 < rows[1]["attention_divergence"]
    one, two = (metrics(tmp_path / name) for name in ("plain", "looking"))
    assert one[0]["loss"] == pytest.approx(two[0]["loss"], abs=1e-6)
    assert "attention_divergence" not in one[1]
    assert weights(tmp_path / "looking", 4) != weights(tmp_path / "plain", 4)
    out = tmp_path / "stopped"
    shutil.copytree(tmp_path / "looking", out)
    for step in (2, 3, 4):
        shutil.rmtree(out / "checkpoints" / f"step-{step:08d}")
    run_grpo(out, *pairs, "attention_coef=4.0")
    assert weights(out, 4) == weights(tmp_path / "looking", 4)


@pytest.mark.parametrize(("target", "room", "fits"), [(0.3, 4, True), (0.3, 3, False)])
def test_a_warm_up_whose_target_cannot_be_reached_is_refused_before_it_runs(target: float, room: int, fits: bool):
    """Three letters and the end are four tokens."""
    task = parse_task("reverse:shortest=3,longest=3,letters=8,noise=0.5")
    said, warmup = list[str](), WarmupConfig(target_accuracy=target)
    check = partial(require_demonstrations_fit, warmup, task, character_tokenizer(task.alphabet), room, said.append)
    if fits:
        check()
        assert not said
    else:
        with pytest.raises(UsageError, match=r"^0% of .* max_new_tokens=3 \(longest: 4\).*\n?.*set max_new_tokens=4"):
            check()


@pytest.mark.parametrize(
    ("recipe", "pairs"),
    [
        ("grpo", ["task=chained", "max_new_tokens=8"]),
        ("iterative", ["task=chained", "max_new_tokens=8"]),
        ("rpt", ["max_new_tokens=4"]),
    ],
)
def test_a_dry_run_refuses_demonstrations_that_do_not_fit(recipe: str, pairs: list[str]):
    result = CliRunner().invoke(app, ["train", recipe, *pairs, "--dry-run"])
    assert isinstance(result.exception, UsageError)
    said = re.search(
        r"0% of the task's demonstrations .*, and (warmup\.(?:sft\.)?target_accuracy) is .* set (max_new_tokens=\d+)",
        str(result.exception),
    )
    assert said is not None
    found, config, settings = load_recipe(recipe, [*pairs[:-1], said[2]])
    assert found.check(config, settings)  # what the message recommends is taken


def test_two_runs_are_the_same_to_the_bit(warm: Path, tmp_path: Path):
    for name in ("one", "two"):
        run_grpo(tmp_path / name, *from_(warm, "max_steps=3"))
    assert weights(tmp_path / "one", 3) == weights(tmp_path / "two", 3)


def test_with_lora_the_reference_is_the_model_without_its_adapters(warm: Path, tmp_path: Path):
    out = tmp_path / "run"
    run_grpo(out, *from_(warm, "techniques=[{name: lora, rank: 4}]", "kl_coef=0.1", "kl_estimator=unbiased"))
    rows = metrics(out)
    assert rows[0]["kl"] < 1e-6 < rows[-1]["kl"]
    before, after = load(warm), load(out)
    trained = dict(after.named_parameters())
    frozen = [name for name in dict(before.named_parameters()) if name in trained]
    assert frozen
    assert all(torch.equal(dict(before.named_parameters())[name], trained[name]) for name in frozen)
    again = tmp_path / "again"
    run_grpo(again, *from_(out, "kl_coef=0.1", "kl_estimator=unbiased"))
    assert metrics(again)[0]["kl"] < 1e-6 < metrics(again)[-1]["kl"], (
        "adapters that stood before belong to the reference"
    )


def test_chained_answers_are_supervised_step_by_step(tmp_path: Path):
    pairs = [
        "task=chained:shortest=1,longest=2,modulus=5",
        "max_new_tokens=20",
        "process_supervision=true",
        "loss_type=gspo_token",
        "warmup.max_steps=60",
    ]
    run_grpo(tmp_path / "run", *pairs, "max_steps=2")
    assert all(row["completions/mean_length"] > 0 for row in metrics(tmp_path / "run"))


def test_a_step_ends_at_its_token_and_the_last_one_at_the_end_of_text():
    task = parse_task("chained:shortest=2,longest=2")
    tokenizer = character_tokenizer(task.alphabet)
    problem = Demonstrations(task, tokenizer).problems(0, 0)
    text = ";".join(problem.steps) + f";#{problem.answer}"
    tokens = (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
    sample = Sample((0,), tokens, (0.0,) * len(tokens), "eos", text, problem)
    first = len(problem.steps[0])
    assert compute_step_rewards(tokenizer, sample) == [(first, 1.0), (text.index("#") - 1, 1.0), (len(tokens) - 1, 1.0)]
    cut = Sample((0,), tokens[:-1], (0.0,) * (len(tokens) - 1), "length", text, problem)
    assert compute_step_rewards(tokenizer, cut)[-1] == (len(tokens) - 2, 0.0)
    nothing = Sample((0,), (tokenizer.eos_token_id,), (0.0,), "eos", "", problem)
    assert compute_step_rewards(tokenizer, nothing) == [(0, 0.0)]


def test_a_file_of_problems_is_asked_in_a_new_order_every_epoch(warm: Path, tmp_path: Path):
    file = tmp_path / "gsm.jsonl"
    rows = [{"question": "abcde"[i % 5] * (1 + i // 5), "answer": f"{i} #### {i}"} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_grpo(tmp_path / "run", *from_(warm, f"task={file}", "max_steps=1"))
    assert metrics(tmp_path / "run")[-1]["frac_reward_zero_std"] == 1


def test_a_run_that_cannot_learn_stops_and_says_why(warm: Path, tmp_path: Path):
    pairs = from_(warm, "task=reverse:shortest=30,longest=40", "diagnostics_patience=3", "max_steps=50")
    with pytest.raises(GuardStop, match="cannot learn"):
        run_grpo(tmp_path / "run", *pairs)
    assert json.loads((tmp_path / "run" / "crash.json").read_text())["step"] <= 6


@pytest.mark.parametrize(
    ("pairs", "told"),
    [
        (["kl_coef=0.1", "kl_estimator=k1"], "expected gradient of 0"),
        (["kl_coef=0.1", "kl_placement=reward"], "k1"),
        (["kl_coef=-1"], "kl_coef"),
        (["top_k=20"], "another distribution"),
        (["loss_type=sapo", "loss_kwargs.epsilon_high=0.3"], "no effect on sapo"),
        (["loss_type=reinforce", "loss_kwargs.epsilon_low=0.3"], "no numbers"),
        (["normalize_rewards_separately=true"], "no effect"),
        (["process_supervision=true", "loss_type=gspo"], "gspo_token"),
        (["process_supervision=true", "advantage_estimator=mean"], "no effect"),
        (["warmup=null"], "fresh model"),
        (["rewards=[{name: model}]"], "needs its folder"),
        (["rewards=[{name: correct, load: x}]"], "no effect"),
        (["num_generations=0"], "whole number"),
        (["attention_coef=0.5"], "differ from itself"),
        (["attention_coef=0.5", "num_iterations=2", "techniques=[taps]"], "taps disturbs"),
        (["attention_coef=0.5", "num_iterations=2", "compile=true"], "compile=false"),
        (["loss_type=gropo"], "did you mean 'grpo'"),
    ],
)
def test_settings_without_sense_are_refused_before_anything_runs(pairs: list[str], told: str):
    with pytest.raises(UsageError, match=told):
        parse_config(GrpoConfig, apply_overrides(read_yaml(RECIPE, "recipe.yaml"), pairs))


@pytest.mark.parametrize("variant", POLICY_VARIANTS)
def test_every_variant_may_be_taken_with_the_recipes_defaults(variant: str):
    config = parse_config(GrpoConfig, load_raw_config("grpo", [f"loss_type={variant}"]))
    assert config.loss_type == variant


def test_an_explicit_wish_for_groups_that_dynamic_sampling_removes_is_refused():
    with pytest.raises(UsageError, match="leaves no group without spread"):
        parse_config(GrpoConfig, load_raw_config("grpo", ["loss_type=dapo", "keep_zero_std_groups=true"]))


def test_mistakes_that_only_the_run_can_see(warm: Path, tmp_path: Path):
    with pytest.raises(UsageError, match="compared with others of its group"):
        run_grpo(tmp_path / "a", *from_(warm, "num_generations=1"))
    with pytest.raises(UsageError, match="no task is called 'revers', did you mean 'reverse'"):
        run_grpo(tmp_path / "b", *from_(warm, "task=revers"))
    with pytest.raises(DataError, match="there is no file"):
        run_grpo(tmp_path / "c", *from_(warm, "task=nothing.jsonl"))
    with pytest.raises(DataError, match="no room"):
        run_grpo(tmp_path / "d", *from_(warm, "max_new_tokens=1000", "eval_problems=1"))
    with pytest.raises(UsageError, match="warmup has no effect"):
        run_grpo(tmp_path / "e", "model=null", f"model.load={warm}")


class Interrupting(Reverse):
    """Ctrl-C while the rows of step 31 are drawn, four a step."""

    __qualname__ = "Reverse"
    drawn = itertools.count()

    def demonstrate(self, problem: Problem, chance: random.Random) -> str:
        if next(self.drawn) == 30 * 4:
            os.kill(os.getpid(), signal.SIGINT)
        return super().demonstrate(problem, chance)


def test_an_interrupted_warm_up_stops_and_goes_on_to_the_same_bits(tmp_path: Path):
    settings = apply_overrides(
        read_yaml(RECIPE, "recipe.yaml"), ["warmup={batch_size: 4, max_steps: 60, target_accuracy: 1.0}"]
    )
    config = parse_config(GrpoConfig, settings)

    def warm_up(task: Reverse, name: str) -> list[str]:
        said: list[str] = []
        try:
            tokenizer = character_tokenizer(task.alphabet)
            model = init_model(config.model, settings, tokenizer, context=WARMUP_CONTEXT, seed=config.seed)
            folder, log = tmp_path / name, said.append
            run_sft_warmup(config, config.warmup, model, tokenizer, task, 5, folder, DistributedContext(), log)
        except KeyboardInterrupt:
            said.append("stopped")
        return said

    said = warm_up(Interrupting(3, 3, 8, 0.5), "halved")
    assert said[1:] == ["stopped"]
    assert f"saved at step 31. quest train {tmp_path} goes on" in said[0]
    assert warm_up(Reverse(3, 3, 8, 0.5), "halved") == warm_up(Reverse(3, 3, 8, 0.5), "whole")
    assert weights(tmp_path / "halved", 60) == weights(tmp_path / "whole", 60)
