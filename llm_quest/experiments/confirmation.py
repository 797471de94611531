"""Plans a confirmation: arms that were decided on the dev half of the held-out data are compared again on the test half
and on fresh seeds (`quest ablate --confirm EXPERIMENT`).

    dev     every experiment is tuned and scored on it, any number of times
    test    only confirmations are scored on it: one for each experiment, at most MAX_CONFIRMATIONS in a ledger, and
            each is a row of the ledger before its first run

Arms, budget, delta and cap are those of the experiment, the learning rates those that it tuned, and the arms those that
it decided: better, worse, or no difference. The result says whether each verdict came again (`confirmed`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from llm_quest.errors import DataError, UsageError
from llm_quest.experiments.arms import CONTROL, DEV, TEST, Arm
from llm_quest.experiments.code_tree import CodeTree, load_code_tree, open_edit, own_code
from llm_quest.experiments.comparison import Claim, Decided
from llm_quest.experiments.experiment import ExperimentPlan
from llm_quest.experiments.ledger import Ledger, Row, find_experiment
from llm_quest.recipes.recipe import load_recipe

MAX_CONFIRMATIONS = 20
FIRST_FRESH_SEED, SEEDS_EACH = 401, 100
DECIDED = get_args(Decided)
"""Outcomes that can be asked once more."""


def has_halves(recipe: str, pairs: Sequence[str]) -> bool:
    """Whether a recipe can be scored on a half of its held-out data. Problems that a task draws have no halves."""
    try:
        load_recipe(recipe, [*pairs, DEV])
    except UsageError:
        return False
    return True


def plan_confirmation(ledger: Ledger, name: str, code: Sequence[str], copies: Path, command: str) -> ExperimentPlan:
    """The plan of a confirmation, the same each time it is asked for; its row is added to the ledger. name: or the
    beginning of one. UsageError where there is nothing to confirm."""
    rows = ledger.rows()
    claims = {row["experiment"]: row for row in reversed(rows) if row["kind"] == "claim"}
    name = find_experiment([*claims][::-1], name, ledger.file)
    claim = claims[name]
    try:
        plan = plan_of_claim(claim, find_decided_verdicts(rows, name), [*code], copies, command)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"--confirm {name}: its rows in {ledger.file} lack what a confirmation needs ({error!r}); run the "
            "experiment again"
        ) from None
    opened = [row for row in rows if row["kind"] == "confirmation"]
    own_row = next((row for row in opened if row["experiment"] == name), None)
    if own_row is None and len(opened) >= MAX_CONFIRMATIONS:
        raise UsageError(
            f"the test half of {ledger.file} was opened {len(opened)} times, and what is chosen by it is no longer "
            "tested by it: hold out other documents (data.held_out, data.validation), with another ledger (--out)"
        )
    first = own_row["first_seed"] if own_row else fresh_seed(rows, plan.claim.cap)
    plan = ExperimentPlan(**{**vars(plan), "first_seed": first})
    where = "the test half" if TEST in plan.pairs else "fresh seeds"
    sentence = f"asked once more on {where}, seeds from {first}: {plan.experiment}"
    arms = [arm.name for arm in plan.arms]
    ledger.append(
        "confirmation", name, {"sentence": sentence, "by": plan.experiment, "first_seed": first, "arms": arms}
    )
    return plan


def find_decided_verdicts(rows: Sequence[Row], name: str) -> dict[str, Row]:
    """The newest verdicts of an experiment that decide something, by arm."""
    verdicts = {row["arm"]: row for row in rows if row["experiment"] == name and row["kind"] == "verdict"}
    kept = {arm: row for arm, row in verdicts.items() if row["outcome"] in DECIDED}
    if not kept:
        outcomes = ", ".join(f"{arm}: {row['outcome']}" for arm, row in verdicts.items()) or "it has no verdict yet"
        raise UsageError(f"--confirm {name}: no arm of it is decided ({outcomes})")
    return kept


def plan_of_claim(
    claim: Row, kept: Mapping[str, Row], code: list[str], copies: Path, command: str
) -> ExperimentPlan:  # fmt: skip
    """The plan of an experiment's kept arms on the test half. UsageError for one that was scored on all held-out
    data, or by other code than this package's."""
    name, settings = claim["experiment"], tuple(claim["settings"])
    own = own_code()
    if claim["arms"][CONTROL]["code"] != own.hash:
        raise UsageError(
            f"--confirm {name}: the package has changed since; run the experiment again, or go back to that code"
        )
    if DEV in settings:
        settings = tuple(TEST if pair == DEV else pair for pair in settings)
    elif has_halves(claim["recipe"], settings):
        raise UsageError(
            f"--confirm {name}: it was scored on all held-out data, so no half is left to test it; run it again "
            "without data.eval_part"
        )
    trees = {own.hash: own, **{tree.hash: tree for tree in edited_trees(code, copies)}}
    arms = [rebuild_arm(arm, claim["arms"][arm], verdict, trees) for arm, verdict in kept.items()]
    rate = next(iter(kept.values()))["learning_rates"][CONTROL]
    return ExperimentPlan(
        claim["recipe"], (*settings, f"learning_rate={rate:g}"), tuple(arms), Arm(CONTROL, (), own),
        Claim(**claim["claim"]), claim["budget"], 1, 1, 0, 1, tuple(claim["secondary"]), claim["question"], command,
        confirms=name, confirms_outcomes=tuple((arm, verdict["outcome"]) for arm, verdict in kept.items()),
    )  # fmt: skip


def edited_trees(code: Sequence[str], copies: Path) -> list[CodeTree]:
    """The edited packages that are at hand: copies that patches were applied to, and worktrees that are given again."""
    folders = [folder for folder in copies.glob("*") if (folder / "llm_quest").is_dir()]
    return [*(load_code_tree(folder) for folder in folders), *(open_edit(given, copies) for given in code)]


def rebuild_arm(name: str, arm: Mapping[str, Any], verdict: Row, trees: Mapping[str, CodeTree]) -> Arm:
    """An arm with its tuned rate. DataError where its edited code is gone."""
    if arm["code"] not in trees:
        raise DataError(f"the edited package of {name} is no longer there; give it again: --code PATCH|WORKTREE")
    pairs = (*arm["settings"], f"learning_rate={verdict['learning_rates'][name]:g}")
    return Arm(name, pairs, trees[arm["code"]], arm.get("metric", ""))


def fresh_seed(rows: Sequence[Row], cap: int) -> int:
    """The first of `cap` seeds that no run of the ledger has."""
    used = {row["seed"] for row in rows if row["kind"] in ("run", "started")}
    used |= {row["first_seed"] for row in rows if row["kind"] == "confirmation"}
    first = FIRST_FRESH_SEED
    while used & set(range(first, first + cap)):
        first += SEEDS_EACH
    return first
