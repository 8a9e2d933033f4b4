"""The training of the speaker encoder: its loss, its figure, several processes, and that what is saved speaks."""

import csv
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from conftest import make_speech
from safetensors.torch import load_file

from data import Clip, read_manifest
from indextts2_hf import IndexTTS2FeatureExtractor, IndexTTS2SpeakerEncoder, IndexTTS2TextToAudioPipeline
from programs import TRAINING, read_log, run_killed, run_program, run_ranks, run_to_error


NAME = "train_speaker_encoder"


def write_manifest(path: Path, rows: list[tuple[object, str, str]]) -> Path:
    """A manifest of (file, speaker, split)."""
    with open(path, "w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text", "speaker", "split"])
        table.writerows([name, "Hello.", speaker, split] for name, speaker, split in rows)
    return path


@pytest.fixture
def manifest(tiny_recordings, tmp_path) -> Path:
    """Two clips of both speakers to learn from, two held out."""
    splits = ["train", "train", "validation", "validation"]
    rows = [
        (tiny_recordings / f"speaker{speaker}-{clip}.wav", f"speaker{speaker}", split)
        for speaker in range(2)
        for clip, split in enumerate(splits)
    ]
    return write_manifest(tmp_path / "recordings.csv", rows)


@pytest.fixture
def options(tiny_checkpoint, manifest):
    """A run of four steps whose every figure is logged."""
    return [
        *("--model", tiny_checkpoint, "--data", manifest, "--max_train_steps", 4, "--batch_size", 2),
        *("--warmup_steps", 1, "--num_workers", 0, "--log_steps", 1, "--crop_s", 0.4),
    ]


def load_encoder(folder):
    return IndexTTS2SpeakerEncoder.from_pretrained(folder, subfolder="speaker_encoder")


# --- the program ---------------------------------------------------------------------------------------------------------


def test_as_a_program_of_its_own(options, tiny_checkpoint, tiny_recordings, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, TRAINING / f"{NAME}.py", "--output", out, *options]
    result = subprocess.run([str(item) for item in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "4 clips of 2 speakers to learn from, 4 of 2 held out; 1 s of speech a step" in result.stderr
    assert f"prepare_dataset.py … --model {out}" in result.stderr

    # What is saved speaks, with a voice that is made anew.
    for folder in (out, out / "last"):
        pipe = IndexTTS2TextToAudioPipeline.from_pretrained(folder)
        voice = pipe.model.encode_voice(tiny_recordings / "speaker0-3.wav")
        assert len(pipe("Hello.", voice=voice, duration_s=0.4, seed=1)["audio"]) == round(0.4 * 22050)

    # Every weight was trained, and every statistic is of what was heard.
    before = load_encoder(tiny_checkpoint).state_dict()
    for name, tensor in load_encoder(out / "last").state_dict().items():
        assert not torch.equal(tensor, before[name]), name

    rows = read_log(out, "train/")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = {"loss", "gradient_norm", "learning_rate", "speaker_accuracy"}
    assert {key.removeprefix("train/") for key in rows[0]} == names | {"step"}
    rows = read_log(out, "eval/")
    assert [row["step"] for row in rows] == [0, 4]
    names = {"equal_error_rate", "loss_per_clip", "speaker_accuracy"}
    assert {key.removeprefix("eval/") for key in rows[0]} == names | {"step"}
    assert 0 <= rows[-1]["eval/equal_error_rate"] <= 1


def test_killed_and_resumed_is_uninterrupted(options, tmp_path):
    run_program(NAME, "--output", tmp_path / "whole", *options)
    out = tmp_path / "killed"
    run_killed(NAME, "--output", out, *options, "--save_steps", 2, after=out / "state" / "step-00000002" / "run.json")
    run_program(NAME, "--output", out, *options, "--save_steps", 2, "--resume")
    expected, found = read_log(tmp_path / "whole"), read_log(out)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_two_processes_are_one_that_accumulates_two_batches(options, tmp_path):
    # Not one with twice the batch: on the CPU each process normalises its own rows.
    one, two = tmp_path / "one", tmp_path / "two"
    run_program(NAME, "--output", one, *options, "--gradient_accumulation_steps", 2)
    run_ranks(NAME, 2, "--output", two, *options)
    for row, other in zip(read_log(two, "train/"), read_log(one, "train/"), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    # The first evaluation is before any step; later ones depend on whose statistics are kept.
    assert read_log(two, "eval/")[0] == pytest.approx(read_log(one, "eval/")[0], rel=1e-4)


def test_without_pairs_the_loss_chooses(options, tiny_recordings, tmp_path):
    rows = [
        (tiny_recordings / f"speaker{speaker}-{clip}.wav", f"speaker{speaker}", "train")
        for speaker in range(2)
        for clip in range(3)
    ]
    rows.append((tiny_recordings / "speaker1-3.wav", "speaker1", "validation"))
    out = tmp_path / "run"
    run_program(
        NAME, "--output", out, *options, "--data", write_manifest(tmp_path / "few.csv", rows), "--max_train_steps", 2
    )
    assert all(row.keys() == {"step", "eval/loss_per_clip", "eval/speaker_accuracy"} for row in read_log(out, "eval/"))


def test_as_many_held_out_clips_as_asked(options, tmp_path):
    out = tmp_path / "run"
    said = run_program(NAME, "--output", out, *options, "--evaluation_clips", 2, "--max_train_steps", 1)
    assert "4 clips of 2 speakers to learn from, 2 of 1 held out;" in said
    assert all(row.keys() == {"step", "eval/loss_per_clip", "eval/speaker_accuracy"} for row in read_log(out, "eval/"))


def test_splits_that_teach_or_tell_nothing_are_refused(options, tiny_recordings, tmp_path):
    clips = [tiny_recordings / f"speaker0-{clip}.wav" for clip in range(4)]
    alone = write_manifest(tmp_path / "alone.csv", [(clip, "me", "") for clip in clips])
    said = run_to_error(NAME, "--output", tmp_path / "run", *options, "--data", alone)
    assert "3 clips of 1 speaker, but speakers are told apart: at least two are needed" in said

    rows = [
        (clips[0], "a", "train"),
        (clips[1], "b", "train"),
        (clips[2], "c", "validation"),
        (clips[3], "d", "validation"),
    ]
    said = run_to_error(
        NAME, "--output", tmp_path / "run", *options, "--data", write_manifest(tmp_path / "strange.csv", rows)
    )
    assert "The held-out split of" in said and "(2 clips) tells nothing about the encoder" in said

    said = run_to_error(NAME, "--output", tmp_path / "run", *options, "--crop_s", 20)
    assert "--crop_s is 20, but the checkpoint hears 15 s of a clip" in said
    assert "--crop_s 0.1 is too short" in run_to_error(NAME, "--output", tmp_path / "run", *options, "--crop_s", 0.1)


def test_a_loss_that_is_no_number_names_its_clips_and_keeps_what_was_good(options, tmp_path):
    out = tmp_path / "run"
    options += [
        "--learning_rate",
        1e30,
        "--warmup_steps",
        2,
        "--save_steps",
        1,
        "--eval_steps",
        100,
        "--max_train_steps",
        9,
    ]
    said = run_to_error(NAME, "--output", out, *options)
    assert re.search(r"The (loss|gradient) is \w+ at step 3", said) and "What was saved before is good" in said
    assert [path.name for path in out.glob("state/*")] == ["step-00000001"]
    weights = load_file(out / "speaker_encoder/diffusion_pytorch_model.safetensors").values()
    assert all(bool(tensor.isfinite().all()) for tensor in weights)


def test_clips_that_cannot_be_used_are_named(options, manifest, tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "short.wav", np.zeros(800), 16000)
    with open(manifest, "a", encoding="utf-8") as file:
        file.write(
            "text.wav,Hello.,speaker0,train\nmissing.wav,Hello.,speaker0,train\nshort.wav,Hello.,speaker1,train\n,Hello.,speaker1,train\n"
        )
    said = run_program(NAME, "--output", tmp_path / "run", *options, "--max_train_steps", 1)
    assert "4 clips cannot be used and are left out" in said
    for name in (
        "text.wav",
        "missing.wav",
        "short.wav: it lasts 0.05 s, 0.25 s are needed",
        "None: the manifest names no file",
    ):
        assert name in said

    rows = [("text.wav", "a", "train"), ("missing.wav", "b", "train")]
    said = run_to_error(
        NAME, "--output", tmp_path / "none", *options, "--data", write_manifest(tmp_path / "bad.csv", rows)
    )
    assert "None of the 2 clips" in said and "can be used" in said


def test_a_clip_that_is_damaged_within_is_one_clear_error(options, manifest, tmp_path):
    sound = make_speech(2.0, 16000, 150.0)
    soundfile.write(tmp_path / "holed.flac", sound, 16000)
    content = bytearray((tmp_path / "holed.flac").read_bytes())
    middle = slice(len(content) * 2 // 5, len(content) * 3 // 5)
    content[middle] = bytes(len(content[middle]))
    (tmp_path / "holed.flac").write_bytes(content)
    with open(manifest, "a", encoding="utf-8") as file:
        file.write("holed.flac,Hello.,speaker0,train\n")
    # By a loading process, whose errors come with a traceback.
    said = run_to_error(NAME, "--output", tmp_path / "run", *options, "--num_workers", 1, "--batch_size", 5)
    assert "error: The clip holed.flac cannot be read" in said and "Mend it, or take it out." in said


# --- its pieces ----------------------------------------------------------------------------------------------------------


def test_the_filter_bank_is_that_of_inference():
    from train_speaker_encoder import speaker_fbank

    extractor = IndexTTS2FeatureExtractor(max_audio_s=1.0)
    for rate, seconds in ((16000, 0.8), (22050, 0.8), (44100, 0.8), (24000, 1.7)):
        sound = make_speech(seconds, rate)
        expected = extractor(speaker_audio=(sound, rate))["speaker_fbank"][0]
        torch.testing.assert_close(speaker_fbank(sound, rate, extractor), expected, rtol=0, atol=1e-5)


def test_crops_are_alike_in_length_and_at_random_places(tmp_path):
    from train_speaker_encoder import SpeakerDataset, collate, speaker_fbank

    extractor = IndexTTS2FeatureExtractor()
    rows = []
    for number, (rate, seconds) in enumerate(((16000, 1.0), (22050, 0.9), (44100, 0.3), (8000, 0.61), (11025, 1.3))):
        soundfile.write(tmp_path / f"{number}.wav", make_speech(seconds, rate), rate)
        rows.append((f"{number}.wav", f"speaker{number % 2}", "train"))
    clips = read_manifest(write_manifest(tmp_path / "clips.csv", rows))
    for crop_s in (0.4, 0.457, 0.5):
        dataset = SpeakerDataset(clips, ["speaker0", "speaker1"], extractor, seed=0, crop_s=crop_s)
        batch = collate([dataset[index, draw] for index in range(5) for draw in range(4)])
        # Whole frames of 25 ms, each 10 ms.
        assert batch["fbank"].shape == (20, int(crop_s * 100) - 2, 80)
        assert batch["fbank"].mean(dim=1).abs().max() < 1e-4
        assert len(batch["fbank"][:4].flatten(1).unique(dim=0)) == 4
        assert torch.equal(dataset[0, 3]["fbank"], batch["fbank"][3])
    assert batch["speaker_numbers"].tolist() == [index % 2 for index in range(5) for _ in range(4)]

    # A speaker who is not known has no number, and without `crop_s` a clip is whole.
    sound, rate = soundfile.read(tmp_path / "2.wav", dtype="float32")
    whole = SpeakerDataset(clips, ["speaker1"], extractor, seed=0)
    assert whole[2, 0]["speaker_number"] == -1
    torch.testing.assert_close(whole[2, 0]["fbank"], speaker_fbank(sound, rate, extractor))


def test_the_loss_is_the_cross_entropy_with_a_larger_angle():
    from train_speaker_encoder import AngularMarginHead

    torch.manual_seed(0)
    head = AngularMarginHead(embed_dim=6, num_speakers=5, scale=30.0, margin=0.2)
    embeds, numbers = 3 * torch.randn(8, 6), torch.randint(5, (8,))
    loss, accuracy = head(embeds, numbers)
    losses, right = [], []
    for embed, number in zip(embeds, numbers, strict=True):
        angles = torch.stack([torch.acos(F.cosine_similarity(embed, vector, dim=0)) for vector in head.vectors])
        right.append(float(angles.argmin() == number))
        angles[number] += 0.2
        assert angles[number] < math.pi
        losses.append(-F.log_softmax(30.0 * angles.cos(), dim=0)[number])
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert float(accuracy) == np.mean(right)

    # The further away, the worse, also where angle and margin pass a half turn; and there is a gradient everywhere.
    angles = torch.linspace(0, math.pi, 100)
    circle = torch.stack([angles.cos(), angles.sin(), torch.zeros(100)], dim=1).requires_grad_()
    head = AngularMarginHead(embed_dim=3, num_speakers=2, scale=3.0, margin=0.2)
    head.vectors.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    losses = torch.stack([head(row[None], torch.tensor([0]))[0] for row in circle])
    assert (losses.diff() > 0).all()
    losses.sum().backward()
    assert circle.grad.isfinite().all()


def test_the_equal_error_rate():
    from train_speaker_encoder import equal_error_rate

    same = np.array([True, True, True, False, False, False])
    assert equal_error_rate(np.array([0.9, 0.8, 0.7, 0.3, 0.2, 0.1]), same) == 0.0
    assert equal_error_rate(np.array([0.1, 0.2, 0.3, 0.7, 0.8, 0.9]), same) == 1.0
    # One of each kind on the wrong side: a third of both.
    assert equal_error_rate(np.array([0.9, 0.8, 0.2, 0.7, 0.1, 0.0]), same) == pytest.approx(1 / 3)
    # All scores alike: accept all or none, half way between.
    assert equal_error_rate(np.ones(6), same) == pytest.approx(0.5)
    # Two normal distributions of unit width, `d` apart: the threshold in the middle errs by the tail beyond d / 2.
    rng = np.random.default_rng(0)
    scores = np.concatenate([rng.normal(2.0, 1, 40_000), rng.normal(0.0, 1, 60_000)])
    is_same = np.arange(100_000) < 40_000
    tail = 0.5 * math.erfc(1 / math.sqrt(2))
    assert equal_error_rate(scores, is_same) == pytest.approx(tail, abs=3e-3)
    # Neither the order nor the scale of the scores matters, nor which of the two kinds is called the same.
    order = rng.permutation(100_000)
    assert equal_error_rate(np.exp(scores[order]), is_same[order]) == pytest.approx(equal_error_rate(scores, is_same))
    assert equal_error_rate(-scores, ~is_same) == pytest.approx(equal_error_rate(scores, is_same), abs=1e-4)


def test_the_clips_of_an_evaluation_make_pairs():
    from train_speaker_encoder import can_score_pairs, choose_evaluation_clips

    # As manifests are often sorted: by speaker, one with far more than the others.
    counts = {"a": 9, "b": 3, "c": 2, "d": 1}
    clips = [Clip(f"{name}{number}", None, name, "") for name, count in counts.items() for number in range(count)]
    names = [clip.clip for clip in choose_evaluation_clips(clips, 100)]
    assert names == "a0 a1 b0 b1 c0 c1 d0 a2 a3 b2 a4 a5 a6 a7 a8".split()
    for count in range(1, 16):
        chosen = choose_evaluation_clips(clips, count)
        assert [clip.clip for clip in chosen] == names[:count]
        assert can_score_pairs(chosen) == (count >= 4)


def test_gradient_checkpointing_changes_neither_gradients_nor_statistics():
    from train_speaker_encoder import checkpoint_with_still_statistics

    fbank = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    results = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        encoder = IndexTTS2SpeakerEncoder(16, 8, 4, 2, 8, (2, 2, 1)).train()
        if is_checkpointed:
            encoder.enable_gradient_checkpointing(checkpoint_with_still_statistics)
        encoder(fbank).speaker_embeds.pow(3).sum().backward()
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in encoder.named_parameters()}
        results.append(gradients | dict(encoder.named_buffers()))
    plain, checkpointed = results
    for name, tensor in plain.items():
        torch.testing.assert_close(checkpointed[name], tensor, msg=name)
