"""The book: a site made from the code. `make book` builds it into `site/`; every page works from file:// too.

Chapters are Markdown files in `book/chapters`. Every family, layer, technique, objective, recipe, generation method and
paper has a page that is made from its source: docstring, code, mutations, cards. `book/questions.yaml` holds the one
sentence that the source does not: the question that each page answers."""
