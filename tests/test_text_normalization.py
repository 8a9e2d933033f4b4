"""The normaliser gives what the original gives, loses no text, and does without its engine where that changes nothing."""

import copy
import json
import pickle
import sys
import time
from pathlib import Path

import pytest

from indextts2_hf import text_normalization
from indextts2_hf.text_normalization import TextNormalizer, uses_chinese_rules


GOLDEN = json.loads((Path(__file__).parent / "assets/parity/text/text_cases.json").read_text(encoding="utf-8"))
PLAIN_TEXTS = [
    "Hello there.",
    "It's what's new: a so-called mother-in-law, isn't it? Yes! (Well) \u2026 \u201cfine\u201d \u2014 caf\u00e9; NASA.",
    "He had a <minute|M IH1 . N AH0 T> left.",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u7ea6\u745f\u592b\u00b7\u9ad8\u767b\u8bf4\uff1aju4 XUAN4\uff01",
    "  Hello \n",
]


@pytest.fixture
def no_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "wetext", None)  # importing it fails, as where it is not installed


@pytest.fixture
def wetext():
    return pytest.importorskip("wetext")


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["text"][:20])
def test_golden_cases(case, wetext):
    assert uses_chinese_rules(case["text"]) is case["uses_chinese_rules"]
    assert TextNormalizer()(case["text"]) == case["normalized"]


@pytest.mark.parametrize("case", GOLDEN["glossary_cases"], ids=lambda case: case["text"][:20])
def test_golden_glossary(case, wetext):
    assert TextNormalizer(GOLDEN["glossary"])(case["text"]) == case["normalized"]


@pytest.mark.parametrize(
    ("text", "chinese"),
    [
        ("a pinyin XING2 here", True),
        ("F5-TTS", False),  # no final
        ("an XING6", False),  # no such tone
        ("mp3", False),  # a letter before it
        ("er2", True),
        ("?!", True),
        ("a@b.com", True),
        ("write to a@b.com", False),
    ],
)
def test_language_choice(text, chinese):
    assert uses_chinese_rules(text) is chinese


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("\u6655xuan4", "\u6655XVAN4"),
        ("\u6655que4", "\u6655QVE4"),
        ("\u6655jun1", "\u6655JVN1"),
        ("\u6655xiu4", "\u6655XIU4"),
        ("\u6655zhu4", "\u6655zhu4"),
    ],
)
def test_pinyin_correction(text, normalized):
    assert TextNormalizer()(text) == normalized


def test_contractions():
    assert TextNormalizer()("Who's there? She's John's, isn't she, that's it.") == (
        "Who is there? She is John's, isn't she, that is it."
    )


def test_characters_are_mapped_in_one_pass():
    assert (
        TextNormalizer()("\uff0c\uff0c\uff0c\u597d,,,\u597d...\u597d\u2026\u2026")
        == ",,,\u597d\u2026\u597d\u2026\u597d\u2026"
    )
    assert TextNormalizer()("\u4e00$\u4e8c\n\u4e09") == "\u4e00.\u4e8c \u4e09"


def test_many_names_and_syllables_come_back():
    text = "\u3002".join(["\u7ea6\u745f\u592b\u00b7\u9ad8\u767b\u8bf4xuan4\u548cgan3"] * 60)
    normalized = TextNormalizer()(text)
    assert normalized.count("\u7ea6\u745f\u592b-\u9ad8\u767b\u8bf4XVAN4\u548cgan3") == 60
    assert "<" not in normalized


def test_annotations_stay_as_they_are(wetext):
    text = "<minute|M IH1 . N AH0 T>s: 5 <live|L AY1 V>, <live|L IH1 V>"
    assert TextNormalizer()(text) == "<minute|M IH1 . N AH0 T>s, five <live|L AY1 V>, <live|L IH1 V>"


def test_glossary_for_one_language_and_longest_term_first():
    normalize = TextNormalizer({"ab": "short", "abab": "long", "Zorro": {"zh": "\u4f50\u7f57"}})
    assert normalize("Abab and ab, Zorro.") == "long and short, Zorro."
    assert normalize("Zorro\u597d") == "\u4f50\u7f57\u597d"
    assert TextNormalizer({"back": r"\g<a>"})("\u597dback") == "\u597d" + r"\g<a>"  # not a pattern


@pytest.mark.parametrize("glossary", [{"": "x"}, {"a": 5}, {"a": {"fr": "x"}}, {"a": {"en": None}}, {3: "x"}])
def test_glossary_of_another_form_is_refused(glossary):
    with pytest.raises(ValueError, match="The glossary has .* but an entry is"):
        TextNormalizer(glossary)


@pytest.mark.parametrize("text", ["", "  \n "])
def test_blank_text_gives_empty_text(text):
    assert TextNormalizer()(text) == ""


def test_where_the_engine_fails_no_text_is_lost(wetext, caplog):
    # Two spaces in a row and "#5" stop the engine.
    assert TextNormalizer()("I have 20  cats. \n\n And 3 dogs.") == "I have twenty cats. And three dogs."
    assert TextNormalizer()("We have 20 cats. See #5 now. They have 3 dogs.") == (
        "We have twenty cats. See #5 now. They have three dogs."
    )
    assert "the text engine failed" in caplog.text and "See #5 now." in caplog.text
    assert TextNormalizer()("Before 5\0after 6.") == "Before five after six."


@pytest.mark.parametrize("text", PLAIN_TEXTS)
def test_plain_text_is_the_same_without_the_engine(text, wetext, monkeypatch):
    expected = TextNormalizer()(text)
    monkeypatch.setitem(sys.modules, "wetext", None)
    assert TextNormalizer()(text) == expected


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("I have 20 cats.", "20"),
        ("It costs $x now", r"\$x"),
        ("\u6709\u0033\u4e2a", "3"),
        ("\u0661\u0662", "\u0661\u0662"),
        ("Dr. Smith", r"Dr\."),
        ("Mr Smith", "Mr"),
        ("See example.com now", r"example\.com"),
        ("A. B. Smith", r"A\."),
        ("In Austin, TX it rains", ", TX"),
        ("Ten miles per h", "per h"),
        ("Two CPUs", "CPUs"),
        ("I saw GPT-5", "5"),
        ('He said "no"', '"no"'),
    ],
)
def test_text_that_needs_the_engine_says_so_without_it(text, word, no_engine):
    with pytest.raises(ImportError, match=rf"The text has .*{word}.*pip install \"indextts2-hf\[text\]\".* as words"):
        TextNormalizer()(text)


def test_long_text_goes_through_in_passages_with_the_same_result(wetext, monkeypatch):
    english = " ".join([case["text"] for case in GOLDEN["cases"] if not case["uses_chinese_rules"]][:5] * 5)
    chinese = "\n".join([case["text"] for case in GOLDEN["cases"] if case["uses_chinese_rules"]])
    whole = [TextNormalizer()(text) for text in (english, chinese)]
    monkeypatch.setattr(text_normalization, "MAX_PASSAGE_LENGTH", 250)
    assert whole == [TextNormalizer()(text) for text in (english, chinese)]


@pytest.mark.parametrize(
    "part", ["\u597d", "a", "a1", "word ", " ", "a-", "<", "\u4e00\u00b7", "xuan4", "\u597d\u3002"]
)
def test_a_hundred_thousand_characters(part, no_engine):
    text = (part * 100_000)[:100_000]
    start = time.monotonic()
    try:
        TextNormalizer()(text)
    except ImportError as error:
        assert len(str(error)) < 200_000
    assert time.monotonic() - start < 10  # a fraction of a second; a quadratic search takes minutes


def test_pickle_and_copy(wetext):
    normalize = TextNormalizer({"TTS": "T T S"})
    normalize("Warm 5")
    for other in (pickle.loads(pickle.dumps(normalize)), copy.deepcopy(normalize)):
        assert other("TTS 5") == "T T S five"
