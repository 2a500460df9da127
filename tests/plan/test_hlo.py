"""Collectives of compiled programs. The texts are short ones in the three ways that compilers write."""

import pathlib

import pytest

from cosmos_jax.plan import hlo

MESH = {"data": 1, "fsdp": 4, "tp": 2, "cp": 1}
TPU, GPU = ((pathlib.Path(__file__).parent / name).read_text() for name in ("tpu.hlo", "gpu.hlo"))


def test_what_a_tpu_compiler_did_is_undone():
    found = {(c.kind, c.axes): c for c in hlo.collectives(TPU, MESH)}
    assert set(found) == {
        ("all-gather", ("fsdp",)), ("reduce-scatter", ("fsdp",)), ("all-reduce", ("tp",)),
        ("collective-permute", ("fsdp",)), ("all-reduce", ("fsdp", "tp")),
    }  # fmt: skip
    gathered = found["all-gather", ("fsdp",)]
    assert (gathered.times, gathered.bytes, gathered.group) == (36, 64 * 64 * 2, 4)  # two fusions, one channel
    assert gathered.wire == 64 * 64 * 2 * 3 / 4 and gathered.where == "jit(step)/while/body/w"
    scattered = found["reduce-scatter", ("fsdp",)]
    assert (scattered.times, scattered.bytes) == (36, 64 * 64 * 2)
    summed = found["all-reduce", ("tp",)]
    assert (summed.times, summed.wire) == (36, 2 * 64 * 2 * 2 * 1 / 2)
    assert found["collective-permute", ("fsdp",)].wire == 16 * 64 * 2
    assert found["all-reduce", ("fsdp", "tp")].group == 8


def test_what_goes_between_slices_is_the_network_s():
    """libtpu takes the part between slices out of a collective: a send and a receive of its runtime."""
    two = {(c.kind, c.axes): c for c in hlo.collectives(TPU, MESH, slices=2)}
    assert two["all-reduce", (hlo.SLICES,)].wire == 16 * 64 * 2 and two["all-reduce", (hlo.SLICES,)].group == 2
    assert not any(hlo.SLICES in c.axes for c in hlo.collectives(TPU, MESH))


def test_what_a_gpu_compiler_writes():
    first, second = (c for c in hlo.collectives(GPU, MESH) if c.kind == "reduce-scatter")
    assert {first.bytes, second.bytes} == {8 * 2 * 4, 16 * 4 * 2} and first.times == second.times == 28
    found = {c.kind: c for c in hlo.collectives(GPU, MESH)}
    assert set(found) == {"all-gather", "reduce-scatter", "all-reduce"}
    assert (found["all-gather"].bytes, found["all-gather"].times) == (32 * 2 * 2, 28)
    assert (found["all-reduce"].bytes, found["all-reduce"].axes) == (8 * 4, ("fsdp", "tp"))


def test_a_loop_of_unknown_length_is_said():
    body = TPU.replace("direction=LT", "direction=NE")
    found = [c for c in hlo.collectives(body, MESH) if c.kind == "reduce-scatter"]
    assert [(c.times, c.sure) for c in found] == [(1, False)]


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups=mesh['data'=1,'fsdp'=4,'tp'=2,'cp'=1] {'tp'}", ("tp",), 2),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", ("fsdp",), 4),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(4)2}", ("tp",), 2),
        ("replica_groups=mesh['axis_0'=8] {'axis_0':(1)4}", ("fsdp",), 4),
        ("replica_groups=[4,2]<=[8]", ("tp",), 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", ("fsdp",), 4),
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", ("fsdp",), 4),
        ("replica_groups={}", ("fsdp", "tp"), 8),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", ("tp",), 2),
    ],
)
def test_groups_name_their_axes(groups, axes, size):
    text = TPU.replace("replica_groups=mesh['axis_0'=8] {'axis_0'}, to_apply=%add\n}", f"{groups}, to_apply=%add\n}}")
    last = [c for c in hlo.collectives(text, MESH) if c.bytes == 4]
    assert [(c.axes, c.group) for c in last] == [(axes, size)]


def test_what_is_no_program_is_said():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("hello", MESH)
