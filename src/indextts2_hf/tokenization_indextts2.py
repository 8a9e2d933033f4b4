"""
Text to the ids that the text-to-semantic model reads, and a long text to segments that it can speak one by one.

The vocabulary is a SentencePiece model, `bpe.model`. The tokenizer adds no special tokens: the model itself puts `<s>`
(id 0, start of text) and `</s>` (id 1, end of text) around the ids.
"""

import os
import re
import unicodedata
from collections.abc import Iterator
from typing import Any

from transformers.tokenization_utils_sentencepiece import SentencePieceBackend
from transformers.utils import logging

from .text_normalization import CHINESE_CHARACTER, TextNormalizer


logger = logging.get_logger(__name__)

VOCAB_FILES_NAMES = {"vocab_file": "bpe.model"}

WORD_START = "▁"
CJK = r"[\u1100-\u11ff\u2e80-\ua4cf\ua840-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff65-\uffdc\U00020000-\U0002ffff]"
CJK_CHARACTER = re.compile(f"({CJK})")
SPACE_AROUND_CJK = re.compile(rf"(?<={CJK})\s+|(?<!\s)\s+(?={CJK})")

# Parity: "▁!" is not among the ends of a sentence.
SENTENCE_ENDS = {".", "!", "?", "▁.", "▁?", "▁..."}
PAUSES = {",", "▁,", "-"}
QUOTES = {"'", "▁'"}

# Where segments are cut: at the ends of sentences, else at clauses, else between words.
SENTENCE_MARKS = (".", "!", "?", "…")
CLAUSE_MARKS = (",", ";", ":", "-")


def pre_tokenize_cjk(text: str) -> str:
    """
    Sets every Chinese, Japanese and Korean character apart with single spaces, and upper-cases the rest.

    `pre_tokenize_cjk("你好, world")` is `"你 好 , WORLD"`.
    """
    return " ".join(chunk.strip() for chunk in CJK_CHARACTER.split(text.strip()) if chunk.strip()).upper()


def split_pieces(pieces: list[str], max_text_tokens: int = 120, quick_streaming_tokens: int = 0) -> list[list[str]]:
    r"""
    Cuts pieces of text into segments as the original does: at the ends of sentences, at every comma and hyphen, then anywhere.

    Args:
        pieces (`list[str]`):
            What `IndexTTS2Tokenizer.tokenize` gives.
        max_text_tokens (`int`, defaults to 120):
            Most pieces in a segment, at least 1. A closing quote may come on top of it.
        quick_streaming_tokens (`int`, defaults to 0):
            Within this many pieces from the beginning, short parts are joined only up to half of `max_text_tokens`, so
            that the first segments are spoken sooner.

    Returns:
        `list[list[str]]`: the segments. Joined they are the input, except for a quote that is said twice, see below.

    Raises:
        ValueError: if `max_text_tokens` is below 1.
    """
    if max_text_tokens < 1:
        raise ValueError(
            f"`max_text_tokens` is {max_text_tokens}, but a segment holds at least 1 token. The default is 120."
        )

    parts: list[list[str]] = []
    current: list[str] = []
    num_cut = 0
    for index, piece in enumerate(pieces):
        current.append(piece)
        if piece not in PAUSES and len(current) <= max_text_tokens:
            # Parity: an end of sentence closes a part only from the third piece on.
            if piece not in SENTENCE_ENDS or len(current) <= 2:
                continue
            # Parity: a quote after it goes to this part, and once more to the beginning of the next one.
            if index + 1 < len(pieces) and pieces[index + 1] in QUOTES:
                current.append(pieces[index + 1])
            parts.append(current)
        else:
            # Parity: a comma or hyphen always closes a part, of whatever length; so does one piece too many, which is then
            # a part of its own.
            parts.append(current[:max_text_tokens])
            if len(current) > max_text_tokens:
                parts.append(current[max_text_tokens:])
                num_cut += 1
        current = []
    if current:
        parts.append(current)
    if num_cut:
        logger.warning(
            f"{num_cut} x cut inside a sentence: more than {max_text_tokens} tokens without punctuation. Shorter sentences "
            "sound better."
        )

    segments: list[list[str]] = []
    num_pieces = 0
    for part in parts:
        num_pieces += len(part)
        length = len(segments[-1]) + len(part) if segments else 0
        can_join = length <= max_text_tokens and num_pieces > quick_streaming_tokens
        if segments and (can_join or length <= max_text_tokens / 2):
            segments[-1].extend(part)
        else:
            segments.append(part)
    return segments


def split_sentences(pieces: list[str], max_text_tokens: int = 120, quick_streaming_tokens: int = 0) -> list[list[str]]:
    r"""
    Cuts pieces of text into segments: at the ends of sentences, a sentence that is too long at its clauses, a clause that is
    too long between words. A word alone that is longer than a segment is cut too, with a warning.

    Takes what [`split_pieces`] takes, and joins short parts as it does. Joined the segments are the input.

    Raises:
        ValueError: if `max_text_tokens` is below 1.
    """
    if max_text_tokens < 1:
        raise ValueError(
            f"`max_text_tokens` is {max_text_tokens}, but a segment holds at least 1 token. The default is 120."
        )
    words: list[list[str]] = []
    for piece in pieces:
        if piece.startswith(WORD_START) or not words:
            words.append([])
        words[-1].append(piece)

    def parts_of(words: list[list[str]], marks: tuple[str, ...]) -> Iterator[list[list[str]]]:
        part: list[list[str]] = []
        for index, word in enumerate(words):
            part.append(word)
            # A mark that is set apart, as in Chinese, belongs to the word before it.
            following = "".join(words[index + 1]).lstrip(WORD_START) if index + 1 < len(words) else ""
            is_mark = following in (*SENTENCE_MARKS, *CLAUSE_MARKS)
            if word[-1].endswith(marks) and not is_mark:
                yield part
                part = []
        if part:
            yield part

    segments: list[list[str]] = []
    num_pieces = 0

    def add(part: list[str]) -> None:
        nonlocal num_pieces
        num_pieces += len(part)
        length = len(segments[-1]) + len(part) if segments else 0
        can_join = length <= max_text_tokens and num_pieces > quick_streaming_tokens
        if segments and (can_join or length <= max_text_tokens / 2):
            segments[-1].extend(part)
        else:
            segments.append(part)

    for sentence in parts_of(words, SENTENCE_MARKS):
        if sum(map(len, sentence)) <= max_text_tokens:
            add([piece for word in sentence for piece in word])
            continue
        for clause in parts_of(sentence, SENTENCE_MARKS + CLAUSE_MARKS):
            if sum(map(len, clause)) <= max_text_tokens:
                add([piece for word in clause for piece in word])
                continue
            for word in clause:
                if len(word) > max_text_tokens:
                    logger.warning(f"A word of {len(word)} tokens is cut: a segment holds at most {max_text_tokens}.")
                for start in range(0, len(word), max_text_tokens):
                    add(word[start : start + max_text_tokens])
    return segments


class IndexTTS2Tokenizer(SentencePieceBackend):
    r"""
    Tokenizer of IndexTTS2: normalised, upper-cased text in SentencePiece pieces. Based on SentencePiece.

    Text is normalised first (`TextNormalizer`: numbers to words, which needs the extra `text`), then its Chinese characters
    are set apart and it is upper-cased. Where the vocabulary has no Chinese character, every text is read with the English
    rules. Special tokens written in a text (`</s>`) are read as text. Characters that
    the vocabulary lacks become `<unk>` and are named in a warning.

    Args:
        vocab_file (`str`):
            Path of the SentencePiece model, `bpe.model`.
        bos_token (`str`, defaults to `"<s>"`), eos_token (`str`, defaults to `"</s>"`):
            Start and end of text, ids 0 and 1. They are added by the model, not here.
        unk_token (`str`, defaults to `"<unk>"`):
            Stands for what the vocabulary lacks.
        pad_token (`str`, defaults to `"</s>"`):
            Padding, put on the left side.
        glossary (`dict[str, str | dict[str, str]]`, *optional*):
            Terms and how to say them, see [`TextNormalizer`]. It is saved with the tokenizer.
        do_normalize (`bool`, defaults to `True`):
            Whether text is normalised. `False` for text that was normalised before.

    Raises:
        ValueError: if there is no vocabulary file, or its special tokens are not those named.
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"

    def __init__(
        self,
        vocab_file: str | None = None,
        bos_token: str = "<s>",
        eos_token: str = "</s>",
        unk_token: str = "<unk>",
        pad_token: str = "</s>",
        glossary: dict[str, str | dict[str, str]] | None = None,
        do_normalize: bool = True,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None or not os.path.isfile(vocab_file):
            raise ValueError(
                f"`vocab_file` is {vocab_file!r}, but the tokenizer needs the path of a SentencePiece model. "
                "It is the file `bpe.model` of a checkpoint folder."
            )
        self.do_normalize = do_normalize
        kwargs.setdefault("split_special_tokens", True)
        super().__init__(
            vocab_file=vocab_file,
            bos_token=bos_token,
            eos_token=eos_token,
            unk_token=unk_token,
            pad_token=pad_token,
            glossary=glossary,
            do_normalize=do_normalize,
            **kwargs,
        )
        if self.added_tokens_encoder and max(self.added_tokens_encoder.values()) >= self.vocab_size:
            missing = [token for token, token_id in self.added_tokens_encoder.items() if token_id >= self.vocab_size]
            raise ValueError(
                f"The vocabulary {vocab_file!r} has no {', '.join(missing)}, and the model has no place for more tokens. "
                "Name the special tokens as they are called in that file."
            )
        pieces = (self.sp_model.id_to_piece(token_id) for token_id in range(self.sp_model.vocab_size()))
        knows_chinese = any(CHINESE_CHARACTER.search(piece) for piece in pieces)
        self.normalizer = TextNormalizer(glossary, knows_chinese=knows_chinese)

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(
                f"The text {text[:50]!r} has half of a surrogate pair, which is not a character. Read the file or the message "
                "it comes from as UTF-8."
            )
        # Parity: one character alone is looked up as it is, neither normalised nor upper-cased.
        if len(text.strip()) != 1:
            text = self.normalizer(text) if self.do_normalize else text
            text = pre_tokenize_cjk(text)
        pieces = self.sp_model.encode(text, out_type=str)
        unknown = self._find_unknown(pieces)
        if unknown:
            logger.warning_once(f"Characters that the vocabulary lacks cannot be spoken: {''.join(unknown)!r}")
        return pieces

    def _find_unknown(self, pieces: list[str]) -> list[str]:
        """The characters of those pieces that the vocabulary lacks, sorted."""
        ids = self.sp_model.piece_to_id(pieces)
        unknown = {piece for piece, token_id in zip(pieces, ids, strict=True) if token_id == self.sp_model.unk_id()}
        return sorted(set("".join(unknown)) - {WORD_START})

    def split_text(self, text: str, max_text_tokens: int = 120, quick_streaming_tokens: int = 0) -> list[list[str]]:
        r"""
        Normalises and tokenizes a text of any length and cuts it into segments to be spoken one by one.

        Args:
            text (`str`):
                The text, with something in it that can be spoken.
            max_text_tokens (`int`, defaults to 120), quick_streaming_tokens (`int`, defaults to 0):
                See [`split_sentences`]. (The original cuts as [`split_pieces`] does, inside sentences and words too.)

        Returns:
            `list[list[str]]`: the pieces of each segment; `convert_tokens_to_ids` gives their ids.

        Raises:
            ValueError: if the text is empty or blank, or if nothing in it is known to the vocabulary but punctuation
                (an emoji alone), or if it holds half of a surrogate pair.
            TypeError: if the text is not a string.
            ImportError: if the text needs the engine of the extra `text` and it is not installed.
        """
        if not isinstance(text, str):
            raise TypeError(f"The text is {text!r}, but it must be a string. Split the texts of a batch one by one.")
        pieces = self.tokenize(text)
        if not any(piece != WORD_START for piece in pieces):
            raise ValueError(f"The text is {text[:50]!r}, with nothing in it to speak. Give at least one word.")
        unknown = [character for character in self._find_unknown(pieces) if unicodedata.category(character)[0] != "P"]
        if unknown and not any(
            character.isalnum() for piece in pieces for character in piece if character not in unknown
        ):
            raise ValueError(
                f"The text {text[:50]!r} has only characters that the vocabulary lacks ({''.join(unknown)!r}), so nothing of "
                f"it can be spoken. Write it in {'Chinese or ' if self.normalizer.knows_chinese else ''}Latin letters."
            )
        return split_sentences(pieces, max_text_tokens, quick_streaming_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Readable text: the pieces joined, without the spaces around Chinese characters. It stays upper-case."""
        return SPACE_AROUND_CJK.sub("", super().convert_tokens_to_string(tokens))


__all__ = ["IndexTTS2Tokenizer", "pre_tokenize_cjk", "split_pieces", "split_sentences"]
