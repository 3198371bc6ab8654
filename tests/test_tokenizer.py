"""Prompts become the ids that Wan's own tokenizer class makes of them; the small model's knows its words."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden.seeded import GOLDEN

import turbojax
from turbojax.errors import UserError
from turbojax.tokenizer import Tokenizer, clean, train_tiny_tokenizer
from turbojax.train import data

CASES = json.loads((GOLDEN / "tokenizer_cases.json").read_text())
TINY = Path(turbojax.__file__).parent / "tiny" / "tokenizer"
CAPTIONS = [
    template.format(colour=colour, shape=shape, motion=motion)
    for template, _ in data.TEMPLATES
    for colour, shape, motion in data.COMBINATIONS
]


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda case: case["text"][:12])
def test_equals_wans_tokenizer(case):
    tokenizer = Tokenizer.load(GOLDEN / "tokenizer.json", CASES["text_len"])
    assert clean(case["text"]) == case["clean"]
    ids, mask = tokenizer(case["text"])
    assert ids.dtype == mask.dtype == np.int32
    assert ids[0].tolist() == case["ids"]
    assert mask[0].tolist() == case["mask"]


def test_batches_are_their_rows():
    tokenizer = Tokenizer.load(GOLDEN / "tokenizer.json", CASES["text_len"])
    ids, mask = tokenizer([case["text"] for case in CASES["cases"]])
    assert ids.tolist() == [case["ids"] for case in CASES["cases"]]
    assert mask.tolist() == [case["mask"] for case in CASES["cases"]]


def test_shipped_tokenizer_has_every_word_of_the_captions():
    shipped = Tokenizer.load(TINY, 32)
    rebuilt = train_tiny_tokenizer(CAPTIONS)
    assert json.loads(shipped.backend.to_str()) == json.loads(rebuilt.backend.to_str())
    assert (shipped.pad_id, shipped.eos_id, shipped.backend.token_to_id("<unk>")) == (0, 1, 2)
    assert shipped.vocab_size <= 128
    ids, mask = shipped(CAPTIONS)
    assert not (ids == 2).any()
    assert len({tuple(row) for row in ids}) == len(set(CAPTIONS))
    assert (ids[np.arange(len(ids)), mask.sum(1) - 1] == 1).all()


def test_tiny_tokenizer_ignores_case_and_punctuation_and_names_unknown_words():
    shipped = Tokenizer.load(TINY, 32)
    plain, _ = shipped("a red circle moving right")
    np.testing.assert_array_equal(shipped("  A Red, circle -- moving RIGHT!")[0], plain)
    ids, mask = shipped("a crimson circle moving north")
    assert (ids == 2).sum() == 2
    assert mask.sum() == 6
    assert shipped.unknown("a crimson circle moving North") == ["crimson", "North"]
    assert shipped.unknown("a red circle") == []


def test_words_added_later_leave_the_ids_of_the_others():
    before = train_tiny_tokenizer(["a red circle"]).backend.get_vocab()
    after = train_tiny_tokenizer(["a red circle", "a blue star"]).backend.get_vocab()
    assert before.items() <= after.items()


def test_save_and_load_round_trip(tmp_path):
    tokenizer = train_tiny_tokenizer(["a red circle"], text_len=6)
    tokenizer.save(tmp_path / "tok")
    assert [p.name for p in (tmp_path / "tok").iterdir()] == ["tokenizer.json"]
    again = Tokenizer.load(tmp_path / "tok", 6)
    np.testing.assert_array_equal(again("circle red")[0], tokenizer("circle red")[0])


def test_errors_name_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer at .*tokenizer.json: name a tokenizer.json or the folder"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        Tokenizer.load(tmp_path)
    import tokenizers

    with pytest.raises(UserError, match="has no <pad> token"):
        Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(UserError, match="text_len must be at least 1"):
        train_tiny_tokenizer(["a"], text_len=0)
