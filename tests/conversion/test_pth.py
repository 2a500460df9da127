"""Our reader and writer of .pth against PyTorch, and every damaged or hostile file against one clear sentence."""

import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict

import conversion_torch
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from conversion_torch import raw
from parity import wan_oracle

from conversion.check import check
from conversion.pth import open_file, write_file
from conversion.tensors import FileError
from conversion.torch_pickle import DTYPES, SIZE, STORAGES, Call, Global, Storage, dumps, loads
from conversion.torch_zip import tensor
from conversion.tree import from_torch
from conversion.wan import entries, entries_original
from cosmos_jax.codecs.wan import WanConfig, abstract

torch.manual_seed(0)
W = torch.randn(4, 6)
TENSORS = {
    "w": W, "transposed": W.t(), "corner": W[1:, 2:4], "row": W[2], "every_other": W[::2, ::3], "one": W[3:, 5:],
    "bf16": torch.randn(4, 2).to(torch.bfloat16), "f16": torch.randn(3).half(), "f64": torch.randn(2, 1, 3).double(),
    "i64": torch.arange(6).reshape(2, 3) - 3, "u16": torch.arange(3).to(torch.uint16), "flag": torch.arange(2) > 0,
    "e4m3": torch.randn(8).to(torch.float8_e4m3fn), "e5m2": torch.randn(8).to(torch.float8_e5m2).view(2, 4).t(),
    "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "parameter": torch.nn.Parameter(torch.randn(2, 2)),
}  # fmt: skip


def same(found, tensors):
    """Also in the same order, which a .pth keeps."""
    assert list(found) == list(tensors)
    conversion_torch.same(found, tensors)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_reads_what_pytorch_wrote(tmp_path, protocol):
    torch.save(OrderedDict(TENSORS), tmp_path / "x.pth", pickle_protocol=protocol)
    found = open_file(tmp_path / "x.pth")
    same(found, TENSORS)
    assert found.metadata == {} and not found["w"].flags.writeable and not found["transposed"].flags.writeable
    assert found.tensors["w"].start == found.tensors["transposed"].start  # one storage, once in the file


def test_reads_a_modules_state_dict_and_flattens_what_is_nested(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    state = module.state_dict()  # an OrderedDict with an attribute, the versions of the modules
    torch.save({"model": state, "epoch": 3, "lr": 1e-3, "note": None, "list": [W, "x"]}, tmp_path / "x.pt")
    found = open_file(tmp_path / "x.pt")
    same(found, {f"model.{k}": v for k, v in state.items()} | {"list.0": W})
    assert found.metadata == {"epoch": "3", "lr": "0.001", "note": "None", "list.1": "x"}


def layout(tensors):
    return {k: (DTYPES[str(v.dtype)], tuple(v.shape)) for k, v in tensors.items()}


def arrays(tensors):
    return ((k, np.frombuffer(raw(v), DTYPES[str(v.dtype)]).reshape(v.shape)) for k, v in tensors.items())


@pytest.mark.parametrize("limit", [zipfile.ZIP64_LIMIT, 16])
@pytest.mark.parametrize("mmap", [False, True])
def test_writes_what_pytorch_reads(tmp_path, monkeypatch, limit, mmap):
    """Also with the 64-bit fields of large files, which a low limit brings out."""
    path = tmp_path / "x.pth"
    with monkeypatch.context() as m:
        m.setattr(zipfile, "ZIP64_LIMIT", limit)
        write_file(path, layout(TENSORS), arrays(TENSORS))
    back = torch.load(path, weights_only=True, mmap=mmap)
    assert list(back) == list(TENSORS)
    for name, x in TENSORS.items():
        assert (back[name].dtype, back[name].shape, raw(back[name])) == (x.dtype, x.shape, raw(x)), name
    found = open_file(path)
    same(found, TENSORS)
    assert all(t.start % 64 == 0 for t in found.tensors.values() if t.stop > t.start)
    assert os.listdir(tmp_path) == ["x.pth"]


def test_every_dtype_goes_there_and_back(tmp_path):
    some = {n: torch.arange(6).reshape(3, 2).to(getattr(torch, n.removeprefix("torch."))) for n in DTYPES}
    write_file(tmp_path / "x.pth", layout(some), arrays(some))
    back = torch.load(tmp_path / "x.pth", weights_only=True)
    assert {n: (x.dtype, raw(x)) for n, x in back.items()} == {n: (x.dtype, raw(x)) for n, x in some.items()}
    same(open_file(tmp_path / "x.pth"), some)
    torch.save(some, tmp_path / "theirs.pth")
    same(open_file(tmp_path / "theirs.pth"), some)


def test_writing_holds_one_tensor_and_leaves_no_half_file(tmp_path):
    n, x = 1 << 20, None
    tracemalloc.start()
    write_file(
        tmp_path / "x.pth",
        {str(i): (np.dtype("f4"), (n,)) for i in range(8)},
        ((str(i), np.full(n, i, np.float32)) for i in range(8)),
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 4 * n, peak  # the last one and the next one, never all eight
    x = {"a": (np.dtype("f4"), (2,)), "b": (np.dtype("f4"), (2,))}
    for bad in ([("a", np.zeros(2, "f4"))], [("b", np.zeros(2, "f4"))], [("a", np.zeros(3, "f4"))]):
        with pytest.raises(ValueError, match=r"never came|comes where the layout has"):
            write_file(tmp_path / "y.pth", x, bad)
    with pytest.raises(ValueError, match="PyTorch has no dtype for complex64"):
        write_file(tmp_path / "y.pth", {"a": (np.dtype("c8"), (2,))}, [])
    assert not (tmp_path / "y.pth").exists()


def test_a_huge_file_costs_nothing_until_it_is_used(tmp_path):
    """8 GiB of holes between two numbers: 64-bit offsets, and no memory; PyTorch agrees on what they are."""
    path, n = tmp_path / "x.pth", 1 << 31
    tree = {"large": tensor("0", np.dtype("f4"), (n // 1024, 1024)), "small": tensor("1", np.dtype("f4"), (1,))}
    with path.open("wb") as f, zipfile.ZipFile(f, "w") as z:
        z.writestr("x/data.pkl", dumps(tree))
        z.writestr("x/version", b"3\n")
        hole = zipfile.ZipInfo("x/data/0")
        hole.file_size = hole.compress_size = 4 * n
        hole.CRC, hole.header_offset = 0, f.tell()
        f.write(hole.FileHeader(zip64=True))
        f.seek(4 * n, 1)
        z.filelist.append(hole)
        z.start_dir = f.tell()
        z.writestr("x/data/1", np.float32(7).tobytes())
    assert path.stat().st_size > 4 * n and path.stat().st_blocks * 512 < 1 << 20
    tracemalloc.start()
    found = open_file(path)
    large = found["large"]
    assert large.shape == (n // 1024, 1024) and large[-1, -1] == 0 and found["small"][0] == 7
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20, peak
    back = torch.load(path, weights_only=True, mmap=True)
    assert back["large"].shape == large.shape and back["small"].item() == 7


# ------------------------------------------------------------------------------------------------ nothing is executed


class Hostile:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def test_a_hostile_pickle_is_refused_and_not_executed(tmp_path):
    canary = tmp_path / "canary"
    torch.save({"w": W, "x": Hostile(canary)}, tmp_path / "x.pth")
    with pytest.raises(FileError, match=r"refers to 'posix.system', .* nothing was executed"):
        open_file(tmp_path / "x.pth")
    assert not canary.exists()
    torch.load(tmp_path / "x.pth", weights_only=False)  # the control: it would have been
    assert canary.exists()


def test_our_records_cannot_be_made_to_act(tmp_path):
    """Calls of known names, with any arguments and states, stay records: nothing is built, no class is changed."""
    evil = Call("torch._utils._rebuild_parameter", ("__import__('os')",), {"__class__": "x", "__setstate__": 1})
    found = loads(dumps([evil, Call(SIZE, (Global("torch.float32"),))]), "x")
    assert type(found[0]) is Call and found[0].state == evil.state and found[0].args == evil.args
    assert type(found[1]) is Call and not hasattr(Call, "__setstate__")


def code(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


STR = b"X\x01\x00\x00\x00a"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"", "pickle exhausted"),
        (code(b"cos\nsystem\n", STR, b"\x85R"), "refers to 'os.system'"),
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93.", "refers to 'posix.system'"),
        (code(b"cbuiltins\neval\n", STR, b"\x85R"), "refers to 'builtins.eval'"),
        (code(b"ctorch\nload\n"), "refers to 'torch.load'"),
        (code(b"ctorch\nComplexFloatStorage\n"), "refers to 'torch.ComplexFloatStorage'"),
        (code(b"(ios\nsystem\n"), "uses the pickle opcode INST"),
        (code(b"(cos\nsystem\no"), "refers to 'os.system'"),
        (code(b"(ctorch\nSize\no"), "uses the pickle opcode OBJ"),
        (code(b"\x82\x01"), "uses the pickle opcode EXT1"),
        (code(b"Pabc\n"), "uses the pickle opcode PERSID"),
        (code(b"N", STR, b"b"), "a NoneType where a Call belongs"),
        (code(b"ctorch\nSize\n", b"}", STR, STR, b"sb"), "a Global where a Call belongs"),
        (code(STR, b")R"), "a str where a Global belongs"),
        (code(b"ctorch\nSize\n", STR, b"R"), "a str where a tuple belongs"),
        (code(b")", STR, b"a"), "a tuple where a list belongs"),
        (code(b"]", STR, STR, b"s"), "a list where a dict belongs"),
        (code(b"}]Ns"), "a list as a key"),
        (code(b"}", STR, b"N", b"s", STR, b"N", b"s"), "a key occurs twice"),
        (code(b"}(", STR, b"u"), "malformed"),
        (code(b"h\x05"), "malformed"),
        (code(b"0"), "uses the pickle opcode POP"),
        (code(b""), "ends in the middle of a value"),
        (code(b"N(N"), "ends in the middle of a value"),
        (code(b"X\xff\xff\xff\x7fa"), "expected 2147483647 bytes"),
        (code(b"\x8a\xff1"), "malformed"),
        (code(STR, b"Q"), "a str where a tuple belongs"),
        (code(b"\xfe"), "malformed"),
    ],
)
def test_a_strange_pickle_is_one_sentence(program, message):
    with pytest.raises(FileError, match=message) as e:
        loads(program, "some.pth")
    assert "some.pth" in str(e.value)


def test_a_short_pickle_cannot_take_all_memory(tmp_path):
    deep = code(b"N" + b"\x85" * 100_000)  # ((((…
    names = code(b"}" + b"X\xff\xff\x00\x00" + b"a" * 65535 + b"q\x00}" + b"h\x00}" * 30 + b"s" * 31)
    laughs = code(b"(]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(40)) + b"t")  # 2⁴⁰ lists
    empty = code(b"}" + b"X\x00\x00\x00\x00q\x00}" + b"h\x00}" * 2000 + b"s" * 2001)  # {"": {"": …
    many = "more than 100000 values"
    for program, message in ((deep, "too deeply"), (names, "too deeply"), (empty, "too deeply"), (laughs, many)):
        archive(tmp_path / "x.pth", {"data.pkl": program})
        with pytest.raises(FileError, match=message):
            open_file(tmp_path / "x.pth")
    assert loads(code(b"Nr\xff\xff\xff\xff"), "x") is None  # the last of 4 billion places: an array of them elsewhere


# --------------------------------------------------------------------------------------------------- damaged archives


def archive(path, records, compression=zipfile.ZIP_STORED, stem="x"):
    with zipfile.ZipFile(path, "w", compression) as z:
        for name, data in records.items():
            z.writestr(f"{stem}/{name}", data)


def view(offset=0, size=(2,), stride=(1,), count=4, kind="torch.FloatStorage", key="0", more=()):
    args = (Storage(kind, key, count), offset, size, stride, False, Call("collections.OrderedDict", ()), *more)
    return Call("torch._utils._rebuild_tensor_v2", args)


def test_the_undamaged_archive_of_these_tests_is_read(tmp_path):
    archive(
        tmp_path / "x.pth", {"data.pkl": dumps({"a": view(offset=2)}), "data/0": np.arange(4, dtype="f4").tobytes()}
    )
    assert open_file(tmp_path / "x.pth")["a"].tolist() == [2, 3]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (view(offset=3), "its 2 elements end at number 4 of a storage of 4"),
        (view(offset=-1), "not a tuple of at most 8 integers ≥ 0"),
        (view(size=(2, 2), stride=(3, 1)), "end at number 4 of a storage of 4"),
        (view(size=(9,), stride=(0,)), "its 9 elements end at number 0 of a storage of 4"),
        (view(size=(-1,)), "integers ≥ 0"),
        (view(size=(True,)), "integers ≥ 0"),
        (view(stride=(-1,)), "integers ≥ 0"),
        (view(stride=(1, 1)), "shorter than argument|longer than argument"),
        (view(size=(1,) * 9, stride=(1,) * 9), "at most 8"),
        (view(count=5), "its storage should be 20 bytes and is 16"),
        (view(count=2**62), "its storage should be"),
        (view(kind="torch.DoubleStorage"), "its storage should be 32 bytes and is 16"),
        (view(key="1"), "there is no '1'"),
        (view(key="../0"), "there is no '../0'"),
        (view(kind=SIZE), "there is no 'torch.Size'"),
        (view(more=({"neg": True},)), "negated or conjugated lazily"),
        (Call("torch._utils._rebuild_tensor_v2", ()), "not enough values"),
        (Call("torch._utils._rebuild_parameter", (Call(SIZE, ()), True, None)), "a torch.Size where a tensor belongs"),
        (Call("torch._utils._rebuild_tensor_v3", view().args), "is not one that is read here"),
        (Call(SIZE, ((1,),)), "'a' is a torch.Size, neither a tensor nor a plain value"),
        (Global("torch.float32"), "'a' is a torch.float32, neither"),
        (Storage("torch.FloatStorage", "0", 4), "'a' is a storage, neither"),
    ],
)
def test_a_tensor_that_cannot_be_there_is_one_sentence(tmp_path, x, message):
    archive(tmp_path / "x.pth", {"data.pkl": dumps({"a": x}), "data/0": b"\0" * 16})
    with pytest.raises(FileError, match=message) as e:
        open_file(tmp_path / "x.pth")
    assert str(tmp_path / "x.pth") in str(e.value)


GOOD = {"data.pkl": dumps({"a": view()}), "data/0": b"\0" * 16}


def written(path, records=GOOD, **options):
    archive(path, records, **options)
    return path.read_bytes()


def old_format(path):
    torch.save({"a": W}, path, _use_new_zipfile_serialization=False)


def truncated(path):
    path.write_bytes(written(path)[:-1])


def wrong_header(path):
    path.write_bytes(written(path).replace(b"x/data/0", b"x/data/9", 1))


def wrong_checksum(path):
    path.write_bytes(written(path).replace(b"FloatStorage", b"HalfStorage\n", 1))


def ends_outside(path):
    """The directory gives the last record 2 GiB more than the file has."""
    data = written(path)
    at = data.rindex(b"PK\x01\x02")
    size = (16 + (1 << 31)).to_bytes(4, "little")
    path.write_bytes(data[: at + 20] + size + size + data[at + 28 :])


def name_twice(path):
    with pytest.warns(UserWarning), zipfile.ZipFile(path, "w") as z:
        for name in ("x/data.pkl", "x/data/0", "x/data/0"):
            z.writestr(name, b"")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (old_format, "the format before 1.6"),
        (lambda p: p.write_bytes(b""), "no zip archive of torch.save"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com"), "no zip archive of torch.save"),
        (truncated, "truncated or damaged"),
        (lambda p: p.write_bytes(b"PK\3\4" + b"\0" * 99), "truncated or damaged"),
        (wrong_header, "the record 'x/data/0' is not where the directory says"),
        (wrong_checksum, "Bad CRC-32"),
        (ends_outside, "ends outside"),
        (name_twice, "one data.pkl and no name twice"),
        (lambda p: written(p, {"other": b""}), "one data.pkl and no name twice"),
        (lambda p: written(p, compression=zipfile.ZIP_DEFLATED), "is compressed or encrypted"),
        (lambda p: written(p, GOOD | {"byteorder": b"big"}), "a big-endian machine"),
        (lambda p: written(p, {"data.pkl": dumps(view()), "data/0": b"\0" * 16}), "one tensor without a name"),
        (
            lambda p: written(p, GOOD | {"data.pkl": dumps({"a.b": view(), "a": {"b": view()}})}),
            "two values that are both called 'a.b'",
        ),
    ],
)
def test_a_damaged_archive_is_one_sentence(tmp_path, make, message):
    path = tmp_path / "x.pth"
    make(path)
    with pytest.raises(FileError, match=message) as e:
        open_file(path)
    assert str(path) in str(e.value)


def test_any_damage_is_a_file_error_or_harmless(tmp_path):
    """1,000 files with a few bytes changed at random: no other exception, and no tensor outside the file."""
    torch.save({k: TENSORS[k] for k in ("w", "transposed", "bf16", "e4m3", "empty")}, tmp_path / "x.pth")
    good, rng, refused = (tmp_path / "x.pth").read_bytes(), np.random.RandomState(0), 0
    for _ in range(1000):
        bad = bytearray(good)
        for at in rng.randint(len(bad), size=rng.randint(1, 4)):
            bad[at] = rng.randint(256)
        (tmp_path / "y.pth").write_bytes(bad[: rng.randint(len(bad))] if rng.rand() < 0.1 else bad)
        try:
            found = open_file(tmp_path / "y.pth")
            assert all(len(found[name].tobytes()) < 1000 for name in found)
        except FileError:
            refused += 1
    assert 250 < refused < 1000


# -------------------------------------------------------------------------------------------------------- the real user


def test_a_wan_vae_in_its_original_file_becomes_our_parameters(tmp_path):
    """Random weights under the names of Wan2.2_VAE.pth: 196 tensors through the file equal the diffusers route."""
    cfg = WanConfig.from_diffusers(wan_oracle.TINY)
    vae = wan_oracle.reference()
    names = {e.path: e.source for e in entries_original(cfg)}
    renamed = {e.source: names[e.path] for e in entries(cfg)}
    torch.save(OrderedDict((renamed[k], v) for k, v in vae.state_dict().items()), tmp_path / "Wan2.2_VAE.pth")
    found = open_file(tmp_path / "Wan2.2_VAE.pth")
    assert len(found) == 196
    check(entries_original(cfg), found.shapes, abstract(cfg))
    ours, theirs = from_torch(entries_original(cfg), found), wan_oracle.params(vae, cfg)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    write_file(tmp_path / "copy.pth", {k: (found.dtypes[k], found.shapes[k]) for k in found}, found.items())
    back = torch.load(tmp_path / "copy.pth", weights_only=True)
    assert {k: raw(v) for k, v in back.items()} == {renamed[k]: raw(v) for k, v in vae.state_dict().items()}


def test_the_tables_are_pytorchs():
    assert {k: str(torch.storage._storage_type_to_dtype_map()[k.removeprefix("torch.")]) for k in STORAGES} == STORAGES
    for name, dtype in DTYPES.items():
        assert str(getattr(torch, name.removeprefix("torch."))) == name
        assert torch.zeros(1, dtype=getattr(torch, name.removeprefix("torch."))).element_size() == dtype.itemsize
    assert DTYPES["torch.bfloat16"] == ml_dtypes.bfloat16
    tree = {"a": [1, -1, 255, 256, 2**40, -(2**40), 0, True, None, "é", (), (1,), (1, 2, 3, 4), {}]}
    assert loads(dumps(tree), "x") == pickle.loads(dumps(tree)) == tree
    assert loads(pickle.dumps(tree, 2), "x") == loads(pickle.dumps(tree, 5), "x") == tree
