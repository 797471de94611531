"""Number Token Loss (Zausinger et al. 2024, arXiv:2411.02083): does it lower the error of predicted numbers?"""

from __future__ import annotations

from collections.abc import Callable

from llm_quest.data.alphabet import character_tokenizer
from llm_quest.data.demonstrations import DemonstrationFeed
from llm_quest.data.problems import draw, task
from llm_quest.generation.sampling import Sampling
from llm_quest.objectives.next_token import NextToken
from llm_quest.objectives.number_token import NumberToken, number_values
from llm_quest.papers.lab import fresh, small_llama, trained
from llm_quest.papers.paper import Measured, Paper, Picture, Results, Verdict, judged
from llm_quest.rollouts.evaluation import answers
from llm_quest.rollouts.verifiers import number, verify
from llm_quest.train.optimizers import adamw

STEPS, RATE, WEIGHT, PROBLEMS = 250, 2e-3, 0.3, 300
TASK = task("addition", {"digits": 2})
TOKENIZER = character_tokenizer(TASK.alphabet)


def arm(distance: str | None) -> Callable[[int], Measured]:
    def run(seed: int) -> Measured:
        config = small_llama(width=64, layers=2, context=16, vocab=TOKENIZER.vocab_size)
        model = fresh(config, seed)
        beside = [] if distance is None else [numbers(distance)]
        feed = DemonstrationFeed(TASK, TOKENIZER, rows=128, seed=seed)
        trace = trained(NextToken(model, beside=beside), feed, adamw(model, lr=RATE), steps=STEPS, seed=seed, warmup=20)
        model.eval()
        problems = [draw(TASK, "test", index) for index in range(PROBLEMS)]
        groups = answers(
            model, TOKENIZER, problems, Sampling(temperature=0.0), encode=spelled,
            max_new_tokens=6,
        )  # fmt: skip
        found = [number(group[0].text) for group in groups]
        errors = [
            abs(float(value) - int(problem.answer)) if value is not None else float(problem.answer)
            for value, problem in zip(found, problems, strict=True)
        ]
        right = sum(verify(problem, group[0].text) for problem, group in zip(problems, groups, strict=True))
        return Measured({"mean absolute error": sum(errors) / PROBLEMS, "accuracy": right / PROBLEMS}, trace.losses)

    return run


def spelled(text: str) -> list[int]:
    return [TOKENIZER.start_id, *TOKENIZER.encode(text, template=False)]


def numbers(distance: str) -> NumberToken:
    """The term beside cross-entropy."""
    return NumberToken(number_values(TOKENIZER, TOKENIZER.vocab_size), weight=WEIGHT, distance=distance)


ARMS = {"cross-entropy": arm(None), "with WAS": arm("was"), "with MSE": arm("mse")}


def judge(results: Results) -> Verdict:
    gain = results.difference("with WAS", "cross-entropy", "mean absolute error")
    share = results.difference("with WAS", "cross-entropy", "accuracy")
    words = f"WAS changes the mean absolute error by {gain} and the accuracy by {share}"
    return judged(gain, words, wanted="negative")


PAPER = Paper(
    name="number_token",
    title="Regress, Don't Guess: A Regression-like Loss on Number Tokens",
    arxiv="2411.02083",
    claim="A loss that knows how far digits lie apart lowers the error of the numbers a model writes.",
    experiment=f"A 0.1M-parameter Llama learns two-digit addition, digit by digit, for {STEPS} steps of 128 sums; "
    f"{PROBLEMS} held-out sums are answered greedily. Control: cross-entropy alone; lambda {WEIGHT:g} for the others.",
    confirms="the mean absolute error falls (95 % interval of the paired difference below zero).",
    refutes="it rises, likewise.",
    arms=ARMS,
    judge=judge,
    picture=Picture("step", "training loss (with its own terms)"),
    minutes=6,
)
