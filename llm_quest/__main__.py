"""`python -m llm_quest` is the `quest` command."""

from __future__ import annotations

from llm_quest.cli.main import main

if __name__ == "__main__":
    main()
