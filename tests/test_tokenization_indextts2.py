"""Pieces, ids and segments equal the original's; the tokenizer is a well-behaved one of transformers."""

import copy
import json
import pickle
import random
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizer

from indextts2_hf import embedded_checkpoint
from indextts2_hf.tokenization_indextts2 import (
    SENTENCE_ENDS,
    IndexTTS2Tokenizer,
    pre_tokenize_cjk,
    split_pieces,
    split_sentences,
)


TEXT_ASSETS = Path(__file__).parent / "assets/parity/text"
GOLDEN = json.loads((TEXT_ASSETS / "text_cases.json").read_text(encoding="utf-8"))["cases"]


@pytest.fixture(scope="module")
def tokenizer():
    return IndexTTS2Tokenizer(str(TEXT_ASSETS / "bpe.model"))


@pytest.fixture(scope="module")
def english():
    return IndexTTS2Tokenizer.from_pretrained(embedded_checkpoint())


@pytest.fixture
def wetext():
    return pytest.importorskip("wetext")


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["text"][:20])
def test_golden_cases(case, tokenizer, wetext):
    text = case["text"]
    assert tokenizer.tokenize(text) == case["pieces"]
    assert tokenizer(text)["input_ids"] == case["ids"]
    for max_text_tokens, segments in case["segments"].items():
        assert split_pieces(tokenizer.tokenize(text), int(max_text_tokens)) == segments
    assert split_pieces(tokenizer.tokenize(text), 40, quick_streaming_tokens=10) == case["segments_quick_10_max_40"]
    if case is not GOLDEN[-1]:  # for the long case the file does not hold the count
        assert tokenizer(text)["input_ids"].count(tokenizer.unk_token_id) == case["unk"]


def test_pre_tokenize_cjk():
    assert pre_tokenize_cjk("  \u4f60\u597d, world  ok\u3042\uc548\U00020000 ") == (
        "\u4f60 \u597d , WORLD  OK \u3042 \uc548 \U00020000"
    )
    assert pre_tokenize_cjk("  ") == ""


def split_recursively(pieces, cuts, size):
    """The original's procedure, word for word of the specification."""
    parts, current = [], []
    for index, piece in enumerate(pieces):
        current.append(piece)
        if not cuts & {",", "\u2581,"} and {",", "\u2581,"} & set(current):
            parts += split_recursively(current, {",", "\u2581,"}, size)
        elif "-" not in cuts and "-" in current:
            parts += split_recursively(current, {"-"}, size)
        elif len(current) <= size:
            if piece not in cuts or len(current) <= 2:
                continue
            if pieces[index + 1 : index + 2] in (["'"], ["\u2581'"]):
                current.append(pieces[index + 1])
            parts.append(current)
        else:
            parts += [current[start : start + size] for start in range(0, len(current), size)]
        current = []
    return parts + [current] * bool(current)


def merge(parts, size, quick):
    segments, total = [], 0
    for part in parts:
        total += len(part)
        if segments and ((len(segments[-1] + part) <= size and total > quick) or len(segments[-1] + part) <= size / 2):
            segments[-1] = segments[-1] + part
        else:
            segments.append(part)
    return segments


def test_splitting_equals_the_recursive_procedure():
    generator = random.Random(0)
    alphabet = [
        "\u2581a",
        "b",
        "c",
        "d",
        ".",
        "!",
        "?",
        "\u2581.",
        "\u2581?",
        "\u2581!",
        "\u2581...",
        ",",
        "\u2581,",
        "-",
        "'",
        "\u2581'",
    ]
    for _ in range(2000):
        pieces = generator.choices(alphabet, k=generator.randrange(60))
        size, quick = generator.randrange(1, 25), generator.choice([0, 0, 5, 20])
        expected = merge(split_recursively(pieces, SENTENCE_ENDS, size), size, quick)
        assert split_pieces(pieces, size, quick) == expected


def test_a_quote_after_the_end_of_a_sentence_is_said_twice():
    assert split_pieces(["a", "b", ".", "'", "c", "d"], max_text_tokens=4) == [["a", "b", ".", "'"], ["'", "c", "d"]]


def test_the_first_segments_are_short_in_quick_streaming():
    pieces = ["a", "b", "c", "."] * 6
    assert [len(segment) for segment in split_pieces(pieces, 12)] == [12, 12]
    assert [len(segment) for segment in split_pieces(pieces, 12, quick_streaming_tokens=8)] == [4, 12, 8]
    assert [len(segment) for segment in split_pieces(pieces, 12, quick_streaming_tokens=16)] == [4, 4, 4, 12]


def test_splitting_leaves_its_input_alone_and_warns_of_cuts(caplog):
    pieces = ["a"] * 10
    assert split_pieces(pieces, 4) == [["a"] * 4, ["a"], ["a"] * 4, ["a"]]
    assert pieces == ["a"] * 10
    assert "2 x cut inside a sentence" in caplog.text
    with pytest.raises(ValueError, match="`max_text_tokens` is 0, but a segment holds at least 1"):
        split_pieces(pieces, 0)


@pytest.mark.parametrize(
    "part", ["so it is. ", "a", "\u597d", "\u597d\uff0c", "\u597d\u3002\u201d", "\u597d-", "xuan4\u8bf4"]
)
def test_a_hundred_thousand_characters(part, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "wetext", None)  # the engine, where it runs, takes 10 to 20 s and is not ours
    start = time.monotonic()
    segments = tokenizer.split_text((part * 100_000)[:100_000])
    assert time.monotonic() - start < 20  # about 1 s; a quadratic step takes minutes
    assert max(map(len, segments)) <= 121


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_blank_text(text, tokenizer):
    with pytest.raises(ValueError, match="nothing in it to speak. Give at least one word"):
        tokenizer.split_text(text)
    assert tokenizer(text)["input_ids"] == []


def test_unknown_characters(tokenizer, caplog):
    segments = tokenizer.split_text("Hello \U0001f98e there")
    assert tokenizer.unk_token_id in tokenizer.convert_tokens_to_ids(segments[0])
    tokenizer.split_text("Hello \U0001f98e there")
    assert caplog.text.count("Characters that the vocabulary lacks cannot be spoken: '\U0001f98e'") == 1


@pytest.mark.parametrize("text", ["\U0001f600", "\U0001f600 \U0001f601!"])
def test_nothing_but_unknown_characters(text, tokenizer):
    with pytest.raises(ValueError, match="only characters that the vocabulary lacks .* Write it in"):
        tokenizer.split_text(text)
    assert tokenizer.unk_token_id in tokenizer(text)["input_ids"]


def test_what_is_not_text(tokenizer):
    with pytest.raises(TypeError, match="must be a string"):
        tokenizer.split_text(["a", "b"])
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        tokenizer.split_text("a \ud83d b")


def test_text_needs_the_engine(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "wetext", None)
    assert tokenizer.split_text("Hello there.") == [tokenizer.tokenize("Hello there.")]
    with pytest.raises(ImportError, match="indextts2-hf"):
        tokenizer.split_text("I have 20 cats.")


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("2024", "TWENTY TWENTY FOUR"),
        ("3:30", "THREE THIRTY"),
        ("$19.99", "NINETEEN POINT NINE NINE DOLLARS"),
        ("50%", "FIFTY PERCENT"),
        ("XING2 is a syllable", "XING TWO IS A SYLLABLE"),
    ],
)
def test_where_the_vocabulary_is_english_every_text_is(text, spoken, tokenizer, wetext):
    english = IndexTTS2Tokenizer.from_pretrained(embedded_checkpoint())
    [segment] = english.split_text(text)
    assert english.convert_tokens_to_string(segment).replace(" AND", "") == spoken
    assert english.unk_token_id not in english.convert_tokens_to_ids(segment)
    assert tokenizer.normalizer(text) != english.normalizer(text)  # this vocabulary has Chinese characters


def test_one_character_is_looked_up_as_it_is(tokenizer):
    assert tokenizer.tokenize(" A ") == ["\u2581A"]
    assert tokenizer(" a ")["input_ids"][-1] == tokenizer.unk_token_id


def words_of(segments):
    return [" ".join("".join(segment).replace("\u2581", " ").split()) for segment in segments]


def test_segments_end_with_sentences_else_clauses_else_words():
    sentence = ["\u2581a", "b", "\u2581c", ",", "\u2581d", "\u2581e", "."]
    assert split_sentences(sentence * 2, 7) == [sentence, sentence]
    assert split_sentences(sentence * 2, 14) == [sentence * 2]
    assert split_sentences(sentence * 2, 6) == [sentence[:4], sentence[4:], sentence[:4], sentence[4:]]
    assert words_of(split_sentences(sentence, 3)) == ["ab", "c,", "d e."]
    assert split_sentences([], 3) == []
    with pytest.raises(ValueError, match="`max_text_tokens` is 0, but a segment holds at least 1"):
        split_sentences(sentence, 0)


def test_no_word_is_cut(english, caplog):
    text = " ".join(["unimaginable", "responsibilities", "of", "international", "cooperation"] * 30)
    segments = english.split_text(text)
    assert len(segments) > 1 and max(map(len, segments)) <= 120
    assert all(segment[0].startswith("\u2581") for segment in segments)
    assert " ".join(words_of(segments)) == text.upper()
    assert "is cut" not in caplog.text
    [*parts] = english.split_text("a" * 300, 50)
    assert max(map(len, parts)) <= 50 and "".join(words_of(parts)) == "A" * 300
    assert "is cut" in caplog.text


def test_segments_joined_are_the_pieces():
    generator = random.Random(0)
    alphabet = ["\u2581a", "\u2581bc", "d", "e", ".", "!", "\u2581.", ",", "\u2581,", "-", "'"]
    for _ in range(1000):
        pieces = generator.choices(alphabet, k=generator.randrange(60))
        size, quick = generator.randrange(1, 25), generator.choice([0, 0, 5, 20])
        segments = split_sentences(pieces, size, quick)
        assert [piece for segment in segments for piece in segment] == pieces
        assert all(0 < len(segment) <= size for segment in segments)


def test_special_tokens(tokenizer):
    assert isinstance(tokenizer, PreTrainedTokenizer)
    assert len(tokenizer) == tokenizer.vocab_size == len(tokenizer.get_vocab())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 1)
    assert tokenizer.unk_token_id == 2
    ids = tokenizer("a </s> <s> b <unk>")["input_ids"]  # written in a text they are text
    assert not {0, 1} & set(ids)
    assert tokenizer.num_special_tokens_to_add() == 0


def test_batch_is_padded_on_the_left(tokenizer):
    texts = ["Hello there.", "\u4f60\u597d", "A"]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 5)
    assert batch["input_ids"].dtype == torch.int64
    for text, row, mask in zip(texts, batch["input_ids"], batch["attention_mask"], strict=True):
        ids = tokenizer(text)["input_ids"]
        assert row.tolist() == [1] * (5 - len(ids)) + ids
        assert mask.tolist() == [0] * (5 - len(ids)) + [1] * len(ids)


def test_decode_is_readable(tokenizer):
    ids = tokenizer("\u6211\u8bf4hello world, \u4f60\u597d.")["input_ids"]
    assert tokenizer.decode(ids) == "\u6211\u8bf4HELLO WORLD,\u4f60\u597d."
    assert tokenizer.decode([1, 1, *ids], skip_special_tokens=True) == tokenizer.decode(ids)


def test_do_normalize(tokenizer):
    plain = IndexTTS2Tokenizer(str(TEXT_ASSETS / "bpe.model"), do_normalize=False)
    assert plain.tokenize("It's so.") == tokenizer.sp_model.encode("IT'S SO.", out_type=str)
    assert tokenizer.tokenize("It's so.") == tokenizer.sp_model.encode("IT IS SO.", out_type=str)


def test_save_and_load(tokenizer, tmp_path):
    glossary = {"TTS": "T T S", "C++": {"en": "C plus plus", "zh": "C \u52a0\u52a0"}}
    original = tmp_path / "original"
    original.mkdir()
    shutil.copy(TEXT_ASSETS / "bpe.model", original)
    saved = IndexTTS2Tokenizer(str(original / "bpe.model"), glossary=glossary, do_normalize=True)
    shutil.rmtree(original)  # the vocabulary is then written from memory
    saved.save_pretrained(tmp_path / "first")
    config = json.loads((tmp_path / "first/tokenizer_config.json").read_text())
    assert config["glossary"] == glossary and config["do_normalize"] is True
    assert (tmp_path / "first/bpe.model").read_bytes() == (TEXT_ASSETS / "bpe.model").read_bytes()

    loaded = IndexTTS2Tokenizer.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    for other in (loaded, AutoTokenizer.from_pretrained(tmp_path / "second")):
        assert type(other) is IndexTTS2Tokenizer
        assert other.normalizer.glossary == glossary and other.padding_side == "left"
        assert other("Use TTS in C++.")["input_ids"] == saved("Use TTS in C++.")["input_ids"]
        assert other("Use TTS.")["input_ids"] != tokenizer("Use TTS.")["input_ids"]


def test_pickle_and_copy(tokenizer):
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        assert other("Hello \u4f60\u597d.") == tokenizer("Hello \u4f60\u597d.")
        assert other.pad_token_id == 1


def test_bad_vocabulary(tmp_path):
    with pytest.raises(ValueError, match="needs the path of a SentencePiece model.*bpe.model"):
        IndexTTS2Tokenizer(str(tmp_path / "missing.model"))
    with pytest.raises(ValueError, match=r"has no \[PAD\], and the model has no place"):
        IndexTTS2Tokenizer(str(TEXT_ASSETS / "bpe.model"), pad_token="[PAD]")
