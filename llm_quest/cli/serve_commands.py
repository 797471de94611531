"""The command that serves a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_quest.cli.options import DeviceOption, DtypeOption, ModelArgument, OfflineOption, QuietOption, ThreadsOption
from llm_quest.cli.output import require_extra, status_printer
from llm_quest.machine.hardware import set_environment


def serve(
    model: ModelArgument,
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="An adapter in PEFT's form, served under this name; may be repeated."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="The name of the model in requests (default: its folder's).")] = None,
    host: Annotated[str, typer.Option(help="The address to listen on; others than loopback need a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0: any that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="A file of API keys, one in a line; requests then need one of them.")
    ] = None,
    allow_host: Annotated[list[str] | None, typer.Option(help="A name under which clients reach this server.")] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="The origin of pages that may use it, such as http://localhost:3000.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, max=1024, help="Texts that are generated at the same time.")] = 16,
    max_model_len: Annotated[
        int | None, typer.Option(min=8, help="Tokens of prompt and text (default: the context, at most 4096).")
    ] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are answered 429.")] = 256,
    prefix_cache: Annotated[
        int, typer.Option(min=0, help="MiB of finished texts whose beginning is used again.")
    ] = 256,
    timeout: Annotated[float, typer.Option(min=1, help="The longest time of a request, in seconds.")] = 600.0,
    log_requests: Annotated[
        bool, typer.Option("--log-requests", help="Log a line per request, without texts.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log what was asked, too.")] = False,
    inside: Annotated[
        bool, typer.Option("--inside", help="Keep the last 64 texts for a page at /inside: how each token came about.")
    ] = False,
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|mtp|ngram", help="With --inside: show what this draft proposes, and what is accepted."
        ),
    ] = None,
    quiet: QuietOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = 0,
    offline: OfflineOption = False,
) -> None:
    """Serve a model, and adapters of it, through OpenAI's HTTP interface: chat and text completions, streams,
    log-probabilities, JSON schemas. Needs llm-quest[serve]."""
    set_environment(threads, offline)
    require_extra("serve", "starlette", "uvicorn", "llguidance")
    from llm_quest.cli.serve import serve_models
    from llm_quest.serve.app import HttpLimits
    from llm_quest.serve.server import ServeOptions

    options = ServeOptions(
        host, port, api_key_file, allow_host or (), allow_origin or (), slots, max_model_len, max_waiting,
        prefix_cache, HttpLimits(request_seconds=timeout), log_requests, log_prompts, inside,
    )  # fmt: skip
    machine: dict[str, Any] = {"device": device, "dtype": dtype, "log": status_printer(quiet)}
    serve_models(model, adapter or (), options, name=name, draft=draft, **machine)
