"""The process that renders chat templates for the server. It imports neither torch nor tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_quest.data.template_messages import with_text_arguments
from llm_quest.data.template_program import TemplateProgram, TemplateSettings, extract_spans
from llm_quest.data.template_sandbox import limit_resources

LIFETIME_SECONDS = 24 * 3600
"""Processor time of the process; a single rendering has its own limit, of the caller."""
MAX_PROGRAMS = 8

RenderRequest = tuple[Mapping[str, Any], Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]
"""Settings of the template, messages, tools."""


def render_requests() -> Callable[[RenderRequest], str]:
    """The worker process: renders one conversation at a time, with limited memory."""
    limit_resources(LIFETIME_SECONDS)
    programs: dict[str, TemplateProgram] = {}

    def render(request: RenderRequest) -> str:
        settings, messages, tools = request
        if (key := repr(settings)) not in programs:
            if len(programs) >= MAX_PROGRAMS:
                programs.clear()
            programs[key] = TemplateProgram(TemplateSettings(**settings))
        try:
            text = programs[key].render(messages, tools, True)
        except Exception:
            text = programs[key].render(with_text_arguments(messages), tools, True)
        return extract_spans(text)[0]

    return render
