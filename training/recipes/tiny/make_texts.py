"""
Makes the sentences that the tiny model learns to read: the usage examples and the definitions of WordNet 3.0, whose licence allows
every use with its notice.

    python training/recipes/tiny/make_texts.py WORDNET_FOLDER OUTPUT

`WORDNET_FOLDER` has the files `data.noun`, `data.verb`, `data.adj`, `data.adv`, `noun.exc` and `verb.exc` (Debian: `/usr/share/wordnet`
of the package `wordnet-base`). `OUTPUT/train.txt` and `OUTPUT/held-out.txt` get a sentence a line, the examples; which one a sentence
goes to depends on its words alone. `OUTPUT/definitions.txt` gets the definitions, which have many words that no example has.
`OUTPUT/words.txt` gets sentences that mean nothing, with every word of the dictionary: how a rare word is pronounced has to be heard.
`OUTPUT/bpe.model` is the vocabulary: the most frequent pieces of the training sentences.
"""

import argparse
import hashlib
import io
import itertools
import random
import re
from pathlib import Path

import sentencepiece


# Words and characters of a sentence: what a small model can be asked to read in one breath.
NUM_WORDS = (3, 18)
NUM_CHARACTERS = (12, 110)
HELD_OUT_SHARE = 0.02
# Held-out sentences are whole ones, of which a recogniser can tell what was said.
HELD_OUT_WORDS = (6, 14)
# Pieces of words: few, so that each is heard often enough to learn how it sounds.
VOCABULARY_SIZE = 600
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,!?'-…"
QUESTION = re.compile(
    r"(who|what|when|where|why|how|which|whose|do|does|did|is|are|was|were|can|could|will|would|have|has) ", re.I
)
# Abuse that the examples quote.
LEFT_OUT = re.compile(
    r"\b(nigg\w*|spic|kike\w*|wop|chink\w*|fag\w*|whore\w*|slut\w*|fuck\w*|shit\w*|cunt\w*|bitch\w*|rape\w*|bastard\w*|"
    r"jap|japs|gook\w*|dyke\w*|tits?|piss\w*|cock|prick|crap)\b",
    re.I,
)


# The sentences of words: parts of speech and inflections stand for words.
NUM_WORD_SENTENCES = 32000
PATTERNS = (
    "The ADJECTIVE NOUN PAST the PLURAL.",
    "That ADJECTIVE NOUN had PLURAL in the NOUN.",
    "He PAST ADVERB, and she PAST the NOUN.",
    "He was their NOUN, and ADJECTIVE too.",
    "Her ADJECTIVE PLURAL can VERB a long NOUN.",
    "His NOUN PRESENT like this ADJECTIVE NOUN.",
    "We saw the NOUN PARTICIPLE near some PLURAL.",
    "It is too ADJECTIVE to VERB ADVERB.",
    "Is there any ADJECTIVE NOUN, or only PLURAL?",
    "Do not VERB your ADJECTIVE NOUN!",
    "She likes PARTICIPLE, but that NOUN was ADJECTIVE.",
    "No NOUN in the world PRESENT so ADVERB.",
    "I will VERB every NOUN of the ADJECTIVE NOUN.",
    "You must VERB, VERB and VERB the NOUN.",
    "In the NOUN of PLURAL, he PAST ADVERB.",
    "One NOUN, two PLURAL and the old NOUN.",
    "They have PLURAL and a bit of NOUN for the ADJECTIVE ones.",
    "ADVERB, they PAST our ADJECTIVE NOUN.",
    "ADJECTIVE PLURAL were PARTICIPLE on their NOUN.",
    "PLURAL and PLURAL are ADJECTIVE.",
    "NOUN and NOUN PAST each other ADVERB.",
)
PARTS = {"ADJECTIVE": "adj", "ADVERB": "adv", "NOUN": "noun", "PLURAL": "noun"}  # the others are verbs
WORD = re.compile(r"(?![ivxl]+$)[a-z]{3,14}")  # no names, abbreviations, compounds, Roman numerals


def read_glosses(folder: Path) -> list[str]:
    """What stands behind the words of each entry, in the order of the files."""
    glosses = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            _, _, gloss = line.partition("| ")
            glosses.append(gloss)
    return glosses


def read_examples(glosses: list[str]) -> list[str]:
    """What stands in quotation marks in them."""
    return [example for gloss in glosses for example in re.findall(r'"([^"]+)"', gloss)]


def read_definitions(glosses: list[str]) -> list[str]:
    """What stands before the first quotation mark, in its parts, without what stands in brackets; none with a name, often a Latin one."""
    definitions = []
    for gloss in glosses:
        definition = re.sub(r" *\([^()]*\) *", " ", gloss.partition('"')[0])
        definitions += [part for part in definition.split(";") if not re.search(r"\S+ .*[A-Z]", part.strip())]
    return definitions


def read_words(folder: Path, part: str) -> list[str]:
    """The plain words of a part of speech, each once."""
    words: dict[str, None] = {}
    for line in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
        if line[:1].isdigit():  # the others are the licence
            fields = line.split()
            words.update(dict.fromkeys(fields[4 : 4 + 2 * int(fields[3], 16) : 2]))
    return [word for word in words if WORD.fullmatch(word)]


def read_irregular(folder: Path, part: str) -> dict[str, list[str]]:
    """Inflected forms that follow no rule, or double a letter, by the word they come from."""
    forms: dict[str, list[str]] = {}
    for line in (folder / f"{part}.exc").read_text(encoding="latin-1").splitlines():
        form, *words = line.split()
        for word in words:
            forms.setdefault(word, []).append(form)
    return forms


def inflect(word: str, form: str, irregular: dict[str, list[str]]) -> str:
    """
    A word in one of the forms of `PATTERNS`.

    Args:
        irregular: as `read_irregular` gives it, of the nouns for `PLURAL` and of the verbs for the other forms.
    """
    if form not in ("PLURAL", "PRESENT", "PAST", "PARTICIPLE"):
        return word
    if form != "PRESENT":
        for other in irregular.get(word, []):
            if form == "PLURAL" or other.endswith("ing") == (form == "PARTICIPLE"):
                return other
    ends_in_y = re.search(r"[^aeiou]y$", word) is not None
    if form == "PARTICIPLE":
        stem = word[:-2] + "y" if word.endswith("ie") else re.sub(r"(?<![eoy])e$", "", word)
        return stem + "ing"
    if form == "PAST":
        return word[:-1] + "ied" if ends_in_y else word + ("d" if word.endswith("e") else "ed")
    return word[:-1] + "ies" if ends_in_y else word + ("es" if re.search(r"(s|x|z|ch|sh)$", word) else "s")


def make_word_sentences(folder: Path) -> list[str]:
    """`NUM_WORD_SENTENCES` of `PATTERNS`, each pattern equally often, with the words of each part of speech in turn."""
    rng = random.Random(0)
    words, irregular = {}, {}
    for part in ("noun", "verb", "adj", "adv"):
        shuffled = read_words(folder, part)
        rng.shuffle(shuffled)
        words[part] = itertools.cycle(shuffled)
    for part in ("noun", "verb"):
        irregular[part] = read_irregular(folder, part)

    def fill(form: re.Match) -> str:
        part = PARTS.get(form[0], "verb")
        return inflect(next(words[part]), form[0], irregular.get(part, {}))

    sentences = []
    for pattern in itertools.islice(itertools.cycle(PATTERNS), NUM_WORD_SENTENCES):
        sentence = re.sub(r"[A-Z]{4,}", fill, pattern)
        sentences.append(sentence[0].upper() + sentence[1:])
    return [sentence for sentence in sentences if not LEFT_OUT.search(sentence)]


def make_sentence(example: str) -> str | None:
    """An example as a sentence with a capital and an end; `None` if it is no plain English."""
    text = example.strip(" ;,-").replace("`", "'").replace("--", ", ")
    text = re.sub(r"(?<!\w)'|'(?!\w)", "", text)
    if not re.fullmatch(r"[A-Za-z' ,;:.!?-]+", text) or LEFT_OUT.search(text):
        return None
    if re.search(r"[A-Z]{2}|[A-Z]\.|\.\.|[.!?] *[a-z]", text):  # abbreviations, ellipses
        return None
    if (
        not NUM_WORDS[0] <= len(text.split()) <= NUM_WORDS[1]
        or not NUM_CHARACTERS[0] <= len(text) <= NUM_CHARACTERS[1]
    ):
        return None
    text = text[0].upper() + text[1:]
    is_asked = (
        QUESTION.match(text)
        and not re.search(r"[.!?]$", text)
        and " if " not in text
        and text.split()[1]
        in ("he she it they you we I is are was were did does do can could will would the this that".split())
    )
    return text if text[-1] in ".!?" else text.rstrip(",;:") + ("?" if is_asked else ".")


def make_sentences(parts: list[str]) -> list[str]:
    """The sentences that can be made of them, each once."""
    sentences: dict[str, str] = {}
    for part in parts:
        sentence = make_sentence(" ".join(part.split()))
        if sentence is not None:
            sentences.setdefault(sentence.lower(), sentence)
    return list(sentences.values())


def is_held_out(sentence: str) -> bool:
    """By a hash of its words, so that other sentences or another order change nothing."""
    words = re.findall(r"[a-z']+", sentence.lower())
    share = int(hashlib.sha256(" ".join(words).encode()).hexdigest()[:8], 16) / 16**8
    return share < HELD_OUT_SHARE and HELD_OUT_WORDS[0] <= len(words) <= HELD_OUT_WORDS[1]


def train_vocabulary(sentences: list[str], path: Path) -> None:
    """Writes a SentencePiece model with `<s>`, `</s>` and `<unk>` as 0, 1 and 2, as the tokenizer expects it: upper case."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentence.upper() for sentence in sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        required_chars=CHARACTERS,
        character_coverage=1.0,
        normalization_rule_name="identity",
        bos_id=0,
        eos_id=1,
        unk_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, metavar="WORDNET_FOLDER")
    parser.add_argument("output", type=Path, metavar="OUTPUT")
    arguments = parser.parse_args()
    glosses = read_glosses(arguments.wordnet)
    examples = make_sentences(read_examples(glosses))
    lists = {
        "train": [sentence for sentence in examples if not is_held_out(sentence)],
        "held-out": [sentence for sentence in examples if is_held_out(sentence)],
    }
    known = {sentence.lower() for sentence in examples}
    # What is held out is held out of the definitions as well: it has the words of no sentence that is evaluated.
    lists["definitions"] = [
        sentence
        for sentence in make_sentences(read_definitions(glosses))
        if sentence.lower() not in known and not is_held_out(sentence)
    ]
    lists["words"] = make_word_sentences(arguments.wordnet)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, lines in lists.items():
        (arguments.output / f"{name}.txt").write_text("\n".join(lines) + "\n")
        print(f"{arguments.output / name}.txt: {len(lines)} sentences, {sum(map(len, lines))} characters")
    train_vocabulary(lists["train"], arguments.output / "bpe.model")


if __name__ == "__main__":
    main()
