"""Requests of the task reason, from a checkpoint's folder to answer.txt: the tokens that transformers says (greedy).

Both layouts of a tiny random Nano and Edge; transformers loads either. Which ids and patches a conversation becomes is
compared bit for bit in tests/parity/test_preprocessing.py; here the reference gets ours.
"""

import functools
import json
import shutil

import numpy as np
import PIL.Image
import pytest
import torch
import transformers

from conversion import weights
from cosmos_jax import media
from cosmos_jax.__main__ import main
from cosmos_jax.config import PrecisionConfig
from cosmos_jax.inference.bundle import Bundle
from cosmos_jax.inference.job import How
from cosmos_jax.inference.requests import plan
from cosmos_jax.inference.run import Runner
from cosmos_jax.parity import prompts, tiny
from cosmos_jax.precision import resolve
from data_pipelines import request_file
from data_pipelines.video import Pixels

NEW = 16
PRECISION = resolve(PrecisionConfig(compute="float32"))
PENALTIES = dict(repetition_penalty=1.3, presence_penalty=0.7)  # without, a random model soon repeats one word
SIZES = {"wide.png": (16, 32), "tall.png": (32, 16), "large.png": (60, 90)}
LONG = "One hand lifts a table, a car turns around, the camera moves."  # questions of nearly one length compile once
TURNS = [
    {"role": "system", "content": "A small robot moves."},
    {"role": "user", "content": [{"type": "image", "image": "wide.png"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": "A car."},
    {"role": "user", "content": [{"type": "text", "text": "And?"}, {"type": "image", "image": "tall.png"}]},
]
QUESTIONS = {
    "words": {"prompt": "Is the cup near a table?"},
    "picture": {"prompt": f"What is in the image? {LONG}", "vision_path": "large.png"},
    "pictures": {"prompt": f"Compare both. {LONG}", "images": ["wide.png", "tall.png"]},
    "clip": {"prompt": "What moves?", "vision_path": "clip.mp4"},
    "turns": {"turns": TURNS},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(family, layout) → folder."""

    @functools.cache
    def make(family):
        return dict(
            zip(("diffusers", "transformers"), tiny.write(tmp_path_factory.mktemp(family), family), strict=True)
        )

    return lambda family, layout: make(family)[layout]


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A folder with pictures and a clip."""
    folder, rng = tmp_path_factory.mktemp("media"), np.random.RandomState(0)
    for name, size in SIZES.items():
        PIL.Image.fromarray(rng.randint(0, 255, (*size, 3), np.uint8)).save(folder / name)
    media.write_mp4(folder / "clip.mp4", rng.randint(0, 255, (11, 8, 24, 3), np.uint8), 4)
    return folder


def write(where, *names):
    """A request file beside the media, one question a line."""
    common = {"model_mode": "reasoner", "max_new_tokens": NEW} | PENALTIES
    lines = [common | {"name": name} | QUESTIONS[name] for name in names]
    file = where / "ask.jsonl"
    file.write_text("".join(json.dumps(x) + "\n" for x in lines))
    return file


def asked(folder, file):
    bundle = Bundle.open(folder)
    return bundle, [q for r in request_file.read(file) for q in plan(r, bundle, How(precision=PRECISION))]


@functools.lru_cache(maxsize=1)
def reference(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = next(model for of, model in tiny.KINDS.values() if of is type(config))
    return kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def prompt(q):
    """The question in the reference's words: images, then the clip."""
    pictures = [p for t in q.planned.sample.turns for p in t.parts if isinstance(p, Pixels)]
    return prompts.Prompt(q.planned.ids.astype(np.int64), tuple(prompts.Picture(p.grid, p.patches) for p in pictures))


def theirs(folder, q, repetition_penalty=1.0, presence_penalty=0.0):
    """New tokens of transformers' own `generate`."""
    model, told, n = reference(folder), prompts.torch_inputs(prompt(q)), len(q.planned.ids)
    how = dict(repetition_penalty=repetition_penalty, logits_processor=[Presence(n, presence_penalty)])
    return model.generate(**told, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **how)[0, n:].tolist()


class Presence(transformers.LogitsProcessor):
    """What transformers has no name for: `amount` less for every word of the answer so far."""

    def __init__(self, begin, amount):
        self.begin, self.amount = begin, amount

    def __call__(self, ids, scores):
        scores = scores.clone()
        scores[0, ids[0, self.begin :]] -= self.amount
        return scores


@pytest.mark.parametrize("layout", ["transformers", "diffusers"])
@pytest.mark.parametrize("family", ["nano", "edge"])
def test_answers_equal_transformers(family, layout, folders, shown):
    """Words, a picture, several, a clip, several turns."""
    folder = folders(family, layout)
    bundle, questions = asked(folder, write(shown, *QUESTIONS))
    params, said = bundle.load("reasoner", PRECISION, vision=True), {}
    for q in questions:
        said[q.name] = q.tokens(params).tolist()
        assert said[q.name] == theirs(folder, q, **PENALTIES), q.name
    assert {len(x) for x in said.values()} == {NEW}
    assert len({tuple(x) for x in said.values()}) == len(QUESTIONS), "what is shown changes the answer"
    words = transformers.AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": QUESTIONS["words"]["prompt"]}]
    want = words.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert questions[0].planned.ids.tolist() == want


def test_penalties_reach_the_decoder(folders, shown):
    """An answer that would be another without either of them."""
    folder = folders("nano", "transformers")
    bundle, (q,) = asked(folder, write(shown, "words"))
    ours = q.tokens(bundle.load("reasoner", PRECISION, vision=True)).tolist()
    assert ours == theirs(folder, q, **PENALTIES)
    assert ours not in [theirs(folder, q, **{k: v}) for k, v in PENALTIES.items()]


def test_an_answer_ends_where_generation_config_says(folders, shown, tmp_path):
    folder = shutil.copytree(folders("edge", "transformers"), tmp_path / "ends")
    _, (q,) = asked(folder, write(shown, "words"))
    whole = theirs(folder, q, **PENALTIES)
    last = next(i for i in range(3, NEW) if whole[i] not in whole[:i])
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [604, whole[last]]}))
    reference.cache_clear()
    bundle, (q,) = asked(folder, write(shown, "words"))
    assert q.tokens(bundle.load("reasoner", PRECISION)).tolist() == theirs(folder, q, **PENALTIES) == whole[: last + 1]
    assert bundle.ends == (606, 604, whole[last])
    (folder / "generation_config.json").unlink()
    assert Bundle.open(folder).ends == (606,)


def test_several_questions_are_answered_in_files(folders, shown, tmp_path):
    """answer.txt and run.json of each, an index over them."""
    folder = folders("nano", "diffusers")
    file = write(shown, "words", "picture")
    out = tmp_path / "out"
    assert main(["generate", f"--checkpoint={folder}", f"--request={file}", f"--out={out}", "--precision=float32"]) == 0
    assert {p.name for p in out.iterdir()} == {"words", "picture", "index.html"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for q in asked(folder, file)[1]:
        said = tokenizer.decode(theirs(folder, q, **PENALTIES), skip_special_tokens=True).strip()
        assert (out / q.name / "answer.txt").read_text() == said + "\n"
        run = json.loads((out / q.name / "run.json").read_text())
        assert set(run["files"]) == {"answer.txt"} and run["task"] == "reason" and run["tokens"] == len(q.planned.ids)
        assert run["max_new_tokens"] == NEW and "do_sample" in run["defaults"] and run["ends"] == [606, 604]
    assert run["media"]["vision_path"]["path"] == str(shown / "large.png")


@pytest.mark.parametrize(("name", "sees"), [("words", False), ("picture", True)])
def test_only_the_reasoner_is_read(name, sees, folders, shown, monkeypatch):
    """Not a number of the generator; the eye where something is shown."""
    read, piece = set(), weights.Merged.piece

    def reading(self, path, *rest):
        read.add(path[0] if path[0] != "layers" else path[1])
        return piece(self, path, *rest)

    monkeypatch.setattr(weights.Merged, "piece", reading)
    bundle, (q,) = asked(folders("nano", "diffusers"), write(shown, name))
    (made,) = Runner(bundle, How(precision=PRECISION)).run([q])
    assert made.text and made.video is None
    assert read == {"embed_tokens", "und", "norm_und", "lm_head"} | ({"vit"} if sees else set())


def test_words_need_no_eyes(folders, shown, tmp_path):
    """A folder without preprocessor files, and with its tokenizer in text_tokenizer/ alone, still answers in words."""
    folder = shutil.copytree(folders("nano", "diffusers"), tmp_path / "bare")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json"):
        (folder / name).unlink()
    bundle, (q,) = asked(folder, write(shown, "words"))
    assert not q.sees and bundle.frontend.eyes is None
    _, (whole,) = asked(folders("nano", "diffusers"), write(shown, "words"))
    np.testing.assert_array_equal(q.planned.ids, whole.planned.ids)
    with pytest.raises(ValueError, match=r"bare lacks preprocessor_config.json, which says how pictures are prepared"):
        asked(folder, write(shown, "picture"))
    with pytest.raises(ValueError, match=r"this frontend has no eyes"):
        bundle.frontend.sample([{"role": "user", "content": [{"type": "image", "image": shown / "wide.png"}]}], None)
    shutil.rmtree(folder / "vision_encoder")
    with pytest.raises(ValueError, match=r"vision_path is given, but bare has no eyes; ask in words alone"):
        asked(folder, write(shown, "picture"))
