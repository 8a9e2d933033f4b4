"""
From what lies on disk to padded batches: the manifest of recordings that people have, the features that
`prepare_dataset.py` makes of them, the order of the batches, and the examples of the text-to-semantic transformer.

Everything random about an example depends on the seed and on the number of its draw, never on the process or the worker that
makes it: a resumed run and a run on more processes see the same examples.
"""

import argparse
import csv
import hashlib
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soundfile
import torch
from datasets import Array2D, Features, List, Value, concatenate_datasets, load_dataset, load_from_disk
from rapidfuzz.distance import Levenshtein
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Sampler

from checkpoint import digest_files


SPLITS = ("train", "validation")
# What a manifest may say of a clip.
COLUMNS = ("file_name", "text", "speaker", "emotion", "language")
# Optimiser steps among which rows of like length come together.
BUCKET_STEPS = 32


# --- recordings ----------------------------------------------------------------------------------------------------------


@dataclass
class Clip:
    """
    A recording as its manifest describes it.

    Args:
        clip (`str`): its name, unique in the manifest.
        audio (path or `dict`): what `load_audio` takes.
        speaker (`str`): who speaks; clips of one speaker are each other's prompts. The name of the clip itself where the
            manifest leaves it empty or says `unknown`: such clips are nobody's prompts.
        text (`str`): what is said; may be empty.
        emotion (`str`, *optional*): how it is said, one of the eight names of `EMOTIONS` where it matters.
        language (`str`, *optional*): code of the language.
        split (`str`, *optional*): `"train"` or `"validation"` where the manifest says so.
    """

    clip: str
    audio: Any
    speaker: str
    text: str
    emotion: str | None = None
    language: str | None = None
    split: str | None = None


class ColumnsAction(argparse.Action):
    """Pairs `NAME=COLUMN` as a dictionary."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: list[str],
        option_string: str | None = None,
    ) -> None:
        columns = dict(pair.partition("=")[::2] for pair in values)
        if not all(columns.values()) or not columns.keys() <= set(COLUMNS):
            raise argparse.ArgumentError(
                self, f"{' '.join(values)} must be pairs NAME=COLUMN of the names {', '.join(COLUMNS)}"
            )
        setattr(namespace, self.dest, columns)


def add_columns_argument(parser: argparse.ArgumentParser) -> None:
    """The option `--columns` of the programs that read recordings: what `read_manifest` takes as `columns`."""
    parser.add_argument(
        "--columns",
        nargs="+",
        action=ColumnsAction,
        metavar="NAME=COLUMN",
        help="what a column is called in the manifest, for example speaker=speaker_id",
    )


def read_manifest(
    source: str | Path, columns: dict[str, str] | None = None, required: tuple[str, ...] = ("text", "speaker")
) -> list[Clip]:
    r"""
    The clips of a folder in the audiofolder layout (`metadata.csv` or `metadata.jsonl`, at its top or in the folders `train` and
    `validation`), of one such file anywhere, or of a `datasets` repository, whose test splits are left out.

    Args:
        source (`str` or `Path`):
            Folder, `.csv` or `.jsonl` file, or repository: its name, or a folder with its parquet files.
        columns (`dict[str, str]`, *optional*):
            Names of the columns `file_name`, `text`, `speaker`, `emotion`, `language` where they are others.
        required (`tuple[str, ...]`, defaults to `("text", "speaker")`):
            Which of them must be there beside the file.

    Returns:
        `list[Clip]`, in the order of the manifest. Whether the audio can be read is not looked at.

    Raises:
        ValueError: there is no manifest, it has no rows, or a column is missing.
    """
    names = {name: name for name in COLUMNS} | (columns or {})
    path = Path(source)
    if not path.exists():
        return _read_repository(str(source), names, required)
    if path.is_file():
        tables = {None: path}
    else:
        folders = {None: path, **{split: path / split for split in SPLITS}}
        found = {split: _find_table(folder) for split, folder in folders.items() if folder.is_dir()}
        tables = {split: table for split, table in found.items() if table is not None}
    if not tables and any(path.rglob("*.parquet")):
        return _read_repository(str(path), names, required)
    if not tables:
        raise ValueError(
            f"{path} has no metadata.csv or metadata.jsonl, nor have its folders {' and '.join(SPLITS)}. Write one with the "
            f"columns {', '.join(names[name] for name in ('file_name', *required))}, or name a manifest file."
        )
    clips = []
    for split, table in tables.items():
        rows = _read_table(table)
        _check_columns(rows, names, required, table)
        for row in rows:
            values = {name: _as_text(row.get(column)) for name, column in names.items()}
            file_name = values["file_name"]
            clip = f"{split}/{file_name}" if split else str(file_name)
            clips.append(
                Clip(
                    clip=clip,
                    audio=str(table.parent / file_name) if file_name else None,
                    speaker=_speaker_of(values["speaker"], clip),
                    text=values["text"] or "",
                    emotion=values["emotion"],
                    language=values["language"],
                    split=split or (row["split"] if row.get("split") in SPLITS else None),
                )
            )
    return clips


def find_fault(clip: Clip, least_s: float = 0.0) -> str | None:
    """
    Why a recording cannot be used, as far as its header and its last sample tell; a clip cut short ends before the latter.
    `None` if it can; it needs `least_s` seconds.
    """
    audio = clip.audio
    if isinstance(audio, Mapping):
        content = audio.get("bytes")
        audio = audio.get("path") if content is None else io.BytesIO(content)
    if audio is None:
        return "the manifest names no file"
    try:
        with soundfile.SoundFile(audio) as file:
            if file.frames == 0:
                return "it is empty"
            if file.frames < least_s * file.samplerate:
                return f"it lasts {file.frames / file.samplerate:.2f} s, {least_s} s are needed"
            file.seek(file.frames - 1)
            if len(file.read(1)) == 0:
                return "it is cut short"
    except (soundfile.SoundFileError, OSError) as error:
        return str(error)
    return None


def leave_out_faulty(clips: list[Clip], least_s: float = 0.0) -> tuple[list[Clip], list[str]]:
    """The clips without fault, and what is wrong with the others."""
    faults = [find_fault(clip, least_s) for clip in clips]
    pairs = list(zip(clips, faults, strict=True))
    return [clip for clip, fault in pairs if fault is None], [
        f"{clip.clip}: {fault}" for clip, fault in pairs if fault
    ]


def choose_splits(clips: list[Clip], validation_fraction: float) -> dict[str, list[Clip]]:
    """
    The manifest's own splits if it holds out clips; otherwise `validation_fraction` of them, at least one if there are two,
    chosen by a hash of their names, so that a clip stays where it is when others come or the order changes.
    """
    if any(clip.split == "validation" for clip in clips):
        is_held_out = {clip.clip: clip.split == "validation" for clip in clips}
    else:
        shares = {clip.clip: int(hashlib.sha256(clip.clip.encode()).hexdigest()[:12], 16) / 16**12 for clip in clips}
        is_held_out = {name: share < validation_fraction for name, share in shares.items()}
        if validation_fraction > 0 and len(clips) > 1:
            # Neither split is to be empty, whatever chance says.
            is_held_out[min(shares, key=shares.get)] = True
            is_held_out[max(shares, key=shares.get)] = False
    return {
        "train": [clip for clip in clips if not is_held_out[clip.clip]],
        "validation": [clip for clip in clips if is_held_out[clip.clip]],
    }


def _as_text(value: Any) -> str | None:
    """A value of a table as text, `None` where it is empty; 0 is a value."""
    return None if value is None or str(value).strip() == "" else str(value).strip()


def _speaker_of(speaker: str | None, clip: str) -> str:
    return clip if speaker is None or speaker.lower() == "unknown" else speaker


def _find_table(folder: Path) -> Path | None:
    return next((folder / name for name in ("metadata.csv", "metadata.jsonl") if (folder / name).is_file()), None)


def _read_table(table: Path) -> list[dict[str, Any]]:
    try:
        # Spreadsheets put a byte-order mark before the first column.
        text = table.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not in UTF-8 ({error}). Save it as UTF-8.") from error
    if table.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(text, newline="")))
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            row = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise ValueError(f"{table}, line {number}: this is no JSON ({error}). Correct or remove it.") from error
        if not isinstance(row, dict):
            raise ValueError(f"{table}, line {number}: this is no JSON object, but {line.strip()[:50]!r}. Correct it.")
        if row:
            rows.append(row)
    return rows


def _check_columns(rows: list[dict[str, Any]], names: dict[str, str], required: tuple[str, ...], where: Any) -> None:
    if not rows:
        raise ValueError(f"{where} has no rows: there is nothing to learn from.")
    missing = [names[name] for name in ("file_name", *required) if names[name] not in rows[0]]
    if missing:
        raise ValueError(
            f"{where} has no column {' or '.join(map(repr, missing))}, but {', '.join(map(repr, rows[0]))}. "
            "Rename it, or say which column it is with --columns."
        )


def _read_repository(repository: str, names: dict[str, str], required: tuple[str, ...]) -> list[Clip]:
    # Decoded here, by soundfile: the library's own decoder needs torchcodec.
    names = names | ({"file_name": "audio"} if names["file_name"] == "file_name" else {})
    try:
        tables = load_dataset(repository)
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{repository} is neither a folder nor a file here, and `datasets` cannot load a repository of that name: {error}"
        ) from error
    clips = []
    for split, table in tables.items():
        if split.startswith("test"):
            continue
        header = [dict.fromkeys(table.column_names)] if len(table) else []
        _check_columns(header, names, required, f"{repository} ({split})")
        audio = table.select_columns(names["file_name"]).cast_column(names["file_name"], datasets.Audio(decode=False))
        columns = {name: column for name, column in names.items() if name != "file_name" and column in table.features}
        labels = {
            name: table.features[column].names
            for name, column in columns.items()
            if isinstance(table.features[column], datasets.ClassLabel)
        }
        # A table without columns has no rows.
        rows = table.select_columns(list(columns.values())) if columns else [{}] * len(table)
        for index, row in enumerate(rows):
            values = {name: row[column] for name, column in columns.items()}
            for name, label_names in labels.items():
                number = values[name]
                values[name] = None if number is None or number < 0 else label_names[number]
            values = {name: _as_text(value) for name, value in values.items()}
            clip = f"{split}/{index:08d}"
            clips.append(
                Clip(
                    clip=clip,
                    audio=StoredAudio(audio, index),
                    speaker=_speaker_of(values.get("speaker"), clip),
                    text=values.get("text") or "",
                    emotion=values.get("emotion"),
                    language=values.get("language"),
                    split=split if split in SPLITS else None,
                )
            )
    return clips


class StoredAudio(Mapping):
    """A recording of a repository, `bytes` and `path` as `load_audio` takes them, read when they are asked for."""

    def __init__(self, table: datasets.Dataset, index: int):
        self.table = table
        self.index = index

    def __getitem__(self, name: str) -> Any:
        return self.table[self.index][self.table.column_names[0]][name]

    def __iter__(self) -> Iterator[str]:
        return iter(("bytes", "path"))

    def __len__(self) -> int:
        return 2


# --- features ------------------------------------------------------------------------------------------------------------


def feature_columns(feature_size: int, num_mel_bins: int) -> Features:
    """
    The columns that `prepare_dataset.py` writes: one row for each clip and speed.

    `semantic_features` and `mel` are in half precision. `num_semantic_tokens` is the length of both `semantic_ids` and
    `semantic_features`.
    """
    return Features(
        {
            "clip": Value("string"),
            "speed": Value("float32"),
            "speaker": Value("string"),
            "emotion": Value("string"),
            "language": Value("string"),
            "text": Value("string"),
            "duration_s": Value("float32"),
            "num_semantic_tokens": Value("int32"),
            "input_ids": List(Value("int32")),
            "semantic_ids": List(Value("int32")),
            "semantic_features": Array2D((None, feature_size), "float16"),
            "mel": Array2D((None, num_mel_bins), "float16"),
            "speaker_embeds": List(Value("float32")),
        }
    )


def made_with(checkpoint: Path) -> dict[str, Any]:
    """What of a checkpoint the features depend on: sizes, and digests of the vocabulary and of the weights that made them."""
    settings = {
        name: json.loads((checkpoint / name / "config.json").read_text()) for name in ("t2s", "semantic_codec", "s2m")
    }
    digests = {"vocabulary": digest_files([checkpoint / "bpe.model"])}
    for name in ("semantic_encoder", "semantic_codec", "speaker_encoder"):
        digests[name] = digest_files(sorted((checkpoint / name).glob("*.safetensors")))
    return {
        "text_vocab_size": settings["t2s"]["text_vocab_size"],
        "feature_size": settings["semantic_codec"]["feature_size"],
        "codebook_size": settings["semantic_codec"]["codebook_size"],
        "num_mel_bins": settings["s2m"]["num_mel_bins"],
        "speaker_embed_dim": settings["s2m"]["speaker_embed_dim"],
        **digests,
    }


def load_features(folder: str | Path, split: str, checkpoint: Path | None = None) -> datasets.Dataset:
    r"""
    One split of a folder that `prepare_dataset.py` wrote, memory-mapped; rows come as numpy arrays.

    Args:
        folder (`str` or `Path`):
            The folder: `features.json` and the shards `train/shard-00000` … and `validation/shard-00000` ….
        split (`str`):
            `"train"` or `"validation"`.
        checkpoint (`Path`, *optional*):
            The checkpoint folder that the features must have been made with.

    Raises:
        ValueError: it is no such folder, preparation was not finished, the split is empty, or it was made with other parts.
    """
    folder = Path(folder)
    if not (folder / "features.json").is_file():
        raise ValueError(
            f"{folder} holds no prepared features: it has no features.json. Make it with `python training/prepare_dataset.py`; a "
            "preparation that was interrupted goes on where it stopped when it is called again."
        )
    found = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    for name, value in ({} if checkpoint is None else made_with(checkpoint)).items():
        if found.get(name) != value:
            raise ValueError(
                f"The features in {folder} were made with {name} {found.get(name)}, but {checkpoint} has {value}. Prepare "
                "the data again with this checkpoint."
            )
    shards = sorted(path for path in (folder / split).glob("shard-*") if path.is_dir())
    tables = [load_from_disk(str(shard)) for shard in shards]
    if not sum(map(len, tables)):
        raise ValueError(f"{folder / split} holds no clips. See report.jsonl there for what was skipped, and why.")
    return concatenate_datasets(tables).with_format("numpy")


# --- order ---------------------------------------------------------------------------------------------------------------


class EndlessBatchSampler(Sampler):
    r"""
    Batches `start` to `stop` of an endless sequence that depends on the seed alone. Rows come as pairs (index, number of the
    draw): all rows in a new order, then all again.

    Args:
        num_rows (`int`): rows of the dataset.
        batch_size (`int`): rows in a batch, over all processes.
        batches_per_step (`int`): batches whose gradients are accumulated; they share out the rows of one larger batch.
        seed (`int`): of the order.
        start, stop (`int`): first batch, and the one behind the last.
        lengths (`list[int]`, *optional*): of the rows; brings rows of like length together.
    """

    drop_last = True

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        batches_per_step: int,
        seed: int,
        start: int,
        stop: int,
        lengths: list[int] | None = None,
    ):
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.seed = seed
        self.start = start
        self.stop = stop
        self.lengths = lengths

    def __len__(self) -> int:
        return max(0, self.stop - self.start)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        num_steps = 1
        if self.lengths is not None:
            # Within one round of the rows, so that no batch holds a row twice.
            num_steps = min(BUCKET_STEPS, max(1, self.num_rows // (self.batch_size * self.batches_per_step)))
        per_bucket = num_steps * self.batches_per_step
        number = self.start
        while number < self.stop:
            bucket = number // per_bucket
            batches = self._bucket(bucket, num_steps)
            for batch in batches[number - bucket * per_bucket :][: self.stop - number]:
                yield batch
                number += 1

    def _bucket(self, bucket: int, num_steps: int) -> list[list[tuple[int, int]]]:
        per_step = self.batch_size * self.batches_per_step
        draws = range(bucket * num_steps * per_step, (bucket + 1) * num_steps * per_step)
        epochs = range(draws[0] // self.num_rows, draws[-1] // self.num_rows + 1)
        orders = {epoch: self._order(epoch) for epoch in epochs}
        rows = [(int(orders[draw // self.num_rows][draw % self.num_rows]), draw) for draw in draws]
        if self.lengths is not None:
            rows.sort(key=lambda row: self.lengths[row[0]])
        steps = [rows[start : start + per_step] for start in range(0, len(rows), per_step)]
        order = np.random.default_rng([self.seed, 1, bucket]).permutation(num_steps)
        rows = [row for index in order for row in steps[index]]
        return [rows[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, 0, epoch]).permutation(self.num_rows)


def draw_generator(seed: int, draw: int) -> np.random.Generator:
    """The random numbers of one draw of one example."""
    return np.random.default_rng([seed, 2, draw])


def num_ctc_frames(ids: list[int]) -> int:
    """Frames that CTC needs to spell `ids`: one for each, and one between two that are alike."""
    return len(ids) + sum(first == second for first, second in zip(ids, ids[1:], strict=False))


def ctc_token_errors(
    logits: torch.Tensor, num_frames: torch.LongTensor, texts: torch.LongTensor, text_lengths: torch.LongTensor
) -> list[int]:
    r"""
    Edit distance of what CTC reads, greedily, to the text.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, length, vocab_size + 1)`): or log-probabilities; the blank is the last.
        num_frames (`torch.LongTensor` of shape `(batch_size,)`): frames of each row.
        texts (`torch.LongTensor` of shape `(batch_size, text_length)`): ids, anything behind the end.
        text_lengths (`torch.LongTensor` of shape `(batch_size,)`): ids of each text.

    Returns:
        `list[int]`: one number for each row.
    """
    blank, errors = logits.shape[-1] - 1, []
    for path, length, text, num_ids in zip(logits.argmax(dim=-1), num_frames, texts, text_lengths, strict=True):
        found = [token for token in path[:length].unique_consecutive().tolist() if token != blank]
        errors.append(Levenshtein.distance(found, text[:num_ids].tolist()))
    return errors


# --- examples of the text-to-semantic transformer ------------------------------------------------------------------------


# Tokens of the history that are wrong together.
WRONG_RUN = 4


class Alignments:
    r"""
    Which piece of the text is spoken at each semantic token, from when its words are.

    Beside a recording lies a JSON file of the same name with `word_begins_s` and `word_ends_s`, seconds of the first and of the last
    sound of each word. The sounds of a word are shared out among its pieces by their letters; a pause is its last piece's.

    Args:
        folder (`Path`): against which the names of the clips are read, where they are not whole paths.
        tokenizer (`IndexTTS2Tokenizer`): of the checkpoint that the features were made with.
        token_rate (`float`): semantic tokens in a second.
    """

    def __init__(self, folder: Path, tokenizer: Any, token_rate: float):
        self.folder = folder
        self.tokenizer = tokenizer
        self.token_rate = token_rate

    def path_of(self, clip: str) -> Path:
        return (self.folder / clip).with_suffix(".json")

    def text_positions(self, row: Mapping[str, Any]) -> torch.LongTensor:
        """
        Positions in `input_ids` for the semantic tokens of a row of `load_features`, of shape `(num_semantic_tokens,)`; all -100 where
        there is no alignment or another number of words.

        Raises:
            ValueError: the alignment cannot be read.
        """
        num_tokens = len(row["semantic_ids"])
        unknown = torch.full((num_tokens,), -100)
        path = self.path_of(row["clip"])
        if not path.is_file():
            return unknown
        try:
            alignment = json.loads(path.read_text(encoding="utf-8"))
            begins, ends = (np.asarray(alignment[name], dtype=float) for name in ("word_begins_s", "word_ends_s"))
            if len(begins) != len(ends):
                raise ValueError(f"it has {len(begins)} begins and {len(ends)} ends")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"The alignment {path} cannot be used: {error!r}. It needs `word_begins_s` and `word_ends_s`, as many of each."
            ) from error
        words: list[list[int]] = []  # the letters of their pieces
        for piece in self.tokenizer.convert_ids_to_tokens(row["input_ids"].tolist()):
            if piece.startswith("▁") or not words:
                words.append([])
            is_known = piece != self.tokenizer.unk_token
            words[-1].append(sum(character.isalnum() for character in piece) if is_known else 0)
        if len(words) != len(begins) or not all(map(sum, words)):
            return unknown
        piece_ends = []
        for letters, begin, end, next_begin in zip(words, begins, ends, [*begins[1:], np.inf], strict=True):
            piece_ends += [begin + (end - begin) * share for share in np.cumsum(letters) / sum(letters)]
            piece_ends[-1] = next_begin
        times = (np.arange(num_tokens) + 0.5) / self.token_rate * float(row["speed"])
        return torch.from_numpy(np.searchsorted(piece_ends, times, side="right"))


class T2SDataset(Dataset):
    r"""
    Target, voice prompt and emotion prompt of the text-to-semantic transformer.

    The voice prompt is another clip of the target's speaker, at a speed of its own. The emotion prompt is another clip of that
    speaker with the same emotion label; where there is none, the target itself. Clips of a speaker who has no other are left
    out as targets.

    Args:
        features (`datasets.Dataset`): from `load_features`.
        seed (`int`): of prompts, free lengths and jitter.
        free_length_probability (`float`, defaults to 0.3): how often the length is not told (paper, section 3.1.1).
        with_emotion (`bool`, defaults to `False`): whether there is an emotion prompt.
        prompts (`datasets.Dataset`, *optional*):
            Further clips, which are prompts alone: for held-out clips those to learn from, for a small folder holds out one or
            two of a speaker.
        length_jitter (`int`, defaults to 0): how many tokens a told count may be off the true one, either way.
        max_semantic_tokens (`int`, *optional*): of the model: a count with jitter is at most this, and at least 1.
        wrong_history_probability (`float`, defaults to 0.0): how often `WRONG_RUN` tokens that are read are some of elsewhere.
        text_dropout_probability (`float`, defaults to 0.0): how often there is no text.
        alignments (`Alignments`, *optional*): where each piece of the text is spoken; gives `text_positions`.

    Raises:
        ValueError: no clip has another one of its speaker.
    """

    def __init__(
        self,
        features: datasets.Dataset,
        seed: int,
        free_length_probability: float = 0.3,
        with_emotion: bool = False,
        prompts: datasets.Dataset | None = None,
        length_jitter: int = 0,
        max_semantic_tokens: int | None = None,
        alignments: Alignments | None = None,
        wrong_history_probability: float = 0.0,
        text_dropout_probability: float = 0.0,
    ):
        rows = range(len(features))
        if prompts is not None:
            features = concatenate_datasets([features, prompts]).with_format("numpy")
        self.features = features
        self.seed = seed
        self.free_length_probability = free_length_probability
        self.with_emotion = with_emotion
        self.length_jitter = length_jitter
        self.max_semantic_tokens = max_semantic_tokens
        self.alignments = alignments
        self.wrong_history_probability = wrong_history_probability
        self.text_dropout_probability = text_dropout_probability
        table = features.with_format(None).select_columns(["clip", "speaker", "emotion", "num_semantic_tokens"])
        self.clips, self.speakers, self.emotions, lengths = (list(table[name]) for name in table.column_names)
        self.speaker_names = sorted(set(self.speakers))
        self.speaker_numbers = {name: number for number, name in enumerate(self.speaker_names)}
        self.emotion_names = sorted({name for name in self.emotions if name})
        self.emotion_numbers = {name: number for number, name in enumerate(self.emotion_names)}
        self.rows_of_speaker: dict[str, list[int]] = defaultdict(list)
        clips_of_speaker: dict[str, set[str]] = defaultdict(set)
        for row, (clip, speaker) in enumerate(zip(self.clips, self.speakers, strict=True)):
            self.rows_of_speaker[speaker].append(row)
            clips_of_speaker[speaker].add(clip)
        self.targets = [row for row in rows if len(clips_of_speaker[self.speakers[row]]) > 1]
        self.lone_speakers = sorted(
            {self.speakers[row] for row in rows} - {self.speakers[row] for row in self.targets}
        )
        if not self.targets:
            if prompts is not None:
                raise ValueError(
                    f"None of the {len(rows)} held-out clips has another clip of its speaker as a prompt, held out or in the "
                    "training split. Hold out clips of speakers that have more."
                )
            raise ValueError(
                f"No speaker of the training split has two clips ({len(self.speaker_names)} speakers, {len(set(self.clips))} clips), but "
                "prompt and target are different clips of one speaker. Check the column `speaker`, or cut long recordings into "
                "several clips."
            )
        self.lengths = [lengths[row] for row in self.targets]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The example of a pair (index, number of the draw)."""
        index, draw = key
        rng = draw_generator(self.seed, draw)
        row = self.targets[index]
        others = [other for other in self.rows_of_speaker[self.speakers[row]] if self.clips[other] != self.clips[row]]
        target = self.features[row]
        example = {
            "id": self.clips[row],
            "input_ids": torch.as_tensor(target["input_ids"]).long(),
            "semantic_ids": torch.as_tensor(target["semantic_ids"]).long(),
            "speaker_features": torch.as_tensor(self.features[int(rng.choice(others))]["semantic_features"]).float(),
            "speaker_number": self.speaker_numbers[self.speakers[row]],
            "emotion_number": self.emotion_numbers.get(self.emotions[row], -100),
            "is_free": rng.random() < self.free_length_probability,
            "num_semantic_tokens": len(target["semantic_ids"]),
        }
        if self.alignments is not None:
            example["text_positions"] = self.alignments.text_positions(target)
        if self.with_emotion:
            alike = [other for other in others if self.emotions[row] and self.emotions[other] == self.emotions[row]]
            prompt = self.features[int(rng.choice(alike))] if alike else target
            example["emotion_features"] = torch.as_tensor(prompt["semantic_features"]).float()
        if self.length_jitter:
            # Draws that not every run has come last: the others are what they are without them.
            jitter = int(rng.integers(-self.length_jitter, self.length_jitter, endpoint=True))
            count = max(1, example["num_semantic_tokens"] + jitter)
            limit = self.max_semantic_tokens
            example["num_semantic_tokens"] = count if limit is None else min(count, limit)
        if self.wrong_history_probability:
            example["read_ids"] = self._with_wrong_runs(example["semantic_ids"], rng)
        example["has_text"] = rng.random() >= self.text_dropout_probability
        if not example["has_text"] and "text_positions" in example:
            example["text_positions"] = torch.full_like(example["text_positions"], -100)
        return example

    def _with_wrong_runs(self, semantic_ids: torch.LongTensor, rng: np.random.Generator) -> torch.LongTensor:
        """Tokens of which runs were replaced by runs of the same clip: voice and manner stay, what is said does not."""
        places = np.arange(len(semantic_ids))
        runs = places // WRONG_RUN
        is_wrong = rng.random(runs[-1] + 1) < self.wrong_history_probability
        sources = rng.integers(len(semantic_ids), size=runs[-1] + 1)
        elsewhere = (sources[runs] + places % WRONG_RUN) % len(semantic_ids)
        return semantic_ids[torch.from_numpy(np.where(is_wrong[runs], elsewhere, places))]


def collate_t2s(examples: list[dict[str, Any]]) -> dict[str, Any]:
    r"""
    A batch for `IndexTTS2T2SForConditionalGeneration.forward`, beside `ids`, the names of its clips, `speaker_numbers` and
    `emotion_numbers` of shape `(batch_size,)`, the latter -100 where a clip has no emotion, and, with alignments, `text_positions` of the
    shape of `labels`. Rows are padded on the right; labels and text positions with -100.
    """
    input_ids = [example["input_ids"] for example in examples]
    masks = [torch.full_like(example["input_ids"], example["has_text"]) for example in examples]
    semantic_ids = [example["semantic_ids"] for example in examples]
    counts = [0 if example["is_free"] else example["num_semantic_tokens"] for example in examples]
    batch = {
        "ids": [example["id"] for example in examples],
        "speaker_numbers": torch.tensor([example["speaker_number"] for example in examples]),
        "emotion_numbers": torch.tensor([example["emotion_number"] for example in examples]),
        "input_ids": pad_sequence(input_ids, batch_first=True),
        "attention_mask": pad_sequence(masks, batch_first=True),
        "labels": pad_sequence(semantic_ids, batch_first=True, padding_value=-100),
        "num_semantic_tokens": torch.tensor(counts),
    }
    if "text_positions" in examples[0]:
        positions = [example["text_positions"] for example in examples]
        batch["text_positions"] = pad_sequence(positions, batch_first=True, padding_value=-100)
    if "read_ids" in examples[0]:
        batch["semantic_ids"] = pad_sequence([example["read_ids"] for example in examples], batch_first=True)
    for name in ("speaker", "emotion"):
        if f"{name}_features" in examples[0]:
            rows = [example[f"{name}_features"] for example in examples]
            batch[f"{name}_features"] = pad_sequence(rows, batch_first=True)
            batch[f"{name}_feature_lengths"] = torch.tensor([len(row) for row in rows])
    return batch
