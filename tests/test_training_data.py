"""Manifests and the programs that read them, prepared features, the order of the batches, and the examples of the text-to-semantic transformer."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_speech
from datasets import Audio, ClassLabel, Dataset, Features, Value

from checkpoint import digest_files
from data import (
    BUCKET_STEPS,
    Alignments,
    EndlessBatchSampler,
    T2SDataset,
    collate_t2s,
    ctc_token_errors,
    draw_generator,
    feature_columns,
    find_fault,
    load_features,
    made_with,
    num_ctc_frames,
    read_manifest,
)
from indextts2_hf.feature_extraction_indextts2 import load_audio
from programs import TRAINING


HEADER = "file_name,text,speaker,emotion,language\n"


# --- manifests -------------------------------------------------------------------------------------------------------------


def test_folder_with_a_table(tmp_path):
    (tmp_path / "metadata.csv").write_text(
        HEADER + 'a/1.wav,"Hello, world.",anna,happy,en\n2.wav,Grüße,"Bert, jr.",,\n', encoding="utf-8"
    )
    first, second = read_manifest(tmp_path)
    assert (first.clip, first.audio, first.speaker) == ("a/1.wav", str(tmp_path / "a" / "1.wav"), "anna")
    assert (first.text, first.emotion, first.language, first.split) == ("Hello, world.", "happy", "en", None)
    assert (second.text, second.speaker, second.emotion, second.language) == ("Grüße", "Bert, jr.", None, None)


def test_split_folders_in_both_formats(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "validation").mkdir()
    (tmp_path / "train" / "metadata.csv").write_text(HEADER + "1.wav,one,a,,\n")
    row = {"file_name": "1.wav", "text": "two", "speaker": "b"}
    (tmp_path / "validation" / "metadata.jsonl").write_text(json.dumps(row) + "\n\n")
    train, validation = read_manifest(tmp_path)
    assert (train.clip, train.split, train.audio) == ("train/1.wav", "train", str(tmp_path / "train" / "1.wav"))
    assert (validation.clip, validation.split, validation.text) == ("validation/1.wav", "validation", "two")


@pytest.mark.parametrize("name", ["list.jsonl", "list.csv"])
def test_manifest_file_with_other_columns(tmp_path, name):
    rows = [
        {"path": "/there/1.wav", "sentence": "one", "client": 0, "split": "train"},
        {"path": "2.wav", "sentence": " two\u2028lines ", "client": "unknown", "split": "validation"},
        {"path": "3.wav", "sentence": None, "client": "", "split": "test"},
    ]
    if name.endswith("csv"):
        lines = [
            "path,sentence,client,split",
            *(",".join(str(v or "") if v != 0 else "0" for v in r.values()) for r in rows),
        ]
        (tmp_path / name).write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    else:
        (tmp_path / name).write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    clips = read_manifest(tmp_path / name, {"file_name": "path", "text": "sentence", "speaker": "client"})
    assert [clip.audio for clip in clips] == ["/there/1.wav", str(tmp_path / "2.wav"), str(tmp_path / "3.wav")]
    assert [clip.text for clip in clips] == ["one", "two\u2028lines", ""]
    # A speaker may be called 0; clips of nobody known are not each other's prompts.
    assert [clip.speaker for clip in clips] == ["0", "2.wav", "3.wav"]
    assert [clip.split for clip in clips] == ["train", "validation", None]


def test_row_without_a_file(tmp_path):
    (tmp_path / "metadata.csv").write_text(HEADER + ",one,a,,\n1.wav\n")
    nothing, short = read_manifest(tmp_path)
    assert nothing.audio is None
    assert (short.text, short.speaker) == ("", "1.wav")


def write_repository(folder: Path, splits: tuple[str, ...]) -> None:
    """A repository of `datasets` with recordings inside its parquet files."""
    for number, split in enumerate(splits):
        buffer = io.BytesIO()
        soundfile.write(buffer, make_speech(0.3, 16000, seed=number), 16000, format="FLAC")
        features = Features(
            {
                "audio": {"bytes": Value("binary"), "path": Value("string")},
                "text": Value("string"),
                "speaker": Value("int64"),
                "emotion": ClassLabel(names=["calm", "happy"]),
            }
        )
        rows = {
            "audio": [{"bytes": buffer.getvalue(), "path": "x.flac"}] * 3,
            "text": [f"{split} {index}" for index in range(3)],
            "speaker": [0, 1, None],
            "emotion": [1, 0, None],
        }
        (folder / "data").mkdir(parents=True, exist_ok=True)
        table = Dataset.from_dict(rows, features=features).cast_column("audio", Audio(decode=False))
        table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def test_repository(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_repository(tmp_path / "speech", ("train", "validation", "test"))
    clips = read_manifest(tmp_path / "speech")
    assert [clip.clip for clip in clips] == [f"{split}/{n:08d}" for split in ("train", "validation") for n in range(3)]
    assert [clip.split for clip in clips] == ["train"] * 3 + ["validation"] * 3
    assert [clip.speaker for clip in clips[:3]] == ["0", "1", "train/00000002"]
    assert [clip.emotion for clip in clips[:3]] == ["happy", "calm", None]
    assert clips[4].text == "validation 1" and clips[4].language is None
    # The recording is read when it is wanted, in another process too.
    audio = pickle.loads(pickle.dumps(clips[4])).audio
    waveform, sampling_rate = load_audio(audio)
    assert sampling_rate == 16000
    np.testing.assert_allclose(waveform, make_speech(0.3, 16000, seed=1), atol=1e-3)
    assert len(pickle.dumps(clips[4])) < 20_000
    assert find_fault(clips[4], 0.25) is None and find_fault(clips[4], 0.5) == "it lasts 0.30 s, 0.5 s are needed"


def test_only_what_is_needed_must_be_there(tmp_path, monkeypatch):
    (tmp_path / "metadata.csv").write_text("path,who\n1.wav,anna\n")
    with pytest.raises(ValueError, match="has no column 'text' or 'speaker', but 'path', 'who'"):
        read_manifest(tmp_path, {"file_name": "path"})
    with pytest.raises(ValueError, match="has no column 'speaker', but"):
        read_manifest(tmp_path, {"file_name": "path"}, required=("speaker",))
    with pytest.raises(ValueError, match="has no column 'file_name', but"):
        read_manifest(tmp_path, required=())
    (clip,) = read_manifest(tmp_path, {"file_name": "path", "speaker": "who"}, required=("speaker",))
    assert (clip.audio, clip.speaker, clip.text) == (str(tmp_path / "1.wav"), "anna", "")
    (clip,) = read_manifest(tmp_path, {"file_name": "path"}, required=())
    assert (clip.audio, clip.speaker, clip.text) == (str(tmp_path / "1.wav"), "1.wav", "")

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_repository(tmp_path / "speech", ("train",))
    table = Dataset.from_parquet(str(tmp_path / "speech/data/train-00000-of-00001.parquet"))
    table.select_columns(["audio"]).to_parquet(tmp_path / "sounds/train-00000-of-00001.parquet")
    clips = read_manifest(tmp_path / "sounds", required=())
    assert [(clip.speaker, clip.text) for clip in clips] == [(f"train/{number:08d}", "") for number in range(3)]
    assert len(load_audio(clips[2].audio)[0]) == 4800
    with pytest.raises(ValueError, match="sounds .train. has no column 'text' or 'speaker', but 'audio'"):
        read_manifest(tmp_path / "sounds")


@pytest.mark.parametrize(
    ("program", "columns", "options"),
    [
        ("train_vocoder", ["audio"], ["--segment_s", "0.15", "--discriminator_channels", "1"]),
        ("train_speaker_encoder", ["audio", "speaker"], ["--crop_s", "0.25"]),
    ],
)
def test_a_repository_with_other_columns_is_learnt_from(program, columns, options, tiny_checkpoint, tmp_path):
    write_repository(tmp_path / "speech", ("train", "validation"))
    for path in (tmp_path / "speech/data").iterdir():
        table = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache")).select_columns(columns)
        table.rename_columns({name: f"the_{name}" for name in columns}).to_parquet(path)
    names = {"audio": "file_name", "speaker": "speaker"}
    pairs = [f"{names[name]}=the_{name}" for name in columns]
    command = [sys.executable, TRAINING / f"{program}.py", "--model", tiny_checkpoint, "--data", tmp_path / "speech"]
    command += ["--output", tmp_path / "run", "--max_train_steps", 1, "--batch_size", 2, "--num_workers", 1]
    command += ["--columns", *pairs, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for extra in ([], ["--resume"]):
        result = subprocess.run(
            [str(item) for item in [*command, *extra]], capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0, result.stderr
        assert "cannot be" not in result.stderr and " 3 clips" in result.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["step"] == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("other.txt", "", "has no metadata.csv or metadata.jsonl"),
        ("metadata.csv", HEADER, "has no rows"),
        ("metadata.csv", "file,text\n1.wav,one\n", "no column 'file_name' or 'speaker', but 'file', 'text'"),
        ("metadata.jsonl", '{"file_name": 1}\n{"file', "line 2: this is no JSON"),
        ("metadata.jsonl", "[1, 2]", "line 1: this is no JSON object, but '\\[1, 2\\]'"),
        ("metadata.csv", b"file_name,text,speaker\n1.wav,Gr\xfc\xdfe,a\n", "not in UTF-8"),
    ],
)
def test_what_is_no_manifest(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_manifest(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a file here"):
        read_manifest(tmp_path / "nothing")


# --- features --------------------------------------------------------------------------------------------------------------


def test_features_come_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    row = {
        "clip": "clip",
        "speed": 0.9,
        "speaker": "speaker",
        "emotion": None,
        "language": "en",
        "text": "hello",
        "duration_s": 0.1,
        "num_semantic_tokens": 5,
        "input_ids": [3, 4],
        "semantic_ids": np.arange(5),
        "semantic_features": rng.standard_normal((5, 7)).astype(np.float16),
        "mel": rng.standard_normal((9, 8)).astype(np.float16),
        "speaker_embeds": rng.standard_normal(4).astype(np.float32),
    }
    other = row | {"semantic_features": row["semantic_features"][:3], "mel": row["mel"][:4]}
    columns = feature_columns(feature_size=7, num_mel_bins=8)
    assert set(columns) == set(row)
    Dataset.from_list([row, other], features=columns).save_to_disk(tmp_path / "train" / "shard-00000")
    Dataset.from_list([row], features=columns).save_to_disk(tmp_path / "train" / "shard-00001")
    (tmp_path / "features.json").write_text("{}")
    loaded = load_features(tmp_path, "train")
    assert [len(item["mel"]) for item in loaded] == [9, 4, 9]
    for name in ("semantic_features", "mel", "speaker_embeds", "semantic_ids", "input_ids"):
        np.testing.assert_array_equal(loaded[0][name], row[name])
    assert (loaded[0]["emotion"], loaded[0]["language"]) == (None, "en")
    with pytest.raises(ValueError, match="validation holds no clips.*report.jsonl"):
        load_features(tmp_path, "validation")
    (tmp_path / "features.json").unlink()
    with pytest.raises(ValueError, match="no features.json.*goes on where it stopped"):
        load_features(tmp_path, "train")


@pytest.mark.parametrize("name", ["semantic_encoder", "semantic_codec", "speaker_encoder", "vocabulary"])
def test_features_of_another_checkpoint(tiny_features, tiny_checkpoint, tmp_path, name):
    assert len(load_features(tiny_features, "train", tiny_checkpoint)) == 12
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    assert made_with(other) == made_with(tiny_checkpoint)
    path = other / "bpe.model" if name == "vocabulary" else next((other / name).glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"were made with {name} .* Prepare the data again with this checkpoint"):
        load_features(tiny_features, "train", other)


def test_large_files_are_told_apart(tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal(3_000_000).astype(np.float32)
    digests = []
    for change in (0.0, 0.0, 1e-3):
        (tmp_path / "weights").write_bytes((weights + change).tobytes())
        digests.append(digest_files([tmp_path / "weights"]))
    assert digests[0] == digests[1] != digests[2]
    (tmp_path / "weights").write_bytes(weights[:-1].tobytes())
    assert digest_files([tmp_path / "weights"]) != digests[0]


# --- order -----------------------------------------------------------------------------------------------------------------


def batches_of(num_rows=10, batch_size=3, batches_per_step=1, seed=0, start=0, stop=20, lengths=None):
    sampler = EndlessBatchSampler(num_rows, batch_size, batches_per_step, seed, start, stop, lengths)
    batches = list(sampler)
    assert len(batches) == len(sampler) == stop - start
    assert all(len(batch) == batch_size for batch in batches)
    return batches


LENGTHS = [5, 90, 7, 50, 51, 6, 91, 8, 49, 92]


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_every_row_comes_equally_often(lengths):
    # 32 steps of 5 rows are 16 epochs of 10 rows.
    rows = [row for batch in batches_of(batch_size=5, stop=BUCKET_STEPS, lengths=lengths) for row in batch]
    assert sorted(draw for _, draw in rows) == list(range(160))
    assert Counter(index for index, _ in rows) == dict.fromkeys(range(10), 16)
    if lengths is None:
        epochs = [[index for index, _ in rows[start : start + 10]] for start in range(0, 160, 10)]
        assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 16


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("start", [1, 31, 32, 33, 70])
def test_a_resumed_order_goes_on_where_it_stopped(lengths, start):
    whole = batches_of(stop=80, lengths=lengths)
    assert batches_of(start=start, stop=80, lengths=lengths) == whole[start:]
    assert batches_of(stop=start, lengths=lengths) == whole[:start]
    assert batches_of(stop=80, lengths=lengths, seed=1) != whole


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("batches_per_step", [2, 4])
def test_accumulated_batches_share_out_a_larger_one(lengths, batches_per_step):
    large = batches_of(batch_size=2 * batches_per_step, stop=40, lengths=lengths)
    small = batches_of(batch_size=2, batches_per_step=batches_per_step, stop=40 * batches_per_step, lengths=lengths)
    steps = [sum(small[n : n + batches_per_step], []) for n in range(0, len(small), batches_per_step)]
    assert steps == large


def test_rows_of_like_length_come_together():
    lengths = list(range(1000))
    spread = [
        np.mean(
            [np.ptp([lengths[index] for index, _ in batch]) for batch in batches_of(1000, 4, stop=64, lengths=given)]
        )
        for given in (None, lengths)
    ]
    assert spread[1] < spread[0] / 5
    # The lengths do not come in an order of their own.
    means = [np.mean([index for index, _ in batch]) for batch in batches_of(1000, 4, stop=32, lengths=lengths)]
    assert abs(np.corrcoef(means, range(32))[0, 1]) < 0.5


def test_more_rows_in_a_batch_than_there_are():
    (batch,) = batches_of(num_rows=2, batch_size=5, stop=1)
    assert Counter(index for index, _ in batch).keys() == {0, 1}
    assert len({draw for _, draw in batch}) == 5


def test_draws_are_independent():
    values = [draw_generator(seed, draw).random() for seed in (0, 1) for draw in range(100)]
    assert len(set(values)) == 200
    assert draw_generator(0, 7).random() == values[7]
    assert 0.4 < np.mean(values) < 0.6


# --- texts read by CTC -----------------------------------------------------------------------------------------------------


def test_frames_that_ctc_needs():
    assert [num_ctc_frames(ids) for ids in ([], [1], [1, 2], [1, 1, 1])] == [0, 1, 2, 5]


def test_token_errors_of_ctc():
    # Greedy paths `0 0 blank 0` and `1 2`, whose third frame is padding: "0 0" for "0 1", and "1 2" for "1 2".
    path = torch.tensor([[0, 0, 3, 0], [1, 2, 0, 0]])
    texts, lengths = torch.tensor([[0, 1], [1, 2]]), torch.tensor([2, 2])
    logits = torch.nn.functional.one_hot(path, 4).float()
    assert ctc_token_errors(logits, torch.tensor([4, 2]), texts, lengths) == [1, 0]


# --- examples --------------------------------------------------------------------------------------------------------------


def make_table(rows: list[tuple]) -> Dataset:
    """Rows of `(clip, speaker, emotion, speed)`; the features of row `i` all have the value `i`."""
    items = [
        {
            "clip": clip,
            "speed": speed,
            "speaker": speaker,
            "emotion": emotion,
            "language": None,
            "text": "",
            "duration_s": 1.0,
            "num_semantic_tokens": 3 + number,
            "input_ids": [2, 3 + number],
            "semantic_ids": [number] * (3 + number),
            "semantic_features": np.full((3 + number, 4), number, dtype=np.float16),
            "mel": np.zeros((2, 8), dtype=np.float16),
            "speaker_embeds": [0.0],
        }
        for number, (clip, speaker, emotion, speed) in enumerate(rows)
    ]
    return Dataset.from_list(items, features=feature_columns(4, 8)).with_format("numpy")


ROWS = [
    ("a1", "anna", "happy", 1.0),
    ("a1", "anna", "happy", 0.9),
    ("a2", "anna", "sad", 1.0),
    ("a2", "anna", "sad", 0.9),
    ("a3", "anna", "happy", 1.0),
    ("b1", "bert", None, 1.0),
    ("b2", "bert", None, 1.0),
    ("c1", "carl", "happy", 1.0),
    ("c1", "carl", "happy", 0.9),
]


def test_prompts():
    dataset = T2SDataset(make_table(ROWS), seed=0, with_emotion=True)
    # Carl has one clip, at two speeds.
    assert len(dataset) == 7 and dataset.lone_speakers == ["carl"]
    assert dataset.lengths == [3 + number for number in range(7)]
    voices, emotions = {}, {}
    for index in range(7):
        examples = [dataset[index, draw] for draw in range(60)]
        assert {example["id"] for example in examples} == {ROWS[index][0]}
        assert {example["speaker_number"] for example in examples} == {["anna", "bert", "carl"].index(ROWS[index][1])}
        emotion_number = {"happy": 0, "sad": 1, None: -100}[ROWS[index][2]]
        assert {example["emotion_number"] for example in examples} == {emotion_number}
        assert all(example["semantic_ids"].tolist() == [index] * (3 + index) for example in examples)
        voices[index] = {int(example["speaker_features"][0, 0]) for example in examples}
        emotions[index] = {int(example["emotion_features"][0, 0]) for example in examples}
    # Another clip of the speaker, at any speed.
    assert voices == {0: {2, 3, 4}, 1: {2, 3, 4}, 2: {0, 1, 4}, 3: {0, 1, 4}, 4: {0, 1, 2, 3}, 5: {6}, 6: {5}}
    # Another clip with the same label; the target itself where there is none.
    assert emotions == {0: {4}, 1: {4}, 2: {2}, 3: {3}, 4: {0, 1}, 5: {5}, 6: {6}}


def test_the_piece_that_is_spoken(tokenizer, tmp_path):
    def ids(text: str) -> np.ndarray:
        return np.array(tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text)))

    alignments = Alignments(tmp_path, tokenizer, token_rate=10.0)
    assert (
        tokenizer.tokenize("Alone, so!") == ["▁AL", "ONE", ",", "▁SO", "!"]
        and ids("so!")[-1] == tokenizer.unk_token_id
    )
    row = {"clip": "a.flac", "speed": 1.0, "semantic_ids": np.zeros(12), "input_ids": ids("Alone, so!")}
    unknown = [-100] * 12
    assert alignments.text_positions(row).tolist() == unknown
    # The sounds of a word by its letters, a pause to the comma, and behind all the last piece.
    (tmp_path / "a.json").write_text(json.dumps({"word_begins_s": [0.1, 0.8], "word_ends_s": [0.6, 1.0]}))
    assert alignments.text_positions(row).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]
    # Half as fast again it is over sooner.
    fast = alignments.text_positions({**row, "speed": 1.5}).tolist()
    assert fast == [0, 0, 1, 1, 2, 3, 3] + [4] * 5
    # Another number of words, or a word without letters: nothing is known.
    for text in ("Alone", "Alone, so! so", "Alone -"):
        assert alignments.text_positions({**row, "input_ids": ids(text)}).tolist() == unknown
    for content in ("{}", '{"word_begins_s": [0.1, 0.8], "word_ends_s": [0.6]}'):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(ValueError, match="a.json cannot be used.*word_begins_s"):
            alignments.text_positions(row)


def test_text_positions_in_a_batch(tokenizer, tmp_path):
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("Alone"))
    table = make_table(ROWS).map(lambda _: {"input_ids": ids})
    row = table[0]
    (tmp_path / "a1.json").write_text(json.dumps({"word_begins_s": [0.0], "word_ends_s": [0.02]}))
    dataset = T2SDataset(table, seed=0, alignments=Alignments(tmp_path, tokenizer, token_rate=50.0))
    batch = collate_t2s([dataset[0, 0], dataset[2, 1]])
    assert batch["text_positions"].shape == batch["labels"].shape
    assert (batch["text_positions"][0, : len(row["semantic_ids"])] >= 0).all()
    assert (batch["text_positions"][0, len(row["semantic_ids"]) :] == -100).all()
    assert (batch["text_positions"][1] == -100).all()


def test_an_example_depends_on_its_draw_alone():
    table = make_table(ROWS)
    first, second = (T2SDataset(table, seed=3, with_emotion=True) for _ in range(2))
    for draw in range(20):
        ours, theirs = first[1, draw], pickle.loads(pickle.dumps(second))[1, draw]
        for name, value in ours.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(theirs[name])) if name != "id" else True
    other = T2SDataset(table, seed=4)
    assert [bool(first[0, draw]["is_free"]) for draw in range(40)] != [
        bool(other[0, draw]["is_free"]) for draw in range(40)
    ]


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_free_lengths(probability):
    dataset = T2SDataset(make_table(ROWS), seed=0, free_length_probability=probability)
    share = np.mean([dataset[0, draw]["is_free"] for draw in range(300)])
    assert share == pytest.approx(probability, abs=0.08 if 0 < probability < 1 else 0)


def test_length_jitter_changes_the_told_count_alone():
    options = {"seed": 0, "free_length_probability": 0.5, "with_emotion": True}
    table = make_table(ROWS)
    exact, jittered = T2SDataset(table, **options), T2SDataset(table, **options, length_jitter=2)
    ours, theirs = ([dataset[6, draw] for draw in range(200)] for dataset in (jittered, exact))
    told = {example["num_semantic_tokens"] for example in ours}
    assert {example["num_semantic_tokens"] for example in theirs} == {9}
    # Prompts, free lengths and labels are what they are without it.
    batch, exact_batch = collate_t2s(ours), collate_t2s(theirs)
    is_free = batch.pop("num_semantic_tokens") == 0
    assert torch.equal(is_free, exact_batch.pop("num_semantic_tokens") == 0) and is_free.any() and not is_free.all()
    assert batch.pop("ids") == exact_batch.pop("ids")
    for name, value in batch.items():
        assert torch.equal(value, exact_batch[name]), name
    assert told == {7, 8, 9, 10, 11}


def test_length_jitter_depends_on_the_draw_alone():
    dataset = T2SDataset(make_table(ROWS), seed=0, length_jitter=2)
    other = pickle.loads(pickle.dumps(dataset))
    counts = [dataset[6, draw]["num_semantic_tokens"] for draw in range(40)]
    assert [other[6, draw]["num_semantic_tokens"] for draw in reversed(range(40))] == counts[::-1]
    assert len(set(counts)) > 1
    reseeded = T2SDataset(make_table(ROWS), seed=1, length_jitter=2)
    assert [reseeded[6, draw]["num_semantic_tokens"] for draw in range(40)] != counts


def test_a_count_with_jitter_has_a_row_of_its_own():
    """Row 0 is the free length, and the table ends at the model's largest count."""
    dataset = T2SDataset(make_table(ROWS), seed=0, free_length_probability=0, length_jitter=5, max_semantic_tokens=10)
    for index, told in ((0, set(range(1, 9))), (6, set(range(4, 11)))):
        examples = [dataset[index, draw] for draw in range(200)]
        assert {example["num_semantic_tokens"] for example in examples} == told
        assert set(collate_t2s(examples)["num_semantic_tokens"].tolist()) == told


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_text_dropout_takes_the_text_and_its_positions_alone(probability, tokenizer, tmp_path):
    ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize("Alone"))
    table = make_table(ROWS).map(lambda _: {"input_ids": ids})
    (tmp_path / "a1.json").write_text(json.dumps({"word_begins_s": [0.0], "word_ends_s": [0.02]}))
    options = {"seed": 0, "with_emotion": True, "length_jitter": 2, "wrong_history_probability": 0.5}
    options["alignments"] = Alignments(tmp_path, tokenizer, token_rate=50.0)
    dropped, kept = (T2SDataset(table, **options, text_dropout_probability=p) for p in (probability, 0.0))
    batch, kept_batch = (collate_t2s([dataset[0, draw] for draw in range(200)]) for dataset in (dropped, kept))
    assert batch.pop("ids") == kept_batch.pop("ids")
    has_text = batch.pop("attention_mask").any(dim=1)
    assert kept_batch.pop("attention_mask").all()
    assert 1 - has_text.float().mean() == pytest.approx(probability, abs=0.08 if probability < 1 else 0)
    positions, kept_positions = batch.pop("text_positions"), kept_batch.pop("text_positions")
    assert (kept_positions >= 0).any()
    assert torch.equal(positions, torch.where(has_text[:, None], kept_positions, -100))
    for name, value in batch.items():
        assert torch.equal(value, kept_batch[name]), name


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_wrong_runs_are_read_and_what_is_to_be_said_stays(probability):
    options = {"seed": 0, "with_emotion": True, "length_jitter": 2}
    table = make_table(ROWS).map(lambda _: {"semantic_ids": list(range(42)), "num_semantic_tokens": 42})
    true, wrong = (
        T2SDataset(table.with_format("numpy"), **options, wrong_history_probability=p) for p in (0.0, probability)
    )
    ours, theirs = ([dataset[6, draw] for draw in range(200)] for dataset in (wrong, true))
    batch, true_batch = collate_t2s(ours), collate_t2s(theirs)
    read_ids = batch.pop("semantic_ids")
    assert batch.pop("ids") == true_batch.pop("ids") and "semantic_ids" not in true_batch
    for name, value in batch.items():
        assert torch.equal(value, true_batch[name]), name
    # Four tokens at a time, the last two as well, from anywhere in the clip.
    is_true = read_ids == batch["labels"]
    shifts = (read_ids - batch["labels"]) % 42
    runs = [shifts[:, start : start + 4] for start in range(0, 42, 4)]
    assert all((run == run[:, :1]).all() for run in runs)
    assert set(shifts.flatten().tolist()) == set(range(42))
    # One of 42 places is the right one.
    assert 1 - is_true.float().mean() == pytest.approx(probability * 41 / 42, abs=0.03)
    other = pickle.loads(pickle.dumps(wrong))
    assert torch.equal(other[6, 11]["read_ids"], ours[11]["read_ids"])


def test_without_length_jitter_the_draws_are_as_ever():
    """What these draws gave before there was a jitter."""
    dataset = T2SDataset(make_table(ROWS), seed=0, with_emotion=True)
    found = []
    for draw in range(8):
        example = dataset[0, draw]
        found.append((int(example["speaker_features"][0, 0]), int(example["is_free"])))
    assert found == [(4, 0), (4, 0), (2, 1), (2, 0), (3, 0), (3, 0), (3, 0), (4, 0)]
    batch = collate_t2s([dataset[0, draw] for draw in range(8)])
    assert batch["num_semantic_tokens"].tolist() == [0 if is_free else 3 for _, is_free in found]


def test_held_out_clips_are_prompted_by_training_clips_too():
    held_out = [
        ("a9", "anna", "sad", 1.0),
        ("b8", "bert", None, 1.0),
        ("b9", "bert", None, 1.0),
        ("d1", "dora", None, 1.0),
    ]
    dataset = T2SDataset(make_table(held_out), seed=0, with_emotion=True, prompts=make_table(ROWS))
    assert len(dataset) == 3 and dataset.lone_speakers == ["dora"] and dataset.lengths == [3, 4, 5]
    voices = []
    for index in range(3):
        examples = [dataset[index, draw] for draw in range(60)]
        assert {example["id"] for example in examples} == {held_out[index][0]}
        voices.append({int(example["speaker_features"][0, 0]) for example in examples})
    # Anna's clips to learn from, at any speed; Bert's, and his other held-out clip.
    assert voices == [{0, 1, 2, 3, 4}, {2, 5, 6}, {1, 5, 6}]
    # Without them there is Bert alone.
    alone = T2SDataset(make_table(held_out), seed=0)
    assert len(alone) == 2 and alone.lone_speakers == ["anna", "dora"]


def test_no_pairs():
    message = "No speaker of the training split has two clips \\(1 speakers, 1 clips\\).*column `speaker`"
    with pytest.raises(ValueError, match=message):
        T2SDataset(make_table(ROWS[-2:]), seed=0)
    with pytest.raises(ValueError, match="None of the 1 held-out clips has another clip of its speaker"):
        T2SDataset(make_table([("d1", "dora", None, 1.0)]), seed=0, prompts=make_table(ROWS))


def test_collate():
    dataset = T2SDataset(make_table(ROWS), seed=0, with_emotion=True, free_length_probability=0.5)
    draws = [(0, draw) for draw in range(8)] + [(4, draw) for draw in range(8)]
    examples = [dataset[key] for key in draws]
    batch = collate_t2s(examples)
    assert batch["ids"] == ["a1"] * 8 + ["a3"] * 8
    assert batch["speaker_numbers"].tolist() == [0] * 16
    assert batch["emotion_numbers"].tolist() == [0] * 16
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (16, 2)
    assert batch["labels"].shape == (16, 7)
    assert batch["labels"][0].tolist() == [0, 0, 0, -100, -100, -100, -100]
    assert batch["labels"][8].tolist() == [4] * 7
    lengths = [3] * 8 + [7] * 8
    told = [0 if example["is_free"] else length for example, length in zip(examples, lengths, strict=True)]
    assert batch["num_semantic_tokens"].tolist() == told and 0 in told and 3 in told and 7 in told
    for name in ("speaker", "emotion"):
        counts = batch[f"{name}_feature_lengths"].tolist()
        features = batch[f"{name}_features"]
        assert features.shape == (16, max(counts), 4) and features.dtype == torch.float32
        for row, example, count in zip(features, examples, counts, strict=True):
            assert torch.equal(row[:count], example[f"{name}_features"]) and not row[count:].any()
    assert "emotion_features" not in collate_t2s([T2SDataset(make_table(ROWS), seed=0)[0, 0]])


def test_a_batch_has_the_loss_of_its_rows(tiny_model, tiny_features):
    """The padding of the collator and of the model agree."""
    dataset = T2SDataset(load_features(tiny_features, "train"), seed=0, with_emotion=True, free_length_probability=0.5)
    examples = [dataset[index, index] for index in (0, 3, 5, 9)]
    names = ("ids", "speaker_numbers", "emotion_numbers")

    def loss(rows):
        with torch.no_grad():
            batch = collate_t2s(rows)
            return tiny_model.t2s(**{name: value for name, value in batch.items() if name not in names}).loss.item()

    assert loss(examples) == pytest.approx(np.mean([loss([example]) for example in examples]), rel=1e-5)
