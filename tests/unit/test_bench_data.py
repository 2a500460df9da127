"""`bench data` at small sizes, and what it measures of the lab-like mixture that does not depend on a clock."""

import dataclasses
import json
import math

import numpy as np
import pytest
from rich.console import Console

from cosmos_jax import bench, flops
from cosmos_jax.bench import data, table
from cosmos_jax.cli import options
from cosmos_jax.config import Config, ConfigError, DataConfig, ModelConfig
from data_pipelines import loader as loaders
from data_pipelines import rehearsal
from data_pipelines.loader import Loader

THIN = ModelConfig(latent_channels=1, action_dim=0, sound_dim=0)
ONE, EIGHT = (dataclasses.replace(rehearsal.BUCKET, rows=n) for n in (1, 8))


def small() -> data.Mixture:
    """The lab's sizes with one latent channel, eight rows."""

    def stream(in_step):
        return rehearsal.stream(THIN.sequence, EIGHT, in_step=in_step)

    return data.Mixture(THIN, stream, stream, (0, 1), look_ahead=4, batches=1, steps=16)


def test_rows_that_take_up_the_same_kinds_cost_more_nearly_the_same():
    counted = data.count(small())
    print(counted)
    assert counted["balance"] < counted["balance_alone"] - 0.04
    assert counted["efficiency"] > 0.92
    assert 0 < counted["longest_wait"] <= rehearsal.BUCKET.segments + 4


def test_the_cost_of_a_row_is_that_of_its_batch():
    batch = next(Loader(*rehearsal.stream(THIN.sequence, ONE), look_ahead=2))
    counts = flops.count(batch)
    und, gen = (batch[f"{s}_segment_ids"][0] for s in ("und", "gen"))
    samples = [(int((und == n).sum()), int((gen == n).sum())) for n in range(und.max() + 1)]
    assert len(samples) > 1
    assert data.cost(THIN, counts.und, counts.gen, samples) == flops.train_step(
        THIN, dataclasses.replace(counts, vision=0, text=0)
    )
    more = data.cost(THIN, counts.und + 5, counts.gen, samples)  # a padded slot costs like any other
    assert more - data.cost(THIN, counts.und, counts.gen, samples) == 5 * 6 * flops.matmul_parameters(THIN)


def test_the_mixture_has_the_published_sizes():
    prepare, order = rehearsal.stream(THIN.sequence, EIGHT)
    for kind, name in enumerate(order.names):
        p, clip = prepare(order.job(kind, 3)), rehearsal.kinds()[name]
        frame = {"256p": 60, "480p": 390, "720p": 920}[next(r for r in rehearsal.FRAME if r in name)]
        assert p.size["gen"] % frame == 0 and clip.least <= p.size["gen"] // frame <= clip.most
        assert 40 <= p.size["und"] <= 2000


def test_the_command_measures_prints_and_writes(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "MIXTURES", {"small": lambda: small()._replace(steps=4)})
    words = ["bench", "data", "--workers=0,1", "--repeat=1", f"--out={tmp_path}"]
    parsed = options.parse(words)
    bench.prepare(parsed, Config(model=THIN))()
    rows = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert [(r["shape"], r["workers"], r["host_rows"], r["rows"]) for r in rows] == [
        ("small", 0, 2, 8),
        ("small", 1, 2, 8),
    ]
    for row in rows:
        assert all(math.isfinite(x) for x in row.values() if isinstance(x, float))
        assert row["tokens_s"] > row["samples_s"] > row["batches_s"] > 0 and row["waiting_bytes"] > 1e5
    text = Console(width=240, record=True)
    table.show("data", {"rows": rows, "machine": {}}, text)
    assert "small" in text.export_text() and "batches/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data", "--shape=labs"], "did you mean 'lab'"),
        (["data", "--workers=two"], "numbers of processes separated by commas"),
        (["data", "--scaling"], "--scaling belongs to bench generate"),
        (["flow", "--workers=2"], "--workers belongs to bench data"),
    ],
)
def test_options_that_do_not_belong_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        bench.prepare(options.parse(["bench", *words]), Config(model=THIN))


def test_latents_are_the_same_in_every_process():
    a, b = (rehearsal.store.__wrapped__(2) for _ in range(2))
    np.testing.assert_array_equal(a, b)


def test_a_rehearsal_takes_the_sizes_that_fit():
    """`train --config.data.source=rehearsal`: any bucket, without any assets; one that holds nothing is refused."""
    toy = dataclasses.replace(ONE, und=128, gen=184, vision=184, segments=10)
    loader = loaders.build(DataConfig(source="rehearsal", bucket=toy), THIN.sequence, None, 1.0, 1.0)
    batch = next(loader)
    loader.close()
    sizes = np.unique(batch["gen_segment_ids"][0], return_counts=True)
    assert set(sizes[1][sizes[0] >= 0]) == {60} and batch["und_ids"].max() < 256
    with pytest.raises(ValueError, match="no published size fits data.bucket.gen=59"):
        rehearsal.stream(THIN.sequence, dataclasses.replace(ONE, gen=59))
