"""Imports point one way (docs/design.md), leaves stay light, and files stay readable."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
ORDER = [  # a module may import from its own line and the lines above it
    ("pallas_kernels",),
    ("data_pipelines",),
    ("cosmos_jax.config",),
    ("cosmos_jax.precision", "cosmos_jax.mesh", "cosmos_jax.shard", "cosmos_jax.dist"),
    ("cosmos_jax.model", "cosmos_jax.codecs", "cosmos_jax.media", "cosmos_jax.flops", "cosmos_jax.chips"),
    ("cosmos_jax.flow", "cosmos_jax.outputs"),
    ("cosmos_jax.loss",),
    ("cosmos_jax.optim", "cosmos_jax.sampling"),
    ("cosmos_jax.state",),
    ("cosmos_jax.step",),
    (
        "cosmos_jax.integrity",
        "cosmos_jax.watchdog",
        "cosmos_jax.preemption",
        "cosmos_jax.profile",
        "cosmos_jax.goodput",
    ),
    ("cosmos_jax.steps", "cosmos_jax.nonfinite"),
    ("cosmos_jax.checkpoint", "cosmos_jax.metrics"),
    ("cosmos_jax.saving",),
    ("cosmos_jax.plan",),
    ("conversion",),
    ("cosmos_jax.pipeline", "cosmos_jax.inference"),
    ("cosmos_jax.evaluate", "cosmos_jax.report"),
    ("cosmos_jax.parity",),
    ("cosmos_jax.bench",),  # calls parity for its PyTorch side, when that is asked for
    ("cosmos_jax.train",),
    ("cosmos_jax.cli",),
    ("cosmos_jax.__main__",),
]


def modules():
    for package in ("pallas_kernels", "data_pipelines", "cosmos_jax", "conversion"):
        yield from sorted((ROOT / package).rglob("*.py"))


def name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{a.name}" for a in node.names)


def level(module: str) -> int | None:
    for i, group in enumerate(ORDER):
        if any(module == g or module.startswith(g + ".") for g in group):
            return i
    return None


@pytest.mark.parametrize("path", list(modules()), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_up_the_list(path):
    own = level(name(path))
    if name(path) == "cosmos_jax":
        return
    assert own is not None, f"{path} has no place in the order of layers"
    for target in imports(path):
        other = level(target)
        if other is None:
            continue
        assert other <= own, f"{name(path)} imports {target}, which lies below it"
    if own == 0:
        assert not any(t.split(".")[0] in ("cosmos_jax", "data_pipelines") for t in imports(path))


@pytest.mark.parametrize("package", ["torch", "tensorflow", "diffusers", "transformers"])
def test_the_runtime_never_imports(package):
    """Only the comparison with PyTorch has it; nothing reaches that when it is imported."""
    for path in modules():
        if not name(path).startswith("cosmos_jax.parity") or package == "tensorflow":
            assert not any(t.split(".")[0] == package for t in imports(path)), path


def test_nothing_imports_the_comparison_until_it_is_asked_for():
    for path in modules():
        if not name(path).startswith("cosmos_jax.parity"):
            top = ast.parse(path.read_text()).body
            found = [n for n in top if isinstance(n, (ast.Import, ast.ImportFrom))]
            assert not any("cosmos_jax.parity" in ast.unparse(n) or "import parity" in ast.unparse(n) for n in found), (
                path
            )
    code = "import sys, cosmos_jax.parity, cosmos_jax.__main__\nassert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("package", ["jax", "flax", "orbax"])
def test_data_pipelines_never_import(package):
    for path in (ROOT / "data_pipelines").rglob("*.py"):
        assert not any(t.split(".")[0] == package for t in imports(path)), path


def test_making_data_loads_no_accelerator_library():
    """Worlds, codecs, samples and packs need numpy alone. (The loader's grain loads jax by itself when it is there.)"""
    names = [name(p) for p in modules() if name(p).startswith("data_pipelines")]
    names = [n for n in names if n not in ("data_pipelines.loader", "data_pipelines.order", "data_pipelines.row")]
    code = "import importlib, sys\n" + "\n".join(f"importlib.import_module({n!r})" for n in names)
    code += "\nassert not {'jax', 'tensorflow', 'torch'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_files_stay_readable():
    for path in modules():
        lines = path.read_text().count("\n")
        assert lines <= 500, f"{path.relative_to(ROOT)} has {lines} lines; split it"


def test_only_checkpoint_imports_orbax():
    users = [name(p) for p in modules() if any(t.split(".")[0] == "orbax" for t in imports(p))]
    assert set(users) <= {"cosmos_jax.checkpoint"}
