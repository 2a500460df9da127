"""Names and widths of bodies against diffusers' tables; statistics files and what is refused, by hand."""

import json

import numpy as np
import pytest
from diffusers.pipelines.cosmos import pipeline_cosmos3_omni as released

from data_pipelines import action
from data_pipelines.action import ActionStats
from data_pipelines.embodiments import TABLE, embodiment, prepare, read_actions, statistics, width

Q01, Q99 = [-0.1, -2.0, 0.0], [0.3, 2.0, 0.0]  # the last channel never moves
BLOCK = {"mean": [0.0, 1.0, 5.0], "std": [0.5, 2.0, 0.0], "min": [-1.0, -4.0, 0.0], "max": [0.5, 4.0, 1.0]}
RAW = np.array([[-0.1, -2.0, 0.0], [0.3, 2.0, 0.0], [0.1, 1.0, 0.0]], np.float32)


@pytest.fixture
def flat(tmp_path):
    """As most of the framework's statistics files: quantiles only."""
    path = tmp_path / "flat.json"
    path.write_text(json.dumps({"q01": Q01, "q99": Q99}))
    return path


@pytest.fixture
def blocks(tmp_path):
    """As LIBERO's: rotations untouched in global, measured in global_raw."""
    path = tmp_path / "blocks.json"
    raw = BLOCK | {"q01": Q01, "q99": Q99}
    path.write_text(json.dumps({"metadata": {"n": 3}, "global": raw | {"q99": [1.1, 1, 1]}, "global_raw": raw}))
    return path


def test_domains_equal_diffusers():
    for name, domain in released._EMBODIMENT_TO_DOMAIN_ID.items():
        body, theirs = embodiment(name), released._EMBODIMENT_TO_RAW_ACTION_DIM.get(name)
        assert body.domain == domain
        if name == "hand_pose":  # diffusers fixes a width that the framework leaves to the dataset
            assert width(body, theirs) == 57 and body.width is None
        else:
            assert body.width == theirs
    assert embodiment(" Bridge_Orig_LeRobot ").domain == 7
    newer = {"xdof_yam": (16, 20), "robotwin": (17, 14), "drawanything": (21, 3), "behavior1k_lerobot": (22, 23)}
    assert {n: TABLE[n][1:3] for n in newer} == newer
    assert width(embodiment("droid_lerobot"), 8) == 8
    assert [width(embodiment("libero"), n) for n in (7, 10, 13)] == [7, 10, 13]


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: embodiment("brige_orig_lerobot"), "did you mean 'bridge_orig_lerobot'"),
        (lambda: embodiment(""), "is not known; the domains are"),
        (lambda: width(embodiment("libero")), "libero actions have 7 or 10 or 13 channels, by dataset"),
        (lambda: width(embodiment("hand_pose")), "hand_pose actions have 1 to 64 channels, by dataset"),
        (lambda: width(embodiment("no_action"), 10), "no_action has no actions"),
        (lambda: width(embodiment("av"), 10), "av actions have 9 channels, not 10"),
        (lambda: width(embodiment("hand_pose"), 65), "not 65"),
        (lambda: prepare(np.zeros((4, 3)), embodiment("pusht"), 4), "pusht actions have 2 channels, not 3"),
        (lambda: prepare(np.zeros((4, 2)), embodiment("pusht"), 5), "4 action rows, but action_chunk_size is 5"),
        (lambda: prepare(np.zeros(4), embodiment("pusht"), 4), "must be rows of channels"),
        (lambda: prepare(np.zeros((0, 2)), embodiment("pusht"), 4), "must be rows of channels"),
        (lambda: prepare(np.full((4, 2), np.nan), embodiment("pusht"), 4), "NaN"),
        (lambda: prepare(np.full((4, 2), 200.0), embodiment("pusht"), 4), "reach 200.0.*within 5"),
    ],
)
def test_what_does_not_fit_a_body_is_one_sentence(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_methods_normalise_as_written(flat, blocks):
    """The framework's formulas, a method at a time, on numbers whose results are plain."""
    np.testing.assert_allclose(ActionStats.load(flat).normalise(RAW), [[-1, -1, 0], [1, 1, 0], [0, 0.5, 0]], atol=1e-6)
    assert ActionStats.load(flat).lo == tuple(np.float32(Q01).tolist())

    def say(method, raw):
        return ActionStats.load(blocks, method).normalise(np.asarray([raw], np.float32))[0]

    np.testing.assert_allclose(say("quantile", (0.5, 1, 0.5)), [0, 1, 0], atol=1e-6)  # global
    np.testing.assert_allclose(say("quantile_rot", (0.5, 1, 0.0)), [2, 0.5, 0], atol=1e-6)  # global_raw
    np.testing.assert_allclose(say("minmax", (0.5, 1, 1)), [1, 0.25, 1], atol=1e-6)
    np.testing.assert_allclose(say("meanstd", (1.0, 2, 5)), [2, 0.5, 0], atol=1e-6)
    # reach: max |extreme − middle| / 5 = 1.1/5, 4/5, 1/5 against half widths 0.2, 2, 0
    np.testing.assert_allclose(say("quantile_rot_scale_floor", (-1, 1, 1)), [-5, 0.5, 5], atol=1e-5)
    unit = np.arcsinh(1)
    np.testing.assert_allclose(say("asinh_rot", (0.3, -8, 0)), [1, -np.arcsinh(4) / unit, 0], atol=1e-6)
    np.testing.assert_allclose(say("piecewise_asinh_rot", (0.2, -8, 0)), [0.5, -1 - np.arcsinh(3), 0], atol=1e-6)


@pytest.mark.parametrize("method", action.METHODS)
def test_denormalise_is_the_inverse(method, blocks):
    stats = ActionStats.load(blocks, method)
    lo, hi = np.asarray(stats.lo), np.asarray(stats.hi)
    raw = ((lo + hi) / 2 + (hi - lo) * np.random.default_rng(0).uniform(-2, 2, (50, 3))).astype(np.float32)
    np.testing.assert_allclose(stats.denormalise(stats.normalise(raw)), raw, rtol=0, atol=2e-5)


def test_clamp_cuts_and_the_limit_refuses(flat):
    far = RAW * np.float32([1, 4, 1])
    assert ActionStats.load(flat).normalise(far).max() == 4
    np.testing.assert_array_equal(ActionStats.load(flat, clamp=True).normalise(far * 100)[0, :2], [-1, -1])
    with pytest.raises(ValueError, match="reach 400.0 after normalising .limit 5"):
        ActionStats.load(flat).normalise(far * 100)


def test_normalising_twice_is_refused(tmp_path):
    """Quantiles as narrow as DROID's rotations: normalised values are no raw ones."""
    path = tmp_path / "s.json"
    path.write_text(json.dumps({"q01": [-0.015, 0.998], "q99": [0.015, 1.0]}))
    stats = statistics(path, embodiment("pusht"))
    once, record = prepare(np.float32([[0.01, 0.9985]]), embodiment("pusht"), 1, stats)
    with pytest.raises(ValueError, match="these statistics do not belong"):
        prepare(once, embodiment("pusht"), 1, stats)
    assert record["statistics"]["source"].startswith("s.json sha256:")
    assert json.loads(json.dumps(record))["statistics"]["limit"] == 5.0
    assert record["domain"] == 4 and record["width"] == 2


def test_rows_are_repeated_or_cut_as_in_diffusers():
    raw = np.arange(6, dtype=np.float32).reshape(3, 2) / 10
    body = embodiment("pusht")
    longer, record = prepare(raw, body, 5, convention="diffusers")
    np.testing.assert_array_equal(longer, raw[[0, 1, 2, 2, 2]])
    np.testing.assert_array_equal(prepare(raw, body, 2, convention="diffusers")[0], raw[:2])
    np.testing.assert_array_equal(prepare(raw, body, 3)[0], raw)
    assert record["statistics"] is None  # taken as they are


def test_umi_takes_the_first_arm(tmp_path):
    path = tmp_path / "umi.json"
    path.write_text(json.dumps({"q01": list(range(-20, 0)), "q99": list(range(20))}))
    assert statistics(path, embodiment("umi")).hi == tuple(range(10))
    with pytest.raises(ValueError, match="bridge_orig_lerobot actions have 10 channels, not 20"):
        statistics(path, embodiment("bridge_orig_lerobot"))


@pytest.mark.parametrize(
    "text, words",
    [
        ("[1, 2]", "no list of numbers 'q01'"),
        ("{", "are not JSON"),
        ("[" * 99_999, "are not JSON"),
        ('{"q01": [0]}', "no list of numbers 'q99'"),
        ('{"q01": [0], "q99": [NaN]}', "no list of numbers 'q99'"),
        ('{"q01": [0], "q99": ["1"]}', "no list of numbers 'q99'"),
        ('{"q01": [0], "q99": [1, 2]}', "differ in length"),
        ('{"q01": [0, 1], "q99": [1, 0]}', "channel 1 ends before it begins"),
        ('{"q01": [0], "q99": [1], "floor": 0}', "floor must be a positive number"),
        ('{"global": 3}', "no list of numbers 'q01'"),
    ],
)
def test_bad_statistics_are_one_sentence(text, words, tmp_path):
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        ActionStats.load(path)


def test_missing_or_unknown_statistics(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ValueError, match="do not exist"):
            ActionStats.load(path)
    with pytest.raises(ValueError, match="'median' is not known"):
        ActionStats.load(tmp_path, "median")


def test_action_files(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[[1, 2.5], [3, -4]]")
    np.testing.assert_array_equal(read_actions(path), np.float32([[1, 2.5], [3, -4]]))
    path.write_text('{"fps": 5, "actions": [[1, 2.5], [3, -4]]}')  # as `generate` writes them
    np.testing.assert_array_equal(read_actions(path), np.float32([[1, 2.5], [3, -4]]))
    with pytest.raises(ValueError, match="cannot be read"):
        read_actions(tmp_path / "none.json")
    for text in ("[]", "{}", "[[]]", "[[1], [1, 2]]", '[["x"]]', "[[NaN]]", "[[true]]", "[1]", "[[1e99]]"):
        path.write_text(text)
        with pytest.raises(ValueError, match="must be a list of rows of numbers"):
            read_actions(path)
    path.write_text("[[1")
    with pytest.raises(ValueError, match="is not JSON"):
        read_actions(path)
