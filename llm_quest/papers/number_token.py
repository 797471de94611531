"""Number Token Loss (Zausinger et al. 2024, arXiv:2411.02083): does it lower the error of generated numbers?"""

from __future__ import annotations

from collections.abc import Callable

from llm_quest.data.loader import ShardedLoader
from llm_quest.data.problems import Problem, draw_problem, make_task
from llm_quest.data.vocabulary import character_tokenizer
from llm_quest.data.whole_documents import Demonstrations
from llm_quest.eval.problems import sample_answers
from llm_quest.generation.sampling import SamplingParams
from llm_quest.objectives.next_token import NextTokenLoss
from llm_quest.objectives.number_token import NumberTokenLoss, number_values
from llm_quest.papers.lab import init_lab_model, small_llama_config, train_lab_model
from llm_quest.papers.paper import CurvePlot, ExperimentResults, Measurement, Paper, Verdict, verdict_from_interval
from llm_quest.rollouts.verifiers import parse_number, verify_answer
from llm_quest.train.optimizers import make_adamw

STEPS, LEARNING_RATE, WEIGHT, PROBLEMS = 250, 2e-3, 0.3, 300
TASK = make_task("addition", {"digits": 2})
TOKENIZER = character_tokenizer(TASK.alphabet)


def make_arm(distance: str | None) -> Callable[[int], Measurement]:
    def run_arm(seed: int) -> Measurement:
        config = small_llama_config(width=64, layers=2, context=16, vocab=TOKENIZER.vocab_size)
        model = init_lab_model(config, seed)
        auxiliary = [] if distance is None else [number_token_term(distance)]
        loader = ShardedLoader(Demonstrations(TASK, TOKENIZER), batch_size=128, micro_batch_size=128, seed=seed)
        trace = train_lab_model(
            NextTokenLoss(model, auxiliary=auxiliary),
            loader,
            make_adamw(model, lr=LEARNING_RATE),
            steps=STEPS,
            seed=seed,
            warmup=20,
        )
        model.eval()
        problems = [draw_problem(TASK, "test", index) for index in range(PROBLEMS)]
        groups = sample_answers(
            model, TOKENIZER, problems, SamplingParams(temperature=0.0), encode_prompt=encode_problem, max_new_tokens=6
        )
        found = [parse_number(group[0].text) for group in groups]
        errors = [
            abs(float(value) - int(problem.answer)) if value is not None else float(problem.answer)
            for value, problem in zip(found, problems, strict=True)
        ]
        right = sum(verify_answer(problem, group[0].text) for problem, group in zip(problems, groups, strict=True))
        return Measurement({"mean absolute error": sum(errors) / PROBLEMS, "accuracy": right / PROBLEMS}, trace.losses)

    return run_arm


def encode_problem(problem: Problem) -> list[int]:
    return [TOKENIZER.start_token_id, *TOKENIZER.encode(problem.prompt, add_special_tokens=False)]


def number_token_term(distance: str) -> NumberTokenLoss:
    """The loss that is added to cross-entropy."""
    return NumberTokenLoss(number_values(TOKENIZER, TOKENIZER.vocab_size), weight=WEIGHT, distance=distance)


ARMS = {"cross-entropy": make_arm(None), "with WAS": make_arm("was"), "with MSE": make_arm("mse")}


def verdict(results: ExperimentResults) -> Verdict:
    gain = results.difference("with WAS", "cross-entropy", "mean absolute error")
    share = results.difference("with WAS", "cross-entropy", "accuracy")
    words = f"WAS changes the mean absolute error by {gain} and the accuracy by {share}"
    return verdict_from_interval(gain, words, wanted="negative")


PAPER = Paper(
    name="number_token",
    title="Regress, Don't Guess: A Regression-like Loss on Number Tokens",
    arxiv="2411.02083",
    claim="A loss that depends on the distance between digits lowers the error of generated numbers.",
    experiment=f"A 0.1M-parameter Llama learns two-digit addition, digit by digit, for {STEPS} steps of 128 sums; "
    f"{PROBLEMS} held-out sums are decoded greedily. Control: cross-entropy alone; lambda {WEIGHT:g} for the others.",
    confirms="the mean absolute error falls (95 % interval of the paired difference below zero).",
    refutes="it rises, the interval above zero.",
    arms=ARMS,
    verdict=verdict,
    plot=CurvePlot("step", "training loss (with its own terms)"),
    minutes=6,
)
