"""The training of the vocoder: its examples, its discriminators and objective, and that what is saved speaks."""

import argparse
import csv
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from conftest import make_speech
from safetensors.torch import load_file, save_file
from transformers import get_cosine_schedule_with_warmup

from data import Clip, EndlessBatchSampler, choose_splits, find_fault, read_manifest
from indextts2_hf import IndexTTS2FeatureExtractor, IndexTTS2TextToAudioPipeline, IndexTTS2Vocoder
from indextts2_hf.feature_extraction_indextts2 import load_audio, log_mel, resample_soxr
from programs import TRAINING, read_log, run_killed, run_program, run_ranks, run_to_error
from train_vocoder import (
    SOURCE_LEARNING_RATE,
    Discriminators,
    MelAndWaveform,
    adversarial_loss,
    collate,
    discriminator_loss,
    estimate_pitch,
    feature_loss,
    make_scheduler,
    pitch_cross_entropy,
    source_losses,
    stft_distance,
    stft_magnitude,
)


HOP_LENGTH = 256


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint, tmp_path_factory):
    """With a vocoder of three stages, which is quick. Shared: a test must not write into it."""
    folder = tmp_path_factory.mktemp("vocoder") / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    torch.manual_seed(0)
    vocoder = IndexTTS2Vocoder(
        initial_channels=32,
        upsample_rates=(8, 8, 4),
        upsample_kernel_sizes=(16, 16, 8),
        resblock_kernel_sizes=(3,),
        resblock_dilations=((1, 3),),
    )
    vocoder.save_pretrained(folder / "vocoder")
    return folder


@pytest.fixture(scope="module")
def checkpoint_with_source(checkpoint, tmp_path_factory):
    """Shared: a test must not write into it."""
    folder = tmp_path_factory.mktemp("source") / "checkpoint"
    shutil.copytree(checkpoint, folder)
    torch.manual_seed(0)
    IndexTTS2Vocoder(**{**load_vocoder(folder).config, "use_source": True}).save_pretrained(folder / "vocoder")
    return folder


@pytest.fixture
def options(checkpoint, tiny_recordings):
    """A run of four steps with very small discriminators from the second step on, whose every figure is logged."""
    return [
        *("--model", checkpoint, "--data", tiny_recordings, "--max_train_steps", 4, "--batch_size", 2),
        *("--warmup_steps", 1, "--num_workers", 0, "--log_steps", 1, "--segment_s", 0.15),
        *("--discriminator_channels", 1, "--discriminator_start_step", 1),
    ]


@pytest.fixture(scope="module")
def extractor() -> IndexTTS2FeatureExtractor:
    return IndexTTS2FeatureExtractor()


def load_vocoder(folder) -> IndexTTS2Vocoder:
    return IndexTTS2Vocoder.from_pretrained(folder, subfolder="vocoder")


def make_dataset(clips, extractor, num_frames=13, is_random=True, cache_s=60.0) -> MelAndWaveform:
    return MelAndWaveform(clips, extractor, 0, num_frames, is_random, cache_s)


# --- the program ---------------------------------------------------------------------------------------------------------


def test_a_program_of_its_own(options, checkpoint, tmp_path):
    out = tmp_path / "run"
    options += ["--max_train_steps", 12, "--learning_rate", 1e-3, "--discriminator_start_step", 10, "--eval_steps", 6]
    options += ["--mel_loss", "single"]
    command = [sys.executable, TRAINING / "train_vocoder.py", "--output", out, *options]
    result = subprocess.run([str(item) for item in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "trainable parameters, and" in result.stderr and "7 clips; 0.3 s of audio a step" in result.stderr

    # What is saved speaks, the best and the last, and the vocoder alone is another.
    for folder in (out, out / "last"):
        pipe = IndexTTS2TextToAudioPipeline.from_pretrained(folder)
        assert len(pipe("Hello.", duration_s=0.4, seed=1)["audio"]) == round(0.4 * 22050)
    for path in checkpoint.glob("*/*.safetensors"):
        old, new = load_file(path), load_file(out / path.relative_to(checkpoint))
        assert all(torch.equal(old[name], new[name]) for name in old) == (path.parent.name != "vocoder")
    assert torch.equal(load_vocoder(out).filter_taps, load_vocoder(checkpoint).filter_taps)

    # It learns, also in so few steps.
    evaluations = read_log(out, "eval/")
    assert [row["step"] for row in evaluations] == [0, 6, 12]
    figures = [row["eval/mel_l1_per_bin"] for row in evaluations]
    assert figures[-1] < 0.8 * figures[0]
    distances = [row["eval/stft_distance"] for row in evaluations]
    assert json.loads((out / "run.json").read_text())["best"] == min(distances) < distances[0]

    # The mel loss alone at first, then with the discriminators.
    rows = [{key.removeprefix("train/") for key in row} for row in read_log(out, "train/")]
    first = {"step", "loss", "gradient_norm", "learning_rate", "mel_l1_per_bin"}
    assert rows[:10] == [first] * 10
    assert rows[10:] == [first | {"discriminator_loss", "adversarial_loss", "feature_loss"}] * 2


def test_a_vocoder_with_a_source_learns(options, checkpoint_with_source, tmp_path):
    base, out = checkpoint_with_source, tmp_path / "run"
    run_program("train_vocoder", "--output", out, *options, "--model", base, "--learning_rate", 1e-3)
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(out / "last")
    assert len(pipe("Hello.", duration_s=0.4, seed=1)["audio"]) == round(0.4 * 22050)
    for name, old in load_vocoder(base).state_dict().items():
        is_fixed = name in ("filter_taps", "source.mel_filters", "source.bands", "source.window")
        assert torch.equal(load_vocoder(out / "last").state_dict()[name], old) == is_fixed, name


def test_a_source_learns_alone_at_first(options, checkpoint_with_source, tmp_path):
    discriminators = tmp_path / "discriminators.safetensors"
    save_file(Discriminators(1).state_dict(), discriminators, {"discriminator_channels": "1"})
    options += ["--model", checkpoint_with_source, "--discriminators", discriminators, "--warmup_steps", 0]
    options += ["--source_steps", 40, "--eval_steps", 20]
    base, before = load_vocoder(checkpoint_with_source), load_file(discriminators)
    weights = {name for name, _ in base.named_parameters()}
    of_source = {name for name in weights if name.startswith("source.")}
    assert len(of_source) == 10
    for steps, learnt in ((2, of_source), (42, weights)):
        out = tmp_path / str(steps)
        run_program("train_vocoder", "--output", out, *options, "--max_train_steps", steps)
        state = load_vocoder(out / "last").state_dict()
        assert {name for name, old in base.state_dict().items() if not torch.equal(old, state[name])} == learnt
        after = load_file(out / "discriminators/model.safetensors")
        assert all(torch.equal(old, after[name]) == (steps == 2) for name, old in before.items())

    rows = read_log(out, "train/")
    losses = {f"train/{name}" for name in ("pitch_cross_entropy", "pitch_l1_octaves", "periodicity_l1")}
    first = losses | {"step", "train/loss", "train/gradient_norm", "train/learning_rate"}
    assert all(set(row) == first for row in rows[:40])
    assert all(set(row) > first | {"train/mel_l1_per_bin", "train/feature_loss"} for row in rows[40:])
    for name in losses:
        distances = [row[name] for row in rows]
        assert np.mean(distances[35:]) < 0.75 * np.mean(distances[:5]), name
    # A draft counts as any other vocoder.
    evaluations = read_log(out, "eval/")
    assert [row["step"] for row in evaluations] == [0, 20, 40, 42]
    assert json.loads((out / "run.json").read_text())["best"] == min(row["eval/stft_distance"] for row in evaluations)
    assert evaluations[0]["eval/stft_distance"] != evaluations[1]["eval/stft_distance"]


def test_two_processes_share_what_the_source_learns(options, checkpoint_with_source, tmp_path):
    options += ["--model", checkpoint_with_source, "--source_steps", 3]
    run_ranks("train_vocoder", 2, "--output", tmp_path / "two", *options)
    run_program("train_vocoder", "--output", tmp_path / "accumulated", *options, "--gradient_accumulation_steps", 2)
    two, accumulated = (read_log(tmp_path / name, "train/") for name in ("two", "accumulated"))
    assert two[:3] == [pytest.approx(row, rel=1e-4) for row in accumulated[:3]] and len(two) == 4
    # The noise of the drafts differs, what is read does not.
    name = "train/pitch_cross_entropy"
    assert two[3][name] == pytest.approx(accumulated[3][name], rel=1e-4)


def test_the_rates_of_both_phases():
    def rates(schedule) -> list[float]:
        values = []
        for _ in range(20):
            values.append(schedule.get_last_lr()[0])
            schedule.optimizer.step()
            schedule.step()
        return values

    def make_optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)

    settings = {"learning_rate": 1e-4, "warmup_steps": 3}
    both = argparse.Namespace(**settings, source_steps=8, max_train_steps=28)
    alone = argparse.Namespace(**settings, source_steps=0, max_train_steps=20)
    published = rates(get_cosine_schedule_with_warmup(make_optimizer(), 3, 20))
    assert rates(make_scheduler(make_optimizer(), alone)) == pytest.approx(published, abs=1e-12)
    schedule = make_scheduler(make_optimizer(), both)
    expected = [SOURCE_LEARNING_RATE * math.cos(math.pi * step / 16) ** 2 for step in range(8)] + published[:12]
    assert rates(schedule) == pytest.approx(expected, abs=1e-12)


def test_the_pitch_of_a_recording():
    pitch = estimate_pitch(make_speech(1.0, 22050, pitch_hz=140.0), 256, 22050)
    assert len(pitch) == 86 and pitch[10:-10].median() == pytest.approx(140, rel=0.1)


def test_a_segment_has_the_pitch_of_the_whole_clip(tiny_recordings, extractor):
    clips = read_manifest(tiny_recordings)[:2]
    dataset = MelAndWaveform(clips, extractor, 0, 13, True, 60.0, with_pitch=True)
    count = 0
    for draw in range(20):
        example, waveform = dataset[draw % 2, draw], dataset.read(draw % 2)
        whole = estimate_pitch(waveform, HOP_LENGTH, 22050)
        places = torch.from_numpy(waveform).unfold(0, 13 * HOP_LENGTH, HOP_LENGTH)
        start = int((places - example["waveform"]).abs().sum(dim=1).argmin())
        assert example["pitch"].shape == (13,)
        torch.testing.assert_close(example["pitch"], whole[start : start + 13], rtol=1e-4, atol=0)
        # At its ends the segment alone has another one.
        count += not torch.allclose(estimate_pitch(example["waveform"].numpy(), HOP_LENGTH, 22050), example["pitch"])
    assert count > 5


def test_a_pitch_is_shared_out_between_its_neighbours():
    step = math.log2(10) / 63  # octaves between two of the 64 pitches from 60 to 600 Hz
    logits = torch.zeros(1, 4, 64)
    logits[..., 10] = 3.0
    pitch = 60 * 2 ** (step * torch.tensor([[10.0, 10.25, 11.0, 70.0]]))
    likelihoods = logits[0, 0].softmax(dim=0).log()
    right, wrong = likelihoods[10], likelihoods[11]
    expected = [-right, -0.75 * right - 0.25 * wrong, -wrong, -wrong]
    torch.testing.assert_close(pitch_cross_entropy(logits, pitch)[0], torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_source_that_is_right_has_no_distance_and_silence_has_figures(checkpoint_with_source, extractor):
    source = load_vocoder(checkpoint_with_source).source
    waveform = torch.from_numpy(make_speech(0.5, 22050))[None, : 40 * HOP_LENGTH]
    batch = {"waveform": waveform, "mel": log_mel(waveform), "pitch": torch.full((1, 40), 60 * 2**0.5)}
    logits = torch.full((1, 40, 64), -100.0)
    place = round(0.5 * 63 / math.log2(10))
    logits[..., place] = 0.0
    batch["pitch"] *= 2 ** (place / 63 * math.log2(10) - 0.5)
    figures = source_losses(
        source, batch, batch["pitch"], logits, source.measure_periodicity(waveform, batch["pitch"])
    )
    assert all(float(figure) == pytest.approx(0, abs=1e-2) for figure in figures.values())
    figures = source_losses(source, batch, 2 * batch["pitch"], logits.roll(1, 2), torch.ones(1, 40, 6))
    assert figures["pitch_l1_octaves"].item() == pytest.approx(1, rel=1e-4)
    assert figures["pitch_cross_entropy"] > 90 and figures["periodicity_l1"] > 0.1

    batch |= {"waveform": 0 * waveform, "mel": log_mel(0 * waveform)}
    figures = source_losses(source, batch, batch["pitch"], logits, torch.ones(1, 40, 6))
    assert all(figure.isfinite() for figure in figures.values())


def test_the_figures_of_the_first_step_by_hand(options, checkpoint, tiny_recordings, extractor, tmp_path):
    out = tmp_path / "run"
    # A first run makes discriminators that the test can load.
    run_program("train_vocoder", "--output", tmp_path / "before", *options, "--max_train_steps", 2)
    weights = tmp_path / "before/discriminators/model.safetensors"
    options += ["--discriminators", weights, "--discriminator_start_step", 0]
    options += ["--max_train_steps", 1, "--warmup_steps", 0]
    run_program("train_vocoder", "--output", out, *options)
    found = read_log(out, "train/")[0]

    discriminators = Discriminators(1)
    discriminators.load_state_dict(load_file(weights))
    vocoder = load_vocoder(checkpoint)
    clips = choose_splits(read_manifest(tiny_recordings), 0.02)["train"]
    dataset = make_dataset(clips, extractor, round(0.15 * 22050 / HOP_LENGTH))
    keys = next(
        iter(EndlessBatchSampler(num_rows=len(clips), batch_size=2, batches_per_step=1, seed=0, start=0, stop=1))
    )
    names = ["discriminator_loss", "adversarial_loss", "feature_loss", "mel_l1_per_bin", "multiscale_mel_l1_per_bin"]
    expected = dict.fromkeys(names, 0.0)
    with torch.no_grad():
        for key in keys:  # each row alone, each term written out
            real = dataset[key]["waveform"][None]
            generated = vocoder(dataset[key]["mel"][None]).waveform
            expected["mel_l1_per_bin"] += (log_mel(generated) - log_mel(real)).abs().mean().item() / 2
            for power in range(7):
                size, num_bands = 32 * 2**power, 5 * 2**power
                mels = [log_mel(row, 22050, num_bands, size, size, size // 4) for row in (generated, real)]
                expected["multiscale_mel_l1_per_bin"] += (mels[0] - mels[1]).abs().mean().item() / 7 / 2
            for network in discriminators.networks:
                *real_layers, real_judgement = network(real)
                *generated_layers, judgement = network(generated)
                expected["discriminator_loss"] += (
                    (real_judgement - 1).square().mean() + judgement.square().mean()
                ) / 2
                expected["adversarial_loss"] += (judgement - 1).square().mean().item() / 2
                pairs = [*zip(real_layers, generated_layers, strict=True), (real_judgement, judgement)]
                expected["feature_loss"] += sum((a - b).abs().mean().item() for a, b in pairs) / 2
    for name, value in expected.items():
        assert found[f"train/{name}"] == pytest.approx(float(value), rel=1e-4), name
    loss = 45 * found["train/multiscale_mel_l1_per_bin"]
    loss += found["train/adversarial_loss"] + 2 * found["train/feature_loss"]
    assert found["train/loss"] == pytest.approx(loss, rel=1e-5)

    # A step of the run moved both sides. Whoever may read the other files may read this one.
    moved = load_file(out / "discriminators/model.safetensors")
    assert [path.name for path in (out / "discriminators").iterdir()] == ["model.safetensors"]
    assert (out / "discriminators/model.safetensors").stat().st_mode == (out / "config.json").stat().st_mode
    assert all(not torch.equal(value, moved[name]) for name, value in load_file(weights).items())
    old, new = vocoder.state_dict(), load_vocoder(out / "last").state_dict()
    assert {name for name in old if torch.equal(old[name], new[name])} == {"filter_taps"}

    said = run_to_error("train_vocoder", "--output", tmp_path / "x", *options, "--discriminator_channels", 2)
    assert "has discriminator_channels 1, but --discriminator_channels is 2" in said
    said = run_to_error("train_vocoder", "--output", tmp_path / "y", *options, "--discriminators", out / "README.md")
    assert "README.md cannot be read" in said


@pytest.mark.parametrize("source_steps", [0, 4])
def test_killed_and_resumed_it_gives_the_same_numbers(options, checkpoint_with_source, tmp_path, source_steps):
    if source_steps:
        options += ["--model", checkpoint_with_source, "--source_steps", source_steps]
    options += ["--save_steps", 2, "--eval_steps", 3, "--max_train_steps", 6]
    run_program("train_vocoder", "--output", tmp_path / "whole", *options)
    run_killed(
        "train_vocoder", "--output", tmp_path / "killed", *options, after=tmp_path / "killed/state/step-00000002"
    )
    assert "Continuing" in run_program("train_vocoder", "--output", tmp_path / "killed", *options, "--resume")
    whole, killed = (read_log(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == 6 + 3 and whole == killed
    for name in ("last/vocoder/diffusion_pytorch_model.safetensors", "discriminators/model.safetensors"):
        one, other = load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)
        assert all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def test_two_processes_or_two_batches_are_one_batch_twice_as_large(options, tmp_path):
    run_program("train_vocoder", "--output", tmp_path / "one", *options, "--batch_size", 4)
    run_ranks("train_vocoder", 2, "--output", tmp_path / "two", *options)
    run_program("train_vocoder", "--output", tmp_path / "accumulated", *options, "--gradient_accumulation_steps", 2)
    one = read_log(tmp_path / "one")
    for name in ("two", "accumulated"):
        rows = read_log(tmp_path / name)
        assert len(rows) == len(one) == 6
        for row, expected in zip(rows, one, strict=True):
            assert row == pytest.approx(expected, rel=1e-4), name


def test_bf16_and_gradient_checkpointing(options, tmp_path):
    for name, extra in (
        ("plain", []),
        ("checkpointing", ["--gradient_checkpointing"]),
        ("bf16", ["--mixed_precision", "bf16"]),
    ):
        run_program("train_vocoder", "--output", tmp_path / name, *options, *extra, "--max_train_steps", 3)
    plain, checkpointing, bf16 = (
        [row["train/loss"] for row in read_log(tmp_path / name, "train/")]
        for name in ("plain", "checkpointing", "bf16")
    )
    assert checkpointing == pytest.approx(plain, rel=1e-5)
    assert bf16 == pytest.approx(plain, rel=5e-2) and bf16 != plain


# --- wrong input ---------------------------------------------------------------------------------------------------------


def copy_recordings(source, folder, names=None):
    """Those of the recordings whose names are given, or all."""
    shutil.copytree(source, folder)
    rows = list(csv.DictReader(open(source / "metadata.csv", encoding="utf-8")))
    rows = [row for row in rows if names is None or row["file_name"] in names]
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return folder


def test_clips_that_cannot_be_read_are_named_and_left_out(options, tiny_recordings, tmp_path):
    recordings = copy_recordings(tiny_recordings, tmp_path / "recordings")
    (recordings / "speaker0-0.wav").write_text("no sound")
    (recordings / "speaker0-1.wav").unlink()
    soundfile.write(recordings / "speaker0-2.wav", np.zeros(0), 16000)
    sound, rate = soundfile.read(recordings / "speaker0-3.wav")
    soundfile.write(recordings / "long.flac", np.tile(sound, 4), rate)
    cut = recordings / "speaker0-3.wav"
    cut.write_bytes((recordings / "long.flac").read_bytes()[:9000])
    said = run_program("train_vocoder", "--output", tmp_path / "run", *options, "--data", recordings)
    assert "4 clips cannot be read and are left out: speaker0-0.wav: Error opening" in said
    assert (
        "speaker0-1.wav: Error opening" in said
        and "speaker0-2.wav: it is empty" in said
        and "speaker0-3.wav: " in said
    )
    assert "; 3 clips; " in said

    for path in recordings.glob("*.wav"):
        path.write_text("no sound")
    said = run_to_error("train_vocoder", "--output", tmp_path / "none", *options, "--data", recordings)
    assert "has 0 readable clips to learn from and 0 to check with" in said


def test_a_clip_that_turns_out_to_be_bad_is_named(options, tiny_recordings, tmp_path):
    recordings = copy_recordings(tiny_recordings, tmp_path / "recordings")
    for path in recordings.glob("*.wav"):
        soundfile.write(path, np.full(16000, np.nan), 16000, subtype="FLOAT")
    for num_workers in (0, 1):
        out = tmp_path / f"run{num_workers}"
        said = run_to_error(
            "train_vocoder", "--output", out, *options, "--data", recordings, "--num_workers", num_workers
        )
        assert "The clip speaker" in said and "samples that are NaN or infinite" in said


def test_a_loss_that_is_no_number_names_the_clips(options, tmp_path):
    out = tmp_path / "run"
    options += ["--learning_rate", 1e30, "--eval_steps", 1, "--discriminator_start_step", 0]
    said = run_to_error("train_vocoder", "--output", out, *options)
    assert re.search(r"loss is (nan|inf) at step \d, in the batch of speaker", said), said
    assert all(bool(tensor.isfinite().all()) for tensor in load_vocoder(out).state_dict().values())


def test_faults_that_are_found_at_once(options, checkpoint, tiny_recordings, tmp_path):
    out = tmp_path / "run"
    one = copy_recordings(tiny_recordings, tmp_path / "one", ["speaker1-3.wav"])
    said = run_to_error("train_vocoder", "--output", out, *options, "--data", one)
    assert "has 1 readable clips to learn from and 0 to check with; at least one of each is needed" in said
    said = run_to_error("train_vocoder", "--output", out, *options, "--segment_s", 0.05)
    assert "--segment_s 0.05 is 1024 samples, but the discriminators look at 2048 at once. Give at least 0.10." in said
    said = run_to_error("train_vocoder", "--output", out, *options, "--source_steps", 2)
    assert "--source_steps 2 is of a vocoder with a source, but the one of" in said and "has none" in said
    said = run_to_error("train_vocoder", "--output", out, *options, "--source_steps", -1)
    assert "--source_steps -1 is negative" in said
    said = run_to_error("train_vocoder", "--output", out, *options, "--conf", out / "recipe.yaml")
    assert "unrecognized arguments: --conf" in said
    other = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, other)
    config = json.loads((other / "vocoder/config.json").read_text())
    (other / "vocoder/config.json").write_text(json.dumps(config | {"sampling_rate": 24000}))
    said = run_to_error("train_vocoder", "--output", out, *options, "--model", other)
    assert "has sampling_rate 24000, but its feature extractor has 22050" in said


def test_faults_of_a_file(tmp_path):
    assert find_fault(Clip("a", None, "s", "")) == "the manifest names no file"
    assert "Error opening" in find_fault(Clip("a", str(tmp_path / "a.wav"), "s", ""))
    soundfile.write(tmp_path / "a.wav", np.zeros(100), 16000)
    assert find_fault(Clip("a", str(tmp_path / "a.wav"), "s", "")) is None
    # As a repository of `datasets` gives them.
    content = (tmp_path / "a.wav").read_bytes()
    assert find_fault(Clip("a", {"bytes": content, "path": None}, "s", "")) is None
    assert find_fault(Clip("a", {"bytes": None, "path": str(tmp_path / "a.wav")}, "s", "")) is None
    assert find_fault(Clip("a", {"bytes": content[:20], "path": None}, "s", "")) is not None


# --- examples ------------------------------------------------------------------------------------------------------------


def test_a_segment_has_the_mel_of_the_whole_clip(tiny_recordings, extractor):
    clips = read_manifest(tiny_recordings)
    dataset = make_dataset(clips, extractor, 40)
    starts = set()
    for draw in range(80):
        index = draw % len(clips)
        example = dataset[index, draw]
        waveform = torch.from_numpy(resample_soxr(*load_audio(clips[index].audio), 22050))
        waveform = torch.nn.functional.pad(waveform, (0, -len(waveform) % HOP_LENGTH))
        places = waveform.unfold(0, 40 * HOP_LENGTH, HOP_LENGTH)
        start = int((places - example["waveform"]).abs().sum(dim=1).argmin())
        assert torch.equal(places[start], example["waveform"])
        torch.testing.assert_close(example["mel"], log_mel(waveform)[start : start + 40], rtol=0, atol=1e-4)
        # A mel of the segment alone is another one at its ends.
        assert not torch.allclose(example["mel"], log_mel(example["waveform"]), atol=1e-2)
        starts.add((index, start))
        assert all(torch.equal(example[name], dataset[index, draw][name]) for name in ("mel", "waveform"))
    assert len(starts) > 40 and 0 in {start for _, start in starts}
    assert any(start + 40 == -(-len(dataset.read(index)) // HOP_LENGTH) for index, start in starts)


def test_a_short_clip_is_filled_up_with_silence_and_a_beginning_is_not(tiny_recordings, extractor):
    clips = read_manifest(tiny_recordings)[:1]
    num_samples = len(resample_soxr(*load_audio(clips[0].audio), 22050))
    num_frames = -(-num_samples // HOP_LENGTH)
    example = make_dataset(clips, extractor, num_frames + 20)[0, 5]
    assert example["mel"].shape == (num_frames + 20, 80) and len(example["waveform"]) == (num_frames + 20) * HOP_LENGTH
    assert not example["waveform"][num_samples:].any() and example["waveform"][:num_samples].any()
    assert example["mel"][-5:].max() < -11

    whole = make_dataset(clips, extractor, num_frames + 20, is_random=False)[0, 5]
    assert len(whole["mel"]) == num_frames
    beginning = make_dataset(clips, extractor, 9, is_random=False)[0, 5]
    assert torch.equal(beginning["waveform"], whole["waveform"][: 9 * HOP_LENGTH])
    torch.testing.assert_close(beginning["mel"], whole["mel"][:9], rtol=0, atol=1e-4)
    batch = collate([whole, beginning])
    assert batch["mel"].shape == (2, num_frames, 80) and batch["mel_lengths"].tolist() == [num_frames, 9]
    assert batch["waveform"].shape == (2, num_frames * HOP_LENGTH) and batch["ids"] == [clips[0].clip] * 2


def test_decoded_clips_are_kept_as_long_as_there_is_room(tiny_recordings, extractor):
    clips = read_manifest(tiny_recordings)
    dataset = make_dataset(clips, extractor, cache_s=1.5)
    without = make_dataset(clips, extractor, cache_s=0.0)
    for draw in range(16):
        example, expected = dataset[draw % 8, draw], without[draw % 8, draw]
        assert all(torch.equal(example[name], expected[name]) for name in ("mel", "waveform"))
    # 0.6 s and 0.7 s; the others are too long for what is left.
    assert sorted(dataset.cache) == [0, 1] and not without.cache


# --- discriminators and objective ----------------------------------------------------------------------------------------


def test_the_discriminators_have_the_published_shapes():
    with torch.device("meta"):
        discriminators = Discriminators(32)
    weights = [
        tuple(conv.weight.shape) for conv in [*discriminators.networks[0].convs, discriminators.networks[0].conv_out]
    ]
    assert weights == [
        *((32, 1, 5, 1), (128, 32, 5, 1), (512, 128, 5, 1), (1024, 512, 5, 1), (1024, 1024, 5, 1)),
        (1, 1024, 3, 1),
    ]
    weights = [
        tuple(conv.weight.shape) for conv in [*discriminators.networks[5].convs, discriminators.networks[5].conv_out]
    ]
    assert weights == [(32, 1, 3, 9), *[(32, 32, 3, 9)] * 3, (32, 32, 3, 3), (1, 32, 3, 3)]
    assert all("parametrizations" in name or name.endswith("bias") for name, _ in discriminators.named_parameters())

    discriminators = Discriminators(1)
    outputs = discriminators(torch.randn(3, 4096))
    assert len(outputs) == 8 and all(len(layers) == 6 for layers in outputs)
    for period, layers in zip((2, 3, 5, 7, 11), outputs, strict=False):
        rows = -(-4096 // period)
        for _ in range(4):
            rows = -(-rows // 3)
        assert layers[-1].shape == (3, 1, rows, period)
    for (n_fft, hop, _), layers in zip(
        ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)), outputs[5:], strict=True
    ):
        frames = (4096 + n_fft - hop - n_fft) // hop + 1
        assert layers[0].shape == (3, 1, n_fft // 2 + 1, frames)


def test_each_row_is_judged_alone_and_every_weight_learns():
    torch.manual_seed(0)
    discriminators = Discriminators(2)
    waveform = 0.1 * torch.randn(3, 4096)
    together = discriminators(waveform)
    for row in range(3):
        alone = discriminators(waveform[row : row + 1])
        for layers, expected in zip(together, alone, strict=True):
            for layer, single in zip(layers, expected, strict=True):
                torch.testing.assert_close(layer[row : row + 1], single, rtol=1e-4, atol=1e-5)
    discriminator_loss(together, discriminators(waveform.flip(0).roll(1, 1))).backward()
    for name, parameter in discriminators.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_judgements_depend_on_the_waveform_from_the_beginning():
    torch.manual_seed(0)
    waveform = torch.randn(4, 8192)
    for outputs in Discriminators(8)(waveform)[:5]:  # of the periods, which see the waveform itself
        assert 0.2 < outputs[-1].std() < 2


def test_silence_has_a_gradient():
    waveform = torch.zeros(1, 4096, requires_grad=True)
    outputs = Discriminators(1)(waveform)
    loss = adversarial_loss(outputs) + stft_magnitude(waveform, (1024, 120, 600)).sum() + log_mel(waveform).sum()
    loss.backward()
    assert waveform.grad.isfinite().all()


def test_the_losses_know_right_from_wrong():
    ones, zeros = [[torch.ones(2, 1, 3)]], [[torch.zeros(2, 1, 3)]]
    assert discriminator_loss(ones, zeros) == 0 and discriminator_loss(zeros, ones) == 2
    assert adversarial_loss(ones) == 0 and adversarial_loss(zeros) == 1
    assert feature_loss(ones, ones) == 0 and feature_loss(ones, zeros) == 1


def test_the_stft_distance(speech):
    real = torch.from_numpy(speech)[None]
    assert stft_distance(real, real) == 0
    # Half as loud: convergence 0.5, and log 2 in every bin that is loud enough.
    assert stft_distance(0.5 * real, real).item() == pytest.approx(0.5 + np.log(2), rel=1e-2)
    assert stft_distance(-real, real) == 0
