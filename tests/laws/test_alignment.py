"""The same weights give the same bits wherever they begin in a file: what is trained is aligned, by who writes the file
or else by who loads it.

On processors where products depend on addresses (AVX2) the equal bits are the law; where they do not, the addresses
are asked directly."""

from __future__ import annotations

import ast
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import llm_quest as quest
from llm_quest.hub.load_save import load, save
from llm_quest.hub.safetensors_io import read_header
from llm_quest.hub.save_adapter import save_adapter
from llm_quest.models import FAMILIES
from llm_quest.models.decoder import Decoder
from llm_quest.recipes import reference_model
from llm_quest.techniques.lora import LoRA
from llm_quest.techniques.quantize import Quantize
from llm_quest.tensor_files import ALIGNMENT, MIN_HUGE_PAGE_BYTES, SLAB_BYTES, HugePageSlabs, align, write_tensors
from llm_quest.train import checkpoint, state
from llm_quest.train.parallel import DistributedContext

TINY = [preset.name for page in FAMILIES for preset in page.presets if preset.name.endswith("-tiny")]
SHIFTS = (4, 8, 16)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRESETS = ("llama3.2-tiny", "gpt2-tiny")  # one publishes its matrices turned


def shift_file(file: Path, shift: int) -> None:
    """More spaces behind the header, until the data begin `shift` bytes beyond a multiple of 64."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].rstrip()
    header += b" " * ((shift - 8 - len(header)) % ALIGNMENT)
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert {stored.start % ALIGNMENT for stored in read_header(file).values()} != {0}


def shift_weights(folder: Path, shift: int) -> Path:
    """A copy whose weights all begin `shift` bytes later."""
    out = folder.with_name(f"{folder.name}-{shift}")
    shutil.copytree(folder, out)
    for file in out.glob("*.safetensors"):
        shift_file(file, shift)
    return out


def lies_aligned(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


def have_equal_parameters(ours: nn.Module, theirs: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


def train_steps(model: Decoder) -> Decoder:
    """Three steps on a batch, and three on a single token, whose products are those of one row."""
    draw = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for shape in [(2, 12), (1, 1)] * 3:
        optimizer.zero_grad()
        rows = torch.randint(0, model.config.vocab_size, shape, generator=draw)
        model(rows).float().log_softmax(dim=-1)[..., 3].sum().backward()
        optimizer.step()
    return model


@torch.no_grad()
def decode(model: Decoder) -> Tensor:
    """The log-probabilities of eight greedy tokens, one pass for each."""
    tokens, log_probs = torch.tensor([[5]]), []
    for _ in range(8):
        best = model(tokens)[0, -1].float().log_softmax(dim=-1).max(dim=-1)
        tokens = torch.cat([tokens, best.indices.view(1, 1)], dim=1)
        log_probs.append(best.values)
    return torch.stack(log_probs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PRESETS)
def test_training_and_log_probs_do_not_depend_on_where_weights_begin_in_a_file(tmp_path, name, dtype):
    made = quest.build(name, seed=4, dtype=dtype).eval()
    folder = save(made, tmp_path / "model")
    expected = decode(made)
    train_steps(made)
    assert all(parameter.isfinite().all() for parameter in made.parameters())
    for shift in (0, *SHIFTS):
        moved = shift_weights(folder, shift) if shift else folder
        model = load(moved, aligned=True)
        assert all(map(lies_aligned, model.parameters()))
        assert torch.equal(decode(model), expected)
        assert have_equal_parameters(train_steps(model), made), "loaded as recipes load"
        mapped = load(moved)
        assert not shift or dtype != torch.float32 or not all(map(lies_aligned, mapped.parameters())), (
            "the shift must be felt"
        )
        DistributedContext().parallelize(mapped)
        assert all(map(lies_aligned, mapped.parameters()))
        assert have_equal_parameters(train_steps(mapped), made), "mapped, then placed for training"


def test_int8_rows_give_the_same_log_probs_wherever_they_begin(tmp_path):
    made = Quantize("int8")(quest.build("llama3.2-tiny", seed=4).eval())
    folder = save(made, tmp_path / "model")
    for shift in SHIFTS:
        model = load(shift_weights(folder, shift), aligned=True)
        assert all(map(lies_aligned, model.parameters()))
        assert torch.equal(decode(model), decode(made))


def test_an_adapters_base_is_aligned_too(tmp_path):
    base = save(quest.build("llama3.2-tiny", seed=4), tmp_path / "base")
    moved = shift_weights(base, 4)
    save_adapter(LoRA(2, 4.0)(load(base)), tmp_path / "adapter", base=str(moved))
    assert all(map(lies_aligned, load(tmp_path / "adapter", aligned=True).parameters()))


def test_a_resumed_optimizer_does_not_lie_in_its_checkpoint_unaligned(tmp_path):
    model = quest.build("llama3.2-tiny", seed=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.tensor([[1, 2, 3]])).logsumexp(dim=-1).sum().backward()
    optimizer.step()
    tensors, numbers = state.optimizer_state_dict(model, optimizer, is_main_process=True)
    folder = checkpoint.save_checkpoint(
        tmp_path / "checkpoints",
        checkpoint.Checkpoint(1, {"model": state.model_state_dict(model, True), "optimizer": tensors}),
    )
    shift_file(folder / checkpoint.TENSOR_FILES["optimizer"], 4)
    saved = checkpoint.load_checkpoint(folder).state_dict["optimizer"]
    assert not all(map(lies_aligned, saved.values()))
    state.load_optimizer_state_dict(model, optimizer, saved, numbers)
    kept = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, Tensor)]
    assert len(kept) == len(tensors)
    assert all(map(lies_aligned, kept))


def test_align_copies_only_what_is_not_aligned():
    memory = torch.arange(80.0)
    assert align(memory) is memory
    moved = align(memory[1:])
    assert torch.equal(moved, memory[1:])
    assert lies_aligned(moved)
    turned = align(memory.view(8, 10).mT)
    assert torch.equal(turned, memory.view(8, 10).mT)
    assert lies_aligned(turned)


def begin_aligned(file: Path) -> bool:
    """Every tensor whose size is a multiple of 64 bytes; and the library reads the file."""
    stored = read_header(file)
    assert safetensors.torch.load_file(file).keys() == stored.keys()
    return all(one.start % ALIGNMENT == 0 for one in stored.values() if one.nbytes % ALIGNMENT == 0)


def test_tensors_of_a_slab_are_aligned_and_share_nothing():
    """Of any size and dtype, over the end of a slab, and too large for one."""
    sizes = (1, 7, 64, 1000, SLAB_BYTES // 11, SLAB_BYTES // 10, 3, 0, MIN_HUGE_PAGE_BYTES)
    allocate, tensors = HugePageSlabs(), []
    for number in range(54):
        dtype = (torch.float32, torch.bfloat16, torch.int8)[number % 3]
        shape = (sizes[number % len(sizes)] // dtype.itemsize or 1, 1) if sizes[number % len(sizes)] else (0, 4)
        tensors.append(allocate(shape, device="cpu", dtype=dtype).fill_(number))
        assert (tensors[-1].shape, tensors[-1].dtype) == (shape, dtype)
    for number, tensor in enumerate(tensors):
        assert (tensor == number).all(), "nobody wrote over it"
        assert tensor.data_ptr() % ALIGNMENT == 0
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    assert allocate((), device="cpu", dtype=torch.float32).shape == (), "a number, as CLIP's logit_scale"
    assert allocate((3, 2), device="meta", dtype=torch.float32).device.type == "meta"


def test_sizes_that_are_multiples_of_64_bytes_begin_aligned_and_every_dtype_is_read_back(tmp_path):
    tensors = {
        "odd": torch.arange(3.0),
        "matrix": torch.arange(32.0).view(2, 16),
        "halves": torch.ones(3, 7, dtype=torch.float16),
        "whole": torch.arange(64, dtype=torch.int8).view(4, 16),
        "steps": torch.tensor(7),
        "brain": torch.ones(2, 32, dtype=torch.bfloat16),
        "mask": torch.tensor([True, False, True]),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "double": torch.ones(3, dtype=torch.float64),
        "int32": torch.arange(16, dtype=torch.int32),
        "int16": torch.arange(3, dtype=torch.int16),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {"key": "value"})
    assert begin_aligned(tmp_path / "a.safetensors")
    read = safetensors.torch.load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], one) and read[name].dtype == one.dtype for name, one in tensors.items())
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as held:
        assert held.metadata() == {"format": "pt", "key": "value"}


@pytest.mark.parametrize("name", TINY)
def test_every_page_is_saved_with_aligned_weights(tmp_path, name):
    assert begin_aligned(save(quest.build(name), tmp_path / "model") / "model.safetensors")


def test_all_other_writers_align_too(tmp_path):
    model = quest.build("llama3.2-tiny", seed=4)
    weights = state.model_state_dict(model, is_main_process=True)
    checkpoint.save_checkpoint(
        tmp_path / "run" / "checkpoints",
        checkpoint.Checkpoint(1, {"model": weights, "optimizer": {"a|b": torch.ones(3)} | weights}),
    )
    reference_model.save_tensors(tmp_path / "reference.safetensors", {"odd": torch.ones(3)} | weights, {"step": "1"})
    save(quest.build("llama3.2-tiny"), tmp_path / "shards", max_shard_size="20KB")
    save(Quantize("int8")(quest.build("llama3.2-tiny")), tmp_path / "int8")
    save_adapter(LoRA(2, 4.0)(model), tmp_path / "adapter")
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) > 8
    assert all(map(begin_aligned, files))


def test_no_other_writer_of_safetensors_is_used():
    """The library pads the header to 8 bytes, and orders by name."""
    package = Path(quest.__file__).parent
    assert not [file for file in package.rglob("*.py") if "save_file" in file.read_text()]


def test_every_recipe_aligns_what_it_loads():
    """Models that recipes load are trained, or say what is trained on: teachers, judges, references."""
    calls = [
        node
        for file in (Path(quest.__file__).parent / "recipes").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "load"
    ]
    told = [
        {word.arg: ast.literal_eval(word.value) for word in call.keywords if isinstance(word.value, ast.Constant)}
        for call in calls
    ]
    assert len(calls) > 8
    assert all(words.get("aligned") or words.get("device") == "meta" for words in told)
