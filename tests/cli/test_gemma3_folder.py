"""Gemma 3 with images from a folder in its own hub layout: pictures from files, prompts, logits and answers equal to
transformers', and every command works on the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import llm_quest as quest
from llm_quest.cli.main import app
from llm_quest.cli.vision import ImagePrompt
from llm_quest.data.image_chat import ImageTurn
from llm_quest.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import DataError
from llm_quest.generation import decoding
from tests.models.vision import GEMMA3_TEXT, SIZES
from tests.oracles import randomize_, transformers

IMAGE_TOKENS = ("<start_of_image>", "<image_soft_token>", "<end_of_image>")
TURNS = ("<start_of_turn>", "<end_of_turn>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] | trim }}{% else %}"
    "{% for item in message['content'] %}{% if item['type'] == 'image' %}{{ '<start_of_image>' }}"
    "{% elif item['type'] == 'text' %}{{ item['text'] | trim }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PROMPT = "compare <start_of_image> with\n<start_of_image> now"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 in the files of google/gemma-3-4b-it; config.json as short as theirs."""
    folder = tmp_path_factory.mktemp("gemma3")
    made = train_bpe([PROMPT, TEMPLATE], 320, (*SPECIAL_TOKENS, *IMAGE_TOKENS, *TURNS))
    tokenizer = Tokenizer(
        made.backend_tokenizer, eos_tokens=["<|endoftext|>"], bos_token="<|im_start|>", pad_token="<|pad|>"
    )
    tokenizer.save(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    names = dict(zip(("boi_token", "image_token", "eoi_token"), IMAGE_TOKENS, strict=True))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_special_tokens": names} | names))
    boi, image, eoi = map(tokenizer.token_to_id, IMAGE_TOKENS)
    config = transformers.Gemma3Config(
        text_config=GEMMA3_TEXT | {"vocab_size": tokenizer.vocab_size},
        vision_config={**SIZES, "patch_size": 4, "num_hidden_layers": 3, "vision_use_head": False},
        mm_tokens_per_image=16, image_token_index=image, boi_token_index=boi, eoi_token_index=eoi,
    )  # fmt: skip
    randomize_(transformers.Gemma3ForConditionalGeneration(config)).save_pretrained(folder)
    held = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in held} == {"language_model", "vision_tower", "multi_modal_projector"}
    processor = gemma3_images(size={"height": 32, "width": 32})
    (folder / "preprocessor_config.json").write_text(json.dumps(processor.to_dict(), default=dict))
    said = {"image_seq_length": 16, "processor_class": "Gemma3Processor"}
    (folder / "processor_config.json").write_text(json.dumps(said))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    for number, size in enumerate(((70, 50), (40, 90))):
        noise = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def gemma3_images(**settings: Any) -> Any:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    return Gemma3ImageProcessorPil(**settings)


@pytest.fixture(scope="module")
def transformers_model(folder: Path) -> tuple[Any, Any]:
    processor = transformers.Gemma3Processor(
        gemma3_images(size={"height": 32, "width": 32}),
        transformers.AutoTokenizer.from_pretrained(folder),
        chat_template=TEMPLATE,
        image_seq_length=16,
    )
    return transformers.Gemma3ForConditionalGeneration.from_pretrained(folder).eval(), processor


def files(folder: Path) -> list[str]:
    return [str(folder / "0.png"), str(folder / "1.png")]


def our_prompt(folder: Path) -> ImagePrompt:
    return ImagePrompt.load(str(folder), files(folder), "cpu", "float32", lambda text: None)


def test_prompt_pixels_and_logits_equal_transformers(folder: Path, transformers_model: tuple[Any, Any]):
    model, processor = transformers_model
    opened = [Image.open(file) for file in files(folder)]
    wanted = processor(images=opened, text=PROMPT, return_tensors="pt")
    ours = our_prompt(folder)
    ids = ours.chat.encode_text(PROMPT, ours.image_lengths)
    assert ids == wanted["input_ids"][0].tolist()
    pixels = torch.stack(ours.images)
    torch.testing.assert_close(pixels, wanted["pixel_values"], atol=2e-6, rtol=1e-6)
    with torch.no_grad():
        reference = model(**wanted).logits
        found = ours.model(wanted["input_ids"], image_features=ours.model.get_image_features(pixels))
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)


def test_generate_and_chat_answer_as_transformers_does(folder: Path, transformers_model: tuple[Any, Any]):
    model, processor = transformers_model
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    opened = [Image.open(file) for file in files(folder)]
    inputs = processor(images=opened, text=prompt, add_special_tokens=False, return_tensors="pt")
    ours = our_prompt(folder)
    assert ours.chat.encode_turns([ImageTurn("user", "What is it?", 2)], [16, 16]) == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    shown = [word for file in files(folder) for word in ("--image", file)]
    asked = ["generate", str(folder), *shown, "-p", "What is it?", "--chat", "-n", "6", "--temperature", "0"]
    said = CliRunner().invoke(app, [*asked, "--json", "-q"])
    assert said.exit_code == 0, said.exception
    assert json.loads(said.stdout)["tokens"] == answer.tolist()
    text = ours.tokenizer.decode(answer.tolist())
    lines = [f"/image {file}" for file in files(folder)] + ["What is it?", "/image no.png", "And now?", "/quit"]
    talk = CliRunner().invoke(
        app, ["chat", str(folder), "-n", "6", "--temperature", "0"], input="\n".join(lines)
    )  # fmt: skip
    assert talk.exit_code == 0, talk.exception
    assert text.strip() in talk.stdout
    assert "no.png: there is no such image" in talk.stderr


@pytest.mark.parametrize("padding", [2, decoding.MAX_PADDING])
def test_ragged_prompts_with_and_without_images_are_answered_as_each_alone(
    folder: Path, padding: int, monkeypatch: pytest.MonkeyPatch
):
    """Prompts so unlike in length that they are read in groups: each group is shown its own images."""
    monkeypatch.setattr(decoding, "MAX_PADDING", padding)  # 2: each prompt is read in a pass of its own
    ours = our_prompt(folder)
    prompts = [
        ours.chat.encode_text("a <start_of_image> b", [16]),
        ours.tokenizer.encode("no image here"),
        ours.chat.encode_text(PROMPT + " and much more text that goes on" * 3, [16, 16]),
    ]
    images = [ours.images[:1], [], ours.images[::-1]]
    options = {"max_new_tokens": 5, "temperature": 0.0, "eos_token_id": ()}
    together = quest.generate(ours.model.with_images(images), prompts, **options)  # type: ignore[arg-type]
    for prompt, shown, one in zip(prompts, images, together, strict=True):
        alone = quest.generate(ours.model.with_images([shown]), [prompt], **options)  # type: ignore[arg-type]
        assert one.tokens == alone[0].tokens


def test_inspect_verify_and_export_read_the_whole_model(folder: Path, tmp_path: Path):
    seen = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert seen.exit_code == 0, seen.exception
    total = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert (json.loads(seen.stdout)["family"], json.loads(seen.stdout)["parameters"]) == ("gemma3", total)
    verified = CliRunner().invoke(app, ["verify", str(folder), "--json"])
    assert verified.exit_code == 0, verified.stdout
    assert json.loads(verified.stdout)["passed"]
    exported = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "out")])
    assert exported.exit_code == 0, exported.exception
    again = CliRunner().invoke(app, ["verify", str(tmp_path / "out"), "--json"])
    assert again.exit_code == 0, again.stdout
    held, wrote = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "out"))
    prefix = {name.replace("vision_tower.vision_model.", "vision_tower.") for name in wrote}
    assert prefix == {name.replace("vision_tower.vision_model.", "vision_tower.") for name in held}
    assert (
        ImagePrompt.load(str(tmp_path / "out"), files(folder), "cpu", "float32", print).preprocess
        == our_prompt(folder).preprocess
    )


def test_captions_are_trained_on_and_the_run_is_shown_images_and_exported(folder: Path, tmp_path: Path):
    """The rows of train vlm have an image as Gemma writes it, between its own tokens."""
    rows = []
    for number in range(8):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "caption": "a photo"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    asked = [f"model.load={folder}", f"data.source={tmp_path / 'rows.jsonl'}", "data.held_out=0.3", "max_steps=2"]
    asked += ["sequence_length=64", "batch_size=4", "precision=fp32", "warmup_steps=1", "eval_images=2"]
    train = CliRunner().invoke(app, ["train", "vlm", *asked, "--out", str(tmp_path / "run"), "-q"])
    assert train.exit_code == 0, train.exception
    trained: Any = quest.load(tmp_path / "run")
    assert trained.spec.family == "gemma3"
    assert not torch.equal(trained.adapter.out.weight, quest.load(folder, vision=True).adapter.out.weight)  # type: ignore[attr-defined]
    exported = CliRunner().invoke(app, ["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert exported.exit_code == 0, exported.exception
    answers = []
    for where in (tmp_path / "run", tmp_path / "out"):
        shown = [
            "generate",
            str(where),
            "--image",
            files(folder)[0],
            "-p",
            "describe:",
            "-n",
            "4",
            "--temperature",
            "0",
        ]
        said = CliRunner().invoke(app, [*shown, "--json", "-q"])
        assert said.exit_code == 0, said.exception
        answers.append(json.loads(said.stdout)["tokens"])
    assert answers[0] == answers[1]


def test_text_commands_read_the_text_part_alone(folder: Path):
    assert quest.load(folder).spec.family == "gemma"
    said = CliRunner().invoke(app, ["generate", str(folder), "-p", "now", "-n", "3", "-q"])
    assert said.exit_code == 0, said.exception


def test_a_processor_of_another_size_than_the_models_is_refused(folder: Path, tmp_path: Path):
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "preprocessor_config.json").unlink()
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    wrong = settings | {"size": {"height": 24, "width": 24}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(wrong))
    with pytest.raises(DataError, match="makes images of 24 pixels with 3 channels, the model reads 32 with 3"):
        ImagePrompt.load(str(tmp_path), files(folder), "cpu", "float32", print)
