"""Formats of quantized weights and their products: rounding by hand, the kernels against the definition, and the
operator's shape rule and gradient. Tests of the C++ kernel need a compiler and are skipped without one."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

from llm_quest.layers import native
from llm_quest.layers.quantized import QuantizedMatrix
from llm_quest.layers.quantized_kernels import (
    MAX_KERNEL_ROWS,
    native_rows,
    quantized_linear,
    quantized_linear_reference,
)
from llm_quest.layers.weight_formats import (
    FORMATS,
    NF4_LEVELS,
    WeightFormat,
    dequantize,
    pack_pairs,
    quantize,
    unpack_pairs,
)

every_format = pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
needs_compiler = pytest.mark.skipif(not native.is_loaded(), reason=f"no C++ kernel: {native.Library.reason}")
OP_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
"""Not the dynamic one: the shape checks of test runs cannot hash symbolic sizes."""
SHAPES = [(5, 32), (16, 96), (3, 40), (9, 768), (1, 7), (4, 1), (6, 33), (4, 128), (4, 160)]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_int8_by_hand():
    weight = torch.tensor([[127.0, -63.4, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.0, 1.0, 0.5, 0.25]])
    q, scale = quantize(weight, FORMATS["int8"])
    assert scale[0] == 1.0
    assert q[0].tolist() == [127, -63, 0, 0]
    assert q[1].tolist() == [0, 0, 0, 0]
    assert (q[2].tolist(), scale[2].item()) == ([-127, 64, 32, 16], pytest.approx(2 / 127, rel=2**-8))


def test_nf4_by_hand():
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([2.0, -1.0, 0.17, -2.0])
    rounded = QuantizedMatrix(weight, FORMATS["nf4"]).weight[0]
    assert rounded[:4].tolist() == pytest.approx([2.0, 2 * NF4_LEVELS[2], 2 * NF4_LEVELS[8], -2.0])
    assert rounded[4:].tolist() == [0.0] * 28


def test_int4_by_hand():
    """A group whose numbers are 0 ... 15 times a scale beside a minimum is exact; a byte's low half comes first."""
    codes = torch.tensor([0.0, 15, 1, 7] * 8)
    weight = 0.5 * codes[None] - 3
    q, scale = quantize(weight, FORMATS["int4"])
    assert scale.tolist() == [[[0.5], [-3.0]]]
    assert torch.equal(dequantize(q, scale, FORMATS["int4"], 32), weight)
    assert [byte & 255 for byte in q[0, :4].tolist()] == [0 | 0 << 4, 15 | 15 << 4, 1 | 1 << 4, 7 | 7 << 4]
    constant, width = torch.full((2, 32), 0.75), 32
    q, scale = quantize(constant, FORMATS["int4"])
    assert torch.equal(dequantize(q, scale, FORMATS["int4"], width), constant)


@every_format
def test_no_number_moves_by_more_than_half_the_widest_step(form: WeightFormat):
    weight = random_tensor(50, 64) * torch.logspace(-3, 3, 50)[:, None]
    q, scale = quantize(weight, form)
    assert torch.equal(scale.bfloat16().float(), scale), "no scale is lost in bfloat16"
    step = scale[:, 0] if form.has_minimum else scale
    step = step[:, None] if not form.group_size else step.repeat_interleave(form.group_size, -1)
    widest = torch.tensor(form.levels or (0.0, 1.0)).diff().max()
    error = (dequantize(q, scale, form, 64) - weight).abs()
    beyond = 1.5 if form.has_minimum else 0.6
    """How far the ends of a group may lie beyond the last level: the scale was rounded, or the fit cuts them."""
    assert (error <= (0.5 + beyond) * widest * step).all()
    assert error.square().mean() / weight.square().mean() < {8: 1e-4, 4: 1e-2}[form.bits]


def test_int4_is_nearer_than_llama_cpp_s_forms():
    weight = random_tensor(64, 256)
    groups = weight.view(64, 8, 32)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    q4_0 = ((groups * (-8 / largest)).round().clamp(-8, 7) * (largest / -8)).view_as(weight)
    ours = QuantizedMatrix(weight, FORMATS["int4"]).weight
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    q4_1 = (((groups - low) / (high - low) * 15).round() * (high - low) / 15 + low).view_as(weight)
    error = (ours - weight).square().mean()
    assert error < 0.75 * (q4_0 - weight).square().mean()
    assert error < 0.9 * (q4_1 - weight).square().mean()


def test_pairs_are_unpacked_as_they_were_packed():
    codes = torch.randint(0, 16, (3, 2, 32), generator=torch.Generator().manual_seed(0))
    assert torch.equal(unpack_pairs(pack_pairs(codes), 32), codes.to(torch.int32))


@needs_compiler
@every_format
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512", "vnni"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_the_definition_for_every_width_and_number_of_rows(
    form: WeightFormat, isa: str, dtype: torch.dtype
):
    for out, width in SHAPES:
        q, scale = quantize(random_tensor(out, width) * torch.linspace(0.1, 3, out)[:, None], form)
        for rows in (1, 2, 3, 4, 7, 9):
            x = random_tensor(rows, width, seed=rows)
            exact = quantized_linear_reference(x.double(), q, scale.double(), form)
            made = native_rows(x, q, scale.to(dtype), form, native.ISA[isa])
            size = x.double().abs() @ dequantize(q, scale.double(), form, width).abs().T
            assert ((made - exact).abs() <= 2e-6 * size).all(), (out, width, rows)


@needs_compiler
@every_format
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512", "vnni"])
def test_a_row_has_the_same_bits_whatever_rows_come_with_it(form: WeightFormat, isa: str):
    for out, width in ((37, 96), (70, 1024)):  # 70 rows are several runs
        q, scale = quantize(random_tensor(out, width), form)
        x = random_tensor(MAX_KERNEL_ROWS, width, seed=1)
        together = native_rows(x, q, scale, form, native.ISA[isa])
        for rows in (1, 2, 3, 5):
            assert torch.equal(native_rows(x[:rows], q, scale, form, native.ISA[isa]), together[:rows])


@needs_compiler
@every_format
def test_what_is_not_finite_stays_so_and_no_rows_are_no_result(form: WeightFormat):
    q, scale = quantize(random_tensor(8, 64), form)
    x = random_tensor(2, 64)
    for broken in ("nan", "inf", "-inf"):
        x[1, 3] = float(broken)
        made = native_rows(x, q, scale, form)
        assert made[0].isfinite().all()
        assert not made[1].isfinite().any()
    assert native_rows(x * float("nan"), q, scale, form).isnan().all()
    assert native_rows(x[:0], q, scale, form).shape == (0, 8)


@needs_compiler
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512", "vnni"])
def test_numbers_of_x_keep_23_bits_of_their_group_s_largest(isa: str):
    """int4's kernel multiplies integers. The largest number meets code 0 and a minimum of 0, so the others are the sum;
    a group of zeros and one of tiny numbers are no division by zero."""
    codes = torch.arange(96).view(1, 3, 32) % 16
    q, scale = pack_pairs(codes), torch.tensor([[[1.0, 1, 1], [0.0, 0, 0]]])
    x = random_tensor(200, 96)
    x[:, 0] = 127.0
    x[:, 32:64], x[0, 64:] = 0.0, 1e-38
    exact = x.double() @ codes.view(1, 96).double().T
    made = native_rows(x, q, scale, FORMATS["int4"], native.ISA[isa])
    bound = 2**-24 * (127 * codes[0, 0].sum() + 4 * exact.abs())
    assert ((made - exact).abs() <= bound).all()


@pytest.mark.parametrize(
    ("variables", "said"),
    [({"CXX": "/no/such/compiler"}, "/no/such/compiler"), ({"LLM_QUEST_NATIVE": "0"}, "LLM_QUEST_NATIVE=0")],
)
def test_without_the_kernel_the_plain_form_computes_and_the_reason_is_told_once(
    variables: dict[str, str], said: str, tmp_path, monkeypatch
):
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(native.Library, "loaded", None)
    monkeypatch.setattr(native.Library, "reason", "")
    monkeypatch.setattr(native.Library, "warned", False)
    matrix, x = QuantizedMatrix(random_tensor(8, 64), FORMATS["int4"]), random_tensor(2, 64, seed=1)
    with pytest.warns(UserWarning, match=f"plain form, which is slow: .*{said}") as told, torch.no_grad():
        made = [matrix(x), matrix(x)]
    assert len(told) == 1
    assert torch.equal(made[0], quantized_linear_reference(x, matrix.q, matrix.scale, matrix.form))
    assert torch.equal(made[0], made[1])


def test_operators_are_built_where_the_cache_has_this_source_and_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_QUEST_CACHE", str(tmp_path))
    monkeypatch.setattr(native.Library, "loaded", None)
    assert not native.is_built()
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / native.build_plan()[0]).write_bytes(b"")
    assert native.is_built()
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    assert not native.is_built(), "of another command"
    monkeypatch.setenv("LLM_QUEST_NATIVE", "0")
    assert not native.is_built()
    assert native.Library.loaded is None, "nothing was tried"


def test_files_are_compiled_side_by_side_and_none_goes_on_where_one_fails(tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    started = []
    start = native.Compiler
    monkeypatch.setattr(native, "Compiler", lambda args: started.append(start(args)) or started[-1])
    meets = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\n"
    meets += "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)"
    both = [str(tmp_path / name) for name in "ab"]
    native.run_compilers([[sys.executable, "-c", meets, *order] for order in (both, both[::-1])])
    fails = "import sys; print('a.cpp:1: no such type', file=sys.stderr); sys.exit(1)"
    commands = [[sys.executable, "-c", code] for code in (fails, "import time; time.sleep(60)", "raise 1")]
    with pytest.raises(subprocess.CalledProcessError) as told:
        native.run_compilers(commands)
    assert native.describe_failure(told.value) == "a.cpp:1: no such type"
    assert [one.process.returncode for one in started[2:]] == [1, -signal.SIGKILL], "the third did not begin"
    monkeypatch.setattr(native, "COMPILE_SECONDS", 0.1)
    with pytest.raises(subprocess.TimeoutExpired):
        native.run_compilers([commands[1]])
    many = "import sys; sys.stderr.write('x' * 200_000)"  # more than a pipe holds
    monkeypatch.setattr(native, "COMPILE_SECONDS", 60)
    native.run_compilers([[*commands[1][:2], "import time; time.sleep(0.1)"], [*commands[1][:2], many]])


def test_a_compiler_that_takes_too_long_is_one_sentence():
    late = subprocess.TimeoutExpired(["g++"], 0.1, stderr=b"a.h:1: warning: x\n" * 5000)
    assert native.describe_failure(late) == "the C++ compiler did not end within 0.1 s"


@every_format
def test_many_rows_and_float64_are_computed_by_the_definition(form: WeightFormat):
    q, scale = quantize(random_tensor(16, 64), form)
    x = random_tensor(MAX_KERNEL_ROWS + 1, 64, seed=1)
    assert torch.equal(quantized_linear(x, q, scale, form), quantized_linear_reference(x, q, scale, form))
    wide = x[:1].double()
    assert torch.equal(
        quantized_linear(wide, q, scale.double(), form), quantized_linear_reference(wide, q, scale.double(), form)
    )


@every_format
@pytest.mark.parametrize("width", [32, 40])
def test_the_operator_has_a_gradient_and_a_shape(form: WeightFormat, width: int):
    """Finite differences in float64; torch's own test of an operator (schema, fake tensors, autograd, compiling)."""
    q, scale = quantize(random_tensor(6, width).double(), form)
    x = random_tensor(3, width, seed=1).double().requires_grad_()
    assert gradcheck(lambda x: quantized_linear(x, q, scale, form), (x,))
    torch.library.opcheck(
        torch.ops.llm_quest.quantized_linear.default, (x, q, scale, form.name, width), test_utils=OP_CHECKS
    )
    on_meta = quantized_linear(x.to("meta"), q.to("meta"), scale.to("meta"), form)
    assert (on_meta.shape, on_meta.dtype, on_meta.device.type) == ((3, 6), torch.float64, "meta")


@every_format
def test_no_float_copy_of_the_weights_is_kept_for_the_backward_pass(form: WeightFormat):
    matrix = QuantizedMatrix(random_tensor(64, 64), form)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        matrix(random_tensor(2, 64, seed=1).requires_grad_())
    assert {tensor.dtype for tensor in saved if tensor.numel() >= matrix.q.numel()} <= {torch.int8}


@every_format
def test_autocast_gives_its_dtype(form: WeightFormat):
    matrix = QuantizedMatrix(random_tensor(8, 64), form)
    with torch.autocast("cpu", torch.bfloat16):
        assert matrix(random_tensor(2, 64, seed=1)).dtype is torch.bfloat16


@every_format
def test_exported_programs_compute_the_definition(form: WeightFormat):
    matrix, x = QuantizedMatrix(random_tensor(8, 64), form), random_tensor(2, 64, seed=1)
    program = torch.export.export(matrix, (x,))
    with torch.no_grad():
        expected = quantized_linear_reference(x, matrix.q, matrix.scale, form)
        torch.testing.assert_close(program.module()(x), expected)
