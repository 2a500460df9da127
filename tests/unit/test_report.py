"""The report: one file, every task in it, failures in red and in words, gaps named."""

import io
import json
import re
from html.parser import HTMLParser

import fake_pipeline as fake
import numpy as np
import pytest
from PIL import Image

from cosmos_jax import report
from cosmos_jax.evaluate import evaluate
from cosmos_jax.report import charts, html, layout
from cosmos_jax.report.examples import EXAMPLES
from data_pipelines.packing import fill, plan, tight_bucket
from data_pipelines.toy_world.episodes import make_episode
from data_pipelines.toy_world.samples import TASKS, make_sample


class Reader(HTMLParser):
    """Every attribute that could fetch something, and whether tags are balanced."""

    VOID = {"meta", "link", "img", "br", "line", "polyline"}

    def __init__(self):
        super().__init__()
        self.fetched, self.open, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a pipeline that knows only nonsense: some rows fail."""
    workdir = tmp_path_factory.mktemp("run")
    evaluate(fake.Garbage(), workdir)
    fake.assets().save(workdir / "assets")
    rows = [
        {"step": 10 * i, "loss": 3 / i, "loss/vision": 1 / i, "loss/text": 2 / i, "loss/sigma_0": 1 / i}
        | {"text/accuracy": 1 - 1 / i, "tokens_per_second": 5000.0, "model_tflops": 0.1, "grad_norm": 1.0}
        | {"tokens/und": 100, "tokens/gen": 150}
        for i in range(1, 30)
    ]
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return workdir


@pytest.fixture(scope="module")
def text(run):
    path = report.write(run)
    assert path == run / "report.html" and path.stat().st_size < 15e6
    return path.read_text()


def test_it_needs_no_other_file_and_no_network(text):
    reader = Reader()
    reader.feed(text)
    assert not reader.open
    assert all(u.startswith(("data:", "#")) for u in reader.fetched)
    assert "http://" not in text and "https://" not in text and "<script" not in text
    assert reader.tags.count("video") > 40 and reader.tags.count("svg") > 20


def test_every_task_and_every_section_is_there(text):
    for name in EXAMPLES:
        assert f'id="task-{name}"' in text
    for t in TASKS:
        assert f"<b>{t.name}</b>" in text
    for anchor, *_ in report.sections.ALL:
        assert f'<section id="{anchor}">' in text
    assert 'class="missing"' not in text
    assert "5,000 tokens/s" in text and "about 0 min" in text


def test_rows_that_lose_are_red_and_said_in_words(run, text):
    scores = json.loads((run / "scores.json").read_text())
    lost = [name for name, s in scores.items() if not s["beats"]]
    assert len(lost) == len(scores) == text.count('<tr class="lost"><td>') - text.count(">truth: ")
    assert f"{len(lost)} do not: " in text and text.count("does NOT beat") == len(lost)
    assert "--bad:#c4161c" in text and "not done" in text


def test_scores_given_by_the_caller_are_shown(run, tmp_path):
    row = {"value": 0.25, "unit": "px", "baselines": {"copy": 9.0}, "better": "lower", "beats": True}
    shown = report.write(tmp_path, {"only <row>": row}).read_text()
    assert "only &lt;row&gt;" in shown and "beats its baselines" in shown and "1 of 1 rows" in shown


def test_what_is_missing_is_said(tmp_path):
    shown = report.write(tmp_path).read_text()
    assert shown.count('class="missing"') == len(EXAMPLES) + 1 + 4 + 1  # one task has two files; sections; the verdict
    assert "run evaluate" in shown and "train there first" in shown
    with pytest.raises(html.Missing, match="scores.json does not exist"):
        report.poster(tmp_path, tmp_path / "poster.png")


def test_the_mask_is_that_of_the_batch():
    a, e = fake.assets(), fake.assets().encode(make_episode(0))
    spec = fake.CONFIG.model.sequence
    planned = [plan(make_sample(e, t, sample_id=i), a.tokenizer, spec) for i, t in enumerate(("policy", "reason"))]
    size = {k: sum(p.size[k] for p in planned) for k in planned[0].size}
    bucket = tight_bucket(planned, 1, round_to=1)
    bucket = type(bucket)(rows=1, segments=2, **(size | {"und": size["und"] + 3}))
    batch = fill([planned], bucket, spec)
    m, u = layout.mask(batch, 0), bucket.und
    first = len(planned[0].ids)
    assert not m[:u, u:].any(), "und never sees gen"
    assert np.array_equal(m[:first, :first], np.tril(np.ones((first, first), bool)))
    assert m[u:, :first].all() and m[u:, u:].all() and not m[u:, first:u].any(), "gen sees its own sample only"
    assert not m[first:u, :first].any() and not m[u - 3 : u].any(), "samples do not mix; padding sees nothing"
    und, gen = layout.kinds(batch, 0)
    count = {n: int((np.concatenate([und, gen]) == i).sum()) for i, n in enumerate(layout.NAMES)}
    assert count["padding"] == 3 and count["action, noisy"] == 16 and count["visual features"] > 0
    assert count["vision, clean"] * 4 == count["vision, noisy"] and count["text that predicts the answer"] > 1


def test_charts_survive_odd_numbers():
    x = np.arange(5.0)
    assert "no points" in charts.chart("t", [charts.Line("a", x, np.full(5, np.nan))])
    drawn = charts.chart("t & u", [charts.Line("a", x, np.array([1, np.nan, np.inf, 0, 3.0]))], log=True)
    assert "t &amp; u" in drawn and "nan" not in drawn and "inf" not in drawn
    flat = charts.chart("flat", [charts.Line("a", x[:1], np.ones(1))], log=True)
    assert re.search(r'points="[\d.]+,[\d.]+"', flat)
    assert np.allclose(charts.smooth(np.ones(50)), 1)


def test_wrong_words_are_marked():
    assert html.compared("a red puck", "a blue puck") == "a <mark>red</mark> puck"
    assert html.compared("", "a") == "<mark>(nothing)</mark>"
    assert html.compared("<b>", "x") == "<mark>&lt;b&gt;</mark>"


def test_pictures(run, tmp_path):
    video = make_episode(0).video
    side = video.shape[1]
    with Image.open(io.BytesIO(report.grid([video, video[:1]]))) as image:
        assert image.size == (2 * 5 * side, 2 * 2 * (side + 2))
    report.poster(run, tmp_path / "poster.png")
    with Image.open(tmp_path / "poster.png") as image:
        assert image.size[0] > 1200 and image.size[1] > 600
