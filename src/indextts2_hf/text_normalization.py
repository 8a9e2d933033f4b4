"""
Written text to speakable text, in Chinese and English: numbers, dates, symbols, names, pronunciation marks, punctuation.

[`TextNormalizer`] is the released front end around the number-and-date engine `wetext` (extra `text`), which is imported
only when a text is normalised. The file knows nothing of tokens: upper-casing and splitting are the tokenizer's.
"""

import re
from collections.abc import Iterator

from transformers.utils import logging


logger = logging.get_logger(__name__)

CHINESE_CHARACTER = re.compile(r"[\u4e00-\u9fff]")
EMAIL = re.compile(r"[a-zA-Z0-9]+@[a-zA-Z0-9]+\.[a-zA-Z]+")
# `<minute|M IH1 . N AH0 T>`: a word and how to say it. The stand-in is a plain lower-case word that no rule changes.
ANNOTATION = re.compile(r"<[^<>|]+\|[^<>|]+>")
ANNOTATION_STAND_IN = "qzx{}xzq"
CONTRACTION = re.compile(r"\b(what|where|who|which|how|there|here|it|she|he|that|this)'s\b", re.IGNORECASE)
# "GPT-5-nano", "F5-TTS": the hyphens become `<H>`, so that the engine does not read them as minus or "to". Words without
# one match too, which keeps the search linear; so do the look-behinds here.
TECH_TERM = re.compile(r"[a-zA-Z][a-zA-Z0-9]*(?:-[a-zA-Z0-9]+)*")
HYPHEN_STAND_IN = re.compile(r"(?<!\s)\s*<H>\s*")
# "约瑟夫·高登-莱维特": a transliterated name.
NAME = re.compile(r"(?<![\u4e00-\u9fff])[\u4e00-\u9fff]+(?:[-·—][\u4e00-\u9fff]+){1,2}")
NAME_STAND_IN = "<n_{}>"
# "XUAN4": optional initial and a final, or a bare "ng" or "er", then the tone.
PINYIN_FINALS = (
    "a|ai|an|ang|ao|e|ei|en|eng|i|ia|ian|iang|iao|ie|in|ing|iong|iu|o|ong|ou"
    "|u|ua|uai|uan|uang|ue|ui|un|uo|v|van|vang|ve|vn|ü|üan|üang|üe"
)
# Parity: the initial may be absent and more digits may follow the tone, so "A4 paper" takes the Chinese rules.
PINYIN = re.compile(rf"(?<![a-z])(?:(?:[zcs]h|[bpmfdtnlgkhjqxzcsryw])?(?:{PINYIN_FINALS})|ng|er)[1-5]", re.IGNORECASE)
PINYIN_STAND_IN = "<pinyin_{}>"
# "ju4", "xuan4": after j, q and x the letter u is read ü, which the vocabulary spells v.
PINYIN_HIDDEN_V = re.compile(r"(?<=^[jqx])[uü](?=(?:n|e|an)?[1-5]$)", re.IGNORECASE)

# Parity: one pass, first entry that fits. A single full-width comma fits before three of them would, so "，，，" becomes
# ",,," and not "…".
CHARACTER_MAP = {
    **dict.fromkeys("：；;，、:", ","),
    "。": ".",
    "！": "!",
    "？": "?",
    "\n": " ",
    "·": "-",
    **dict.fromkeys(("...", ",,,", "……"), "…"),
    **dict.fromkeys('“”"‘’（）()《》【】[]「」', "'"),
    **dict.fromkeys("—～~", "-"),
}
# Parity: the Chinese rules alone turn a dollar sign that the engine left into a full stop.
CHARACTER_MAPS = {"zh": {**CHARACTER_MAP, "$": "."}, "en": CHARACTER_MAP}
CHARACTER_PATTERNS = {
    language: re.compile("|".join(map(re.escape, character_map))) for language, character_map in CHARACTER_MAPS.items()
}

# The engine's time and memory (25 kB a character) grow faster than the text, so a longer one goes through in passages.
MAX_PASSAGE_LENGTH = 1000
SENTENCE_BREAK = re.compile(r"(?<=[a-z]{3}[.!?])\s+(?=[A-Z\"'“])|(?<=[。！？；\n])")

# What the engine would change. Chinese: digits alone. English: anything but letters and plain punctuation, and the
# words below. Found by walking through the rule graph of wetext 0.1.8; what is missing here are some 850 rare
# capitalised names ("Brno", "Iacob") that the engine spells out letter by letter.
NEEDS_ENGINE = {
    "zh": re.compile(r"\d+"),
    "en": re.compile(
        r"""(?:[\d_]|[^\w\s.,!?;:'’‘“”…—–()\[\]-])\S*  # digits and symbols
        | \b(?:Apt|Bldg|Capt|Co|Col|Drs?|Esq|Ft|Gen|Gov|Hon|Lt|Ltd|Maj|Mt|No|NO|Rev|Sgt|Vol|VOL|Aka)\.  # titles
        | \b(?:Mrs?|Ms|Jr|Esq|Mon|Tue?|Wed|Thu?|Thurs?|Fri|Sat|Sun)\b | \bWorld\sWar\sI | \b(?:HVAC|SPDR|TV|VTE|ZIP)\b
        | \b[A-Za-z]\.(?=\s?\w)  # initials: A. B. Smith
        | (?<=\w)\.\w\S*  # domains: example.com
        | ,\s?[A-Z]{2}\b  # states: Austin, TX
        | \bper\s[A-Za-z]{1,4}\b  # units: per kg
        | (?:[a-z][A-Z]|[A-Z]{2}[a-z])\w*  # iOS, CPUs
        """,
        re.VERBOSE,
    ),
}


def uses_chinese_rules(text: str) -> bool:
    """
    Whether a text is normalised with the Chinese rules; the English ones are the other choice.

    Chinese are texts with a Chinese character or a pinyin syllable with tone ("XING2"), texts without any ASCII letter
    ("12345") and a lone e-mail address.
    """
    if CHINESE_CHARACTER.search(text) or not re.search("[a-zA-Z]", text) or EMAIL.fullmatch(text):
        return True
    return PINYIN.search(text) is not None


class TextNormalizer:
    r"""
    Turns written text into speakable text: `TextNormalizer()("It's 5 km.")` is `"It is five kilometers."`.

    Numbers, dates, units and symbols become words, quotes and brackets become `'`, Chinese punctuation becomes ASCII,
    pinyin such as `XUAN4` and annotations such as `<minute|M IH1 . N AH0 T>` stay. A text that needs none of this also
    works without the engine; with the engine installed every text goes through it, so both give the same.

    Args:
        glossary (`dict[str, str | dict[str, str]]`, *optional*):
            Terms and how to say them, `{"TTS": "T T S", "C++": {"en": "C plus plus", "zh": "C 加加"}}`. A term that has
            no entry for the language at hand stays as it is. Case does not matter; longer terms go first; a term is
            replaced wherever its letters stand, also inside a word.
        knows_chinese (`bool`, defaults to `True`):
            Whether Chinese can be spoken. `False` reads every text with the English rules: "2024" is then "twenty twenty
            four".

    Raises:
        ValueError: if the glossary is not of this form.
    """

    def __init__(self, glossary: dict[str, str | dict[str, str]] | None = None, knows_chinese: bool = True) -> None:
        self.knows_chinese = knows_chinese
        self.glossary = dict(glossary or {})
        for term, spoken in self.glossary.items():
            readings = spoken if isinstance(spoken, dict) else {"en": spoken, "zh": spoken}
            if not (isinstance(term, str) and term.strip() and readings.keys() <= {"en", "zh"}) or not all(
                isinstance(reading, str) for reading in readings.values()
            ):
                raise ValueError(
                    f"The glossary has {term!r}: {spoken!r}, but an entry is a term and a string, or a term and a "
                    'dictionary with "en" and "zh": {"C++": {"en": "C plus plus", "zh": "C 加加"}}.'
                )

    def __call__(self, text: str) -> str:
        """
        Normalises one text of any length.

        Where the engine fails on a text, it is applied sentence by sentence; a sentence on which it fails alone stays as
        written, with a warning. No text is lost.

        Args:
            text (`str`): Chinese, English or mixed text; empty and blank text gives the empty string.

        Returns:
            `str`: the speakable text, without white space at its ends.

        Raises:
            ImportError: if the text needs the engine and `wetext` is not installed.
        """
        text = text.replace("\0", " ")  # the engine drops what follows a null character
        text, annotations = _protect(ANNOTATION, ANNOTATION_STAND_IN, text)
        language = "zh" if self.knows_chinese and uses_chinese_rules(text) else "en"
        text = CONTRACTION.sub(r"\1 is", text)
        text = self._apply_glossary(text, language)
        text = TECH_TERM.sub(lambda match: match[0].replace("-", "<H>"), text)
        if language == "zh":
            text, pinyin = _protect(PINYIN, PINYIN_STAND_IN, text)
            text, names = _protect(NAME, NAME_STAND_IN, text)
            text = _apply_engine(text, language)
            text = _restore(names, NAME_STAND_IN, text)
            pinyin = {stand_in: _correct_pinyin(syllable) for stand_in, syllable in pinyin.items()}
            text = _restore(pinyin, PINYIN_STAND_IN, text)
        else:
            text = _apply_engine(text, language)
        text = HYPHEN_STAND_IN.sub("-", text)
        text = CHARACTER_PATTERNS[language].sub(lambda match: CHARACTER_MAPS[language][match[0]], text)
        return _restore(annotations, ANNOTATION_STAND_IN, text)

    def _apply_glossary(self, text: str, language: str) -> str:
        # Parity: one term after the other, the longest first, also inside words.
        for term in sorted(self.glossary, key=len, reverse=True):
            spoken = self.glossary[term]
            reading = spoken if isinstance(spoken, str) else spoken.get(language)
            if reading is not None:
                text = re.sub(re.escape(term), lambda match, reading=reading: reading, text, flags=re.IGNORECASE)
        return text


def _protect(pattern: re.Pattern, stand_in: str, text: str) -> tuple[str, dict[str, str]]:
    """Puts stand-ins without digits in the place of all matches; gives the text and what each stand-in stands for."""
    originals: dict[str, str] = {}

    def put_away(match: re.Match) -> str:
        name = stand_in.format("".join("abcdefghij"[int(digit)] for digit in str(len(originals))))
        originals[name] = match[0]
        return name

    return pattern.sub(put_away, text), originals


def _restore(originals: dict[str, str], stand_in: str, text: str) -> str:
    return re.sub(stand_in.format("[a-j]+"), lambda match: originals.get(match[0], match[0]), text)


def _correct_pinyin(syllable: str) -> str:
    if syllable[0] not in "jqxJQX":
        return syllable
    return PINYIN_HIDDEN_V.sub("v", syllable).upper()


def _apply_engine(text: str, language: str) -> str:
    """Numbers, dates, units and symbols to words, by `wetext`; without it, a text that has none of them passes."""
    try:
        from wetext import Normalizer
    except ImportError as error:
        found = NEEDS_ENGINE[language].search(text.replace("<H>", " - "))
        if found is None:
            return " ".join(text.split()) if language == "en" else text.strip()
        word = found.string[: found.start()].rpartition(" ")[2] + found[0]
        raise ImportError(
            f"The text has {word!r}, which must become words before it can be spoken, and the package `wetext` "
            'that does it is not installed. Run `pip install "indextts2-hf[text]"`, or write numbers, symbols and '
            "abbreviations as words."
        ) from error

    engine = Normalizer(lang=language, operator="tn", remove_erhua=False)  # cheap: the rules are read at import
    spoken = ""
    for passage in _split_passages(text):
        written = passage.strip()
        spoken += passage.replace(written, _normalize_passage(engine.normalize, written)) if written else passage
    return spoken.strip()


def _split_passages(text: str) -> Iterator[str]:
    """Cuts a long text into passages of at most `MAX_PASSAGE_LENGTH` characters, at the end of sentences if possible."""
    start = 0
    while len(text) - start > MAX_PASSAGE_LENGTH:
        passage = text[start : start + MAX_PASSAGE_LENGTH]
        end = max((match.end() for match in SENTENCE_BREAK.finditer(passage)), default=0)
        end = end or max(passage.rfind(character) for character in " ，、") + 1
        passage = passage[: end or MAX_PASSAGE_LENGTH]
        yield passage
        start += len(passage)
    yield text[start:]


def _normalize_passage(normalize, passage: str) -> str:
    # The engine stops with bare assertions, for example at two spaces in a row or at "#5".
    try:
        return normalize(passage)
    except Exception:
        pass
    # Parity: the original goes on with the whole English text as written, and with no text at all in Chinese.
    sentences = SENTENCE_BREAK.split(" ".join(passage.split()))
    spoken = []
    for sentence in filter(None, sentences):
        try:
            spoken.append(normalize(sentence.strip()))
        except Exception as error:
            logger.warning(f"Numbers and symbols stay as written, the text engine failed ({error!r}): {sentence!r}")
            spoken.append(sentence)
    return " ".join(spoken)


__all__ = ["TextNormalizer", "uses_chinese_rules"]
