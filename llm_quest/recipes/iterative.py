"""`quest train iterative`: GRPO with a reward model that is trained on (DeepSeekMath, arXiv:2402.03300, algorithm 1).

      judge 0   from policy 0 and its samples, labelled by the verifier
      policy i  GRPO from policy i-1, its reference, under judge i-1
      judge i   trained on with comparisons of policy i's samples, a tenth of each batch from earlier iterations

Every stage is a run of its own in the folder, so the whole goes on where it was interrupted. In the metrics of a policy
`reward_model` is what it is trained for and `reward` is what it is worth: where they part, the judge is being fooled.
Not said in the paper: the policy's optimiser begins anew in every iteration."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm_quest.data.preferences import Rated
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.disk import replace_json
from llm_quest.errors import UsageError
from llm_quest.hub.files import load, load_tokenizer, write_model_json
from llm_quest.models.decoder import Decoder
from llm_quest.objectives.reward_model import RewardLoss
from llm_quest.recipes.course import Outcome, company, founded
from llm_quest.recipes.grpo import Say, asking, begun, posed, train_grpo
from llm_quest.recipes.grpo_config import Grpo, Named
from llm_quest.recipes.iterative_config import Iterative
from llm_quest.recipes.parts import Model
from llm_quest.recipes.policy import writer_of
from llm_quest.recipes.yaml import Settings
from llm_quest.rollouts.rewards import Correct
from llm_quest.rollouts.scored import ReplayFeed, comparisons
from llm_quest.rollouts.writer import Question
from llm_quest.techniques.score_head import ScoreHead, score_head
from llm_quest.train.loop import train
from llm_quest.train.optimizers import adamw
from llm_quest.train.parallel import Parallel
from llm_quest.train.run import Run
from llm_quest.train.settings import Settings as LoopSettings
from llm_quest.train.state import derive_seed


def train_iterative(
    config: Iterative, settings: Settings, out: Path, *, resume: str = "auto", env: Mapping[str, Any] | None = None,
    quiet: bool = False, say: Say = print,
) -> Outcome:  # fmt: skip
    """Run the recipe in a folder; the outcome is that of the last policy."""
    with company(config, config.rollout.prompts) as parallel:
        if parallel.world > 1:
            raise UsageError("iterative trains its judges in one process; drop torchrun (grpo takes several)")
        founded(config, out, parallel)
        begun(config, settings, out, parallel, say)
        policy = config.model.load or str(out / "warmup")
        judge, outcome = config.judge.load, None
        for number in range(config.iterations + 1):
            folder = out / f"iteration-{number}"
            if number > 0:
                stage = staged(config, policy, str(judge), number)
                outcome = train_grpo(stage, settings, folder / "policy", resume=resume, env=env, quiet=quiet, say=say)
                policy = str(folder / "policy")
                if outcome.status != "finished":
                    return outcome
            if number > 0 or judge is None:
                judge = str(judged(config, policy, judge, out, number, parallel, say))
        assert outcome is not None
        return outcome


def staged(config: Iterative, policy: str, judge: str, number: int) -> Grpo:
    """One iteration's policy run: the verifier watches, the judge rewards."""
    given = config.model_dump(exclude={"iterations", "judge", "recipe", "model", "warmup", "rewards", "seed"})
    rewards = (Named(name="correct", weight=0.0), Named(name="model", load=judge))
    seed = config.seed + number
    return Grpo(recipe="grpo", model=Model(load=policy), warmup=None, rewards=rewards, seed=seed, **given)


def judged(
    config: Iterative, policy: str, judge: str | None, out: Path, number: int, parallel: Parallel, say: Say
) -> Path:
    """The judge of this iteration, trained on; its folder."""
    folder, part = out / f"iteration-{number}" / "judge", config.judge
    file = out / f"iteration-{number}" / "comparisons.json"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_json(file, [spelled(one) for one in compared_by(config, policy, number, parallel)])
    new = read(file)
    history = [one for earlier in range(number) for one in read(out / f"iteration-{earlier}" / "comparisons.json")]
    if not new and judge is not None:
        say(f"judge {number}: no question has both right and wrong answers any more; it stays what it was")
        return Path(judge)
    model, tokenizer = judge_of(judge or policy, derive_seed(config.seed, "judge"))
    objective = parallel.place(RewardLoss(model))
    feed = ReplayFeed(new, history, rows=part.rows, share=part.replay, seed=derive_seed(config.seed, f"judge {number}"))
    with Run(folder, identity={"tokenizer": tokenizer.hash}) as run:
        write_model_json(folder, model)
        tokenizer.save(folder / "tokenizer", model_max_length=model.config.context)
        result = train(
            objective, feed, adamw(model, lr=part.lr), lambda step: 1.0,
            LoopSettings(steps=part.steps, log_every=10, keep=1), run, parallel=parallel,
        )  # fmt: skip
    right = result.metrics["rewards/accuracy"]
    say(f"judge {number}: {len(new)} new comparisons, {len(history)} earlier ones; {right:.0%} of the last batch right")
    return folder


def judge_of(where: str, seed: int) -> tuple[Decoder, Tokenizer]:
    """A reward model; a language model's head is replaced."""
    model = load(where, dtype="float32", aligned=True)
    return (model if score_head(model) is not None else ScoreHead(1, seed=seed)(model)), load_tokenizer(where)


def compared_by(config: Iterative, policy: str, number: int, parallel: Parallel) -> Sequence[Rated]:
    """What the policy writes now, better beside worse by the verifier's word."""
    model, tokenizer = load(policy, dtype="float32", aligned=True).to(parallel.device), load_tokenizer(policy)
    encode, problems = asking(config, tokenizer), posed(config)
    asked = [problems.train(10_000_000 * (number + 1) + index) for index in range(config.judge.questions)]
    questions = [Question(tuple(encode(problem.prompt)), problem) for problem in asked]
    seed = derive_seed(config.seed, f"comparisons {number}")
    groups = writer_of(config, model, tokenizer, parallel)(model, questions, config.rollout.group, seed)
    return comparisons(groups, Correct(), seed)


def spelled(one: Rated) -> list[list[int]]:
    return [part.tolist() for part in (one.prompt, *one.answers)]


def read(file: Path) -> list[Rated]:
    """Comparisons from their file; none where there is none (a judge that was loaded had no iteration 0)."""
    if not file.is_file():
        return []
    ids = partial(np.array, dtype=np.int64)
    return [Rated(ids(p), tuple(ids(a) for a in answers)) for p, *answers in json.loads(file.read_text())]
