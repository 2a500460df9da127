"""Configs: files become typed settings, overrides are checked, a slip of the finger meets the nearest name."""

import dataclasses
import json
import pathlib

import jax
import pytest

from cosmos_jax.cli.options import parse, read_config
from cosmos_jax.config import Config, ConfigError, SampleConfig, from_dict, to_dict
from cosmos_jax.model import cosmos
from cosmos_jax.pipeline import Pipeline
from cosmos_jax.report.examples import EXAMPLES
from data_pipelines.tasks import INDEX

ROOT = pathlib.Path(__file__).resolve().parents[2]
FILES = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base"))


def read(name, **overrides):
    return read_config(str(ROOT / "configs" / f"{name}.py"), [(k.replace("__", "."), v) for k, v in overrides.items()])


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_a_config_that_survives_json(name):
    config = read(name)
    assert isinstance(config, Config)
    assert hash(config) == hash(read(name))
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert {t for t, _ in config.data.mixture} <= set(INDEX)


@pytest.mark.parametrize(
    ("name", "count"), [("nano", 15_173_669_120), ("super", 64_019_736_832), ("edge", 3_369_657_024)]
)
def test_released_models_have_their_parameters(name, count):
    model = dataclasses.replace(read(name).model, vision=None)
    assert sum(x.size for x in jax.tree.leaves(cosmos.abstract(model))) == count


def test_the_toy_trains_every_task_that_the_report_shows():
    assert {t for t, share in read("toy").data.mixture if share > 0} == set(EXAMPLES)


def test_overrides_of_every_kind():
    config = read(
        "toy", model__layers="2", optim__lr="1e-4", flow__shift_video="3", model__rope_sections="(4,6,6)",
        data__mixture__reason="9", data__bucket__rows="2", optim__frozen="('vit',)", train__tensorboard="False",
        model__vision__layers="1", sample__solver="euler",
    )  # fmt: skip
    assert (config.model.layers, config.optim.lr, config.flow.shift_video) == (2, 1e-4, 3.0)
    assert config.model.rope_sections == (4, 6, 6)
    assert dict(config.data.mixture)["reason"] == 9.0 and len(config.data.mixture) == len(EXAMPLES)
    assert config.data.bucket.rows == 2 and config.model.vision.layers == 1
    assert config.optim.frozen == ("vit",) and config.train.tensorboard is False and config.sample.solver == "euler"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"modle__layers": "3"}, r"config\.modle is not a setting \(did you mean 'model'\?\)"),
        ({"model__layrs": "3"}, r"config\.model\.layrs is not a setting \(did you mean 'layers'\?\)"),
        ({"model__layers": "three"}, r"config\.model\.layers must be int, got 'three'"),
        ({"model__layers": "3.5"}, r"config\.model\.layers must be int"),
        ({"model__layers__x": "3"}, r"config\.model\.layers is 4, not a group"),
        ({"model__rope_sections": "(6,6,6)"}, r"rope_sections=\(6, 6, 6\) must sum to head_dim/2 = 16"),
        ({"model__rope_sections": "(8,8)"}, r"needs 3 values, got 2"),
        ({"sample__solver": "unipcc"}, r"did you mean 'unipc'"),
    ],
)
def test_a_wrong_setting_is_one_sentence(overrides, says):
    with pytest.raises(ConfigError, match=says):
        read("toy", **overrides)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("trian --config=x", "did you mean 'train'"),
        ("--config=x", "name a command first"),
        ("generate --promt=x", "did you mean '--prompt'"),
        ("train --prompt=x", "train has no option '--prompt'"),
        ("generate --seed=x", "--seed: invalid int value: 'x'"),
    ],
)
def test_wrong_words_are_one_sentence(words, says):
    with pytest.raises(ConfigError, match=says):
        parse(words.split())


def test_overrides_may_be_written_with_a_space():
    options = parse("train --config c.py --config.a.b 3 --config.c=4".split())
    assert options.config == "c.py" and options.overrides == [("a.b", "3"), ("c", "4")]


def test_a_missing_file_names_the_nearest():
    with pytest.raises(ConfigError, match=r"tou\.py does not exist \(did you mean '.*toy\.py'"):
        read("tou")


def test_a_task_may_have_its_own_sampling_settings():
    sample = SampleConfig(steps=16, shift=5.0, guidance=3.0, steps_of=(("policy", 4),), shift_of=(("policy", 20.0),))
    pipeline = Pipeline(dataclasses.replace(read("toy"), sample=sample), {}, None)
    own, general = pipeline.settings("policy"), pipeline.settings("text2video")
    assert (own["steps"], own["shift"], own["guidance"]) == (4, 20.0, 1.0)
    assert (general["steps"], general["shift"], general["guidance"]) == (16, 5.0, 3.0)
    assert pipeline.settings("policy", steps=8)["steps"] == 8
    with pytest.raises(ConfigError, match="sample.steps_of='polcy' .*did you mean 'policy'"):
        SampleConfig(steps_of=(("polcy", 4),))
