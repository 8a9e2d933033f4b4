"""The training of a small speech encoder after Whisper's or after alignments: its targets, resuming, several processes, and that what is saved speaks."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_speech
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from data import read_manifest
from indextts2_hf import IndexTTS2TextToAudioPipeline
from programs import read_log, run_killed, run_program, run_ranks, run_to_error


NAME = "train_semantic_encoder"


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A tiny Whisper encoder of three layers with random weights."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=48, num_mel_bins=80, dropout=0.0
    )
    encoder = WhisperEncoder(config)
    for parameter in encoder.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    folder = tmp_path_factory.mktemp("whisper")
    encoder.save_pretrained(folder)
    return folder


@pytest.fixture
def options(tiny_checkpoint, tiny_recordings, whisper):
    return [
        *("--model", tiny_checkpoint, "--data", tiny_recordings, "--teacher", whisper, "--layer", 2),
        *(
            "--num_components",
            8,
            "--max_train_steps",
            4,
            "--batch_size",
            2,
            "--warmup_steps",
            1,
            "--learning_rate",
            1e-2,
        ),
        *("--num_workers", 0, "--log_steps", 1, "--validation_fraction", 0.3, "--crop_s", 0.5),
    ]


def test_it_learns_and_what_is_saved_speaks(options, tiny_recordings, tmp_path):
    out = tmp_path / "run"
    said = run_program(NAME, "--output", out, *options, "--max_train_steps", 200, "--log_steps", 50)
    assert "8 components hold" in said and "of the variance of layer 2" in said
    figures = [row["eval/explained_variance"] for row in read_log(out, "eval/")]
    assert figures[-1] > max(0.2, figures[0] + 0.2)
    for folder in (out, out / "last"):
        pipe = IndexTTS2TextToAudioPipeline.from_pretrained(folder)
        voice = pipe.model.encode_voice(tiny_recordings / "speaker0-3.wav")
        assert len(pipe("Hello.", voice=voice, duration_s=0.4, seed=1)["audio"]) == round(0.4 * 22050)


def test_killed_and_resumed_is_uninterrupted(options, tmp_path):
    run_program(NAME, "--output", tmp_path / "whole", *options)
    out = tmp_path / "killed"
    run_killed(NAME, "--output", out, *options, "--save_steps", 2, after=out / "state" / "step-00000002" / "run.json")
    run_program(NAME, "--output", out, *options, "--save_steps", 2, "--resume")
    for row, other in zip(read_log(out), read_log(tmp_path / "whole"), strict=True):
        assert row == pytest.approx(other, rel=1e-5)


def test_two_processes_are_one_with_twice_the_batch(options, tmp_path):
    run_program(NAME, "--output", tmp_path / "one", *options, "--batch_size", 4)
    run_ranks(NAME, 2, "--output", tmp_path / "two", *options)
    for row, other in zip(read_log(tmp_path / "two"), read_log(tmp_path / "one"), strict=True):
        assert row == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_faults(options, whisper, tmp_path):
    out = tmp_path / "run"
    said = run_to_error(NAME, "--output", out, *options, "--teacher", tmp_path)
    assert f"--teacher {tmp_path} holds no Whisper encoder" in said
    said = run_to_error(NAME, "--output", out, *options, "--layer", 4)
    assert f"--layer is 4, but the encoder of {whisper} has 3." in said
    said = run_to_error(NAME, "--output", out, *options, "--num_components", 33)
    assert "--num_components is 33, but with encoders of 32 and 24 at most 24 are kept." in said


def test_hidden_states_are_those_of_transformers(whisper):
    from train_semantic_encoder import WhisperTeacher

    encoder = WhisperEncoder.from_pretrained(whisper).eval()
    extractor = WhisperFeatureExtractor()
    # transformers takes 30 s alone.
    mel = extractor(make_speech(30.0, 16000), sampling_rate=16000, return_tensors="pt")["input_features"]
    model = WhisperModel(
        WhisperConfig(**{**encoder.config.to_dict(), "decoder_layers": 1, "decoder_attention_heads": 2})
    )
    model.encoder.load_state_dict(encoder.state_dict())
    with torch.no_grad():
        expected = model.eval().encoder(mel, output_hidden_states=True).hidden_states
    for layer in (1, 2):
        found = WhisperTeacher(encoder, layer, 24).hidden_states(mel[0])
        torch.testing.assert_close(found, expected[layer][0, 1:], rtol=0, atol=1e-5)
        halved = WhisperTeacher(encoder, layer, 24, frames_per_target=2).hidden_states(mel[0])
        pairs = (expected[layer][0, 1:-1:2] + expected[layer][0, 2:-1:2]) / 2
        torch.testing.assert_close(halved, pairs, rtol=0, atol=1e-5)


def test_targets_are_components_turned(whisper):
    from train_semantic_encoder import WhisperTeacher

    encoder = WhisperEncoder.from_pretrained(whisper).eval()
    teacher = WhisperTeacher(encoder, 2, 24)
    extractor = WhisperFeatureExtractor()
    mels = [
        extractor(make_speech(2.0, 16000, pitch), sampling_rate=16000, padding="longest", return_tensors="pt")[
            "input_features"
        ][0]
        for pitch in (100.0, 140.0, 200.0)
    ]
    share = teacher.fit(mels, num_components=6, seed=0)
    assert 0.3 < share < 1.0
    states = torch.cat([teacher.hidden_states(mel) for mel in mels])
    projected = (states - teacher.mean) @ teacher.projection
    assert torch.linalg.matrix_rank(projected, atol=1e-2) == 6
    # Distances are those of the components; of the whole, they hold the share that was said.
    scaled = (states - states.mean(dim=0)) / states.std(dim=0)
    assert projected.square().sum() / scaled.square().sum() == pytest.approx(share, abs=1e-3)
    target = teacher(mels[0])
    torch.testing.assert_close(target.mean(dim=1), torch.zeros(len(target)), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.var(dim=1, unbiased=False), torch.ones(len(target)), rtol=0, atol=1e-2)


# --- after alignments ----------------------------------------------------------------------------------------------------


ALIGNMENT = {
    "phones": ["_", "a", "b"],
    "ends_s": [0.1, 0.25, 0.4],
    "pitch_hz": [0.0] * 4 + [300.0] * 28,
    "pitch_step_s": 0.0125,
}


@pytest.fixture
def aligned(tiny_recordings, tmp_path):
    """The recordings, each beside an alignment."""
    folder = tmp_path / "aligned"
    shutil.copytree(tiny_recordings, folder)
    for path in folder.rglob("*.wav"):
        path.with_suffix(".json").write_text(json.dumps(ALIGNMENT))
    return folder


def test_labels_are_shares_place_and_pitch(aligned):
    from train_semantic_encoder import PITCH_WEIGHT, PLACE_WEIGHT, AlignmentTeacher

    clips = read_manifest(aligned)
    teacher = AlignmentTeacher(clips, size=24, token_rate=50.0, seed=0)
    assert list(teacher.numbers) == ["_", "a", "b"]
    labels = teacher.describe(clips[0], np.zeros(8000, np.float32), 0.0)
    assert labels.shape == (25, 5)
    torch.testing.assert_close(labels[:, :3].sum(dim=1), torch.ones(25))
    # The middle of frame 4 is at 97.5 ms, that of frame 6 at 137.5 ms.
    torch.testing.assert_close(labels[4, :3], torch.tensor([0.625, 0.375, 0.0]))
    torch.testing.assert_close(labels[6], torch.tensor([0.0, 1.0, 0.0, PLACE_WEIGHT * -0.5, PITCH_WEIGHT * 1.0]))
    assert labels[0, 4] == 0.0
    assert labels[22, 2] == 1.0  # behind the end
    crop = teacher.describe(clips[0], np.zeros(4000, np.float32), 0.1)
    torch.testing.assert_close(crop, labels[5:17], rtol=0, atol=1e-5)
    target = teacher(labels)
    assert target.shape == (25, 24)
    # Frames of one phone are alike, of two they are not.
    alike, unlike = (torch.cosine_similarity(target[8], target[frame], dim=0) for frame in (9, 15))
    assert alike > 0.8 and unlike < 0.5


def test_it_learns_alignments(options, aligned, tmp_path):
    out = tmp_path / "run"
    options = [*("--data", aligned, "--alignments"), *options[:2], *options[8:]]
    said = run_program(NAME, "--output", out, *options, "--max_train_steps", 150, "--log_steps", 50)
    assert "3 phones: _ a b" in said
    figures = [row["eval/explained_variance"] for row in read_log(out, "eval/")]
    assert figures[-1] > max(0.2, figures[0] + 0.2)
    (aligned / "speaker0-0.json").write_text('{"phones": ["a"], "ends_s": []}')
    said = run_to_error(NAME, "--output", tmp_path / "other", *options)
    assert "has no alignment in" in said and "speaker0-0.json" in said
