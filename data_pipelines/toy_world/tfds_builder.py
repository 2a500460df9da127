"""The toy world on disk: a `tensorflow_datasets` builder that writes array_record files, without TensorFlow.

In: a directory and episode counts. Out: a dataset whose episodes equal those of `stream.StreamSource`, byte for byte.

    python -m data_pipelines.toy_world.tfds_builder --dir=DIR [--train=4000] [--test=64]
"""

from __future__ import annotations

import argparse
import json
import pathlib
from dataclasses import fields
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.toy_world.episodes import FRAMES, Episode
from data_pipelines.toy_world.render import SIZE
from data_pipelines.toy_world.stream import StreamSource, held_out

JSON_FIELDS = ("seed", "kind", "colours", "caption", "instruction", "qa", "onsets", "events", "fps", "sample_rate")
ARRAYS = {"video": np.uint8} | dict.fromkeys(("sound", "actions", "poses", "gripper", "pucks"), np.float32)


class ToyWorld(tfds.core.GeneratorBasedBuilder):
    """Video, sound, actions, positions, and a JSON text of everything else."""

    VERSION = tfds.core.Version("1.2.0")  # 1.2: test episodes of other seeds

    def __init__(self, *, train: int = 4000, test: int = 64, **kwargs: Any):
        self._sizes = {"train": StreamSource(train), "test": held_out(test)}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "video": tfds.features.Tensor(shape=(FRAMES, SIZE, SIZE, 3), dtype=np.uint8, encoding="zlib"),
                "sound": tfds.features.Tensor(shape=(2, None), dtype=np.float32, encoding="zlib"),
                "actions": tfds.features.Tensor(shape=(FRAMES - 1, 10), dtype=np.float32),
                "poses": tfds.features.Tensor(shape=(FRAMES, 3), dtype=np.float32),
                "gripper": tfds.features.Tensor(shape=(FRAMES, 2), dtype=np.float32),
                "pucks": tfds.features.Tensor(shape=(FRAMES, None, 2), dtype=np.float32),
                "meta": tfds.features.Text(),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, description=__doc__)

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(source) for name, source in self._sizes.items()}

    def _generate_examples(self, source: StreamSource):
        for i in range(len(source)):
            e = source[i]
            meta = json.dumps({f: getattr(e, f) for f in JSON_FIELDS})
            yield i, {name: getattr(e, name) for name in ARRAYS} | {"meta": meta}


def write(directory: str | pathlib.Path, train: int = 4000, test: int = 64) -> None:
    """Generate the dataset under `directory` (about 10 ms per episode)."""
    builder = ToyWorld(data_dir=str(directory), file_format="array_record", train=train, test=test)
    builder.download_and_prepare()


class TfdsSource:
    """Random access to the episodes of a split: the twin of `StreamSource`. A pickled one opens the files anew."""

    def __init__(self, directory: str, split: str, data):
        self._where, self._data = (directory, split), data

    def __reduce__(self):
        return open_source, self._where

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, i: int) -> Episode:
        record = self._data[i]
        meta: Any = record["meta"]
        meta = json.loads(meta.decode() if isinstance(meta, bytes) else meta)
        for name in ("colours", "onsets"):
            meta[name] = tuple(meta[name])
        for name in ("qa", "events"):
            meta[name] = tuple(map(tuple, meta[name]))
        arrays: dict[str, Any] = {name: np.asarray(record[name], dtype) for name, dtype in ARRAYS.items()}
        return Episode(**meta, **arrays)


def open_source(directory: str | pathlib.Path, split: str) -> TfdsSource:
    """Episodes of "train" or "test" from a directory that `write` filled. ValueError otherwise."""
    found = sorted(pathlib.Path(directory).glob(f"toy_world/{ToyWorld.VERSION}/dataset_info.json"))
    if not found:
        raise ValueError(
            f"no toy_world dataset of version {ToyWorld.VERSION} in {str(directory)!r}; write it with "
            f"`python -m data_pipelines.toy_world.tfds_builder --dir={directory}` or set data.source=toy."
        )
    builder = tfds.builder_from_directory(str(found[-1].parent))
    if split not in builder.info.splits:
        raise ValueError(f"split {split!r} is not one of {', '.join(builder.info.splits)}.")
    return TfdsSource(str(directory), split, builder.as_data_source(split=split))


assert {f.name for f in fields(Episode)} == set(JSON_FIELDS) | set(ARRAYS)

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dir", required=True)
    parser.add_argument("--train", type=int, default=4000)
    parser.add_argument("--test", type=int, default=64)
    a = parser.parse_args()
    write(a.dir, a.train, a.test)
    print(f"wrote {a.train} + {a.test} episodes under {a.dir}/toy_world")
