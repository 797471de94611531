"""Builds the site: chapters and pages as files of HTML that need no network and no server, with a search index as a
script, and checks that every link inside it leads somewhere."""

from __future__ import annotations

import functools
import html
import json
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pygments.formatters import HtmlFormatter

from book import api, reference
from book.blocks import BLOCKS, exercises_block
from book.catalog import KINDS, Subject, all_subjects, read_questions
from book.markdown import LINK, Block, Renderer
from book.pages import make_sections, summary_of, title_of
from book.run import Examples, example_environment
from book.source import ROOT

SECTIONS = {"reference": "Reference", "api": "API", **KINDS}
"""Folder of the site -> the heading that lists its pages."""
CHAPTERS, THEME = ROOT / "book/chapters", ROOT / "book/theme"
SPEAKER = "17-generation"
"""The chapter in whose folder the commands of pages run: its run `speaker` is a model with a tokenizer."""
Log = Callable[[str], None]


class BookError(ValueError):
    """What keeps the book from being built: a subject without a question, a link that leads nowhere."""


@dataclass(frozen=True)
class Page:
    """A file of the site. path: relative to it; group: the heading that lists it; text: what search reads; name: what
    the code calls its subject."""

    path: str
    title: str
    group: str
    summary: str
    body: str
    text: str = ""
    name: str = ""


@dataclass
class Book:
    """What links may name: key -> (path, title). here: the page that is made; addresses are relative to it."""

    names: dict[str, tuple[str, str]] = field(default_factory=dict)
    here: str = ""

    def link(self, key: str) -> tuple[str, str]:
        """The address and the title of a page, from the page that is being made."""
        if key not in self.names:
            raise BookError(f"{self.here}: [[{key}]] is no page of the book")
        path, title = self.names[key]
        return relative(path, self.here), title


def relative(path: str, here: str) -> str:
    return "../" * here.count("/") + path


def chapter_files() -> list[Path]:
    return sorted(CHAPTERS.glob("*.md"))


def chapter_title(file: Path) -> str:
    return file.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ").strip()


def chapter_path(file: Path) -> str:
    return f"{file.stem}.html"


def build_site(out: Path, *, run: bool = True, log: Log = print) -> list[Page]:
    """Write the site into a folder, which is replaced. run: run the examples of the chapters; without, they are shown
    alone."""
    begun = time.process_time()
    check_folder(out)
    subjects, book = all_subjects(), Book()
    check_questions(subjects)
    book.names = {one.key: (one.path, title_of(one)) for one in subjects}
    book.names |= {f.stem.split("-", 1)[1]: (chapter_path(f), chapter_title(f)) for f in chapter_files()}
    book.names |= {key: (f"{key}.html", title) for key, title in reference.page_names().items()}
    book.names |= {f"api/{one.file}": (one.path, one.name) for one in api.all_modules()}
    with example_environment() as folder:
        pages = list(make_chapters(book, run, log, folder))
        examples = Examples("a page", folder / SPEAKER) if run else None
        pages += make_subject_pages(book, subjects, examples)
    pages += [*make_reference(book), *make_api(book)]
    pages += [make_index(pages, book), *make_kind_indexes(pages)]
    write_pages(out, pages)
    check_links(out)
    log(f"{len(pages)} pages in {out}, {time.process_time() - begun:.0f} s of this process")
    return pages


def check_folder(out: Path) -> None:
    """The folder is new, empty, or holds a site, which is replaced."""
    if out.exists() and any(out.iterdir()) and not (out / "search-index.js").is_file():
        raise BookError(f"{out} holds other files; name a new folder for the book")


def check_questions(subjects: list[Subject]) -> None:
    """Every subject has a question, and no question is without its subject."""
    keys, asked = {one.key for one in subjects}, set(read_questions())
    if keys != asked:
        missing, unknown = sorted(keys - asked), sorted(asked - keys)
        raise BookError(f"book/questions.yaml: no question for {missing or 'none'}; of no subject: {unknown or 'none'}")


def make_chapters(book: Book, run: bool, log: Log, folder: Path) -> Iterator[Page]:
    for file in chapter_files():
        begun = time.process_time()
        yield make_chapter(book, file, folder, run)
        log(f"{file.name}: {time.process_time() - begun:.1f} s of this process")


def make_chapter(book: Book, file: Path, folder: Path, run: bool) -> Page:
    book.here = chapter_path(file)
    blocks: dict[str, Block] = dict(BLOCKS)
    if run:
        (folder / file.stem).mkdir()
        examples = Examples(file.name, folder / file.stem)
        blocks |= {"quest": examples.quest, "python": examples.python}
    text = file.read_text(encoding="utf-8")
    check_fences(file.name, text)
    body = Renderer(blocks, book.link)(text)
    if asked := exercises_block(file.stem.split("-", 1)[1]):
        body += f'<section><h2 id="exercises">Exercises</h2>{asked}</section>'
    return Page(book.here, chapter_title(file), "Chapters", first_paragraph(text, book), body, text)


def check_fences(name: str, text: str) -> None:
    """Every block of a chapter runs, or is made from the source."""
    for kind in re.findall(r"^```(\S+)", text, re.M):
        if kind not in ("quest", "python", *BLOCKS):
            raise BookError(f"{name}: a {kind} block would not be run; known: quest, python, {', '.join(BLOCKS)}")


def first_paragraph(text: str, book: Book) -> str:
    """What a chapter begins with, without marks; a link is its words."""
    said = LINK.sub(lambda found: found[2] or book.link(found[1])[1], text.split("\n\n")[1])
    return re.sub(r"[\[\]$`*]", "", re.sub(r"\s+", " ", said)).strip()


def make_subject_pages(book: Book, subjects: list[Subject], examples: Examples | None = None) -> Iterator[Page]:
    questions = read_questions()
    for subject in subjects:
        book.here = subject.path
        markdown = Renderer(dict(BLOCKS), book.link)
        sections = make_sections(subject, markdown, examples)
        title = title_of(subject)
        body = f"<h1>{html.escape(title)} <code>{subject.name}</code></h1>"
        body += f"<p class='question'>{html.escape(questions[subject.key])}</p>"
        body += "".join(f'<section><h2 id="{anchor(h)}">{h}</h2>{text}</section>' for h, text in sections)
        summary = summary_of(subject)
        yield Page(
            subject.path,
            title,
            KINDS[subject.kind],
            summary,
            body,
            f"{questions[subject.key]} {summary} {subject.name}",
            subject.name,
        )


def make_reference(book: Book) -> Iterator[Page]:
    book.here = "reference/index.html"
    for one in reference.reference_pages(Renderer({}, book.link), book.link):
        yield Page(one.path, one.title, SECTIONS["reference"], "", one.body, one.words)


def make_api(book: Book) -> Iterator[Page]:
    book.here = "api/index.html"
    markdown = Renderer({}, book.link)
    for one in api.all_modules():
        summary = api.module_summary(one)
        yield Page(one.path, one.name, SECTIONS["api"], summary, api.module_body(one, markdown), api.module_words(one))


def anchor(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")


def make_index(pages: list[Page], book: Book) -> Page:
    """The first page: chapters in order, then the pages by kind."""
    chapters = "".join(
        f'<li><a href="{one.path}">{html.escape(one.title)}</a><p>{html.escape(one.summary)}</p></li>'
        for one in pages if one.group == "Chapters"
    )  # fmt: skip
    counts = Counter(one.group for one in pages)
    kinds = "".join(
        f'<li><a href="{kind}/index.html">{name}</a> <span class="count">{counts[name]}</span></li>'
        for kind, name in SECTIONS.items()
    )
    body = (
        "<h1>LLM Quest</h1><p class='question'>How do modern language models work, and how is it known that the code "
        "is right?</p><p>Every architecture, technique and objective is one file of plain PyTorch, equal to an "
        "independent reference, and every page here is made from that file.</p>"
        f"<h2>Chapters</h2><ol class='chapters'>{chapters}</ol><h2>Pages</h2><ul class='kinds'>{kinds}</ul>"
    )
    return Page("index.html", "LLM Quest", "", "", body)


def make_kind_indexes(pages: list[Page]) -> Iterator[Page]:
    for kind, name in SECTIONS.items():
        items = "".join(
            f'<li><a href="{Path(one.path).name}">{html.escape(one.title)}</a>{code_name(one)}'
            f"<p>{html.escape(one.summary)}</p></li>" for one in pages if one.group == name
        )  # fmt: skip
        yield Page(f"{kind}/index.html", name, "", "", f"<h1>{name}</h1><ul class='chapters'>{items}</ul>")


def code_name(page: Page) -> str:
    """What the code calls the subject of a page, beside its title."""
    return f" <code>{page.name}</code>" if page.name else ""


def write_pages(out: Path, pages: list[Page]) -> None:
    shutil.rmtree(out, ignore_errors=True)
    template = Environment(
        loader=FileSystemLoader(THEME), undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True
    ).get_template("page.html")
    order = [one for one in pages if one.group == "Chapters"]
    for page in pages:
        file = out / page.path
        file.parent.mkdir(parents=True, exist_ok=True)
        place = order.index(page) if page in order else None
        near = (
            order[place - 1] if place else None,
            order[place + 1] if place is not None and place + 1 < len(order) else None,
        )
        text = template.render(
            page=page, root="../" * page.path.count("/"), before=near[0], after=near[1], chapters=order, kinds=SECTIONS
        )
        file.write_text(text, encoding="utf-8")
    colors = HtmlFormatter(style="default").get_style_defs(".code")
    dark = HtmlFormatter(style="monokai").get_style_defs(".code")
    style = (THEME / "style.css").read_text(encoding="utf-8")
    colors, dark = readable_colors(colors, PAPER["light"]), readable_colors(dark, PAPER["dark"])
    written = f"{style}\n{colors}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    (out / "style.css").write_text(written, encoding="utf-8")
    shutil.copy(THEME / "search.js", out / "search.js")
    (out / "search-index.js").write_text(f"window.PAGES = {search_index(pages)};\n", encoding="utf-8")


PAPER = {"light": "#f4f5f7", "dark": "#1f2226"}
"""What code lies on: --soft of the style."""
MIN_CONTRAST = 4.6
"""Of code with its background; WCAG 2.2 wants 4.5."""


def readable_colors(css: str, paper: str) -> str:
    """The colors of a style of pygments without its backgrounds, each as much darker or paler as it has to be."""
    css = re.sub(r"background(-color)?:[^;}]*;?", "", css)
    return re.sub(r"(?<=color: )#[0-9a-fA-F]{3,6}\b", lambda found: readable_color(found[0], paper), css)


def readable_color(color: str, paper: str) -> str:
    """The color, mixed with black or white until its contrast with the paper is enough."""
    goal = 0 if luminance(paper) > 0.5 else 255
    parts = channels(color)
    while contrast(written := "#" + "".join(f"{round(part):02x}" for part in parts), paper) < MIN_CONTRAST:
        parts = [part + 0.04 * (goal - part) for part in parts]
    return written


def channels(color: str) -> list[float]:
    """Red, green and blue of #rgb or #rrggbb, 0 to 255."""
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    return [float(int(digits[at : at + 2], 16)) for at in (0, 2, 4)]


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    r, g, b = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (one / 255 for one in channels(color))
    )
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def search_index(pages: list[Page]) -> str:
    """Title, address, group, summary and words of each page, as JSON."""
    rows = [[one.title, one.path, one.group, one.summary, words_of(one.text)] for one in pages if one.group]
    return json.dumps(rows, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/")


def words_of(text: str) -> str:
    return " ".join(sorted(set(re.findall(r"[a-z0-9_.-]{3,}", text.lower()))))


class LinkReader(HTMLParser):
    """Collects the ids of a page, what it links to, what it loads, and images without a description."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.append(str(given["id"]))
        if tag == "a" and given.get("href"):
            self.links.append(str(given["href"]))
        if tag in ("script", "link", "img", "iframe"):
            self.loaded += [str(given[key]) for key in ("src", "href") if given.get(key)]


COLORED = re.compile(r'</?span(?: class="\w*")?>')
"""Half of all tags: colors of code, without an id."""


def check_links(out: Path) -> None:
    """Every link inside the site leads to a file, and to an id where it names one; nothing is loaded from elsewhere."""
    read: dict[Path, LinkReader] = {}
    for file in sorted(out.rglob("*.html")):
        read[file.resolve()] = LinkReader()
        read[file.resolve()].feed(COLORED.sub("", file.read_text(encoding="utf-8")))
    problems = []
    is_file = functools.cache(Path.is_file)
    headings = {file: set(page.ids) for file, page in read.items()}
    for file, page in read.items():
        problems += [f"{file.name}: loads {one}" for one in page.loaded if "//" in one]
        problems += [f"{file.name}: the id {one} twice" for one, times in Counter(page.ids).items() if times > 1]
        for link in page.links:
            if "//" in link or link.startswith("mailto:"):
                continue
            path, _, name = link.partition("#")
            target = Path(os.path.normpath(file.parent / path)) if path else file
            if not is_file(target):
                problems.append(f"{file.name}: {link} leads nowhere")
            elif name and target in headings and name not in headings[target]:
                problems.append(f"{file.name}: {link}: no such heading")
    if problems:
        raise BookError("the book has bad links:\n" + "\n".join(problems[:20]))
