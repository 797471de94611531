"""Conversations that a chat template renders once in a process of the tests."""

from __future__ import annotations

from typing import Any

RENDERED: dict[str, Any] = {}
"""What templates made of conversations in this process."""


def render_once() -> None:
    """A chat template is rendered in a process of its own, a fifth of a second each time: here the same conversations
    are rendered once by the same template under the same limits. (An error is never kept.)"""
    from llm_quest.data import template_sandbox

    render = template_sandbox.run_batch

    def run_once(settings: Any, jobs: Any) -> Any:
        key = f"{template_sandbox.WORKER_COMMAND} {template_sandbox.CPU_SECONDS} {settings} {jobs}"
        if key not in RENDERED:
            RENDERED[key] = render(settings, jobs)
        return RENDERED[key]

    template_sandbox.run_batch = run_once
