"""Makes the page of each subject from its source. A page has the same parts in the same order: the question, the idea,
the numbers or figure, the code, how it is switched on, what breaks without it, what is commonly got wrong, sources."""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING

from book.api import Module, module_name
from book.blocks import (
    card_block,
    code_block,
    exercises_block,
    figure_block,
    mistakes_block,
    mutation_block,
    mutations_of,
    mutations_of_tests,
    recorded_block,
    recorded_mutations,
)
from book.catalog import Subject, read_questions, read_titles, techniques
from book.equations import symbol_rows
from book.markdown import Renderer, color_code, output_block
from book.run import Examples
from book.source import (
    PACKAGE,
    ROOT,
    code_of,
    docstring_of,
    flat,
    opening_sentence,
    papers_of,
    paragraphs,
    public_names,
    split_mistakes,
)
from book.switch import switch_section

if TYPE_CHECKING:
    from llm_quest.papers import Paper

Section = tuple[str, str]
"""(heading, HTML)."""

MAX_CODE_LINES = 60
PAGE_FIGURES = {
    "layer/scaled_dot_product": "masks", "layer/rotary": "rotary", "layer/kv_cache": "cache",
    "technique/softcap": "softcap", "technique/length": "rotary", "objective/preference_losses": "preference",
    "objective/surrogates": "clipping", "layer/latent_attention": "latent", "layer/delta_net": "cache",
}  # fmt: skip
PAPER_PAGES = {
    "technique/qk_clip": "qk_clip", "technique/dyt": "dyt", "technique/hyper_connections": "hyper_connections",
    "layer/hyper_connections": "hyper_connections", "technique/length": "yarn", "technique/multi_token": "multi_token",
    "layer/multi_token_prediction": "multi_token", "layer/moe": "fine_grained", "objective/routing": "expert_bias",
    "objective/number_token": "number_token", "technique/lora": "lora", "technique/dora": "dora",
    "technique/rslora": "rslora", "technique/softcap": "soft_cap", "objective/surrogates": "gspo",
    "objective/policy_gradient": "dr_grpo", "objective/process_reward": "process",
    "objective/preference_losses": "label_noise", "objective/reward_model": "kl_penalty",
    "recipe/rpt": "rpt", "recipe/grpo": "countdown", "recipe/gkd": "gkd", "layer/latent_attention": "mla",
    "layer/delta_net": "gated_deltanet", "family/gpt_oss": "sinks", "family/olmo2": "post_norm",
}  # fmt: skip
"""The card in which a subject was measured."""
BENCHMARKS = {
    "layer/kv_cache": "Cache size", "layer/latent_attention": "Cache size", "layer/delta_net": "Mixers",
    "layer/attention": "Mixers", "layer/quantized": "Quantized weights", "layer/quantized_kernels": "Quantized weights",
    "layer/weight_formats": "Quantized weights", "technique/quantize": "Quantized weights", "layer/vision": "Images",
    "layer/scaled_dot_product": "Ragged prompts and packed rows", "technique/dora": "Adapters",
    "technique/rslora": "Adapters", "technique/lora_xs": "Adapters", "layer/low_rank": "Adapters",
    "objective/cross_entropy": "The loss at a large vocabulary", "objective/next_token": "Training, 11M Llama shape",
    "recipe/pretrain": "Training, 11M Llama shape", "recipe/dpo": "A DPO step", "objective/preference": "A DPO step",
    "recipe/vit": "Images", "generation/decoding": "Generation with a cache",
    "generation/generate": "Generation with a cache", "generation/compiled": "Generation with a cache",
    **{f"generation/{one}": "Speculative decoding" for one in ("decoder", "draft_length", "draft_model", "drafters",
       "mtp_drafter", "ngram_drafter", "rejection_sampler", "target_model")},
    "family/deepseek_v3": "Cache size", "family/qwen3_next": "Mixers", "family/llama": "Training, 11M Llama shape",
    "family/vit": "Images", "objective/log_probs": "A GRPO step",
}  # fmt: skip
"""The section of docs/benchmarks.md in which a subject was measured."""


def title_of(subject: Subject) -> str:
    """A paper's title, else what its field calls the subject; its name in the code where nothing says that."""
    return paper_of(subject).title if subject.kind == "paper" else read_titles().get(subject.key) or subject.name


def paper_of(subject: Subject) -> Paper:
    from llm_quest.papers import load_paper

    return load_paper(subject.name)


def make_sections(subject: Subject, markdown: Renderer, examples: Examples | None = None) -> list[Section]:
    """The parts of a page; those that a subject does not have are left out. examples: where its command runs; None: the
    command is shown alone."""
    makers = {"family": family_sections, "recipe": recipe_sections, "paper": paper_sections}
    parts = [("Idea", idea(subject, markdown)), *makers.get(subject.kind, code_sections)(subject, markdown)]
    options = technique_options(subject.name) if subject.kind == "technique" else ""
    parts += [("Switch it on", switch_section(subject, examples) + options)]
    if subject.kind != "paper":
        parts += [
            ("What breaks without it", breaks(subject, markdown)),
            ("Commonly got wrong", mistakes_block(subject.file)),
            ("Measured here", measured(subject, markdown)),
        ]
    parts += [("Exercises", exercises_block(subject.key, subject.file))]
    parts += [("Sources", sources(subject))] if subject.kind != "paper" else []
    return [(heading, body) for heading, body in parts if body]


def summary_of(subject: Subject) -> str:
    """The first sentence of what a page says, for lists and search; of several subjects in a file, their own."""
    own = docstring_of(f"{subject.file}:{subject.anchor}") if subject.file in shared_files() else ""
    return opening_sentence(split_mistakes(own)[0] or docstring_text(subject))


@cache
def shared_files() -> frozenset[str]:
    """Files that hold several techniques."""
    files = [one.file for one in techniques()]
    return frozenset(one for one in files if files.count(one) > 1)


def docstring_text(subject: Subject) -> str:
    """The docstring of the file, or of the class where several subjects share a file; a paper's claim."""
    if subject.kind == "paper":
        return paper_of(subject).claim
    whole = docstring_of(subject.file)
    own = docstring_of(f"{subject.file}:{subject.anchor}") if subject.anchor else ""
    return split_mistakes(f"{whole}\n\n{own}" if own else whole)[0]


def idea(subject: Subject, markdown: Renderer) -> str:
    figure, text = PAGE_FIGURES.get(subject.key), docstring_text(subject)
    return markdown(text) + symbols_table(subject, text) + (figure_block(figure) if figure else "")


def symbols_table(subject: Subject, text: str) -> str:
    """What the symbols of a page's equations mean."""
    rows = [[code(symbol), html.escape(meaning)] for symbol, meaning in symbol_rows(subject, text)]
    return f"<h3>Symbols</h3>{table(('symbol', 'meaning'), rows)}" if rows else ""


def breaks(subject: Subject, markdown: Renderer) -> str:
    """Mistakes that were made on purpose: in the file, or caught by the tests of a family or recipe; and where those in
    what a recipe is made of are shown."""
    named = mutations_of_tests(subject.name, same_kind(subject.kind)) if subject.kind in ("family", "recipe") else []
    made = list(dict.fromkeys([*mutations_of(subject.file), *named]))
    found = len(made) + len(recorded_mutations(subject.file))
    count = f"{found} mistake{'s were' if found > 1 else ' was'} made on purpose; a test failed each time."
    shown = "".join(map(mutation_block, made)) + recorded_block(subject.file)
    return (f"<p>{count}</p>{shown}" if found else "") + parts_of_recipe(subject, markdown)


@cache
def same_kind(kind: str) -> frozenset[str]:
    """The names of all pages of a kind."""
    return frozenset(key.partition("/")[2] for key in read_questions() if key.startswith(f"{kind}/"))


def parts_of_recipe(subject: Subject, markdown: Renderer) -> str:
    """The pages of the objectives that a recipe imports."""
    text = (PACKAGE / subject.file).read_text(encoding="utf-8") if subject.kind == "recipe" else ""
    used = dict.fromkeys(re.findall(r"from llm_quest\.objectives\.(\w+) import", text))
    links = ", ".join(f"[[objective/{one}]]" for one in used)
    return markdown(f"Mistakes in what it trains with: {links}.") if links else ""


def measured(subject: Subject, markdown: Renderer) -> str:
    """The verdict of a card, and the table of a benchmark."""
    name, heading = PAPER_PAGES.get(subject.key), BENCHMARKS.get(subject.key)
    card = f"The claim and its control: [[paper/{name}]].\n\n{verdict(name)}\n\n" if name else ""
    return markdown(card + (benchmark(heading) if heading else "")) if card or heading else ""


def benchmark(heading: str) -> str:
    """The first paragraph and the first table of a section of docs/benchmarks.md, and a link to it."""
    text = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {re.escape(heading)}\n\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        raise ValueError(f"docs/benchmarks.md has no section {heading!r}")
    parts = found[1].split("\n\n")
    table_at = next((number for number, part in enumerate(parts) if part.startswith("|")), 0)
    return "\n\n".join([*parts[: table_at + 1], "More, and what it was measured on: [[reference/benchmarks]]."])


def verdict(name: str) -> str:
    """The verdict of a card, in its own words; empty without a card."""
    file = ROOT / f"docs/papers/{name}.md"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = re.search(r"## (Verdict: .*?)\n\n(.*?)\n\n", text, re.S)
    return f"**{found[1]}**: {found[2]}" if found else "Not measured yet."


def sources(subject: Subject) -> str:
    links = "".join(
        f'<li><a href="https://arxiv.org/abs/{one}">arXiv:{one}</a></li>' for one in papers_of(subject.file)
    )
    place = f'<a href="../{Module(subject.file, module_name(subject.file)).path}">llm_quest/{subject.file}</a>'
    return f"<ul>{links}<li>The code: {place}</li></ul>"


def code_sections(subject: Subject, markdown: Renderer) -> Iterator[Section]:
    """The code of a layer, technique or objective, and how it is switched on."""
    yield "Code", code_of_subject(subject)
    if subject.kind == "layer":
        yield "Where it is used", markdown(", ".join(f"[[family/{one}]]" for one in users_of(subject.file)))


def code_of_subject(subject: Subject) -> str:
    """Its own class, or the public names of its file until the page is long; the rest is named."""
    names = [subject.anchor] if subject.anchor else public_names(subject.file)
    stem = subject.name.replace("_", "")
    names.sort(key=lambda name: stem not in name.lower())  # GatedDeltaNet is what delta_net.py is about
    shown, lines = [], 0
    for name in names:
        lines += code_of(f"{subject.file}:{name}").text.count("\n") + 1
        if shown and lines > MAX_CODE_LINES:
            break
        shown.append(definition_section(subject.file, name))
    rest = names[len(shown) :]
    more = f"<p>Also in the file: {', '.join(map(code, rest))}.</p>" if rest else ""
    return "".join(shown) + more


def definition_section(file: str, name: str) -> str:
    """A definition with its first sentence."""
    said = (
        flat(paragraphs(split_mistakes(docstring_of(f"{file}:{name}"))[0] or "\n")[0])
        if docstring_of(f"{file}:{name}")
        else ""
    )
    return f'<h3 id="{name}">{name}</h3><p>{html.escape(said)}</p>{code_block(f"{file}:{name}")}'


def code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells."""
    heads = "".join(f"<th>{one}</th>" for one in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table tabindex="0"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>'


@cache
def layer_users() -> dict[str, list[str]]:
    """A file of layers/ -> the families whose files import it, or whose models have a module of it."""
    from llm_quest.cli.models import ALL_FAMILIES
    from llm_quest.models.build import build_meta_model

    found: dict[str, list[str]] = {}
    for family in ALL_FAMILIES:
        text = inspect.getsource(inspect.getmodule(family.assemble))  # type: ignore[arg-type]
        places = {type(one).__module__ for one in build_meta_model(family.presets[-1].config).modules()}
        built = [one.rpartition(".")[2] for one in sorted(places) if one.startswith("llm_quest.layers.")]
        for name in dict.fromkeys([*re.findall(r"from llm_quest\.layers\.(\w+) import", text), *built]):
            found.setdefault(f"layers/{name}.py", []).append(family.name)
    return found


def users_of(file: str) -> list[str]:
    return layer_users().get(file, [])


def technique_options(name: str) -> str:
    """The options of a technique."""
    from llm_quest.cli.techniques import list_techniques

    entry = next(one for one in list_techniques().entries if one.name == name)
    rows = [[code(one.name), html.escape(one.takes), code(one.default)] for one in entry.options]
    return table(("option", "takes", "default"), rows) if rows else ""


def family_sections(subject: Subject, markdown: Renderer) -> Iterator[Section]:
    """The blocks, sizes and file of a family, and its difference from the family that it builds on."""
    from llm_quest.cli.diagram import draw_model
    from llm_quest.cli.models import ALL_FAMILIES
    from llm_quest.models.build import build_meta_model

    family = next(one for one in ALL_FAMILIES if one.name == subject.name)
    published = [one for one in family.presets if one.num_parameters] or list(family.presets)
    yield "Blocks", output_block("\n".join(draw_model(build_meta_model(published[0].config))))
    rows = [[code(one.name), f"{one.num_parameters or 0:,}", html.escape(one.hub_id or "")] for one in published]
    yield "Sizes", table(("preset", "parameters", "hub id"), rows)
    yield "The file", code_block(subject.file)
    yield "Difference", difference(family, markdown)
    yield "Use it", color_code(
        f"$ quest show {published[0].name}\n$ quest train pretrain model.preset={family.presets[-1].name}\n"
        f"$ quest generate {published[0].hub_id or 'FOLDER'} -p \"Once upon a time\"", "console"
    )  # fmt: skip


def parent_of(family: object) -> str:
    """The family that a file builds on: the one that it imports, else Llama, whose parent is GPT-2."""
    from llm_quest.cli.diff import parent_families

    found = parent_families(inspect.getmodule(family.assemble))  # type: ignore[attr-defined,arg-type]
    if found:
        return found[0]
    name: str = family.name  # type: ignore[attr-defined]
    return {"gpt2": "", "llama": "gpt2", "vit": "", "clip": "vit", "gpt_neox": "gpt2"}.get(name, "llama")


def difference(family: object, markdown: Renderer) -> str:
    """The layers that a family adds to its parent and removes, with the sentence that defines each."""
    from llm_quest.cli.diff import family_layers
    from llm_quest.cli.models import ALL_FAMILIES

    parent = parent_of(family)
    if not parent:
        return ""
    old = family_layers(next(one for one in ALL_FAMILIES if one.name == parent))
    new = family_layers(family)  # type: ignore[arg-type]
    changed = [("-", name, text) for name, text in old.items() if name not in new]
    changed += [("+", name, text) for name, text in new.items() if name not in old]
    text = "\n".join(f"{mark} {name}: {said}" for mark, name, said in changed)
    said = markdown(f"Against [[family/{parent}]]" + (":" if text else ", no layer is new: the numbers differ."))
    own: str = family.name  # type: ignore[attr-defined]
    return said + (color_code(text, "diff") if text else "") + color_code(f"$ quest diff {parent} {own}", "console")


def recipe_sections(subject: Subject, markdown: Renderer) -> Iterator[Section]:
    """The code of a recipe, its command, and all its settings."""
    from llm_quest.recipes.settings_reference import make_page

    yield "Run it", color_code(f"$ quest train {subject.name}\n$ quest plan {subject.name}", "console")
    yield "Code", code_of_subject(subject)
    rows = [
        [code(one.key), html.escape(one.takes), code(one.default), html.escape(one.description)]
        for one in make_page(subject.name).settings
    ]
    yield "Settings", table(("setting", "takes", "default", "what it is for"), rows)


def paper_sections(subject: Subject, markdown: Renderer) -> Iterator[Section]:
    """The card of a claim with its plot, and the row that defines it."""
    file = ROOT / f"docs/papers/{subject.name}.md"
    if file.is_file():
        card = file.read_text(encoding="utf-8").split("\n", 2)[2]
        text, _, after = card.partition(f"]({subject.name}.svg)")
        before = re.sub(r"!\[[^\]]*$", "", text)
        yield "Card", markdown(re.sub(r"^## ", "### ", before, flags=re.M)) + card_block(subject.name) + markdown(after)
    paper = paper_of(subject)
    source = f"https://arxiv.org/abs/{paper.arxiv}"
    text = (PACKAGE / subject.file).read_text(encoding="utf-8")
    row = re.search(rf"^{subject.name}:\n(?: .*\n)+", text, re.M)
    assert row is not None, "a claim is a row of its file"
    place = f"<figcaption>llm_quest/{subject.file}</figcaption>"
    yield "The experiment", f'<figure class="source">{place}{color_code(row[0], "yaml")}</figure>'
    yield "Sources", f'<ul><li><a href="{source}">arXiv:{paper.arxiv}</a></li></ul>'
