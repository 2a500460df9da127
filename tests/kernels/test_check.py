"""`python -m pallas_kernels.check`: what fails, what is one sentence, what compilers say. No compiler runs here; with
them it is tests/kernels/gpu/test_check.py and the command itself."""

import dataclasses
import json
import sys

import pytest

from pallas_kernels.check import __main__ as command
from pallas_kernels.check import cases, dumps, judge, topology
from pallas_kernels.check.cases import Case
from pallas_kernels.check.dumps import Kernel
from pallas_kernels.check.program import Outcome

GPU = Case("toy/two", None, {"gpu": {"one": 32, "two": 0}, "tpu": {"one": 2048}})
CONTROL = Case("toy/control", None, {"gpu": {}}, refused="exceeds available shared memory")
ONE, TWO = (Kernel(n, 1000, 232_448, 0, "0/0 B", 168) for n in ("one", "two"))


def outcome(*kernels, case=GPU, error=None):
    return Outcome("h200:1", case.name, 1.5, kernels, error)


@pytest.mark.parametrize(
    ("case", "result", "wrong"),
    [
        (GPU, outcome(ONE, TWO), ""),
        (GPU, outcome(Kernel("one", 1000, 232_448, 32, "8/32 B", 168), TWO), ""),
        (GPU, outcome(Kernel("one", 1000, 232_448, 40, "8/40 B", 168), TWO), "one spills 8/40 B, 32 bytes are allowed"),
        (GPU, outcome(ONE), "there is no kernel two in the program"),
        (GPU, outcome(ONE, TWO, dataclasses.replace(ONE, name="three")), "a kernel three that the case does not name"),
        (GPU, outcome(ONE, dataclasses.replace(TWO, memory=None)), "the compiler reported nothing of two"),
        (GPU, outcome(error="ValueError: no\n such   thing"), "ValueError: no such thing"),
        (CONTROL, outcome(case=CONTROL, error="smem exceeds available shared memory"), ""),
        (CONTROL, outcome(ONE, case=CONTROL), "the compiler accepted it, and it must refuse"),
        (CONTROL, outcome(case=CONTROL, error="TypeError: x"), "refused for another reason: TypeError: x"),
    ],
)
def test_a_case_is_judged_by_what_it_promises(case, result, wrong):
    assert judge.problems(case, result) == ([wrong] if wrong else [])
    for row in judge.rows(case, result):
        assert "h200:1" in judge.line(row) and "1.5" in judge.line(judge.rows(case, result)[0])


CHILD = """
import json, os, sys, time
topology, dump, *names = sys.argv[1:]
assert os.path.isdir(dump) and os.environ["JAX_PLATFORMS"] == "cpu" and os.environ["MOSAIC_GPU_DUMP_TO"] == dump
print("a library greets")
print("{ as compilers do }")
kernel = dict(name="k", memory=1, capacity=2, spilled=0, spills="0/0 B")
for name in names:
    print(json.dumps({"begins": name}), flush=True)
    if name == "dies":
        sys.exit("compiler: fatal error")
    if name == "hangs":
        time.sleep(60)
    kernel["spilled"] = 64 if name == "spills" else 0
    error = "RuntimeError: refused" if name == "fails" else None
    out = dict(topology=topology, case=name, seconds=1.0, kernels=[] if error else [kernel], error=error)
    print(json.dumps(out), flush=True)
"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A process that answers as the real one does, and wheels that are there."""
    monkeypatch.setattr(topology, "missing", lambda name: None)
    path = tmp_path / "child.py"
    path.write_text(CHILD)
    return sys.executable, str(path)


def chosen(*names):
    return {"h200:1": [Case(n, None, {"gpu": {"k": 0}}) for n in names]}


@pytest.mark.parametrize(("name", "says"), [("fails", "refused"), ("spills", "k spills"), ("dies", "fatal error")])
def test_a_failing_kernel_is_a_failing_command(name, says, child, capsys, tmp_path):
    """And the cases after it are compiled all the same."""
    out = tmp_path / "all.json"
    assert command.run(chosen("good", name, "last"), out, child) == 1
    printed = capsys.readouterr().out
    assert (
        f"FAILED h200:1 {name}: " in printed and says in printed and "3 programs" in printed and "1 failed" in printed
    )
    found = {r["case"]: r for r in json.loads(out.read_text())}
    assert found["good"]["problems"] == found["last"]["problems"] == [] and found[name]["problems"]


def test_well_compiled_kernels_are_a_success(child, capsys):
    assert command.run(chosen("one", "two"), None, child) == 0
    assert "2 programs, 2 kernels, 0 failed" in capsys.readouterr().out


def test_a_compiler_that_hangs_is_ended(child):
    found = list(command.outcomes("h200:1", ["hangs", "next"], child, patience=1.0))
    assert [o.case for o in found] == ["hangs", "next"]
    assert "took longer than 1 s" in found[0].error and found[1].error is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--topology=v9:2x2", "--topology=v9:2x2 is not a topology; write one like v5e:2x2"),
        ("--topology=h200", "is not a topology"),
        ("--topology=v5e:2x2x1", "is not a topology"),
        ("--only=nothing", "--only=nothing is in the name of no case for v5e:2x2, v5p:2x2x1"),
        ("--json=/no/such/file", "there is no directory /no/such"),
        ("--fast", "Unrecognized arguments: --fast; see --help."),
    ],
)
def test_mistakes_are_one_sentence(words, says, capsys):
    assert command.main([words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_a_missing_wheel_is_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    assert command.main(["--topology=v5e:2x2", "--only=flow/noise"]) == 1
    assert "v5e:2x2 needs the wheel libtpu; run: pip install -e '.[aot]'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("jax_version", "plugin", "says"),
    [
        ("0.10.2", "0.11.2", "needs jax ≥ 0.11, which needs Python ≥ 3.12"),
        ("0.11.2", None, "needs the wheel jax-cuda13-plugin; run: pip install -e '.[aot]'"),
        ("0.11.2", "0.11.0", "needs jax-cuda13-plugin 0.11.2, as jax, and 0.11.0 is installed"),
    ],
)
def test_the_gpu_compiler_must_match_jax(jax_version, plugin, says, monkeypatch):
    def version(name):
        if name == "jax":
            return jax_version
        if plugin is None:
            raise topology.importlib.metadata.PackageNotFoundError(name)
        return plugin

    monkeypatch.setattr(topology.importlib.metadata, "version", version)
    assert says in topology.missing("h200:1")


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'attention_dq_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for attention_dq_mosaic_gpu_kernel
    72 bytes stack frame, 8 bytes spill stores, 24 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compile time = 29.721 ms
"""
MODULE = """
    %c65544_i32_3 = arith.constant 65544 : i32
    %24 = gpu.launch async [%4] blocks(%a) in (%b = %c4) dynamic_shared_memory_size %c65544_i32_3 {
"""


def test_what_ptxas_and_mosaic_wrote_is_read(tmp_path):
    (tmp_path / "attention_dq_0.ptxas").write_text(PTXAS)
    (tmp_path / "attention_dq_0.before_layout_inference.txt").write_text(MODULE)
    assert dumps.gpu(tmp_path, 232_448) == [Kernel("attention_dq", 65_544, 232_448, 24, "8/24 B", 168)]
    with pytest.raises(ValueError, match="nothing of the registers"):
        dumps.ptxas(PTXAS.replace("Used 168 registers", ""))


def test_what_libtpu_wrote_is_read(tmp_path):
    call = "transpose_jvp_attention_dq__.3"
    block = {"allocations": [{"tag": "spill", "size": 2048}, {"tag": "input window", "size": 4096}]}
    report = {
        "global_info": {"vmem_capacity": 2**26},
        "hlo_breakdowns": {call: {"blocks": [block], "total_size": 6144}},
    }
    (tmp_path / "1-TLP-02-vmem_report.html").write_text(f"<script>const DATA ={json.dumps(report)};</script>")
    (tmp_path / f"2-{call}-00-schedule-analysis_packed-bundles-post-ra.txt").write_text(
        "\ttotal scheduled bundles:    554\n"
    )
    hlo = f'  %{call} = bf16[1024,256] custom-call(%x), custom_call_target="tpu_custom_call", x\n  %y = f32[] add(%a)\n'
    (kernel,) = dumps.tpu(tmp_path, hlo, {"attention_dq": 128, "attention": 1})
    assert kernel == Kernel("attention_dq", 6144, 2**26, 2048, "2 KiB", smem=128, bundles=554)


def test_every_kernel_of_the_project_is_in_the_table():
    """Forward and backward; every platform has something that must be refused."""
    found = {k for c in cases.TABLE for kernels in c.spills.values() for k in kernels}
    assert {"attention_forward", "attention_dq", "attention_dkv", "norm_rope", "norm_rope_backward"} <= found
    assert {f"flow_{n}" for n in cases.FLOW} <= found
    assert {p for c in cases.TABLE if c.refused for p in c.platforms} == {"tpu", "gpu"}
    assert len({c.name for c in cases.TABLE}) == len(cases.TABLE)
