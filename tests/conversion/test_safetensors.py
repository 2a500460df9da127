"""Our reader and writer against the reference package, and every kind of damaged file against one clear sentence."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from conversion.safetensors import DTYPES, FileError, open_file, open_folder, write_file

RNG = np.random.RandomState(0)
TENSORS = {
    "a": torch.randn(3, 5), "b": torch.randn(4, 2).to(torch.bfloat16), "c": torch.arange(6).reshape(2, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64), "empty": torch.zeros(0, 4), "flag": torch.tensor([True, False]),
    "f8": torch.randn(8).to(torch.float8_e4m3fn),
}  # fmt: skip


def raw(x: torch.Tensor) -> bytes:
    return x.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"format": "pt"})
    return path


def test_reads_what_the_reference_wrote(file):
    found = open_file(file)
    assert set(found) == set(TENSORS) and found.metadata == {"format": "pt"}
    for name, x in TENSORS.items():
        assert found[name].shape == tuple(x.shape) == found.shapes[name] and found[name].tobytes() == raw(x), name
    assert found.dtypes["b"] == ml_dtypes.bfloat16 and not found["a"].flags.writeable


def test_writes_what_the_reference_reads_and_byte_identical_files(file, tmp_path):
    found = open_file(file)
    out = tmp_path / "copy.safetensors"
    order = sorted(found, key=lambda k: (found.tensors[k].start, found.tensors[k].stop))
    write_file(out, {k: (found.dtypes[k], found.shapes[k]) for k in order}, ((k, found[k]) for k in order), {"a": "b"})
    back = safetensors.torch.load_file(out)
    assert {k: raw(v) for k, v in back.items()} == {k: raw(v) for k, v in TENSORS.items()}
    assert out.stat().st_size % 8 == file.stat().st_size % 8 and open_file(out).metadata == {"a": "b"}


def test_every_dtype_goes_there_and_back(tmp_path):
    arrays = {n: RNG.randint(0, 2, (3, 2)).astype(d) for n, d in DTYPES.items()}
    write_file(tmp_path / "x.safetensors", {n: (x.dtype, x.shape) for n, x in arrays.items()}, arrays.items())
    found = open_file(tmp_path / "x.safetensors")
    assert {n: (found[n].dtype, found[n].tobytes()) for n in found} == {
        n: (x.dtype, x.tobytes()) for n, x in arrays.items()
    }


def header(entries, length=None, data=b"\0" * 16):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(a, b, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [a, b]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\1\2", "is truncated"),
        (header({"a": entry(0, 8), "b": entry(8, 16)})[:-1], "'b' lies at bytes 8…16, outside the file's 15"),
        (header({}, length=1 << 40), "is truncated"),
        (header(b"not json", data=b""), "the header is not JSON"),
        (header(b"[1]", data=b""), "the header is not a table"),
        (header(b'{"a":1,"a":2}', data=b""), "a name occurs twice"),
        (header(b"[" * 200_000, data=b""), "the header is not JSON"),
        (header({"a": entry(0, 8), "b": entry(4, 12)}, data=b"\0" * 12), "'b' overlaps the one before it"),
        (header({"a": entry(0, 8), "b": entry(12, 20)}, data=b"\0" * 20), "'b' leaves 4 bytes unaccounted for"),
        (header({"a": entry(0, 8)}), "8 bytes after the last tensor"),
        (header({"a": entry(0, 16)}), r"'a' of shape \[2\] and F32 needs 8 bytes but has 16"),
        (header({"a": entry(0, 8, "F31")}, data=b"\0" * 8), "'a' has the unknown dtype 'F31'"),
        (header({"a": entry(0, 8, shape=(-2,))}, data=b"\0" * 8), "entry for 'a' is malformed"),
        (header({"a": entry(8, 0)}, data=b"\0" * 8), "'a' lies at bytes 8…0"),
        (header({"a": {"dtype": "F32"}}, data=b""), "entry for 'a' is malformed"),
        (
            header({"a": entry(0, 8), "__metadata__": {"x": 1}}, data=b"\0" * 8),
            "__metadata__ is not a table of strings",
        ),
    ],
)
def test_a_damaged_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message) as e:
        open_file(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as f:  # sparse: takes no space
        f.write((200_000_000).to_bytes(8, "little"))
        f.truncate(300_000_000)
    with pytest.raises(FileError, match="claims a header of 200000000 bytes"):
        open_file(path)


@pytest.fixture
def folder(tmp_path):
    names = sorted(TENSORS)
    files = {"m-1.safetensors": names[:3], "m-2.safetensors": names[3:]}
    for f, keys in files.items():
        safetensors.torch.save_file({k: TENSORS[k] for k in keys}, tmp_path / f)
    index = {"metadata": {}, "weight_map": {k: f for f, keys in files.items() for k in keys}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_reads_sharded_folders(folder):
    found = open_folder(folder)
    assert {k: found[k].tobytes() for k in found} == {k: raw(v) for k, v in TENSORS.items()}


def test_a_folder_that_is_not_whole_is_one_sentence(folder, tmp_path):
    index = folder / "m.safetensors.index.json"
    listed = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": listed["weight_map"] | {"z": "m-1.safetensors"}}))
    with pytest.raises(FileError, match="disagree on 'z'"):
        open_folder(folder)
    index.write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(FileError, match="in its own folder"):
        open_folder(folder)
    index.write_text(json.dumps(listed))
    (folder / "m-2.safetensors").unlink()
    with pytest.raises(FileError, match=r"names m-2.safetensors, which is not there"):
        open_folder(folder)
    index.unlink()
    safetensors.torch.save_file({"a": TENSORS["a"]}, folder / "other.safetensors")
    with pytest.raises(FileError, match=r"2 .safetensors files and no index"):
        open_folder(folder)


def test_a_writer_that_is_interrupted_leaves_no_file(tmp_path):
    path = tmp_path / "x.safetensors"

    def arrays():
        yield "a", np.zeros(2, np.float32)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, {"a": (np.float32, (2,)), "b": (np.float32, (2,))}, arrays())
    assert not path.exists()
    with pytest.raises(ValueError, match="'b' never came"):
        write_file(path, {"a": (np.float32, (2,)), "b": (np.float32, (2,))}, [("a", np.zeros(2, np.float32))])
    with pytest.raises(ValueError, match="'b' float32"):
        write_file(path, {"a": (np.float32, (2,))}, [("b", np.zeros(2, np.float32))])
    assert not path.exists()
