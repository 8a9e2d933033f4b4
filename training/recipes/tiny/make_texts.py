"""
Makes the sentences that the tiny model learns to read: the usage examples and the definitions of WordNet 3.0, whose licence allows
every use with its notice.

    python training/recipes/tiny/make_texts.py WORDNET_FOLDER OUTPUT

`WORDNET_FOLDER` has the files `data.noun`, `data.verb`, `data.adj`, `data.adv` (Debian: `/usr/share/wordnet` of the package
`wordnet-base`). `OUTPUT/train.txt` and `OUTPUT/held-out.txt` get a sentence a line, the examples; which one a sentence goes to depends on
its words alone. `OUTPUT/definitions.txt` gets the definitions, which have many words that no example has. `OUTPUT/bpe.model` is
the vocabulary: the most frequent pieces of the training sentences.
"""

import argparse
import hashlib
import io
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
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, lines in lists.items():
        (arguments.output / f"{name}.txt").write_text("\n".join(lines) + "\n")
        print(f"{arguments.output / name}.txt: {len(lines)} sentences, {sum(map(len, lines))} characters")
    train_vocabulary(lists["train"], arguments.output / "bpe.model")


if __name__ == "__main__":
    main()
