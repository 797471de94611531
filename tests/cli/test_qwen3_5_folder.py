"""Qwen3.5 with images from a folder in its own hub layout: pictures of several sizes from files, prompts, logits and
answers equal to transformers', and every command works on the folder."""

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
from llm_quest.cli.vision import ImagePrompt, TemplatedImageConversation
from llm_quest.data.batch import IGNORE_INDEX
from llm_quest.data.document import DropReport
from llm_quest.data.image_chat import ImageChat, ImageTurn
from llm_quest.data.image_text import CaptionDataset, ImageTextCollator, read_caption_rows
from llm_quest.data.records import read_records
from llm_quest.data.tokenizer import SPECIAL_TOKENS, Tokenizer
from llm_quest.data.vocabulary import train_bpe
from llm_quest.errors import UsageError
from llm_quest.generation import decoding
from llm_quest.hub.load_tokenizer import load_preprocess, load_tokenizer
from llm_quest.objectives.next_token import CaptioningLoss
from llm_quest.recipes.engine import run_recipe
from llm_quest.recipes.recipe import load_recipe
from tests.models.vision import QWEN3_5_TEXT, QWEN3_5_VISION, qwen_patches
from tests.oracles import edit_config, randomize_, transformers

IMAGE_TOKENS = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for item in message.content %}"
    "{% if item.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif 'text' in item %}{{ item.text }}{% endif %}{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ONE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPT = f"compare {ONE} with\n{ONE} now"
IMAGES = {
    "size": {"shortest_edge": 256, "longest_edge": 2048},
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen3.5 in the files of Qwen/Qwen3.5-0.8B."""
    folder = tmp_path_factory.mktemp("qwen3_5")
    made = train_bpe([PROMPT, TEMPLATE], 320, (*SPECIAL_TOKENS, *IMAGE_TOKENS))
    tokenizer = Tokenizer(made.backend_tokenizer, eos_tokens=["<|im_end|>"], bos_token=None, pad_token="<|pad|>")
    tokenizer.save(folder)
    start, image, end, video = map(tokenizer.token_to_id, IMAGE_TOKENS)
    config = transformers.Qwen3_5Config(
        text_config=QWEN3_5_TEXT | {"vocab_size": tokenizer.vocab_size}, vision_config=QWEN3_5_VISION,
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = randomize_(transformers.Qwen3_5ForConditionalGeneration(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5)) * 0.5 - 1)
    model.save_pretrained(folder)
    edit_config(folder, lambda c: c["vision_config"].update(model_type="qwen3_5", deepstack_visual_indexes=[]))
    held = load_file(folder / "model.safetensors")
    assert {".".join(name.split(".")[:2]) for name in held} == {"model.language_model", "model.visual"}
    (folder / "preprocessor_config.json").write_text(json.dumps(qwen_images().to_dict(), default=dict))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for number, size in enumerate(((70, 50), (20, 90))):
        noise = np.random.default_rng(number).integers(0, 256, (5, 7, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def qwen_images() -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(**IMAGES)


@pytest.fixture(scope="module")
def transformers_model(folder: Path) -> tuple[Any, Any]:
    """The model, and the tokenizer: the processor's class needs a video processor, which needs torchvision."""
    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def files(folder: Path) -> list[str]:
    return [str(folder / "0.png"), str(folder / "1.png")]


def their_inputs(tokenizer: Any, text: str, folder: Path) -> dict[str, torch.Tensor]:
    """What Qwen3VLProcessor gives: the placeholder as often as an image has merged patches."""
    images = qwen_images()(images=[Image.open(file) for file in files(folder)], return_tensors="pt")
    first, *parts = text.split("<|image_pad|>")
    counts = [int(grid.prod()) // 4 for grid in images["image_grid_thw"]]
    assert len(set(counts)) == 2, "two images of several sizes"
    text = first + "".join("<|image_pad|>" * n + part for n, part in zip(counts, parts, strict=True))
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).long()
    return {"input_ids": ids, "mm_token_type_ids": kinds, **images}


def our_prompt(folder: Path) -> ImagePrompt:
    return ImagePrompt.load(str(folder), files(folder), "cpu", "float32", lambda text: None)


def test_prompt_pixels_and_logits_equal_transformers(folder: Path, transformers_model: tuple[Any, Any]):
    model, tokenizer = transformers_model
    wanted, ours = their_inputs(tokenizer, PROMPT, folder), our_prompt(folder)
    ids = ours.chat.encode_text(PROMPT, ours.image_lengths)
    assert ids == wanted["input_ids"][0].tolist()
    torch.testing.assert_close(qwen_patches(ours.images)["pixel_values"], wanted["pixel_values"], atol=2e-6, rtol=1e-6)
    with torch.no_grad():
        reference = model(**wanted).logits
        features = [ours.model.get_image_features(image[None])[0] for image in ours.images]
        found = ours.model(wanted["input_ids"], image_features=features)
    torch.testing.assert_close(found, reference, atol=3e-4, rtol=3e-4)


def test_generate_and_chat_answer_as_transformers_does(folder: Path, transformers_model: tuple[Any, Any]):
    model, tokenizer = transformers_model
    prompt = f"<|im_start|>user\n{ONE}{ONE}What is it?<|im_end|>\n<|im_start|>assistant\n"
    inputs, ours = their_inputs(tokenizer, prompt, folder), our_prompt(folder)
    asked_ids = ours.chat.encode_turns([ImageTurn("user", "What is it?", 2)], ours.image_lengths)
    assert asked_ids == inputs["input_ids"][0].tolist()
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    shown = [word for file in files(folder) for word in ("--image", file)]
    asked = ["generate", str(folder), *shown, "-p", "What is it?", "--chat", "-n", "8", "--temperature", "0"]
    said = CliRunner().invoke(app, [*asked, "--json", "-q"])
    assert said.exit_code == 0, said.exception
    assert json.loads(said.stdout)["tokens"] == answer.tolist()
    lines = [f"/image {file}" for file in files(folder)] + ["What is it?", "And now?", "/quit"]
    talk = CliRunner().invoke(app, ["chat", str(folder), "-n", "8", "--temperature", "0"], input="\n".join(lines))
    assert talk.exit_code == 0, talk.exception
    assert ours.tokenizer.decode(answer.tolist()).strip() in talk.stdout


@pytest.mark.parametrize("padding", [2, decoding.MAX_PADDING])
def test_ragged_prompts_with_and_without_images_are_answered_as_each_alone(
    folder: Path, padding: int, monkeypatch: pytest.MonkeyPatch
):
    """Positions behind images are fewer than tokens by another number in each row, also when rows end or are joined."""
    ours = our_prompt(folder)
    monkeypatch.setattr(decoding, "MAX_PADDING", padding)  # 2: each prompt is read in a pass of its own
    lengths = ours.image_lengths
    prompts = [
        ours.chat.encode_text(f"a {ONE} b", lengths[:1]),
        ours.tokenizer.encode("no image here"),
        ours.chat.encode_text(PROMPT + " and much more text that goes on" * 3, lengths[::-1]),
    ]
    images = [ours.images[:1], [], ours.images[::-1]]
    options = {"max_new_tokens": 6, "temperature": 0.0, "eos_token_id": ()}
    together = quest.generate(ours.model.with_images(images), prompts, n=2, **options)  # type: ignore[arg-type]
    for number, (prompt, shown) in enumerate(zip(prompts, images, strict=True)):
        alone = quest.generate(ours.model.with_images([shown]), [prompt], **options)[0]  # type: ignore[arg-type]
        row = list(prompt)
        for token in alone.tokens:
            features = [ours.model.get_image_features(image[None])[0] for image in shown] or None
            assert token == int(ours.model(torch.tensor([row]), image_features=features)[0, -1].argmax())
            row.append(token)
        assert [one.tokens for one in together[2 * number : 2 * number + 2]] == [alone.tokens] * 2


def test_what_no_longer_fits_is_dropped_with_its_images(folder: Path):
    shown, said = ImagePrompt.load(str(folder), [], "cpu", "float32", lambda text: None), []
    history = TemplatedImageConversation(shown, "Be brief.")
    for number, file in enumerate(files(folder)):
        history.add_image(file)
        history.add_user_message(f"What is it, {number}?")
        history.add_reply("A cat.")
    history.add_user_message("And now?")
    whole = history.prompt_tokens(1000, said.append)
    assert not said
    shorter = history.prompt_tokens(len(whole) - 1, said.append)
    assert len(said) == 1
    assert len(shown.images) == 1
    assert torch.equal(shown.images[0], our_prompt(folder).images[1])
    assert shorter == shown.chat.encode_turns(history.turns, shown.image_lengths)
    assert [turn.role for turn in history.turns] == ["system", "user", "assistant", "user"]
    with pytest.raises(UsageError, match="and there is room for 5"):
        history.prompt_tokens(5, said.append)


def test_inspect_verify_and_export_read_the_whole_model(folder: Path, tmp_path: Path):
    seen = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert seen.exit_code == 0, seen.exception
    total = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert (json.loads(seen.stdout)["family"], json.loads(seen.stdout)["parameters"]) == ("qwen3_5", total)
    exported = CliRunner().invoke(app, ["export", str(folder), str(tmp_path / "out")])
    assert exported.exit_code == 0, exported.exception
    for where in (folder, tmp_path / "out"):
        verified = CliRunner().invoke(app, ["verify", str(where), "--json"])
        assert verified.exit_code == 0, verified.stdout
        assert json.loads(verified.stdout)["passed"]
    held, wrote = (load_file(where / "model.safetensors") for where in (folder, tmp_path / "out"))
    assert held.keys() == wrote.keys()
    assert all(torch.equal(tensor, wrote[name]) for name, tensor in held.items())
    again = ImagePrompt.load(str(tmp_path / "out"), files(folder), "cpu", "float32", print)
    assert again.preprocess == our_prompt(folder).preprocess


def test_text_commands_read_the_text_part_alone(folder: Path):
    assert quest.load(folder).spec.family == "qwen3_next"


def test_an_image_whose_sides_are_no_multiples_is_refused(folder: Path):
    with pytest.raises(UsageError, match="images are 3 x 12 x 16; this model reads 3 channels and sides that are mult"):
        our_prompt(folder).model.get_image_features(torch.zeros(1, 3, 12, 16))


@pytest.fixture(scope="module")
def questions(folder: Path) -> Path:
    """Rows about images of three sizes."""
    Image.open(folder / "0.png").resize((64, 64)).save(folder / "2.png")
    rows = [
        {"image": f"{number}.png", "question": "compare", "answer": answer}
        for number, answer in enumerate(("now with", "compare now now with", "with"))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def test_the_loss_of_rows_with_images_of_several_sizes_is_that_of_transformers(
    folder: Path, transformers_model: tuple[Any, Any], questions: Path
):
    """Of the answers and their ends alone, image by image in transformers, all in one padded batch here."""
    model, tokenizer = quest.load(folder, vision=True), load_tokenizer(folder)
    preprocess, chat = load_preprocess(folder), ImageChat(tokenizer, model.config)

    def prefix_of(height: int, width: int) -> list[int]:
        return chat.encode_images([model.config.num_image_tokens(height, width)])

    rows = read_caption_rows(read_records(questions), DropReport())
    examples = CaptionDataset(rows, preprocess, 0.0, "rows").train_examples
    assert len({one.pixels.shape for one in examples}) == 3
    writer = ImageTextCollator(tokenizer, (), 200, prefix_of)
    batch = writer.collate(examples, [np.arange(1)] * 3, preprocess)
    with torch.no_grad():
        found = CaptioningLoss(model)(batch)
    expected = torch.zeros(())
    for row, one in zip(rows, examples, strict=True):
        tokens, targets = writer.encode_row(one.turns, one.pixels)
        images = qwen_images()(images=[Image.open(row.image)], return_tensors="pt")
        ids = torch.tensor([tokens])
        kinds = (ids == model.config.image_token_id).long()
        assert int(kinds.sum()) == int(images["image_grid_thw"].prod()) // 4
        with torch.no_grad():
            logits = transformers_model[0](input_ids=ids, mm_token_type_ids=kinds, **images).logits[0]
        expected += torch.nn.functional.cross_entropy(
            logits, torch.tensor(targets), ignore_index=IGNORE_INDEX, reduction="sum"
        )
        learned = [target for target in targets if target != IGNORE_INDEX]
        assert tokenizer.decode(learned[:-1]) == f" {one.turns[0].answer}"
    torch.testing.assert_close(found.total, expected, rtol=1e-5, atol=0)


def test_train_vlm_learns_answers_about_images_of_several_sizes(folder: Path, questions: Path, tmp_path: Path):
    pairs = [
        f"model.load={folder}", f"data.source={questions}", f"data.validation={questions}", "max_steps=20",
        "question_lr_scale=1", "batch_size=3", "learning_rate=5e-3", "warmup_steps=1", "caption_first_steps=0",
        "precision=fp32", "threads=1", "sequence_length=128", "logging_steps=1", "eval_images=3",
    ]  # fmt: skip
    found, config, settings = load_recipe("vlm", pairs)
    outcome = run_recipe(found, config, settings, tmp_path / "run", log=lambda text: None)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.5 * losses[0], losses
    assert outcome.scores, "all three images are asked about"
    seen = quest.load(tmp_path / "run", vision=True)
    assert seen.config.vision_config == quest.load(folder, vision=True).config.vision_config
    assert load_preprocess(tmp_path / "run") == load_preprocess(folder)
