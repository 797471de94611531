"""`quest serve`: serves a model and its adapters through OpenAI's HTTP interface."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from llm_quest.cli.chat import load_text_model
from llm_quest.cli.export import export_run
from llm_quest.cli.generation_options import read_advice
from llm_quest.cli.speculative_generate import load_draft
from llm_quest.cli.vision import load_matching_preprocess, reads_images
from llm_quest.contracts import LogFn
from llm_quest.data.chat import find_template_fault
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import QuestError, UsageError
from llm_quest.hub.adapter_config import CONFIG, read_adapter_config
from llm_quest.hub.load_adapter import load_adapter
from llm_quest.hub.locate import is_checkpoint, locate_adapter, locate_model
from llm_quest.hub.pooling import Pooling, read_pooling
from llm_quest.models.decoder import Decoder
from llm_quest.models.multimodal import VisionLanguageModel
from llm_quest.serve.images import ImageReader
from llm_quest.serve.server import LoadedModel, ServeOptions, bind_socket, http_server, make_server, run_server


def serve_models(
    name_or_path: str,
    adapters: Sequence[str],
    options: ServeOptions,
    *,
    name: str | None,
    draft: str | None,
    device: str,
    dtype: str,
    log: LogFn,
) -> None:
    """Serve until the process is told to end. Keys are read and the port is bound first, so that a mistake shows before
    models load."""
    if draft is not None and not options.inside:
        raise UsageError("--draft shows on the page of --inside what a draft proposes: add --inside")
    parsed, rules = parse_adapters(adapters), options.access_rules()
    listener = bind_socket(options.host, options.port)
    with listener:
        served_name = name or Path(name_or_path).name or name_or_path
        models = {served_name: load_model(name_or_path, device, dtype, log)}
        for adapter, folder in parsed.items():
            if adapter in models:
                raise UsageError(
                    f"--adapter {adapter}={folder}: this is the name of the model; give another, or --name"
                )
            models[adapter] = load_with_adapter(name_or_path, folder, served_name, device, dtype, log)
        if draft is not None:
            base = models[served_name]
            source = load_draft(draft, base.model, base.tokenizer, name_or_path, device, dtype, log)
            models = {key: replace(model, draft=source) for key, model in models.items()}
        server = make_server(models, options, rules, log)
        host, port = listener.getsockname()[:2]
        address = f"[{host}]" if ":" in host else host
        first = next(iter(server.served.values()))
        log(f"{', '.join(models)}: {options.slots} slots of {first.max_model_len:,} tokens")
        log(f"http://{address}:{port}/v1  (OpenAI's interface; Ctrl-C ends)")
        run_server(server, listener, http_server(server))


def parse_adapters(given: Sequence[str]) -> dict[str, str]:
    """NAME=PATH each. UsageError for another form, or a name that is given twice."""
    adapters: dict[str, str] = {}
    for one in given:
        name, _, folder = one.partition("=")
        if not name or not folder:
            raise UsageError(f"--adapter {one!r}: give a name and a folder, such as french=runs/french-lora")
        if name in adapters:
            raise UsageError(f"--adapter {name} is given twice")
        adapters[name] = folder
    return adapters


def load_model(name_or_path: str, device: str, dtype: str, log: LogFn) -> LoadedModel:
    model, tokenizer, images = load_decoder(name_or_path, device, dtype, log)
    if fault := find_template_fault(tokenizer):
        log(f"note: chats are refused: {fault}")
    advice = read_advice(model.generation_config)
    if advice:
        log(f"generation_config.json advises {', '.join(f'{key} {value:g}' for key, value in advice.items())}")
    return LoadedModel(model, tokenizer, advice, pooling=find_pooling(name_or_path, log), images=images)


def load_decoder(
    name_or_path: str, device: str, dtype: str, log: LogFn
) -> tuple[Decoder, Tokenizer, ImageReader | None]:
    """The part of a model that writes text, its tokenizer, and what reads images, where the folder has that."""
    with_images = reads_images(name_or_path)
    model: Any
    model, tokenizer = load_text_model(name_or_path, device, dtype, log, vision=with_images)
    if not isinstance(model, VisionLanguageModel):
        return model, tokenizer, None
    model.decoder.generation_config = model.generation_config
    if not with_images:
        return model.decoder, tokenizer, None
    preprocess = load_matching_preprocess(name_or_path, model.config.vision_config)
    return model.decoder, tokenizer, ImageReader.of(model, preprocess, tokenizer)


def find_pooling(name_or_path: str, log: LogFn) -> Pooling | None:
    """The pooling by which a folder's model makes embeddings; None, with a note, for one that is not supported."""
    try:
        location = locate_model(name_or_path)
        return None if location.gguf_file is not None else read_pooling(location.folder)
    except QuestError as error:
        log(f"note: no embeddings: {error}")
        return None


def load_with_adapter(name_or_path: str, folder: str, parent: str, device: str, dtype: str, log: LogFn) -> LoadedModel:
    """Load the base with an adapter. Weights that are mapped from the base's files are in memory once."""
    model, tokenizer, images = load_decoder(name_or_path, device, dtype, lambda line: None)
    with adapter_folder(folder) as adapter:
        load_adapter(model, adapter)
        named = str(read_adapter_config(adapter / CONFIG).get("base_model_name_or_path") or name_or_path)
    model.eval()
    is_other = Path(named).name != Path(name_or_path).name
    log(f"{folder}: adapter of {name_or_path}" + (f"; it says that its base is {named}" if is_other else ""))
    advice, pooling = read_advice(model.generation_config), find_pooling(name_or_path, log)
    return LoadedModel(model, tokenizer, advice, parent, pooling, images=images)


@contextmanager
def adapter_folder(path: str) -> Iterator[Path]:
    """The folder of an adapter. The adapter of a run, or of one of its checkpoints, is exported while it is read."""
    run = locate_adapter(path)
    if not (run / "model.json").is_file() and not is_checkpoint(run):
        yield run
        return
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        try:
            export_run(run, adapter, adapter=True)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        try:
            yield adapter
        except QuestError as error:
            raise type(error)(str(error).replace(str(adapter), path)) from None
