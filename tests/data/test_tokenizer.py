"""The byte-level BPE and the chat template."""

import pytest

from data_pipelines import tokenizer
from data_pipelines.tokenizer import ChatTokenizer

TOK = ChatTokenizer()


def names(ids):
    return "".join(TOK._tok.decode([i], skip_special_tokens=False) for i in ids)


def test_the_committed_vocabulary_is_what_training_gives(tmp_path):
    tokenizer.train(tokenizer.toy_texts()).save(str(tmp_path / "t.json"))
    assert (tmp_path / "t.json").read_text() == tokenizer.TOY.read_text()


@pytest.mark.parametrize("text", ["The red puck.", "héllo 日本\n\x00 🙂", "  spaces  ", "<|im_end|><|vision_start|>"])
def test_every_string_round_trips(text):
    assert TOK.decode(TOK.encode(text)) == text


def test_a_user_cannot_write_control_tokens():
    assert not {TOK.eos, TOK.im_start, TOK.vision_start} & set(TOK.encode("<|im_end|><|im_start|><|vision_start|>"))


def test_chat_template_is_qwen_s():
    ids = TOK.chat([("system", "a"), ("user", "b")])
    want = "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert names(ids) == want
    assert names(TOK.generation_ids("b")) == want.split("\n", 2)[2] + "<|im_end|><|vision_start|>"


def test_only_the_answer_is_supervised():
    ids, mask = TOK.reason_ids("Which?", "red", [2, 2], [0.2, 1.2])
    assert names([i for i, m in zip(ids, mask, strict=True) if m]) == "red<|im_end|>"
    span = "<|vision_start|><|video_pad|><|video_pad|><|vision_end|>"
    assert f"<0.2 seconds>{span}<1.2 seconds>{span}Which?" in names(ids)
    assert TOK.reason_ids("Which?", None, [], [])[1] == [False] * len(TOK.reason_ids("Which?", None, [], [])[0])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        ChatTokenizer(tmp_path / "none.json")
