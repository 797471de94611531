"""What reads input: for each kind good inputs, and a function that reads one. It may return or raise a QuestError;
anything else is a fault."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import struct
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llm_quest.data.conversations import read_conversations
from llm_quest.data.document import DropReport
from llm_quest.data.image_text import read_caption_rows
from llm_quest.data.preferences import read_preferences
from llm_quest.data.preprocessor_config import parse_preprocessor_config
from llm_quest.data.problems import parse_task
from llm_quest.data.problems.problem import Problem
from llm_quest.data.prompt_rows import read_prompt_rows
from llm_quest.data.records import iter_records
from llm_quest.data.row_forms import ROW_FORMS
from llm_quest.data.sentencepiece_model import read_sentencepiece
from llm_quest.data.step_labels import read_labeled_steps
from llm_quest.data.text_classification import read_labeled_texts
from llm_quest.data.tokenizer import Tokenizer
from llm_quest.data.unpaired import read_unpaired
from llm_quest.data.vocabulary import token_bytes
from llm_quest.errors import DataError, UsageError
from llm_quest.hub.adapter_config import read_adapter_config
from llm_quest.hub.config import parse_generation_config, read_json
from llm_quest.hub.gguf import TensorData, read_gguf, tensor_nbytes, write_gguf
from llm_quest.hub.gguf_dequantize import DEQUANTIZE_ONLY
from llm_quest.hub.gguf_export import save_gguf
from llm_quest.hub.inspect import inspect_folder
from llm_quest.hub.load_save import load
from llm_quest.hub.load_tokenizer import load_tokenizer
from llm_quest.hub.pooling import read_pooling
from llm_quest.hub.safetensors_io import read_header
from llm_quest.layers.rotary import LinearScaling, RotaryEmbedding
from llm_quest.manifest import describe_changes, find_fault, read_manifest
from llm_quest.models import FAMILIES, VISION_FAMILIES
from llm_quest.models.build import build, preset
from llm_quest.recipes import RECIPES
from llm_quest.recipes.config import parse_config
from llm_quest.recipes.recipe import get_recipe
from llm_quest.recipes.yaml_io import apply_overrides, read_yaml
from llm_quest.report.record import read_run
from llm_quest.rollouts.verifiers import VERIFIERS, verify_answer
from tests.faults.gguf_keys import example_keys, write_with_keys
from tests.faults.mutations import to_hostile_json
from tests.faults.server_target import CHAT, STRUCTURED, TEXTS, ask
from tests.gguf_judge import word_tokenizer
from tests.tokenizer_kinds import tokenizer_of


@dataclass(frozen=True)
class Target:
    """values: good inputs as JSON values (`as_lines`: rows of a file); contents: good inputs as bytes. read(file):
    reads a file of the name `file` (without it: of the target's)."""

    name: str
    read: Callable[[Path], object]
    values: Callable[[], Sequence[Any]] = lambda: ()
    contents: Callable[[], Sequence[bytes]] = lambda: ()
    as_lines: bool = False
    file: str = ""


def example_rows() -> list[Any]:
    return [[dict(form.example)] * 2 for forms in ROW_FORMS.values() for form in forms]


def rows_reader(parse: Callable[..., object]) -> Callable[[Path], object]:
    def read(file: Path) -> object:
        report = DropReport()
        parsed = parse(iter_records(file, report), report)
        report.lines()
        return parsed

    return read


def family_configs() -> list[Any]:
    found = []
    for family in (*FAMILIES, *VISION_FAMILIES):
        config = next(one.config for one in family.presets if one.name.endswith("-tiny"))
        found.append(family.publish(config) | {"dtype": "float32"})
    return found


def inspect_config(file: Path) -> object:
    """A model's folder with this config.json and no weights."""
    return inspect_folder(file.parent).lines()


def read_generation(file: Path) -> object:
    content = read_json(file)
    return parse_generation_config({}, content), parse_generation_config(content, {})


def recipe_texts() -> list[bytes]:
    folder = Path(get_recipe.__code__.co_filename).parent
    return [file.read_bytes() for file in sorted(folder.glob("*.yaml"))]


def read_recipe(file: Path) -> object:
    settings = read_yaml(file.read_text(encoding="utf-8", errors="replace"), file.name)
    name = settings.tree.get("recipe")
    return parse_config(get_recipe(name if name in RECIPES else "pretrain").Config, settings)


def read_overrides(file: Path) -> object:
    pairs = file.read_text(encoding="utf-8", errors="replace").split("\x1e")
    settings = apply_overrides(read_yaml("recipe: pretrain", "recipe.yaml"), pairs)
    return parse_config(get_recipe("pretrain").Config, settings)


def safetensors_bytes() -> list[bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    return [struct.pack("<Q", len(text)) + text + bytes(32)]


@functools.cache
def gguf_bytes() -> list[bytes]:
    """Small models with their tokenizers, so that most of the bytes are numbers, names and counts."""
    sizes = {"vocab_size": 40, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 2}
    model = build(
        replace(preset("llama3.2-tiny").config, rotary=RotaryEmbedding(2, 10_000.0, LinearScaling(2.0)), **sizes)
    )
    found = []
    for quantize in (None, "q8_0"):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "x.gguf"
            save_gguf(model, word_tokenizer(40), file, quantize=quantize)
            found.append(file.read_bytes())
    return found


@functools.cache
def gguf_block_bytes() -> list[bytes]:
    """The block types that are read and not written: the matrices of a small model, each of another type."""
    sizes = {"vocab_size": 40, "hidden_size": 256, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 2}
    kinds = itertools.cycle(DEQUANTIZE_ONLY)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.gguf"
        model = build(replace(preset("llama3.2-tiny").config, rotary=RotaryEmbedding(2, 10_000.0), **sizes))
        save_gguf(model, word_tokenizer(40), file)
        found = read_gguf(file)
        tensors = {}
        for name, tensor in found.tensors.items():
            kind = next(kinds) if tensor.shape[-1] == 256 and len(tensor.shape) == 2 else "F32"
            zeros = bytes(tensor_nbytes(kind, tensor.shape))
            tensors[name] = TensorData(kind, tensor.shape, lambda zeros=zeros: iter([zeros]))
        file.unlink()
        write_gguf(file, found.metadata, tensors)
        return [file.read_bytes()]


def read_gguf_model(file: Path) -> object:
    inspected = inspect_folder(file).lines()
    with contextlib.suppress(DataError):
        load_tokenizer(file)
    return inspected, load(file)


def read_gguf_with_keys(file: Path) -> object:
    changed = file.with_name("x.gguf")
    return read_gguf_model(changed) if write_with_keys(file, changed) else None


POOLING: dict[str, Any] = {
    "modules.json": [{"type": "x.Transformer", "path": ""}, {"type": "x.Pooling", "path": "1_Pooling"}],
    "1_Pooling/config.json": {"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False},
    "sentence_bert_config.json": {"max_seq_length": 512, "do_lower_case": False},
    "config_sentence_transformers.json": {"prompts": {"query": "Q: "}, "default_prompt_name": None},
    "config.json": {"is_matryoshka": True, "matryoshka_dimensions": [4, 8]},
}
NEW_POOLING = POOLING | {"1_Pooling/config.json": {"embedding_dimension": 8, "pooling_mode": ["lasttoken"]}}


def read_pooling_files(file: Path) -> object:
    """A folder with these files: name -> contents."""
    (file.parent / "1_Pooling").mkdir(exist_ok=True)
    with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError):
        given = json.loads(file.read_bytes())
        for name in POOLING:
            (file.parent / name).write_bytes(to_hostile_json(given.get(name)))
    return read_pooling(file.parent)


def tokenizer_values() -> list[Any]:
    return [
        json.loads(tokenizer_of(kind).backend_tokenizer.to_str()) for kind in ("byte-level", "Unigram", "WordPiece")
    ]


def read_tokenizer(file: Path) -> object:
    tokenizer = Tokenizer.load(file)
    if tokenizer.byte_token_ids:
        assert tokenizer.byte_token_ids
    else:
        with contextlib.suppress(UsageError):  # of a kind whose bytes are not known
            token_bytes(tokenizer, [5])
    return tokenizer.decode(tokenizer.encode("Once upon a time été"))


def read_tokenizer_config(file: Path) -> object:
    (file.parent / "tokenizer.json").write_text(tokenizer_of("byte-level").backend_tokenizer.to_str())
    return Tokenizer.load(file.parent).eos_token_ids


def read_answers(file: Path) -> object:
    text = file.read_text(encoding="utf-8", errors="replace")
    scores = []
    for name in VERIFIERS:
        problem = Problem("?", "12", name, "key", numbers=(3, 4), steps=("3*4=12",))
        scores.append(verify_answer(problem, text))
    return scores


def read_task(file: Path) -> object:
    return parse_task(file.read_text(encoding="utf-8", errors="replace"))


def read_run_folder(file: Path) -> object:
    (file.parent / "checkpoints").mkdir(exist_ok=True)
    return read_run(file.parent)


def read_manifest_file(file: Path) -> object:
    find_fault(file.parent)
    return describe_changes(read_manifest(file.parent)["identity"], {"settings": '{"a": 1}'})


ADAPTER = {
    "peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "base_model_name_or_path": "base",
    "rank_pattern": {"q_proj": 4}, "alpha_pattern": {}, "modules_to_save": None, "bias": "none", "use_dora": False,
}  # fmt: skip
METRICS = {"step": 1, "loss": 2.5, "tokens": 64, "tokens_per_second": 10.5, "learning_rate": 1e-3, "eval/loss": 2.4}
EVENT = {"time": "2026-11-29T03:04:50.289+00:00", "event": "saved", "step": 2, "checkpoint": "x"}
ENTRY = {"size": 3, "sha256": "0" * 64}
MANIFEST = {"format": 2, "step": 3, "identity": {"settings": '{"a": 2}'}, "files": {"state.json": ENTRY}}
GENERATION = {
    "bos_token_id": 1, "eos_token_id": [2, 3], "pad_token_id": 0, "temperature": 0.7, "top_k": 50, "top_p": 0.9,
    "do_sample": True, "repetition_penalty": 1.1, "min_p": 0.05, "max_new_tokens": 20, "max_length": 99,
}  # fmt: skip
PREPROCESSOR = {
    "image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"shortest_edge": 32}, "crop_size": 32,
    "do_center_crop": True, "do_rescale": True, "rescale_factor": 0.1, "do_normalize": True, "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3, "resample": 3, "do_convert_rgb": True,
}  # fmt: skip
TOKENIZER_CONFIG = {
    "tokenizer_class": "GPT2TokenizerFast", "eos_token": "</s>", "bos_token": {"content": "<s>"},
    "model_max_length": 64, "chat_template": "{{ messages[0].content }}", 
    "added_tokens_decoder": {"330": {"content": "<x>", "special": True}},
}  # fmt: skip
SENTENCEPIECE = (
    b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02",
    b"\x12\x04\x18\x01\x20\x03\n\x0c\n\x03abc\x15\0\0\0\0\x18\x01",
)
ANSWERS = (b"<think>3*4=12</think> <answer>12</answer>", b"3 * 4", b"#### 12", b"\\boxed{12}", b"3*4=12;12", b"1,250/3")
OVERRIDES = (
    b"max_steps=30\x1emodel.preset=llama3.2-tiny\x1emodel.config={hidden_size: 64}",
    b"model.preset=llama3.2-tiny\x1etechniques=[{name: lora, rank: 8}]",
    b"model.preset=llama3.2-tiny\x1edata.source=[a, {path: b}]",
)
TASKS = (b"addition:digits=3", b"countdown:count=4,largest=20", b"reverse:longest=5", b"chained", b"registers")

TARGETS: tuple[Target, ...] = (
    *(
        Target(f"rows of {name}", rows_reader(parse), example_rows, as_lines=True, file="rows.jsonl")
        for name, parse in {
            "conversations": read_conversations, "preferences": read_preferences, "prompts": read_prompt_rows,
            "classes": read_labeled_texts, "single answers": read_unpaired,
            "labeled steps": read_labeled_steps, "captions": read_caption_rows,
        }.items()
    ),
    Target("config.json", inspect_config, family_configs),
    Target("adapter_config.json", read_adapter_config, lambda: [ADAPTER]),
    Target("generation_config.json", read_generation, lambda: [GENERATION]),
    Target("preprocessor_config.json", lambda file: parse_preprocessor_config(read_json(file)), lambda: [PREPROCESSOR]),
    Target("tokenizer.json", read_tokenizer, tokenizer_values),
    Target("tokenizer_config.json", read_tokenizer_config, lambda: [TOKENIZER_CONFIG]),
    Target("tokenizer.model", read_sentencepiece, contents=lambda: SENTENCEPIECE),
    Target("x.safetensors", read_header, contents=safetensors_bytes),
    Target("x.gguf", read_gguf_model, contents=gguf_bytes),
    Target("GGUF of other block types", read_gguf_model, contents=gguf_block_bytes, file="x.gguf"),
    Target("keys of GGUF files", read_gguf_with_keys, example_keys),
    Target("pooling files", read_pooling_files, lambda: [POOLING, NEW_POOLING]),
    Target("MANIFEST.json", read_manifest_file, lambda: [MANIFEST]),
    Target("metrics.jsonl", read_run_folder, lambda: [[METRICS, METRICS]], as_lines=True),
    Target("events.jsonl", read_run_folder, lambda: [[EVENT, EVENT]], as_lines=True),
    Target("recipe.yaml", read_recipe, contents=recipe_texts),
    Target("key=value", read_overrides, contents=lambda: OVERRIDES, file="pairs.txt"),
    Target("answers", read_answers, contents=lambda: ANSWERS, file="answers.txt"),
    Target("tasks", read_task, contents=lambda: TASKS, file="task.txt"),
    Target("POST chat", ask("/v1/chat/completions"), lambda: [CHAT, STRUCTURED]),
    Target("POST completions", ask("/v1/completions"), lambda: TEXTS),
)  # fmt: skip
