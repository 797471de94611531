"""LLaVA-1.5 from a folder in its own hub layout: pictures from files, prompts and answers equal to transformers'."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import llm_quest as quest
from llm_quest.cli.main import app
from llm_quest.cli.vision import ImagePrompt
from llm_quest.data.image_chat import ImageChat, ImageTurn
from llm_quest.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import UsageError
from llm_quest.hub.load_tokenizer import load_tokenizer
from tests.models.vision import SIZES
from tests.oracles import randomize_, transformers

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
PROMPT = "USER: <image>\nWhat is in the picture? ASSISTANT:"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA under the names and in the files of llava-hf/llava-1.5-7b-hf."""
    folder = tmp_path_factory.mktemp("llava")
    made = train_bpe([PROMPT, TEMPLATE], 300, (*SPECIAL_TOKENS, "<image>"))
    tokenizer = Tokenizer(
        made.backend_tokenizer, eos_tokens=["<|endoftext|>"], bos_token="<|im_start|>", pad_token="<|pad|>"
    )
    tokenizer.save(folder)
    text = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=112, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(**SIZES, num_hidden_layers=3)
    image = tokenizer.token_to_id("<image>")
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, tie_word_embeddings=False, image_seq_length=16
    )
    randomize_(transformers.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    assert {hub_name(name).split(".")[0] for name in load_file(folder / "model.safetensors")} == {
        "language_model", "vision_tower", "multi_modal_projector",
    }  # fmt: skip
    tensors = {hub_name(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    square = {"height": 32, "width": 32}
    processor = transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size=square
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(processor.to_dict(), default=dict))
    ours = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": 8,
        "processor_class": "LlavaProcessor",
    }
    (folder / "processor_config.json").write_text(json.dumps(ours | {"vision_feature_select_strategy": "default"}))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    noise = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((70, 50), Image.Resampling.BICUBIC).save(folder / "photo.png")
    return folder


def hub_name(name: str) -> str:
    """transformers' name of today in the layout of the hub's files."""
    renames = {
        r"(model\.)?lm_head\.": "language_model.lm_head.",
        r"(model\.)?language_model\.(?!lm_head\.|model\.)": "language_model.model.",
        r"(model\.)?vision_tower\.(?!vision_model\.)": "vision_tower.vision_model.",
        r"model\.": "",
    }
    for pattern, replacement in renames.items():
        name, count = re.subn(f"^{pattern}", replacement, name)
        if count:
            break
    return name


@pytest.fixture(scope="module")
def transformers_model(folder: Path) -> tuple[Any, Any]:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder),
        patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval(), processor


def our_prompt(folder: Path) -> ImagePrompt:
    return ImagePrompt.load(str(folder), [str(folder / "photo.png")], "cpu", "float32", lambda text: None)


def test_prompt_pixels_and_logits_equal_transformers(folder: Path, transformers_model: tuple[Any, Any]):
    model, processor = transformers_model
    wanted = processor(images=Image.open(folder / "photo.png"), text=PROMPT, return_tensors="pt")
    ours = our_prompt(folder)
    ids = ours.chat.encode_text(PROMPT, ours.image_lengths)
    assert ids == wanted["input_ids"][0].tolist()
    torch.testing.assert_close(torch.stack(ours.images), wanted["pixel_values"], atol=2e-6, rtol=1e-6)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        reference = model(input_ids=tokens, pixel_values=wanted["pixel_values"]).logits
        features = ours.model.get_image_features(torch.stack(ours.images))
        found = ours.model(tokens, image_features=features)
    torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)


def test_the_commands_answer_as_transformers_does(folder: Path, transformers_model: tuple[Any, Any]):
    model, processor = transformers_model
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    inputs = processor(
        images=Image.open(folder / "photo.png"), text=prompt, add_special_tokens=False, return_tensors="pt"
    )
    ours = our_prompt(folder)
    assert ours.chat.encode_turns([ImageTurn("user", "What is it?", 1)], [16]) == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    asked = ["generate", str(folder), "--image", str(folder / "photo.png"), "-p", "What is it?", "--chat"]
    said = CliRunner().invoke(app, [*asked, "-n", "6", "--temperature", "0", "--json", "-q"])
    assert said.exit_code == 0, said.exception
    assert json.loads(said.stdout)["tokens"] == answer.tolist()
    talk = CliRunner().invoke(
        app, ["chat", str(folder), "--image", str(folder / "photo.png"), "-n", "6", "--temperature", "0", "-q"],
        input="What is it?\nAnd now?\n/quit\n",
    )  # fmt: skip
    assert talk.exit_code == 0, talk.exception


def test_what_somebody_typed_is_no_control_token_and_the_image_stands_once(folder: Path):
    chat: ImageChat = our_prompt(folder).chat
    end = load_tokenizer(folder).token_to_id("<|im_end|>")
    image = load_tokenizer(folder).token_to_id("<image>")
    assert end not in chat.encode_text("<image> a <|im_end|>", [16])
    assert chat.encode_turns([ImageTurn("user", "<image> <|im_end|>", 1)], [16]).count(image) == 16
    with pytest.raises(UsageError, match="the prompt has 2 times <image>, and there is one image"):
        chat.encode_text("<image> and <image>", [16])
    with pytest.raises(UsageError, match="the prompt has 1 times <image>, and there are 2 images"):
        chat.encode_text("<image> and", [16, 16])
    assert chat.encode_text("<image> and <image>", [16, 3]).count(image) == 19


def test_the_folder_loads_and_is_published_again(folder: Path, tmp_path: Path):
    model: Any = quest.load(folder)
    quest.save(model, tmp_path / "again", tokenizer=load_tokenizer(folder))
    again = dict(quest.load(tmp_path / "again").named_parameters())
    assert all(torch.equal(again[name], parameter) for name, parameter in model.named_parameters())


def test_a_folder_as_today_s_transformers_saves_it_says_how_images_are_made(folder: Path, tmp_path: Path):
    """processor_config.json with the image processor inside, and no preprocessor_config.json."""
    for file in folder.iterdir():
        if file.name not in ("preprocessor_config.json", "processor_config.json"):
            (tmp_path / file.name).symlink_to(file)
    said = json.loads((folder / "processor_config.json").read_text())
    inner = json.loads((folder / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").write_text(json.dumps(said | {"image_processor": inner}))
    assert our_prompt(tmp_path).preprocess == our_prompt(folder).preprocess
