"""Commands about models and their folders: list, describe, compare, change, verify, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from llm_quest.cli.options import JsonOption, ModelArgument, OfflineOption, ThreadsOption
from llm_quest.cli.output import print_colored_result, print_result
from llm_quest.machine.hardware import set_environment


def models(
    words: Annotated[list[str] | None, typer.Argument(help="Only models that hold all of these: qwen3 moe.")] = None,
    max_parameters: Annotated[str | None, typer.Option(help="At most so many: 500M, 4B.")] = None,
    json: JsonOption = False,
) -> None:
    """List the models that can be built by name, or search them."""
    from llm_quest.cli.models import list_presets

    print_result(list_presets(words or (), max_parameters), json)


def show_model(name: Annotated[str, typer.Argument(help="A preset's name.")], json: JsonOption = False) -> None:
    """Describe a model: its layers, parameters by part, cache and cost."""
    from llm_quest.cli.models import make_model_card

    print_result(make_model_card(name), json)


def diff(a: Annotated[str, typer.Argument(help="A family or preset.")], b: str, json: JsonOption = False) -> None:
    """Compare two families: what is new, layers, numbers, code."""
    from llm_quest.cli.diff import diff_families

    print_colored_result(diff_families(a, b), json)


def inspect(
    folder: Annotated[str, typer.Argument(help="A model folder.")],
    weights: Annotated[
        bool, typer.Option("--weights", help="Read every weight too, and list those that are not finite.")
    ] = False,
    json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """Describe a model folder, and everything that is wrong with it."""
    set_environment(0, offline)
    from llm_quest.hub.inspect import inspect_folder

    print_result(inspect_folder(folder, check_weights=weights), json)


def add_tokens(
    model: ModelArgument,
    folder: Annotated[Path, typer.Argument(help="The output folder.")],
    tokens: Annotated[list[str], typer.Argument(metavar="TOKEN...", help="The new tokens.")],
    special: Annotated[bool, typer.Option("--special", help="Control tokens, which nobody's text spells.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files in the folder.")] = False,
    json: JsonOption = False,
    offline: OfflineOption = False,
) -> None:
    """Add tokens to a model: to its tokenizer, and rows to its embedding, each the mean of the others."""
    set_environment(0, offline)
    from llm_quest.cli.tokens import add_tokens_to_folder

    print_result(add_tokens_to_folder(model, folder, tokens, special=special, overwrite=overwrite), json)


def verify(
    folder: Annotated[str, typer.Argument(help="A model folder.")], json: JsonOption = False, threads: ThreadsOption = 0
) -> None:
    """Compare the outputs and tokens of a model folder, of text or of images, with transformers', which must be
    installed."""
    set_environment(threads)
    from llm_quest.hub.verify import compare_with_transformers

    print_result(compare_with_transformers(folder), json)


def export(
    run: Annotated[
        Path,
        typer.Argument(
            help="A run folder, or one of its checkpoints (RUN@best, RUN@last, RUN@120); for a GGUF file also the "
            "folder of a model or an adapter."
        ),
    ],
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER|FILE.gguf",
            help="Where to write the Hugging Face layout, a GGUF file, or with --web a page.",
        ),
    ],
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16 (default: float32; of a GGUF file, as the weights are)."),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="Of a GGUF file or a page: q8_0 or q4_0.")] = None,
    web: Annotated[
        bool,
        typer.Option("--web", help="Write a page that runs the model in a browser, with the model as a GGUF file."),
    ] = False,
    wllama: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.tgz|FOLDER",
            help="Of a page: the npm package @wllama/wllama 3.13.0 (default: the cache, otherwise npm gets it).",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the files in the folder.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Of a model with an adapter: the whole model, with the adapter merged.")
    ] = False,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a model with an adapter: the adapter alone, for PEFT or llama.cpp.")
    ] = False,
    license: Annotated[str | None, typer.Option(help="The license of the weights, for the card: apache-2.0.")] = None,
    json: JsonOption = False,
) -> None:
    """Export a model as a folder that transformers and vLLM load, with a card of its data, recipe and numbers, as a
    GGUF file for llama.cpp, or as a page for a browser."""
    from llm_quest.cli.export import export_run

    kind: dict[str, Any] = {"overwrite": overwrite, "merged": merge, "adapter": adapter, "web": web, "wllama": wllama}
    print_result(export_run(run, folder, dtype=dtype, license=license, quantize=quantize, **kind), json)


def push(
    folder: Annotated[Path, typer.Argument(help="A model folder, as quest export writes it.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository of the hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")] = False,
    json: JsonOption = False,
) -> None:
    """Upload a model folder to the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN."""
    set_environment(0)
    from llm_quest.hub.push import push_folder

    print_result(push_folder(folder, repository, private=private), json)


def consolidate(
    run: Annotated[Path, typer.Argument(metavar="RUN|CHECKPOINT", help="A run folder, or one of its checkpoints.")],
    json: JsonOption = False,
) -> None:
    """Make the checkpoints whole that the processes of an FSDP2 run wrote in shards."""
    from llm_quest.cli.export import consolidate_run

    print_result(consolidate_run(run), json)
