"""`quest generate`, and the parts that it shares with other commands: loading a model and printing its text as it is
generated, without control characters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import nn

from llm_quest.cli.generation_options import GENERATE_DEFAULTS, GenerationOptions
from llm_quest.cli.output import clean_text, print_json
from llm_quest.contracts import LogFn
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.errors import UsageError
from llm_quest.generation.beam_search import beam_search
from llm_quest.generation.generate import generate_completions, stream_tokens
from llm_quest.generation.stopping import Completion, StoppingCriteria
from llm_quest.hub.load_save import load_model_and_tokenizer
from llm_quest.layers.linear import set_few_row_products
from llm_quest.layers.quantized import QuantizedMatrix
from llm_quest.machine.choices import choose_few_row_kernel, choose_few_rows, choose_weight_kernel, slow_bf16_warning
from llm_quest.machine.hardware import describe_threads, usable_cores
from llm_quest.machine.profile import MachineProfile, load_compiler, load_kernel_rates
from llm_quest.models.build import DTYPES
from llm_quest.models.decoder import Decoder
from llm_quest.recipes.auto import find_idle_threads, resolve_precision
from llm_quest.train.parallel import resolve_device


def load_text_model(
    name_or_path: str, device: str, dtype: str, log: LogFn, *, vision: bool = False
) -> tuple[Decoder, Tokenizer]:
    """Load the model and the tokenizer of a command. dtype auto: bfloat16 on a GPU that has it, else float32. vision:
    with the part that reads images, where there is one."""
    torch_device = resolve_device(device)
    kind = resolve_dtype(dtype, torch_device)
    if torch_device.type == "cpu":
        note_busy_cores(log)
        use_fast_products(kind, log)
    model, tokenizer = load_model_and_tokenizer(name_or_path, device=torch_device, dtype=kind, vision=vision)
    if torch_device.type == "cpu" and (kinds := quantized_kinds(model)):
        use_fast_weights(model, kinds, load_kernel_rates(log), log)
    size = sum(p.numel() for p in model.parameters())
    log(f"{name_or_path}: {model.spec.family}, {size:,} parameters, {kind} on {torch_device}")
    return model, tokenizer


def load_for_generation(
    name_or_path: str,
    options: GenerationOptions,
    *,
    defaults: Mapping[str, float] = GENERATE_DEFAULTS,
    device: str,
    dtype: str,
    log: LogFn,
) -> tuple[Decoder, Tokenizer, GenerationOptions]:
    """Load the model and the tokenizer of a command that generates; its options with the model's own defaults."""
    model, tokenizer = load_text_model(name_or_path, device, dtype, log)
    return model, tokenizer, options.with_advice(model.generation_config, defaults, log)


def note_busy_cores(log: LogFn) -> None:
    """Log that fewer threads are faster, where there are fewer cores or other programs keep some busy. The number is
    not changed: the last bits of a result depend on it."""
    threads = torch.get_num_threads()
    if threads > usable_cores():
        log(f"note: {describe_threads(threads, option='--threads ')}")
    elif (idle := find_idle_threads(threads)).value < threads:
        log(f"note: {idle.reason}, so --threads {idle.value} is faster than {threads}, and changes last bits")


def use_fast_products(dtype: str, log: LogFn) -> None:
    """Choose the kernels of products with few rows by the machine's profile, and warn of a dtype that is slow here."""
    profile = load_kernel_rates(log)
    set_few_row_products(choose_few_rows(profile).value, choose_few_row_kernel(profile).value)
    if dtype == "bfloat16" and (warning := slow_bf16_warning(profile)):
        log(f"warning: {warning}")


def quantized_kinds(model: nn.Module) -> list[str]:
    """The formats of the model's quantized matrices."""
    return sorted({module.form.name for module in model.modules() if isinstance(module, QuantizedMatrix)})


def use_fast_weights(model: nn.Module, kinds: Sequence[str], profile: MachineProfile, log: LogFn) -> None:
    """Dequantize the formats that are slower than float32 by the machine's profile, with a warning."""
    for kind in kinds:
        choice = choose_weight_kernel(profile, kind)
        if choice.value:
            continue
        for module in model.modules():
            if isinstance(module, QuantizedMatrix) and module.form.name == kind and module.q.dim() == 2:
                module.keep_floats()
        log(f"warning: {choice.reason} on this machine: they are dequantized, and take float32's memory")


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """The dtype that `--dtype` names; UsageError for a name that is not known."""
    if dtype == "auto":
        fast = device.type == "cuda" and resolve_precision("auto", device).value == "bf16"
        return "bfloat16" if fast else "float32"
    if dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype!r} is not known; give auto, {', '.join(DTYPES)}")
    return dtype


def generate_text(
    name_or_path: str, prompt: str, options: GenerationOptions, *, device: str, dtype: str, as_json: bool, log: LogFn
) -> None:
    """Print the continuation of a prompt as it is generated; with as_json, one JSON document at the end."""
    model, tokenizer, options = load_for_generation(name_or_path, options, device=device, dtype=dtype, log=log)
    tokens = options.encode_prompts(tokenizer, [prompt])[0]
    require_room_in_context(tokens, model, options.slide)
    until = options.stopping_criteria(model, tokenizer)
    if options.compile:
        require_compiler(next(model.parameters()).device, log)
    if as_json or options.beams:
        done = complete_prompts(model, [tokens], options, until)[0]
    if as_json:
        print_json({"prompt": prompt, **asdict(done)})
        return
    if not options.chat:
        print_text(prompt)
    pieces = [done.text or ""] if options.beams else stream_text(model, tokens, options, until)
    for piece in pieces:
        print_text(piece)
    print_text("\n")


def complete_prompts(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions,
    stopping_criteria: StoppingCriteria,
    copy_offsets: Sequence[int] | None = None,
) -> list[Completion]:
    """One completion of each prompt: sampled, or the best that beam search finds."""
    if (beams := options.beams) is not None:
        return beam_search(model, prompts, options.sampling, stopping_criteria, beams, compile=options.compile)
    return generate_completions(
        model, prompts, options.sampling, stopping_criteria,
        seed=options.seed, compile=options.compile, copy_offsets=copy_offsets,
    )  # fmt: skip


def require_compiler(device: torch.device, log: LogFn) -> None:
    """UsageError if there is no C++ compiler, which torch.compile needs on the CPU."""
    if device.type == "cpu" and not (compiler := load_compiler(log)).works:
        raise UsageError(f"--compile needs a C++ compiler that works: {compiler.problem}; or leave --compile out")
    log("compiling: about half a minute before the text begins")


def require_room_in_context(tokens: list[int], model: Decoder, slide: bool) -> None:
    """UsageError for a prompt that fills the context."""
    context = model.config.max_position_embeddings
    if len(tokens) >= context and not slide:
        raise UsageError(f"the prompt has {len(tokens)} tokens, the context is {context}; shorten it, or --slide")


def stream_text(
    model: Decoder, tokens: list[int], options: GenerationOptions, stopping_criteria: StoppingCriteria
) -> Iterator[str]:
    """Yield the text in pieces, each as soon as its bytes are complete."""
    for token in stream_tokens(
        model, [tokens], options.sampling, stopping_criteria, seed=options.seed, compile=options.compile
    ):
        yield token.text


def print_text(text: str) -> None:
    """Write text to stdout at once, without control characters."""
    sys.stdout.write(clean_text(text))
    sys.stdout.flush()
