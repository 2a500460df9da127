"""`plan` from the words to the verdict, without a compiler; with one it is tests/kernels/aot/test_plan.py."""

import dataclasses
import json

import pytest

from cosmos_jax import flops, plan
from cosmos_jax.__main__ import main
from cosmos_jax.chips import CHIPS, GIB
from cosmos_jax.cli.options import read_config
from cosmos_jax.plan import ahead, links, make, packing, program, roofline, search
from cosmos_jax.plan.hlo import Collective
from cosmos_jax.plan.links import Joined
from pallas_kernels.check import topology

NANO = ["--config=configs/nano.py"]
ROWS16 = ["--config.mesh.fsdp=16", "--config.mesh.tp=4", "--config.data.bucket.rows=16"]


@pytest.mark.parametrize(
    ("name", "chips", "devices", "copies"),
    [("v4:2x2x1", 4, 4, 1), ("v5e:2x4", 8, 8, 1), ("v5p:4x4x4@2", 128, 128, 2), ("v6e:16x16", 256, 256, 1),
     ("tpu7x:2x2x1", 4, 8, 1), ("h100:8", 8, 8, 1), ("h200:8@4", 32, 32, 4), ("b200:8", 8, 8, 1)],
)  # fmt: skip
def test_a_topology_is_what_its_name_says(name, chips, devices, copies):
    t = topology.parse(name)
    assert (t.chips, t.devices, t.copies) == (chips, devices, copies) and t.family in CHIPS


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (NANO, "plan needs --topology"),
        ([*NANO, "--topology=v9:2x2"], "--topology=v9:2x2 is not a topology; write one like v5e:2x2"),
        ([*NANO, "--topology=v5p:4x4"], "is not a topology"),
        ([*NANO, "--topology=h200:8x4"], "is not a topology"),
        ([*NANO, "--topology=h200:8@0"], "is not a topology"),
        ([*NANO, "--topology=v5e:2x4", "--size=8k"], "'8k' is no size; there are 720p"),
        ([*NANO, "--topology=v5e:2x4", "--mix=4k"], "'4k' is no size"),
        ([*NANO, "--topology=v5e:2x4", "--analytic", "--config.mesh.fsdp=3"], "does not fit 8 devices"),
        ([*NANO, "--topology=v5e:2x4", "--analytic"], "Cannot divide data.bucket.rows"),
        (
            [*NANO, "--topology=h200:64", "--analytic", "--config.mesh.fsdp=1", "--config.mesh.tp=64"],
            "model.kv_heads by",
        ),
    ],
)
def test_mistakes_are_one_sentence(words, says, capsys):
    assert main(["plan", *words]) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


@pytest.mark.parametrize(("name", "wheel"), [("v5e:2x2", "libtpu"), ("h200:8", "jax")])
def test_a_missing_wheel_is_the_command_that_installs_it(name, wheel, monkeypatch, capsys):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(topology.importlib.metadata, "version", lambda name: "0.10.2")
    assert main(["plan", *NANO, f"--topology={name}"]) == 2
    err = capsys.readouterr().err
    assert f"{name} needs" in err and wheel in err and "pip install -e '.[aot]'" in err and err.count("\n") == 1


def test_a_pack_is_filled_in_the_order_of_the_mix():
    cfg = read_config("configs/nano.py", [])
    full = packing.pack(cfg)
    assert full.samples == ((1902, 44160), (1902, 18720), (1902, 920), (1902, 920))
    assert full.real.gen_pairs == sum(g * (u + g) for u, g in full.samples)
    one = packing.pack(cfg, ("720p",))
    assert one.samples == ((1902, 44160),) and one.share == pytest.approx((1902 + 44160) / 73728)
    toy = packing.pack(read_config("configs/toy.py", []))
    assert toy.samples == ((128, 184),) and toy.share == 1


def test_padding_costs_matmuls_and_a_plain_attention_everything():
    cfg = read_config("configs/nano.py", [])
    pack = packing.pack(cfg)
    fused, plain = pack.computed(skips=True), pack.computed(skips=False)
    assert (fused.gen, fused.gen_pairs) == (65536, pack.real.gen_pairs)
    assert plain.gen_pairs == 65536 * (8192 + 65536)


V5P = CHIPS["v5p"]


@pytest.mark.parametrize(
    ("kind", "joined", "seconds"),
    [
        ("all-gather", Joined(4, 1, 2), 3 / 4 * 1e9 / 200e9),
        ("reduce-scatter", Joined(4, 1, 2), 3 / 4 * 1e9 / 200e9),
        ("all-reduce", Joined(4, 1, 2), 2 * 3 / 4 * 1e9 / 200e9),
        ("all-to-all", Joined(4, 1, 2), 3 / 4 * 1e9 / 200e9),
        ("collective-permute", Joined(4, 1, 2), 1e9 / 200e9),
        ("all-reduce", Joined(1, 2), 2 * 1 / 2 * 1e9 / 6.25e9),
        ("all-gather", Joined(16, 2, 4), 15 / 16 * 1e9 / 400e9 + 1 / 2 * 1e9 / (6.25e9 * 16)),
    ],
)
def test_seconds_of_a_collective(kind, joined, seconds):
    c = Collective(kind, 10**9, ("x",), joined.local * joined.outer, 3, "")
    assert links.seconds(c, joined, V5P) == pytest.approx(3 * seconds)


def test_rings_lines_and_machines():
    """4 of 4 chips of a v5p are a ring, 4 of a v6e's 16 a line; a GPU's switch has no links; slices are the network."""
    square = [(0, (x, y, 0)) for x in range(4) for y in range(4)]
    assert links.from_places(square, (4, 4, 4), V5P) == Joined(16, 1, 4)
    assert links.from_places([(0, (x, 0, 0)) for x in range(4)], (16, 16), CHIPS["v6e"]) == Joined(4, 1, 1)
    assert links.from_places([(0, (0, 0, 0)), (1, (0, 0, 0))], (4, 4, 4), V5P) == Joined(1, 2, 0)
    assert links.from_places([(m, ()) for m in (0, 0, 1, 1)], (2,), CHIPS["h200"]) == Joined(2, 2, 0)


@pytest.mark.parametrize(
    ("name", "mesh", "axes", "joined"),
    [
        ("v5p:4x4x4", dict(data=1, fsdp=16, tp=4, cp=1), ("tp",), Joined(4, 1, 2)),
        ("v5p:4x4x4", dict(data=1, fsdp=16, tp=4, cp=1), ("fsdp",), Joined(16, 1, 4)),
        ("v5p:4x4x4@2", dict(data=2, fsdp=16, tp=4, cp=1), ("data",), Joined(1, 2, 0)),
        ("v5p:4x4x4@2", dict(data=1, fsdp=128, tp=1, cp=1), ("fsdp",), Joined(64, 2, 6)),
        ("h200:8@4", dict(data=4, fsdp=8, tp=1, cp=1), ("data",), Joined(1, 4, 0)),
        ("h200:8@4", dict(data=1, fsdp=32, tp=1, cp=1), ("fsdp",), Joined(8, 4, 0)),
    ],
)
def test_the_guess_without_jax_is_where_jax_puts_them(name, mesh, axes, joined):
    """The same answers as `program.joined` gave for these with jax 0.11.2 and libtpu 0.0.52."""
    t = topology.parse(name)
    assert links.guessed(t, mesh, axes, CHIPS[t.family]) == joined


def test_the_clocks_are_the_stated_rates():
    cfg = read_config("configs/nano.py", [("data.bucket.rows", "16")])
    mesh, pack = dict(data=1, fsdp=16, tp=4, cp=1), packing.pack(cfg)
    r = roofline.train(cfg, pack, mesh, V5P, 0.8, fused=True)
    assert r.model == flops.train_step(cfg.model, pack.real, train_und=False) * 16 / 64
    assert r.executed > r.model and r.compute == r.executed / 459e12 and r.memory == r.bytes / 2765e9
    assert (r.least, r.limit) == (r.compute, "compute") and r.alone == r.compute + r.memory + 0.8
    assert r.mfu(r.least) == pytest.approx(r.model / r.executed) and r.mfu(r.alone) < r.mfu(r.least)
    plain = roofline.train(cfg, pack, mesh, V5P, 0.8, fused=False)
    assert plain.compute > r.compute and plain.bytes > 5 * r.bytes


def test_it_says_whether_it_fits_and_keeps_the_numbers(tmp_path, capsys):
    assert main(["plan", *NANO, "--topology=v5p:4x4x4", "--analytic", f"--out={tmp_path}", *ROWS16]) == 0
    out = capsys.readouterr().out
    for word in (
        "FITS: needs",
        "mosaic_tpu",
        "compute bfloat16",
        "GiB to spare",
        "MFU at most",
        "all-gather",
        "98% of",
    ):
        assert word in out
    kept = json.loads((tmp_path / "nano-v5p-4x4x4-fsdp16-tp4-full-rows-16-estimate.json").read_text())
    main(
        [
            "plan",
            *NANO,
            "--topology=v5p:4x4x4",
            "--analytic",
            f"--out={tmp_path}",
            *ROWS16,
            "--config.optim.offload=True",
        ]
    )
    assert len(list(tmp_path.iterdir())) == 2, "another plan, another file"
    assert kept["fits"] and kept["needs"] == sum(kept["memory"].values())
    assert kept["command"].startswith(
        "--config=configs/nano.py --topology=v5p:4x4x4 --what=train --analytic --config.mesh"
    )


def test_eight_small_chips_are_refused_with_the_reason(capsys):
    words = [*NANO, "--topology=v5e:2x4", "--analytic", "--config.data.bucket.rows=8"]
    assert main(["plan", *words]) == 1
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "parameters, optimiser and average alone are 17.09" in out


def fits(needs: float):
    """A plan function that finds `needs(config)` GiB."""
    asked = []

    def plan(cfg, name):
        asked.append((cfg, name))
        size = int(needs(cfg) * GIB)
        return {"needs": size, "has": 16 * GIB, "fits": size <= 16 * GIB, "analytic": False}

    return plan, asked


def edge(*overrides):
    cfg = read_config("configs/edge.py", [("data.bucket.rows", "16"), *overrides])
    return cfg, make.plan(cfg, "v6e:2x4", analytic=True)


def test_the_smallest_change_that_fits_is_named_and_was_compiled():
    """No rematerialisation, two packs on each chip: recompute first, then micro-batches, then the mesh."""
    cfg, found = edge(("model.remat", "dots"))
    order = [dict(c.changes) for c in search.candidates(cfg, topology.parse("v6e:2x4"), "train", found["mesh"])]
    assert order[:3] == [
        {"model.remat": "full"}, {"optim.accumulate": 2}, {"model.remat": "full", "optim.accumulate": 2},
    ]  # fmt: skip
    assert order[3:5] == [{"optim.offload": True}, {"model.remat": "full", "optim.offload": True}]
    assert order[5] == {"mesh.fsdp": 4, "mesh.cp": 2, "data.bucket": dataclasses.replace(cfg.data.bucket, rows=8)}
    assert all("mesh.tp" in c or "mesh.cp" in c for c in order[5:]) and "model.remat" in order[6]
    plan, asked = fits(lambda c: 15 if c.model.remat == "full" and c.optim.accumulate == 2 else 17)
    said = search.settings(cfg, found, plan)
    assert said[-1] == "would fit: --config.model.remat=full --config.optim.accumulate=2 (compiled: 15.00 of 16.00 GiB)"
    assert all(s.startswith("would not") for s in said[:-1]) and len(asked) == len(said) <= search.MOST


def test_a_candidate_that_the_estimate_rules_out_is_not_compiled():
    cfg, found = edge(("model.remat", "none"))
    plan, asked = fits(lambda c: 1)
    search.settings(cfg, found, plan)
    assert all(search.estimated(c, search.Candidate((), name), found) <= search.ERROR for c, name in asked)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ('print(\'plan: {"refused": "no such mesh"}\')', "no such mesh"),
        ("import sys; sys.exit('fatal: the end')", "fatal: the end"),
    ],
)
def test_a_compiler_that_dies_is_one_sentence(answer, says, monkeypatch, tmp_path):
    fake = tmp_path / "python"
    fake.write_text(f"#!{__import__('sys').executable}\n{answer}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(ahead.sys, "executable", str(fake))
    with pytest.raises(ahead.PlanError, match=says):
        ahead.compiled(ahead.Request(read_config("configs/toy.py", []), "v5e:2x2"))


def test_a_compiler_that_runs_out_of_memory_is_a_plan(monkeypatch):
    said = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: … HLO temporaries (40.56G) exceeds available HBM (15.75G)."
    wanted = program.exhausted(said)
    assert wanted == int(40.56 * GIB)
    monkeypatch.setattr(make, "compiled", lambda request: {"exhausted": wanted, "says": said})
    cfg = read_config("configs/nano.py", [("data.bucket.rows", "8")])
    found = make.plan(cfg, "v5e:2x4")
    assert not found["fits"] and sum(found["memory"].values()) == found["needs"] == wanted
    assert found["verdict"].startswith("DOES NOT FIT: needs 40.56") and "GiB more than the 15.75" in found["verdict"]
    assert "refused" in "\n".join(plan.report.lines(found))


def test_candidates_change_only_what_they_say():
    cfg, found = edge(("model.remat", "dots"))
    c = search.Candidate((("model.remat", "full"),), "v5e:2x4")
    assert c.apply(cfg) == dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat="full"))
    assert c.words("v5e:2x4") == "--config.model.remat=full" and c.words("v5e:4x4").endswith("--topology=v5e:2x4")
