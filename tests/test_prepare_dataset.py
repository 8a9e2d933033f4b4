"""Recordings to features: they are those of inference, whatever is left out is reported, and nothing is done twice or lost."""

import csv
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_speech
from datasets import load_from_disk

import prepare_dataset
from data import Clip, choose_splits, load_features, made_with
from indextts2_hf import IndexTTS2ForTextToWaveform, IndexTTS2Processor
from prepare_dataset import Preparer, Settings, Shard, change_speed, plan_shards, prepare_in_workers
from programs import TRAINING, run_killed, run_program, run_to_error


SAMPLING_RATE = 16000
COLUMNS = ["file_name", "text", "speaker", "emotion", "language"]


def write_clip(path: Path, seconds: float, seed: int = 0, sampling_rate: int = SAMPLING_RATE) -> None:
    soundfile.write(path, make_speech(seconds, sampling_rate, 110.0 + 30 * seed, seed=seed), sampling_rate)


def write_table(folder: Path, rows: list[list[str]]) -> None:
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def read_report(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "report.jsonl").read_text().splitlines()]


def assert_same_features(folder: Path, other: Path) -> None:
    for split in ("train", "validation"):
        ours, theirs = load_features(folder, split), load_features(other, split)
        assert len(ours) == len(theirs)
        for row, other_row in zip(ours, theirs, strict=True):
            for name, value in row.items():
                assert np.array_equal(value, other_row[name]), (row["clip"], name)
    assert (folder / "report.jsonl").read_text() == (other / "report.jsonl").read_text()
    assert (folder / "features.json").read_text() == (other / "features.json").read_text()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Six good clips, and one of everything that can be wrong with a clip."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = []
    for number in range(6):
        name, speaker = f"good{number}.wav", f"speaker{number % 2}"
        write_clip(folder / name, 0.7 + 0.1 * number, number, sampling_rate=(16000, 22050, 44100)[number % 3])
        emotion, language = ("Überrascht", "de") if number == 0 else ("happy", "en")
        rows.append([name, "Hello, world.", speaker, emotion, language])
    write_clip(folder / "lone.wav", 0.8, 7)
    write_clip(folder / "textless.wav", 0.8)
    write_clip(folder / "punctuation.wav", 0.8)
    write_clip(folder / "endless.wav", 0.8)
    write_clip(folder / "long.wav", 3.2)
    write_clip(folder / "short.wav", 0.1)
    write_clip(folder / "brief.wav", 0.26)  # long enough at its own speed
    soundfile.write(folder / "silent.wav", np.zeros(SAMPLING_RATE), SAMPLING_RATE)
    write_clip(folder / "whole.flac", 0.8)
    (folder / "broken.flac").write_bytes((folder / "whole.flac").read_bytes()[:3000])
    rows += [
        ["lone.wav", "Hello.", "", "", ""],
        ["textless.wav", "", "speaker0", "", ""],
        ["punctuation.wav", "🙂", "speaker0", "", ""],
        ["endless.wav", "hello world " * 100, "speaker0", "", ""],
        ["long.wav", "Hello.", "speaker0", "", ""],
        ["short.wav", "Hello.", "speaker0", "", ""],
        ["brief.wav", "Hello.", "speaker0", "", ""],
        ["silent.wav", "Hello.", "speaker0", "", ""],
        ["broken.flac", "Hello.", "speaker0", "", ""],
        ["missing.wav", "Hello.", "speaker0", "", ""],
        ["", "Hello.", "speaker0", "", ""],
        ["good0.wav", "Hello again.", "speaker0", "", ""],
    ]
    write_table(folder, rows)
    return folder


OPTIONS = ["--speeds", 0.9, 1.0, 1.1, "--max_duration_s", 3, "--clips_per_shard", 3, "--validation_fraction", 0.2]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, recordings, tiny_checkpoint) -> tuple[Path, str]:
    """The folder that a real process with two workers made of it, and what that process said."""
    folder = tmp_path_factory.mktemp("prepared") / "features"
    command = [
        sys.executable,
        TRAINING / "prepare_dataset.py",
        recordings,
        "--model",
        tiny_checkpoint,
        "--output",
        folder,
    ]
    result = subprocess.run(
        [str(part) for part in [*command, *OPTIONS, "--num_workers", 2]],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    return folder, result.stderr


def rows_of(folder: Path) -> dict[tuple[str, float], dict]:
    return {
        (row["clip"], round(float(row["speed"]), 3)): row
        for split in ("train", "validation")
        for row in load_features(folder, split)
    }


def test_which_rows_there_are(prepared):
    folder, _ = prepared
    train, validation = (load_features(folder, split).with_format(None) for split in ("train", "validation"))
    good = {f"good{number}.wav" for number in range(6)} | {"lone.wav", "brief.wav"}
    assert set(train["clip"]) | set(validation["clip"]) == good
    assert set(validation["clip"]) and not set(train["clip"]) & set(validation["clip"])
    assert set(validation["speed"]) == {1.0}
    for clip in set(train["clip"]) - {"brief.wav"}:
        speeds = [row["speed"] for row in train if row["clip"] == clip]
        assert speeds == pytest.approx([0.9, 1.0, 1.1])


def test_features_are_those_of_inference(prepared, recordings, tiny_checkpoint):
    model = IndexTTS2ForTextToWaveform.from_pretrained(tiny_checkpoint)
    processor = IndexTTS2Processor.from_pretrained(tiny_checkpoint)
    rows = rows_of(prepared[0])
    for clip in ("good0.wav", "good1.wav", "good2.wav"):
        row = rows[clip, 1.0]
        voice = model.encode_voice(str(recordings / clip))
        assert np.array_equal(row["semantic_features"], voice.speaker_features.half().numpy())
        assert np.array_equal(row["mel"], voice.prompt_mel.half().numpy())
        np.testing.assert_array_equal(row["speaker_embeds"], voice.speaker_embeds.numpy())
        with torch.no_grad():
            codes = model.semantic_codec.encode(voice.speaker_features[None]).semantic_ids[0]
        assert row["semantic_ids"].tolist() == codes.tolist()
        assert row["num_semantic_tokens"] == len(codes) == len(row["semantic_features"])
        assert row["input_ids"].tolist() == processor("Hello, world.")["input_ids"][0].tolist()
        # Mel and tokens are of the same sound.
        assert len(row["mel"]) == pytest.approx(len(codes) * 22050 / 256 / 50, abs=4)


def test_what_the_manifest_says_is_kept(prepared):
    rows = rows_of(prepared[0])
    row = rows["good0.wav", 1.0]
    assert (row["speaker"], row["emotion"], row["language"], row["text"]) == (
        "speaker0",
        "Überrascht",
        "de",
        "Hello, world.",
    )
    row = rows["lone.wav", 1.0]
    assert (row["speaker"], row["emotion"], row["language"]) == ("lone.wav", None, None)


def test_speeds(prepared, recordings):
    rows = rows_of(prepared[0])
    clip = next(clip for clip, speed in rows if speed == 1.1)
    seconds = soundfile.info(recordings / clip).duration
    for speed in (0.9, 1.0, 1.1):
        row = rows[clip, speed]
        assert row["duration_s"] == pytest.approx(seconds / speed, abs=1e-3)
        assert row["num_semantic_tokens"] == pytest.approx(50 * seconds / speed, abs=2)
        assert len(row["mel"]) == pytest.approx(22050 / 256 * seconds / speed, abs=2)


@pytest.mark.parametrize("speed", [0.9, 1.0, 1.1])
def test_changed_speed_moves_length_and_pitch(speed):
    tone = np.sin(2 * np.pi * 440 * np.arange(SAMPLING_RATE) / SAMPLING_RATE).astype(np.float32)
    changed = change_speed(tone, speed)
    assert changed.dtype == np.float32
    assert len(changed) == pytest.approx(len(tone) / speed, abs=1)
    expected = np.sin(2 * np.pi * 440 * speed * np.arange(len(changed)) / SAMPLING_RATE)
    np.testing.assert_allclose(changed[500:-500], expected[500:-500], atol=1e-2)


def test_report(prepared):
    folder, said = prepared
    report = read_report(folder)
    reasons = {(line["clip"], line["speed"]): line["reason"] for line in report if "clip" in line}
    assert reasons == {
        ("textless.wav", None): "no text",
        ("punctuation.wav", None): "no text",
        ("endless.wav", None): "text too long",
        ("long.wav", None): "too long",
        ("short.wav", None): "too short",
        ("brief.wav", 1.1): "too short",
        ("silent.wav", None): "silent",
        ("broken.flac", None): "unreadable",
        ("missing.wav", None): "no file",
        ("None", None): "no file",
        ("good0.wav", None): "listed twice",
    }
    assert all(line["detail"] and line["split"] in ("train", "validation") for line in report if "clip" in line)
    for text in ("2 x no text", "2 x no file", "1 x unreadable", "1 x too short at speed 1.1", "report.jsonl"):
        assert text in said
    # The one held-out clip of speaker0 has those to learn from as prompts.
    assert list(load_features(folder, "validation")["speaker"]).count("speaker0") == 1
    lone = [line for line in report if "speaker" in line]
    assert [(line["speaker"], line["split"]) for line in lone] == [("lone.wav", "train"), ("speaker1", "train")]
    assert all(line["reason"] == "one clip of the speaker" for line in lone)
    assert "2 speakers have one clip only" in said
    assert "Traceback" not in said


def test_counts(prepared, tiny_checkpoint):
    folder, said = prepared
    features = json.loads((folder / "features.json").read_text())
    assert made_with(tiny_checkpoint).items() <= features.items()
    assert features["speeds"] == [0.9, 1.0, 1.1]
    for split in ("train", "validation"):
        table = load_features(folder, split, tiny_checkpoint).with_format(None)
        assert features["rows"][split] == len(table)
        assert features["clips"][split] == len(set(table["clip"]))
        assert features["speakers"][split] == len(set(table["speaker"]))
        assert features["seconds"][split] == pytest.approx(sum(table["duration_s"]))
        assert f"{split}: {features['clips'][split]} clips ({features['rows'][split]} rows" in said


def test_nothing_is_done_twice(prepared, recordings, tiny_checkpoint, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(prepared[0], folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*/shard-*/*")}
    said = run_program("prepare_dataset", recordings, "--model", tiny_checkpoint, "--output", folder, *OPTIONS)
    assert "shards are there already" in said
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/shard-*/*")} == times
    assert_same_features(folder, prepared[0])


def test_killed_and_called_again(prepared, recordings, tiny_checkpoint, tmp_path):
    folder = tmp_path / "features"
    arguments = [recordings, "--model", tiny_checkpoint, "--output", folder, *OPTIONS]
    run_killed("prepare_dataset", *arguments, "--num_workers", 1, after=folder / "train" / "shard-00000")
    with pytest.raises(ValueError, match="no features.json"):
        load_features(folder, "train")
    # Its worker ends as well.
    time.sleep(0.3)
    there = sorted(folder.glob("*/shard-*"))
    assert len(there) < len(list(prepared[0].glob("*/shard-*")))
    time.sleep(0.3)
    assert sorted(folder.glob("*/shard-*")) == there
    for path in there:
        load_from_disk(str(path))
    (folder / "train" / ".shard-00001.999.tmp").mkdir(exist_ok=True)  # what a killed worker leaves
    times = {path: path.stat().st_mtime_ns for path in there}
    run_program("prepare_dataset", *arguments)
    assert {path: path.stat().st_mtime_ns for path in there} == times
    assert not list(folder.glob("*/.*"))
    # The other folder was made by two workers, most of this one without any.
    assert_same_features(folder, prepared[0])


def test_killed_worker(recordings, tiny_checkpoint, tmp_path):
    clips = [Clip("good0.wav", str(recordings / "good0.wav"), "speaker", "Hello.")] * 400
    shard = Shard(tmp_path / "shard-00000", "train", clips)
    done = prepare_in_workers(Settings(str(tiny_checkpoint), [1.0], 3.0, "cpu"), [shard], 1)
    next(done)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(OSError, match="worker was killed.*fewer --num_workers"):
        list(done)
    assert not list(tmp_path.iterdir())


def test_error_in_a_worker(recordings, tmp_path, tiny_checkpoint):
    shard = Shard(tmp_path / "shard-00000", "train", [])
    with pytest.raises(ValueError, match="nowhere"):
        list(prepare_in_workers(Settings(str(tmp_path / "nowhere"), [1.0], 3.0, "cpu"), [shard], 1))


@pytest.fixture(scope="module")
def preparer(tiny_checkpoint) -> Preparer:
    return Preparer(Settings(str(tiny_checkpoint), [1.0], 15.0, "cpu"))


def test_full_disk(preparer, recordings, tmp_path):
    clips = [
        Clip(f"good{number}.wav", str(recordings / f"good{number}.wav"), "speaker", "Hello.") for number in range(6)
    ]
    shard = Shard(tmp_path / "train" / "shard-00000", "train", clips)
    shard.folder.parent.mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="could not be written.*make room, then call again"):
            list(preparer.prepare_shard(shard))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(shard.folder.parent.iterdir())
    assert len(list(preparer.prepare_shard(shard))) == 6
    assert len(load_from_disk(str(shard.folder))) == 6


def test_too_many_semantic_tokens(preparer, tmp_path):
    # The checkpoint has positions for 200 tokens, 4 s.
    write_clip(tmp_path / "fits.wav", 3.9)
    write_clip(tmp_path / "long.wav", 4.3)
    clips = [Clip(name, str(tmp_path / f"{name}.wav"), "speaker", "Hello.") for name in ("fits", "long")]
    shard = Shard(tmp_path / "shard-00000", "train", clips)
    list(preparer.prepare_shard(shard))
    assert load_from_disk(str(shard.folder))["clip"][:] == ["fits"]
    (line,) = read_report(shard.folder)
    assert line["clip"] == "long" and line["reason"] == "too many semantic tokens"
    assert "positions for 200" in line["detail"]


def test_text_that_is_none(preparer, tmp_path):
    texts = ["one\u2028\ud800", " \u2028 ", "。"]
    shard = Shard(
        tmp_path / "shard-00000", "train", [Clip(str(n), None, "speaker", text) for n, text in enumerate(texts)]
    )
    list(preparer.prepare_shard(shard))
    assert [line["reason"] for line in read_report(shard.folder)] == ["no text"] * 3


def test_features_that_are_not_finite(preparer, tiny_checkpoint, tmp_path):
    write_clip(tmp_path / "clip.wav", 0.6)
    mean = preparer.pipeline.semantic_codec.feature_mean
    shard = Shard(tmp_path / "shard-00000", "train", [Clip("clip", str(tmp_path / "clip.wav"), "speaker", "Hello.")])
    mean.add_(1e6)
    try:
        list(preparer.prepare_shard(shard))
    finally:
        mean.sub_(1e6)
    assert read_report(shard.folder)[0]["reason"] == "not finite"
    # A shard without rows is one all the same.
    assert len(load_from_disk(str(shard.folder))) == 0


# --- splits ----------------------------------------------------------------------------------------------------------------


def make_clips(count: int, split: str | None = None) -> list[Clip]:
    return [Clip(f"clip{number}", "", "speaker", "text", split=split) for number in range(count)]


def test_splits_of_the_manifest_are_kept():
    clips = make_clips(5)
    clips[3].split, clips[0].split = "validation", "train"
    splits = choose_splits(clips, 0.5)
    assert [clip.clip for clip in splits["validation"]] == ["clip3"]
    assert len(splits["train"]) == 4


def test_held_out_clips_do_not_depend_on_their_order_or_on_new_ones():
    clips = make_clips(1000)
    held_out = {clip.clip for clip in choose_splits(clips, 0.1)["validation"]}
    assert 70 < len(held_out) < 130
    assert {clip.clip for clip in choose_splits(clips[::-1], 0.1)["validation"]} == held_out
    more = {clip.clip for clip in choose_splits(make_clips(1500), 0.1)["validation"]}
    assert held_out == {name for name in more if int(name[4:]) < 1000}


@pytest.mark.parametrize("count", [1, 2, 3, 20])
@pytest.mark.parametrize("fraction", [0.0, 1e-9, 0.999999])
def test_neither_split_is_empty(count, fraction):
    for split in (None, "train"):
        splits = choose_splits(make_clips(count, split), fraction)
        assert len(splits["train"]) + len(splits["validation"]) == count
        assert len(splits["train"]) >= 1 or fraction > 0.5
        if count > 1:
            assert splits["train"]
            assert bool(splits["validation"]) == (fraction > 0)


def test_shards_hold_every_clip_once(tmp_path):
    splits = {"train": make_clips(7), "validation": make_clips(3)}
    shards = plan_shards(splits, tmp_path, 3)
    assert [str(shard.folder.relative_to(tmp_path)) for shard in shards] == [
        "train/shard-00000",
        "train/shard-00001",
        "train/shard-00002",
        "validation/shard-00000",
    ]
    assert [clip for shard in shards for clip in shard.clips] == splits["train"] + splits["validation"]


# --- what a user can do wrong ----------------------------------------------------------------------------------------------


def test_other_options_in_the_same_folder(prepared, recordings, tiny_checkpoint, tmp_path):
    folder = prepared[0]
    arguments = [recordings, "--model", tiny_checkpoint, "--output", folder, *OPTIONS]
    said = run_to_error("prepare_dataset", *arguments, "--speeds", 1.0)
    assert "was begun with speeds [0.9, 1.0, 1.1] (now [1.0])" in said and "another --output" in said
    write_clip(tmp_path / "clip.wav", 0.5)
    write_table(tmp_path, [["clip.wav", "Hello.", "speaker", "", ""]])
    assert "was begun with clips 17 (now 1), manifest" in run_to_error("prepare_dataset", tmp_path, *arguments[1:])
    said = run_to_error("prepare_dataset", *arguments[:4], tmp_path, *OPTIONS)
    assert "holds other files" in said


def test_no_clip_can_be_used(tiny_checkpoint, tmp_path):
    write_table(tmp_path, [["missing.wav", "Hello.", "a", "", ""], ["other.wav", "", "a", "", ""]])
    output = tmp_path / "features"
    said = run_to_error("prepare_dataset", tmp_path, "--model", tiny_checkpoint, "--output", output)
    assert "None of the 2 clips can be used: " in said and "1 x no file" in said and "1 x no text" in said
    assert len(read_report(output)) == 2
    assert not (output / "features.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_duration_s", "20"], "must be between 0.25 and 15"),
        (["--speeds", "3"], "between 0.5 and 2"),
        (["--validation_fraction", "1"], "below 1"),
        (["--columns", "speaker"], "pairs NAME=COLUMN"),
        (["--columns", "voice=x"], "pairs NAME=COLUMN"),
        (["--columns", "speaker=voice"], "no column 'voice', but 'file_name', 'text'"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--output", "{file}/features"], "cannot be written"),
        (["--model", "{file}"], "is neither a folder here nor a repository"),
    ],
)
def test_impossible_options(arguments, message, recordings, tiny_checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("{file}", str(tmp_path / "file")) for argument in arguments]
    given = [recordings, "--model", tiny_checkpoint, "--output", tmp_path / "features", *arguments]
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *map(str, given)])
    with pytest.raises((SystemExit, ValueError, OSError)) as caught:
        prepare_dataset.main()
    assert message in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "features").exists()


def test_interrupted(recordings, tiny_checkpoint, tmp_path, monkeypatch):
    arguments = [recordings, "--model", tiny_checkpoint, "--output", tmp_path / "features", *OPTIONS]
    monkeypatch.setattr(sys, "argv", ["prepare_dataset.py", *map(str, arguments)])

    def interrupt(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        yield

    monkeypatch.setattr(prepare_dataset, "prepare_here", interrupt)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(ValueError, match="interrupted.*the same call makes the others"):
            prepare_dataset.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
