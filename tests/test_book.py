"""The book: every family, layer, technique, objective, recipe, generation method and paper has a page, every anchor and
link leads somewhere, every formula parses. `make book` also runs every example."""

from __future__ import annotations

import html
import itertools
import re
from pathlib import Path

import pytest
import typer

from book import (
    api,
    blocks,
    coverage,
    equations,
    figures,
    flows,
    pages,
    pictures,
    readmes,
    reference,
    site,
    source,
    switch,
)
from book.__main__ import main as book_command
from book.catalog import Subject, all_subjects, read_questions
from book.exercises import EXERCISES, PRACTICED
from book.games import GAMES
from book.markdown import Renderer
from book.run import ExampleError, Examples, example_environment
from book.site import Book, BookError, build_site, check_links, check_questions

ROOT = source.ROOT


@pytest.fixture(scope="module")
def site_and_pages(tmp_path_factory):
    """The site without its figures, and without running the examples."""
    out = tmp_path_factory.mktemp("book") / "site"
    with pytest.MonkeyPatch.context() as patch:
        known = dict.fromkeys(figures.FIGURES, "<p>figure</p>")
        patch.setattr(pages, "figure_block", known.__getitem__)
        patch.setitem(site.BLOCKS, "figure", lambda words, body: known[words])
        return out, build_site(out, run=False, log=lambda text: None)


def test_every_subject_of_the_package_has_a_page_with_its_question_and_code(site_and_pages):
    out, made = site_and_pages
    questions = read_questions()
    for subject in all_subjects():
        text = (out / subject.path).read_text(encoding="utf-8")
        assert "class='question'" in text, subject.key
        assert questions[subject.key].endswith("?"), subject.key
        assert f"<figcaption>llm_quest/{subject.file}" in text, f"{subject.key} shows no code"
    assert len({page.path for page in made}) == len(made)


def test_the_title_of_a_page_is_the_name_of_its_field_and_what_the_code_calls_it_stands_beside(site_and_pages):
    out, made = site_and_pages
    titled = [one for one in made if one.group != "API"]
    assert [one.path for one in titled if re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", one.title)] == []
    assert len({one.title for one in titled}) == len(titled), "two pages of one title"
    for one in (one for one in titled if one.name):
        text = (out / one.path).read_text(encoding="utf-8")
        assert f"<h1>{html.escape(one.title)} <code>{one.name}</code></h1>" in text, one.path
        listed = (out / Path(one.path).parent / "index.html").read_text(encoding="utf-8")
        assert f">{html.escape(one.title)}</a> <code>{one.name}</code>" in listed, one.path


def test_a_page_shows_first_the_class_that_its_file_is_named_after(site_and_pages):
    shown = (site_and_pages[0] / "layer/delta_net.html").read_text(encoding="utf-8")
    assert '<h3 id="GatedDeltaNet">' in shown


def test_a_layer_names_the_families_whose_models_have_it_and_a_chapter_is_summed_up_without_marks():
    assert {"deepseek_v2", "deepseek_v3"} <= set(pages.users_of("layers/latent_attention.py"))
    assert "llama" not in pages.users_of("layers/latent_attention.py")
    book = Book({"norm": ("norm.html", "Norms")})
    assert (
        site.first_paragraph("# A\n\nSee [[norm]], *the* [[norm|one]]\nof `x`.\n\nMore.", book)
        == "See Norms, the one of x."
    )


def test_the_first_sentence_of_a_docstring_ends_before_its_drawing_and_its_options():
    drawn = "A mixer: DPO's kin, by Su et al. Roughly so.\n\n    x -> y\n\nMore."
    assert source.opening_sentence(drawn) == "A mixer: DPO's kin, by Su et al. Roughly so"
    assert source.opening_sentence("Streams of a\nmodel:\n    in -> out\n") == "Streams of a model"
    assert source.opening_sentence("Adapters. rank: r. More.") == "Adapters"
    assert source.opening_sentence("") == ""


def test_every_public_class_and_function_is_on_its_api_page_with_its_signature(site_and_pages):
    out, _ = site_and_pages
    modules = api.all_modules()
    for module in modules:
        text = (out / module.path).read_text(encoding="utf-8")
        for node in api.walk_public(api.public_definitions(module.file)):
            assert f'id="L{node.lineno}"' in text, f"{module.name}.{node.name}"
    assert len(modules) > 400
    norm = (out / "api/llm_quest.layers.norm.html").read_text(encoding="utf-8")
    assert 'id="RMSNorm"' in norm
    assert 'id="RMSNorm.forward"' in norm


def test_the_reference_has_commands_exit_codes_metrics_settings_and_other_projects_names(site_and_pages):
    from llm_quest.cli.main import app
    from llm_quest.cli.techniques import list_techniques
    from llm_quest.errors import QuestError

    out, _ = site_and_pages
    text = {
        name: (out / f"reference/{name}.html").read_text(encoding="utf-8") for name in ("commands", "cli", "glossary")
    }
    for name in typer.main.get_command(app).commands:  # type: ignore[attr-defined]
        assert f"<code>quest {name}</code>" in text["commands"]
    codes = {one.exit_code for one in QuestError.__subclasses__() if isinstance(getattr(one, "exit_code", None), int)}
    assert all(f"<td>{one}</td>" in text["cli"] for one in codes)
    assert "api/llm_quest.generation.speculative.rejection_sampler.html" in text["glossary"]
    techniques = re.sub("<[^>]*>", "", (out / "reference/techniques.html").read_text(encoding="utf-8"))
    assert len(re.findall(r"\$ quest train (RECIPE |classify\b)", techniques)) == len(list_techniques().entries)


def test_every_page_has_a_command_and_its_output_is_chosen_by_words():
    for subject in all_subjects():
        assert switch.command_of(subject)[0].startswith("quest "), subject.key
    assert set(switch.read_commands()) <= {one.key for one in all_subjects()}
    assert switch.chosen_lines("a\nb 1\nc\nb 2", "has=b") == ["b 1", "b 2"]
    assert switch.chosen_lines("a\nb 1\nc\nb 2", "from=b head=2") == ["b 1", "c"]
    assert switch.chosen_lines("a", "from=b") == []


def test_every_page_has_the_parts_that_its_kind_requires(site_and_pages):
    out, _ = site_and_pages
    pages_of = {one.key: (one.kind, (out / one.path).read_text(encoding="utf-8")) for one in all_subjects()}
    found = {key: missing for key, (kind, page) in pages_of.items() if (missing := coverage.missing_parts(kind, page))}
    assert found == {}
    page = pages_of["layer/norm"][1]
    lacking = page.replace(">Commonly got wrong<", "><").replace("class='question'", "")
    assert coverage.missing_parts("layer", lacking) == ["Question", "Commonly got wrong"]


def test_exercises_are_shown_on_the_pages_that_they_are_about(site_and_pages):
    out, _ = site_and_pages
    assert set(PRACTICED) <= set(EXERCISES)
    assert {key for keys in PRACTICED.values() for key in keys} <= {one.key for one in all_subjects()}
    for place, name in (("layer/rotary.html", "rotary"), ("05-llama.html", "rotary"), ("recipe/dpo.html", "dpo_loss")):
        assert f"quest learn {name}<" in (out / place).read_text(encoding="utf-8"), place
    game = next(one.path for one in all_subjects() if one.file == GAMES[0].file)
    assert "quest learn break 1<" in (out / game).read_text(encoding="utf-8")


BAD = {
    "a link": ("[[layer/none]]", "layer/none"),
    "an example": ("```python\n1 / 0\n```", "ZeroDivisionError"),
    "a command": ("```quest\nquest show nothing\n```", "ended with"),
    "a figure": ("```figure none\n```", "no figure 'none'"),
    "an anchor": ("```code layers/norm.py:None\n```", "no 'None'"),
    "a block that does not run": ("```console\nquest show gpt2\n```", "console"),
}


@pytest.mark.parametrize(("text", "said"), BAD.values(), ids=BAD)
def test_a_chapter_with_something_wrong_ends_the_command_with_1(text, said, tmp_path, monkeypatch, capsys):
    """`make book` is a step of CI."""
    (tmp_path / "chapters").mkdir()
    (tmp_path / "chapters/01-bad.md").write_text(f"# Bad\n\nA chapter.\n\n{text}\n")
    monkeypatch.setattr(site, "CHAPTERS", tmp_path / "chapters")
    monkeypatch.setattr("sys.argv", ["book", str(tmp_path / "site")])
    assert book_command() == 1
    assert said in capsys.readouterr().err


def sentences(text: str) -> set[str]:
    """Long sentences of prose: without code, formulas and marks, on one line."""
    prose = re.sub(r"^```.*?^```|\$\$.*?\$\$", "", text, flags=re.M | re.S)
    flat = re.sub(r"\s+", " ", re.sub(r"[`*\[\]]", "", prose))
    return {one for one in re.split(r"(?<=[.:;?!])\s", flat) if len(one) > 60}


def test_no_sentence_of_the_book_stands_in_the_source_too():
    """What the source says is included from it by an anchor. The recipes of `extending.md` are new files."""
    texts = [file.read_text(encoding="utf-8") for file in (ROOT / "llm_quest").rglob("*.py")]
    source_text = re.sub(r"\s+", " ", re.sub(r"[`*\[\]]", "", " ".join(texts)))
    files = [*site.chapter_files(), source.ROOT / "book/questions.yaml", source.ROOT / "book/glossary.yaml"]
    twice = {one for file in files for one in sentences(file.read_text(encoding="utf-8")) if one in source_text}
    assert twice == set()
    assert sentences("It is said. " + "The norm's first sentence is long enough, `and` has a mark in it: here.") == {
        "The norm's first sentence is long enough, and has a mark in it:"
    }


def test_a_chapter_shows_the_lines_that_it_is_about_and_no_whole_files():
    found = {
        words: source.code_of(words).text.count("\n") + 1
        for file in site.chapter_files()
        for words in re.findall(r"^```code (.*)$", file.read_text(encoding="utf-8"), re.M)
    }
    assert {words: lines for words, lines in found.items() if lines > 60} == {}
    assert len(found) > 20


def test_a_benchmark_that_is_shown_is_a_section_of_its_page():
    for heading in pages.BENCHMARKS.values():
        assert "| --- |" in pages.benchmark(heading), heading
    assert set(pages.BENCHMARKS) <= {one.key for one in all_subjects()}
    with pytest.raises(ValueError, match="no section"):
        pages.benchmark("Nothing of the kind")


def test_every_entry_of_the_glossary_names_code_or_a_page(monkeypatch):
    assert reference.check_places() == []
    wrong = {"x": ("TRL", "", "layers/norm.py:None"), "y": ("TRL", "", "layer/none")}
    monkeypatch.setattr(reference, "read_glossary", lambda: wrong)
    assert len(reference.check_places()) == 2


def test_every_number_that_a_log_or_a_report_may_hold_is_explained():
    known = reference.known_metrics()
    assert {"frac_reward_zero_std", "rewards/margin", "max_violation", "eval/bits_per_byte", "sampling_rounds"} <= known
    assert [one for one in sorted(known) if not reference.is_explained(one)] == []
    assert not reference.is_explained("mystery")


def test_every_symbol_of_every_equation_is_explained():
    shown = 0
    for subject in all_subjects():
        rows = equations.symbol_rows(subject, pages.docstring_text(subject))
        shown += bool(rows)
        assert [symbol for symbol, meaning in rows if not meaning] == [], subject.key
    assert shown >= 20
    new = equations.symbol_rows(Subject("layer", "new", ""), "A law.\n\n      Q = zeta x\n")
    assert new == [("Q", ""), ("zeta", ""), ("x", equations.read_symbols()[1]["everywhere"]["x"])]
    known = {one.key for one in all_subjects()} | {"everywhere"}
    assert set(equations.read_symbols()[1]) <= known, "symbols of a page that is not there"


def test_every_symbol_that_a_page_explains_stands_in_its_equations_and_the_longest_name_is_the_one_that_is_meant():
    for subject in all_subjects():
        own = equations.read_symbols()[1].get(subject.key, {})
        names = [equations.names_of(one) for one in equations.symbols_in(pages.docstring_text(subject))]
        shown = {next((name for name in several if name in own), "") for several in names}
        assert set(own) - shown == set(), subject.key
    assert equations.meaning_of("q_nope_h", {"q_nope": "a part"}, {"q": "queries"}) == "a part"
    assert equations.meaning_of("q_rope_h", {"q": "own", "q_rope": "a part"}, {}) == "a part"


def test_words_and_names_of_a_mistake_are_marked():
    assert blocks.with_marks("masked *before* the `exp`, a * b * c < 2") == (
        "masked <em>before</em> the <code>exp</code>, a * b * c &lt; 2"
    )


def test_every_package_has_a_readme_whose_links_lead_somewhere(tmp_path):
    for package in readmes.packages():
        file = readmes.readme_file(package)
        assert file.is_file(), f"python -m book.readmes writes {package}/README.md"
        assert readmes.dead_links(file) == [], package
        listed = set(re.findall(r"^\| \[[^\]]+\]\(([\w/]+\.py)\)", file.read_text(encoding="utf-8"), re.M))
        there = {file for file, _ in readmes.modules(package)}
        assert len(there - listed) <= len(there) / 4, f"{package}: python -m book.readmes lists its new modules"
    (tmp_path / "README.md").write_text("[gone](gone.py) [here](README.md) [far](https://x.org)")
    assert readmes.dead_links(tmp_path / "README.md") == ["gone.py"]


def test_the_documents_of_the_project_link_to_what_is_there():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    assert {file.name: dead for file in files if (dead := readmes.dead_links(file))} == {}
    assert all(file.stat().st_size <= pictures.MAX_BYTES for file in pictures.PICTURES.glob("*.png"))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BookError, match="other files"):
        build_site(tmp_path, run=False)
    assert (tmp_path / "thesis.txt").is_file()


def test_quest_book_shows_a_site_that_is_there_and_names_what_is_missing(tmp_path, monkeypatch):
    from llm_quest.cli import book as command
    from llm_quest.errors import UsageError

    (tmp_path / "index.html").write_text("<h1>LLM Quest</h1>")
    opened = []
    monkeypatch.setattr(command.webbrowser, "open", opened.append)
    address = command.open_book(tmp_path, renew=False, browser=True, log=print)
    assert opened == [address]
    assert address.endswith("/index.html")
    assert address.startswith("file://")
    monkeypatch.setattr(command, "CHECKOUT", tmp_path)
    with pytest.raises(UsageError, match="git clone"):
        command.open_book(tmp_path, renew=True, browser=False, log=print)


def test_a_subject_without_a_question_stops_the_build():
    known = all_subjects()
    with pytest.raises(BookError, match=r"family/new"):
        check_questions([*known, Subject("family", "new", "models/new.py")])
    with pytest.raises(BookError, match=known[0].key):
        check_questions(known[1:])


def test_pages_load_nothing_from_elsewhere_and_stay_small(site_and_pages):
    out, _ = site_and_pages
    for file in out.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        assert not re.search(r'<(script|link|img)[^>]+(src|href)="(https?:)?//', text), file
        assert len(text) < 300_000, f"{file.name} is too large for a phone"
        levels = [int(one) for one in re.findall(r"<h([1-6])[ >]", text)]
        assert levels[0] == 1, f"{file.name} does not begin with its title"
        assert levels.count(1) == 1, f"{file.name} has {levels.count(1)} titles"
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels)), f"{file.name} skips a level of headings"


def test_every_color_of_code_has_enough_contrast_and_wide_things_scroll_in_themselves(site_and_pages):
    """`python -m tests.book_page SITE` looks at the pages in a browser."""
    css = (site_and_pages[0] / "style.css").read_text(encoding="utf-8")
    for scheme, part in zip(("light", "dark"), css.rsplit("@media (prefers-color-scheme: dark)", 1), strict=True):
        assert f"--soft: {site.PAPER[scheme]}" in css
        colors = re.findall(r"^ *\.code .*?[^-]color: (#[0-9a-fA-F]{3,6})\b", part, re.M)
        assert len(colors) > 20
        assert [one for one in colors if site.contrast(one, site.PAPER[scheme]) < 4.5] == [], scheme
    assert (
        site.contrast("#888888", "#ffffff") < 4.5 < site.contrast(site.readable_color("#888888", "#ffffff"), "#ffffff")
    )
    assert "overflow-wrap: break-word" in css[css.index("table {") : css.index("}", css.index("table {"))], (
        "words break"
    )
    for rule in ("pre {", "table {", 'math[display="block"] {'):
        assert "overflow-x: auto" in css[css.index(rule) : css.index("}", css.index(rule))], rule
    assert "main { overflow-wrap: anywhere; }" in css, (
        "long names break; without it three pages were wider than a phone"
    )


@pytest.mark.parametrize("page", ['<a href="nowhere.html">x</a>', '<a href="#gone">x</a>', '<img src="https://x.org/a.png">',
                                  '<p id="a"></p><p id="a"></p>'])  # fmt: skip
def test_a_bad_link_an_id_twice_and_a_picture_from_elsewhere_are_found(tmp_path, page):
    (tmp_path / "a.html").write_text(page)
    with pytest.raises(BookError, match=r"a\.html"):
        check_links(tmp_path)


def test_code_is_included_from_its_anchor_without_its_docstring():
    code = source.code_of("layers/norm.py:RMSNorm.forward")
    assert code.text.startswith("def forward(self, x:")
    assert code.text in dedent_code("layers/norm.py")
    assert '"""' not in source.code_of("layers/norm.py:RMSNorm").text
    assert source.code_of("layers/norm.py:RMSNorm").text.splitlines()[1].strip().startswith("def __init__")


def dedent_code(file: str) -> str:
    lines = source.parse(file)[0].splitlines()
    return "\n".join(line[4:] if line.startswith("    ") else line for line in lines)


@pytest.mark.parametrize("anchor", ["layers/none.py", "layers/norm.py:None", "layers/norm.py:RMSNorm.none"])
def test_an_anchor_that_names_nothing_is_an_error(anchor):
    with pytest.raises(source.AnchorError, match=re.escape(anchor.split(":")[0])):
        source.code_of(anchor)


def test_mistakes_are_read_from_docstrings_one_by_one():
    kept, found = source.split_mistakes(
        "A norm.\n\nCommonly got wrong: eps is inside; the cast comes\nbefore. It matters."
    )
    assert kept == "A norm."
    assert found == ["eps is inside", "the cast comes before", "It matters"]
    assert any("eps belongs inside the root" in one for one in source.mistakes_of("layers/norm.py"))


def test_mutations_of_a_file_are_shown_with_the_tests_that_fail():
    shown = blocks.breaks_block("layers/norm.py")
    assert "norms scale by weight, not 1 + weight" in shown
    assert "pytest tests/" in shown


def test_an_example_that_fails_ends_the_build(tmp_path):
    examples = Examples("chapter.md", tmp_path)
    with pytest.raises(ExampleError, match=r"(?s)chapter\.md.*ZeroDivisionError"):
        examples.python("", "1 / 0")
    with example_environment() as folder, pytest.raises(ExampleError, match="nothing-of-the-kind"):
        Examples("chapter.md", folder).quest("", "quest show nothing-of-the-kind")
    assert "<samp>3</samp>" in examples.python("", "x = 1\nprint(x + 2)")
    assert "<samp>2</samp>" in examples.python("", "print(x + 1)"), "a chapter has one namespace"


def test_formulas_are_mathml_and_text_is_never_html():
    render = Renderer({}, Book({}).link)
    assert "<math" in render("the root $\\sqrt{d}$")
    assert "<mfrac>" in render("$$\\frac{a}{b}$$")
    assert "<script>" not in render("<script>alert(1)</script>")
    assert "costs $5 and $6" in render("costs $5 and $6")


def test_a_link_to_no_page_is_an_error():
    with pytest.raises(BookError, match="layer/none"):
        Renderer({}, Book({}, "here.html").link)("see [[layer/none]]")


@pytest.mark.parametrize("name", [*sorted(figures.FIGURES.keys() - {"cache"}), *flows.FLOWS])
def test_figures_are_drawn_in_the_colors_of_the_page_described_and_readable_on_a_phone(name):
    """A phone has 370 pixels for a figure; exponents of a logarithmic axis are the smallest text. Without `cache`,
    which is drawn as the other curves are and takes seconds."""
    drawn = figures.draw(name) if name in figures.FIGURES else flows.draw_flow(name)
    width = float(re.search(r'viewBox="0 0 ([\d.]+) ', drawn)[1])
    fonts = [float(size) for size in re.findall(r'font-size(?:="|: )([\d.]+)', drawn)]
    assert min(fonts) * 370 / width >= 7, f"text of {min(fonts)} in a width of {width}"
    assert "var(--s1)" in drawn
    assert "aria-label=" in drawn
    assert "<figcaption>" in drawn


@pytest.mark.parametrize("card", sorted((ROOT / "docs/papers").glob("*.svg")), ids=lambda file: file.stem)
def test_a_cards_plot_has_the_colors_of_the_page(card: Path):
    assert re.search(r"#[0-9a-f]{6}", card.read_text(encoding="utf-8")), "the picture beside the card has its own"
    assert not re.search(r"(fill|stroke): #[0-9a-f]{3,6}", blocks.card_block(card.stem))


def test_figures_show_what_the_layers_compute():
    from llm_quest.scope import Scope

    mask = figures.full_mask(Scope(source_positions()), 3)
    assert mask.sum(-1).tolist() == [1, 2, 3, 3, 3, 3, 3, 3]


def source_positions():
    import torch

    return torch.arange(8)[None]
