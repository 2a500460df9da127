"""Our reader and writer of distributed checkpoints against PyTorch, sharded by two processes and by none."""

import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conversion_torch import raw, same
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from conversion import torch_zip
from conversion.dcp import FILE, METADATA, cover, open_folder, write_folder
from conversion.tensors import FileError
from conversion.torch_pickle import DTYPES, META, SIZE, Call, Global, dumps, loads

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is disabled", "ignore:Detected an existing checkpoint"
)
torch.manual_seed(0)
TENSORS = {
    "net.a": torch.randn(4, 6), "net.view": torch.randn(4, 6).t()[1:, ::2], "net.bf16": torch.randn(3, 2).bfloat16(),
    "net.f16": torch.randn(3).half(), "net.i64": torch.arange(6).reshape(2, 3), "net.flag": torch.tensor([True, False]),
    "net.e4m3": torch.randn(8).to(torch.float8_e4m3fn), "net.scalar": torch.tensor(2.5), "net.empty": torch.zeros(0, 4),
    "net_ema.a": torch.nn.Parameter(torch.randn(4, 6)),
}  # fmt: skip

# Two processes on this machine; rank 0 alone knows nothing of half of the data.
SHARDED = {
    "rows": ((7, 5), "[Shard(0)]", "float32"), "columns": ((7, 5), "[Shard(1)]", "bfloat16"),
    "fewer_rows_than_ranks": ((1, 3), "[Shard(0)]", "int64"), "everywhere": ((3, 2), "[Replicate()]", "float16"),
    "deep": ((2, 3, 4, 5), "[Shard(2)]", "bool"), "nothing": ((0, 2), "[Shard(0)]", "float32"),
}  # fmt: skip
SAVE = """
import datetime, os, sys, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
rank, store, out, sharded = int(sys.argv[1]), sys.argv[2], sys.argv[3], eval(sys.argv[4])
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=90))
mesh = dist.init_device_mesh("cpu", (2,))
state = {"net": {}, "iteration": 5}
for name, (shape, placement, dtype) in sharded.items():
    x = torch.randn(shape, generator=torch.Generator().manual_seed(len(name))).to(getattr(torch, dtype))
    state["net"][name] = distribute_tensor(x, mesh, eval(placement))
dcp.save(state, checkpoint_id=out)
print("saved", flush=True)
sys.stdin.read()  # until both have saved
os._exit(0)  # gloo's threads sometimes abort an orderly end
"""


def arrays(tensors):
    return ((k, np.frombuffer(raw(v), DTYPES[str(v.dtype)]).reshape(v.shape)) for k, v in tensors.items())


def layout(tensors):
    return {k: (DTYPES[str(v.dtype)], tuple(v.shape)) for k, v in tensors.items()}


@pytest.fixture
def saved(tmp_path):
    torch_dcp.save(TENSORS | {"iteration": 3}, checkpoint_id=tmp_path / "iter_000000100" / "model", no_dist=True)
    return tmp_path / "iter_000000100"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """A folder that two processes wrote together, and the whole tensors."""
    root = tmp_path_factory.mktemp("sharded")
    args = [str(root / "store"), str(root / "model"), repr(SHARDED)]
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    pipes = dict(env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    ranks = [subprocess.Popen([sys.executable, "-c", SAVE, str(rank), *args], **pipes) for rank in range(2)]
    assert [p.stdout.readline() for p in ranks] == ["saved\n"] * 2
    for p in ranks:
        p.communicate(timeout=60)
    whole = {}
    for name, (shape, _, dtype) in SHARDED.items():
        x = torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))
        whole[f"net.{name}"] = x.to(getattr(torch, dtype))
    return root / "model", whole


def test_reads_what_one_process_wrote(saved):
    for path in (saved, saved / "model", str(saved)):
        found = open_folder(path)
        same(found, TENSORS)
        assert list(found.metadata) == ["iteration"] and found.metadata["iteration"].endswith(" bytes, not read")
    assert not found["net.a"].flags.writeable and isinstance(found["net.a"].base, np.memmap)


def test_reads_what_two_processes_sharded(sharded):
    folder, whole = sharded
    assert sorted(p.name for p in folder.iterdir()) == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    found = open_folder(folder)
    same(found, whole)
    parts = {name.removeprefix("net."): len(t.chunks) for name, t in found.tensors.items()}
    assert parts == dict(rows=2, columns=2, fewer_rows_than_ranks=1, everywhere=1, deep=2, nothing=0)
    assert list(found.metadata) == ["iteration"]


def test_writes_what_pytorch_reads(tmp_path):
    write_folder(tmp_path / "new" / "model", layout(TENSORS), arrays(TENSORS))
    assert sorted(os.listdir(tmp_path / "new" / "model")) == [METADATA, FILE]
    state = {k: torch.full_like(v.detach(), 1) for k, v in TENSORS.items()}
    torch_dcp.load(state, checkpoint_id=tmp_path / "new" / "model", no_dist=True)
    assert {k: raw(v) for k, v in state.items()} == {k: raw(v) for k, v in TENSORS.items()}
    dcp_to_torch_save(tmp_path / "new" / "model", tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert {k: (v.dtype, raw(v)) for k, v in state.items()} == {k: (v.dtype, raw(v)) for k, v in TENSORS.items()}
    same(open_folder(tmp_path / "new"), TENSORS)


def test_our_metadata_is_pytorchs(tmp_path):
    """Unpickled by PyTorch's own classes, ours equals what it saves for the same tensors; only the places differ."""
    plain = {k: v.detach() for k, v in TENSORS.items()}
    torch_dcp.save(plain, checkpoint_id=tmp_path / "theirs", no_dist=True)
    write_folder(tmp_path / "ours", layout(plain), arrays(plain))
    ours, theirs = (pickle.loads((tmp_path / p / METADATA).read_bytes()) for p in ("ours", "theirs"))
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.planner_data == theirs.planner_data
    assert set(ours.storage_data) == set(theirs.storage_data) and ours.version == theirs.version


def test_an_interrupted_write_is_no_checkpoint(tmp_path, monkeypatch):
    def stops():
        yield next(arrays(TENSORS))
        raise KeyboardInterrupt

    def fails(_):
        if error := next(calls):
            raise error

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path, layout(TENSORS), stops())
    with pytest.raises(FileError, match="its writing was interrupted"):
        open_folder(tmp_path)
    for bad in (list(arrays(TENSORS))[:-1], list(arrays(TENSORS))[1:], [*arrays(TENSORS), ("x", np.zeros(1))]):
        with pytest.raises(ValueError, match="never came|comes where the layout has"):
            write_folder(tmp_path, layout(TENSORS), bad)
        assert os.listdir(tmp_path) == [FILE]
    with monkeypatch.context() as m, pytest.raises(OSError, match="disk is full"):
        calls = iter((None, OSError("the disk is full")))  # after the data, after .metadata
        m.setattr(os, "fsync", fails)
        write_folder(tmp_path, layout(TENSORS), arrays(TENSORS))
    with pytest.raises(FileError, match="its writing was interrupted"):
        open_folder(tmp_path)
    write_folder(tmp_path, layout(TENSORS), arrays(TENSORS))
    same(open_folder(tmp_path), TENSORS)
    with pytest.raises(FileError, match="already holds a checkpoint"):
        write_folder(tmp_path, layout(TENSORS), arrays(TENSORS))


def test_only_the_tensor_that_is_read_is_in_memory(tmp_path):
    """One chunk: nothing is allocated. Two chunks, written by hand: the tensor once. Writing: two tensors at most."""
    n = 1 << 20
    tracemalloc.start()
    items = ((str(i), np.full((2, n), i, np.float32)) for i in range(6))
    write_folder(tmp_path, {str(i): (np.dtype("f4"), (2, n)) for i in range(6)}, items)
    writing = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    found = open_folder(tmp_path)
    total = sum(float(found[str(i)][-1, -1]) for i in range(6))
    mapped = tracemalloc.get_traced_memory()[1]

    def split(entries, places):
        """Tensor 0 becomes [4, n]: the rows of tensor 0, then those of tensor 1."""
        entries["0"].state["size"] = Call(SIZE, ((4, n),))
        two = Call(
            META + "ChunkStorageMetadata", (), {"offsets": Call(SIZE, ((2, 0),)), "sizes": Call(SIZE, ((2, n),))}
        )
        entries["0"].state["chunks"].append(two)
        del entries["1"]
        next(k for k in places if k.state["fqn"] == "1").state |= {"fqn": "0", "offset": Call(SIZE, ((2, 0),))}

    edit(tmp_path, split)
    found = open_folder(tmp_path)
    tracemalloc.reset_peak()
    x = found["0"]
    joined = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 15 and x.shape == (4, n) and x[:, -1].tolist() == [0, 0, 1, 1]
    assert writing < 3 * 8 * n and mapped < n and 16 * n <= joined < 17 * n, (writing, mapped, joined)


def test_cover_is_counting():
    """Against painting the boxes: random tilings, each also with one box dropped, moved, doubled or tripled."""
    rng, hits = np.random.RandomState(0), 0
    for _ in range(300):
        shape = tuple(rng.randint(1, 6, size=rng.randint(0, 4)))
        boxes = [((0,) * len(shape), shape)]
        for _ in range(rng.randint(8) if shape else 0):
            (offsets, sizes), axis = boxes.pop(rng.randint(len(boxes))), rng.randint(len(shape))
            cut = rng.randint(sizes[axis] + 1)
            first, second, moved = (list(x) for x in (sizes, sizes, offsets))
            first[axis], second[axis], moved[axis] = cut, sizes[axis] - cut, offsets[axis] + cut
            boxes += [(offsets, tuple(first)), (tuple(moved), tuple(second))]
        i = rng.randint(len(boxes))
        offsets, sizes = boxes[i]
        there = tuple(rng.randint(0, 3) for _ in shape)
        for some in (
            boxes,
            boxes[:i] + boxes[i + 1 :],
            boxes + [boxes[i]],
            boxes + [boxes[i]] * 2,
            boxes[:i] + [(there, sizes)] + boxes[i + 1 :],
        ):
            painted = np.zeros([n + 12 for n in shape], int)
            for offsets, sizes in some:
                painted[tuple(slice(a, a + n) for a, n in zip(offsets, sizes, strict=True))] += 1
            inside = painted[tuple(slice(n) for n in shape)]
            once = bool((inside == 1).all() and painted.sum() == inside.size)
            assert cover(shape, some) == once, (shape, some)
            hits += once
    assert 300 < hits < 900


# ------------------------------------------------------------------------------------------------- damaged checkpoints


def edit(folder, change):
    tree = loads((folder / METADATA).read_bytes(), "x")
    change(tree.state["state_dict_metadata"], tree.state["storage_data"])
    (folder / METADATA).write_bytes(dumps(tree))


def chunk(entries, name="net.rows", i=0):
    return entries[name].state["chunks"][i].state


def place(places, name="net.rows"):
    return next(p for k, p in places.items() if k.state["fqn"] == name).state


def test_an_edited_metadata_is_otherwise_read(sharded, tmp_path):
    folder = shutil.copytree(sharded[0], tmp_path / "x")
    edit(folder, lambda entries, places: None)
    same(open_folder(folder), sharded[1])


def again(entries, places):
    index, where = next((k, p) for k, p in places.items() if k.state["fqn"] == "net.rows")
    places[Call(index.name, (), dict(index.state))] = where


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e, p: e["net.rows"].state["chunks"].pop(), "the chunks of 'net.rows' do not cover its .7, 5. exactly"),
        (lambda e, p: e["net.rows"].state["chunks"].append(e["net.rows"].state["chunks"][0]), "do not cover"),
        (lambda e, p: chunk(e).update(sizes=Call(SIZE, ((3, 5),))), "do not cover"),
        (lambda e, p: chunk(e).update(sizes=Call(SIZE, ((5, 5),))), "do not cover"),
        (lambda e, p: chunk(e).update(sizes=Call(SIZE, ((4,),))), "is shorter than"),
        (lambda e, p: chunk(e).update(sizes=Call(SIZE, ((4, -5),))), "integers ≥ 0"),
        (lambda e, p: chunk(e).pop("sizes"), "it lacks 'sizes'"),
        (lambda e, p: chunk(e, i=1).update(offsets=Call(SIZE, ((5, 0),))), "does not say where the part of 'net.rows'"),
        (lambda e, p: e["net.rows"].state.update(size=Call(SIZE, ((8, 5),))), "do not cover"),
        (lambda e, p: e["net.rows"].state.update(properties=None), "no TensorProperties where one belongs"),
        (
            lambda e, p: setattr(e["net.rows"].state["properties"], "state", (Global(SIZE), Call(SIZE, ()))),
            "is not a dense tensor",
        ),
        (lambda e, p: p.clear(), "does not say where"),
        (again, "two places for 'net.rows'"),
        (lambda e, p: place(p).update(relative_path="__7_0.distcp"), "names __7_0.distcp, which is not there"),
        (lambda e, p: place(p).update(relative_path="../x/__0_0.distcp"), "not a file of its own folder"),
        (lambda e, p: place(p).update(relative_path="/etc/passwd"), "not a file of its own folder"),
        (lambda e, p: place(p).update(offset=1 << 40), "is truncated: 'net.rows' ends at byte"),
        (lambda e, p: place(p).update(offset=-1), "integers ≥ 0"),
        (lambda e, p: place(p).update(transform_descriptors=["zstd"]), "was transformed when saved"),
        (lambda e, p: p.update({"x": Call(SIZE, ())}), "no MetadataIndex where one belongs"),
    ],
)
def test_damaged_metadata_is_one_sentence(sharded, tmp_path, change, message):
    folder = shutil.copytree(sharded[0], tmp_path / "x")
    edit(folder, change)
    with pytest.raises(FileError, match=message) as e:
        open_folder(folder)
    assert str(folder) in str(e.value)


def retype(entries, places):
    properties = entries["net.rows"].state["properties"]
    properties.state = (Global("torch.int32"), *properties.state[1:])


def swap(entries, places):
    place(places).update({k: place(places, "net.columns")[k] for k in ("offset", "length")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (retype, "holds float32 .4, 5. where .metadata has int32 .4, 5. of 'net.rows'"),
        (swap, "holds bfloat16 .7, 3. where .metadata has float32"),
        (lambda e, p: place(p).update(place(p, "iteration")), "no tensor where .metadata has|is no zip archive"),
        (lambda e, p: place(p).update(offset=place(p)["offset"] + 1), "is no zip archive of torch.save"),
        (lambda e, p: place(p).update(length=place(p)["length"] - 1), "is truncated or damaged"),
    ],
)
def test_a_chunk_that_is_another_is_one_sentence(sharded, tmp_path, change, message):
    folder = shutil.copytree(sharded[0], tmp_path / "x")
    edit(folder, change)
    with pytest.raises(FileError, match=message):
        open_folder(folder)["net.rows"]


def test_a_damaged_folder_is_one_sentence(saved):
    data = (saved / "model" / FILE).read_bytes()
    (saved / "model" / FILE).write_bytes(data[:-1])
    with pytest.raises(FileError, match=f"{FILE} is truncated"):
        open_folder(saved)
    (saved / "model" / FILE).unlink()
    with pytest.raises(FileError, match=f"names {FILE}, which is not there"):
        open_folder(saved)
    good = (saved / "model" / METADATA).read_bytes()
    for bad, message in ((good[:-9], "malformed"), (b"", "malformed"), (dumps({"a": 1}), "no Metadata where one")):
        (saved / "model" / METADATA).write_bytes(bad)
        with pytest.raises(FileError, match=message):
            open_folder(saved)
    with pytest.raises(FileError, match="has no .metadata, nor has its model/"):
        open_folder(saved / "optim")


def test_a_hostile_metadata_is_refused_and_not_executed(saved, tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    (saved / "model" / METADATA).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(FileError, match=r"refers to 'posix.mkdir', .* nothing was executed"):
        open_folder(saved)
    assert not (tmp_path / "canary").exists()
    pickle.loads((saved / "model" / METADATA).read_bytes())  # the control: it would have been
    assert (tmp_path / "canary").exists()


def test_the_archives_are_those_of_torch_save(tmp_path):
    """Each stretch of our file is a file that torch.load reads by itself."""
    write_folder(tmp_path, layout(TENSORS), arrays(TENSORS))
    found = open_folder(tmp_path)
    for name, x in TENSORS.items():
        for part in found.tensors[name].chunks:
            (tmp_path / "part.pt").write_bytes(part.path.read_bytes()[part.start : part.stop])
            assert raw(torch.load(tmp_path / "part.pt", weights_only=True)) == raw(x)
            assert torch_zip.open_archive(part.path, part.start, part.stop).storages.keys() == {"0"}
