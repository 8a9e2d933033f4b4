"""New checkpoints: their parts fit, they speak at once, and no part is born dead, saturated or with an emotion."""

import copy
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ASSETS, SAMPLING_RATE, make_speech
from safetensors.torch import load_file
from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

import make_checkpoint
from indextts2_hf import (
    IndexTTS2FeatureExtractor,
    IndexTTS2ForTextToWaveform,
    IndexTTS2SemanticToMelTransformer,
    IndexTTS2T2SConfig,
    IndexTTS2TextToAudioPipeline,
)
from make_checkpoint import carry_noise, initialize, load_tokenizer, make_model, make_noises, read_sizes
from programs import TRAINING


BPE_MODEL = ASSETS / "parity" / "text" / "bpe.model"
CONFIGS = TRAINING / "configs"
PARTS = ("t2s", "s2m", "semantic_encoder", "semantic_codec", "speaker_encoder", "vocoder")

# The least that is a whole model.
SIZES = {
    "semantic_encoder": {
        "model_type": "wav2vec2-bert",
        "hidden_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "feature_projection_input_dim": 160,
        "conv_depthwise_kernel_size": 7,
    },
    "semantic_codec": {"codebook_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_layers": 1},
    "speaker_encoder": {
        "embed_dim": 16,
        "growth_rate": 4,
        "bottleneck_factor": 2,
        "initial_channels": 8,
        "block_layers": [2, 2, 2],
    },
    "t2s": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_text_tokens": 130,
        "max_semantic_tokens": 100,
        "speaker_num_latents": 4,
        "speaker_conformer_hidden_size": 16,
        "speaker_conformer_intermediate_size": 32,
        "speaker_conformer_num_layers": 1,
        "speaker_conformer_num_heads": 2,
        "emotion_conformer_hidden_size": 16,
        "emotion_conformer_intermediate_size": 32,
        "emotion_conformer_num_layers": 1,
        "emotion_conformer_num_heads": 2,
    },
    "s2m": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_layers": 2,
        "content_size": 16,
        "wavenet_hidden_size": 16,
        "wavenet_num_layers": 2,
        "t2s_projection_sizes": [16],
    },
    "vocoder": {
        "initial_channels": 32,
        "upsample_rates": [8, 8, 4],
        "upsample_kernel_sizes": [16, 16, 8],
        "resblock_kernel_sizes": [3],
        "resblock_dilations": [[1]],
    },
    "scheduler": {"sway_coefficient": -1.0, "default_num_inference_steps": 8},
    "generation": {"do_sample": True, "temperature": 0.8, "num_beams": 1},
}


def changed(section: str, **settings) -> dict:
    """The sizes with other settings in a section; `None` takes one out."""
    sizes = copy.deepcopy(SIZES)
    sizes.setdefault(section, {}).update(settings)
    sizes[section] = {key: value for key, value in sizes[section].items() if value is not None}
    return sizes


def write_sizes(folder: Path, sizes: dict) -> Path:
    path = folder / "sizes.yaml"
    path.write_text(yaml.safe_dump(sizes))
    return path


def make(sizes: Path, output: Path, monkeypatch, seed: int = 0, tokenizer: Path = BPE_MODEL) -> Path:
    arguments = ["--sizes", sizes, "--tokenizer", tokenizer, "--output", output, "--seed", seed]
    monkeypatch.setattr(sys, "argv", ["make_checkpoint.py", *map(str, arguments)])
    make_checkpoint.main()
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Made by a real process."""
    folder = tmp_path_factory.mktemp("made")
    sizes = write_sizes(folder, SIZES)
    arguments = ["--sizes", sizes, "--tokenizer", BPE_MODEL, "--output", folder / "runs" / "new", "--seed", 0]
    result = subprocess.run(
        [sys.executable, str(TRAINING / "make_checkpoint.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr
    assert "vocoder: 0.0" in result.stderr and "is ready; it is untrained" in result.stderr
    assert sorted(path.name for path in (folder / "runs").iterdir()) == ["new"]
    return folder / "runs" / "new"


def test_whoever_may_read_the_folder_may_read_the_weights(made):
    weights = list(made.rglob("*.safetensors"))
    assert len(weights) == 6
    assert {path.stat().st_mode for path in weights} == {(made / "config.json").stat().st_mode}


def test_it_speaks_at_once(made):
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(made)
    voice = (make_speech(1.0), SAMPLING_RATE)
    audio = pipe("Hello, world.", voice=voice, seed=1, duration_s=1.3, num_inference_steps=4)["audio"]
    assert len(audio) == round(1.3 * pipe.sampling_rate)
    assert np.isfinite(audio).all() and np.abs(audio).max() < 1.0 and audio.std() > 1e-3
    free = pipe("Hello, world.", voice=voice, seed=1, num_inference_steps=4)["audio"]
    assert 0 < len(free) <= 2.1 * pipe.sampling_rate


def test_what_follows_from_other_parts(made):
    model = IndexTTS2ForTextToWaveform.from_pretrained(made)
    t2s, s2m = model.t2s.config, model.s2m.config
    assert t2s.text_vocab_size == load_tokenizer(str(BPE_MODEL)).vocab_size
    assert (t2s.semantic_vocab_size, t2s.semantic_start_token_id, t2s.semantic_stop_token_id) == (66, 64, 65)
    assert (t2s.use_length_row, t2s.skip_semantic_position_one, t2s.prefix_placeholder_token_id) == (True, False, 64)
    assert (t2s.feature_size, s2m.semantic_size, model.semantic_codec.config.feature_size) == (24, 24, 24)
    assert (t2s.speaker_embed_dim, s2m.speaker_embed_dim, s2m.t2s_hidden_size) == (16, 16, 32)
    assert s2m.mel_frames_per_token == pytest.approx(22050 / 256 / 50)
    scheduler = model.scheduler.config
    assert (scheduler.sway_coefficient, scheduler.default_num_inference_steps, scheduler.grid) == (-1.0, 8, None)
    generation = model.generation_config
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (64, 65, 65)
    assert (generation.max_new_tokens, generation.suppress_tokens, generation.temperature) == (101, [64], 0.8)
    # The statistics say to train_semantic_codec.py that the codec is new.
    assert not model.semantic_codec.feature_mean.any() and (model.semantic_codec.feature_variance == 1).all()


def test_other_rates(tmp_path, monkeypatch):
    sizes = changed("vocoder", upsample_rates=[5, 8, 8], upsample_kernel_sizes=[9, 16, 16])
    sizes |= {"sampling_rate": 24000, "feature_extractor": {"hop_length": 320, "n_fft": 1280, "win_length": 1280}}
    model = IndexTTS2ForTextToWaveform.from_pretrained(
        make(write_sizes(tmp_path, sizes), tmp_path / "new", monkeypatch)
    )
    assert model.config.sampling_rate == model.vocoder.config.sampling_rate == 24000
    assert model.feature_extractor.sampling_rate == 24000
    assert model.s2m.config.mel_frames_per_token == 1.5
    voice = model.encode_voice((make_speech(1.0, 24000), 24000))
    assert len(voice.prompt_mel) == pytest.approx(75, abs=1)


def test_normalised_mels(tmp_path, monkeypatch):
    sizes = write_sizes(tmp_path, changed("s2m", mel_mean=-5.0, mel_std=2.0))
    model = IndexTTS2ForTextToWaveform.from_pretrained(make(sizes, tmp_path / "new", monkeypatch))
    assert (model.s2m.config.mel_mean, model.s2m.config.mel_std) == (-5.0, 2.0)
    # The velocity begins at the mean of speech, -6, of normalised mels.
    assert (model.s2m.velocity_projection.bias == -0.5).all()


def test_card(made):
    card = (made / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["indextts2", "untrained"]
    assert "# new" in card and "`sizes.yaml`, drawn with the seed 0" in card


def test_the_seed_decides(made, tmp_path, monkeypatch):
    sizes = write_sizes(tmp_path, SIZES)
    # A checkpoint serves as tokenizer as well.
    same = make(sizes, tmp_path / "same", monkeypatch, tokenizer=made)
    other = make(sizes, tmp_path / "other", monkeypatch, seed=1)
    for part in PARTS:
        (path,) = (made / part).glob("*.safetensors")
        ours, theirs, others = (load_file(folder / part / path.name) for folder in (made, same, other))
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name]), name
        assert not all(torch.equal(tensor, others[name]) for name, tensor in ours.items())
    assert (same / "bpe.model").read_bytes() == BPE_MODEL.read_bytes()


def test_trained_speech_encoder(tmp_path, monkeypatch):
    """Any that transformers knows, here one that hears the waveform itself, cut after its second layer."""
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[16] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
    )
    encoder = Wav2Vec2Model(config)
    encoder.save_pretrained(tmp_path / "encoder")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(tmp_path / "encoder")
    sizes = copy.deepcopy(SIZES)
    sizes["semantic_encoder"] = {"from_pretrained": str(tmp_path / "encoder"), "num_hidden_layers": 2}
    folder = make(write_sizes(tmp_path, sizes), tmp_path / "new", monkeypatch)
    model = IndexTTS2ForTextToWaveform.from_pretrained(folder)
    assert type(model.feature_extractor.semantic_feature_extractor) is Wav2Vec2FeatureExtractor
    assert len(model.semantic_encoder.encoder.layers) == 2
    weights = encoder.state_dict()
    for name, tensor in model.semantic_encoder.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], msg=name)
    voice = model.encode_voice((make_speech(1.0), SAMPLING_RATE))
    assert voice.speaker_features.shape == (49, 24)


# --- weights of the tiny model ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> IndexTTS2ForTextToWaveform:
    torch.manual_seed(0)
    model = make_model(read_sizes(CONFIGS / "tiny_sizes.yaml"), load_tokenizer(str(BPE_MODEL)))
    initialize(model)
    return model


@pytest.fixture(scope="module")
def heard(tiny) -> list[dict[str, torch.Tensor]]:
    """What it hears of three voices, two clips each."""
    clips = []
    for pitch_hz in (90.0, 150.0, 250.0):
        for seed in range(2):
            sound = make_speech(1.5, pitch_hz=pitch_hz * (1 + 0.05 * seed), seed=seed)
            inputs = tiny.feature_extractor(speaker_audio=(sound, SAMPLING_RATE))
            features = tiny.semantic_to_mel.encode_features(
                inputs["speaker_input_features"], inputs["speaker_attention_mask"]
            )
            clips.append({"features": features, **inputs})
    return clips


def varying_share(values: torch.Tensor) -> float:
    """Which part of the power of `(num_values, channels)` differs from value to value."""
    return float(values.var(dim=0).sum() / values.square().sum(dim=-1).mean())


def test_tiny_sizes(tiny):
    counts = {part: sum(p.numel() for p in getattr(tiny, part).parameters()) / 1e6 for part in PARTS}
    words = 2 * tiny.t2s.text_embedding.weight.numel() / 1e6
    assert 1.0 < counts["t2s"] - words < 2.0
    assert (tiny.t2s.config.hidden_size, tiny.t2s.config.num_hidden_layers) == (128, 4)
    assert (tiny.s2m.config.hidden_size, tiny.s2m.config.num_layers) == (128, 6)
    assert (tiny.semantic_codec.config.codebook_size, tiny.semantic_codec.config.feature_size) == (512, 128)
    assert 1.5 < counts["vocoder"] < 2.5
    assert counts["s2m"] < 4 and counts["semantic_encoder"] < 1 and counts["semantic_codec"] < 1
    # As long as what the feature extractor hears.
    assert tiny.t2s.config.max_semantic_tokens > 50 * tiny.feature_extractor.max_audio_s


def test_noises():
    torch.manual_seed(0)
    noises = make_noises(3, 1.0, 16000)
    assert [noise.shape for noise in noises] == [(16000,)] * 3 and noises[0].dtype == np.float32
    assert [np.abs(noise).max() for noise in noises] == pytest.approx([0.5] * 3)
    assert abs(np.corrcoef(noises)[np.triu_indices(3, 1)]).max() < 0.5


def test_speech_encoder_and_codec_hear(tiny, heard):
    features = torch.cat([clip["features"] for clip in heard])
    assert varying_share(features) > 0.1
    features = (features - features.mean(dim=0)) / features.std(dim=0)
    codec = tiny.semantic_codec
    with torch.no_grad():
        output = codec(features[None])
    lengths = (output.latents.norm(dim=-1).mean(), codec.quantizer.codebook.weight.norm(dim=-1).mean())
    assert 0.5 < lengths[1] / lengths[0] < 2.0
    # A buzz has few sounds, yet far more than one code.
    assert len(output.semantic_ids.unique()) > 40
    assert varying_share(output.semantic_embeds[0]) > 0.1
    assert float(output.loss) < 3.0


def test_speaker_encoder_hears(tiny, heard):
    with torch.no_grad():
        embeds = torch.cat([tiny.speaker_encoder(clip["speaker_fbank"]).speaker_embeds for clip in heard])
    assert 0.2 < embeds.square().mean().sqrt() < 10.0
    assert (embeds[0] - embeds[-1]).abs().mean() > 0.1
    # It was calibrated, not left in training.
    assert not tiny.speaker_encoder.projection_norm.training and tiny.speaker_encoder.projection_norm.momentum == 0.1
    assert tiny.speaker_encoder.projection_norm.running_mean.abs().mean() > 0.01


def test_vocoder_is_neither_silent_nor_clipped(tiny, heard):
    with torch.no_grad():
        waveforms = torch.cat([tiny.vocoder(clip["prompt_mel"]).waveform for clip in heard])
    assert 0.01 < waveforms.std() < 0.3
    assert waveforms.abs().max() < 1.0


def test_s2m_begins_at_the_mean_of_speech(tiny, heard):
    mel = heard[0]["prompt_mel"]
    codec, s2m = tiny.semantic_codec, tiny.s2m
    with torch.no_grad():
        embeds = codec.encode(heard[0]["features"][None]).semantic_embeds
        content = s2m.regulate_length(embeds, None, torch.tensor([mel.shape[1]]))
        speaker_embeds = tiny.speaker_encoder(heard[0]["speaker_fbank"]).speaker_embeds
    assert varying_share(content[0]) > 0.05
    # States of the T2S say nothing before they are learnt.
    states = torch.randn(*embeds.shape[:2], s2m.config.t2s_hidden_size)
    assert torch.equal(s2m.add_hidden_states(embeds, states), embeds)
    velocities = []
    for time in (0.1, 0.9):
        noise = torch.randn(mel.shape, generator=torch.Generator().manual_seed(0))
        sample = (1 - time) * noise + time * mel
        with torch.no_grad():
            output = s2m(
                sample, torch.tensor([time]), torch.zeros_like(mel), content, speaker_embeds, labels=mel - noise
            )
        velocities.append(output.velocity)
        assert output.velocity.mean() == pytest.approx(-6.0, abs=0.5)
        assert output.loss < 0.7 * (mel - noise).abs().mean()
    # The time is heard.
    assert (velocities[0] - velocities[1]).abs().mean() > 0.01


def make_s2m(width: int) -> IndexTTS2SemanticToMelTransformer:
    torch.manual_seed(0)
    return IndexTTS2SemanticToMelTransformer(
        hidden_size=width,
        num_attention_heads=4,
        num_layers=3,
        content_size=32,
        semantic_size=24,
        speaker_embed_dim=16,
        wavenet_hidden_size=width,
        wavenet_num_layers=3,
        t2s_hidden_size=32,
        t2s_projection_sizes=(16,),
    )


def test_the_noise_is_carried_where_there_is_room():
    s2m = make_s2m(160)
    torch.nn.init.constant_(s2m.velocity_projection.bias, -2.0)
    carry_noise(s2m)
    for time in (0.0, 0.25, 0.5):
        sample = (1 - time) * torch.randn(4, 60, 80) + time * torch.randn(4, 60, 80)
        with torch.no_grad():
            velocity = s2m(
                sample,
                torch.full((4,), time),
                prompt_mel=torch.randn(4, 60, 80),
                content_embeds=torch.randn(4, 60, 32),
                speaker_embeds=torch.randn(4, 16),
            ).velocity
        assert torch.stack([velocity.flatten(), -sample.flatten()]).corrcoef()[0, 1] > 0.95
        assert velocity.mean() == pytest.approx(-2.0, abs=0.1)
        if time == 0.0:
            assert velocity.std() == pytest.approx(1.0, abs=0.1)

    narrow, untouched = make_s2m(152), make_s2m(152)
    carry_noise(narrow)
    assert all(torch.equal(tensor, untouched.state_dict()[name]) for name, tensor in narrow.state_dict().items())


def test_a_new_wide_network_carries_the_noise():
    torch.manual_seed(0)
    sizes = changed("s2m", hidden_size=160, wavenet_hidden_size=160, mel_mean=-6.0, mel_std=3.0)
    model = make_model(sizes, load_tokenizer(str(BPE_MODEL)))
    initialize(model)
    noise = torch.randn(1, 60, 80)
    with torch.no_grad():
        output = model.s2m(
            noise, torch.zeros(1), torch.zeros_like(noise), torch.randn(1, 60, 16), torch.randn(1, 16), labels=-noise
        )
    assert output.loss < 0.3


def t2s_batch(model: IndexTTS2ForTextToWaveform, heard: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    features = torch.stack([clip["features"] for clip in heard])
    with torch.no_grad():
        semantic_ids = model.semantic_codec.encode(features).semantic_ids
    return {
        "input_ids": torch.arange(2, 14).expand(len(heard), -1),
        "speaker_features": features,
        "labels": semantic_ids,
        "num_semantic_tokens": torch.full((len(heard),), semantic_ids.shape[1]),
    }


def test_t2s_guesses_evenly_and_knows_no_emotion(tiny, heard):
    batch = t2s_batch(tiny, heard)
    t2s = tiny.t2s.eval()
    with torch.no_grad():
        plain = t2s(**batch)
        emotional = t2s(**batch, emotion_features=batch["speaker_features"].flip(0))
    assert plain.semantic_loss == pytest.approx(math.log(t2s.config.semantic_vocab_size), abs=0.6)
    assert plain.text_loss == pytest.approx(math.log(t2s.config.text_vocab_size), abs=0.8)
    assert torch.equal(plain.logits, emotional.logits)
    assert not emotional.emotion_embeds.any()
    # The voice is heard, the learnt rows are not all the same.
    latents = t2s.encode_speaker(batch["speaker_features"])
    assert (latents[0] - latents[-1]).abs().mean() > 0.01
    assert latents[0].std(dim=0).mean() > 0.1


def test_every_weight_can_learn(heard):
    """The gradients reach every parameter of every part that is trained."""
    torch.manual_seed(0)
    model = make_model(read_sizes(CONFIGS / "tiny_sizes.yaml"), load_tokenizer(str(BPE_MODEL)))
    initialize(model)
    # The first step of these frees what lies before them.
    for layer in (model.t2s.emotion_out_proj, model.s2m.t2s_projection[-1]):
        torch.nn.init.normal_(layer.weight, std=1e-3)
    batch = t2s_batch(model, heard)
    model.t2s(**batch, emotion_features=batch["speaker_features"].flip(0)).loss.backward()
    features = batch["speaker_features"]
    features = (features - features.mean(dim=(0, 1))) / features.std(dim=(0, 1))
    model.semantic_codec(features).loss.backward()
    model.vocoder(heard[0]["prompt_mel"]).waveform.square().mean().backward()
    fbank = torch.cat([clip["speaker_fbank"] for clip in heard])
    (model.speaker_encoder.train()(fbank).speaker_embeds * torch.randn(len(fbank), 64)).sum().backward()
    mel = torch.cat([clip["prompt_mel"] for clip in heard])
    hidden_states = torch.randn(*batch["labels"].shape, model.t2s.config.hidden_size)
    embeds = model.s2m.add_hidden_states(torch.randn(*batch["labels"].shape, 128), hidden_states)
    content = model.s2m.regulate_length(embeds, None, torch.full((len(mel),), mel.shape[1]))
    model.s2m(mel, torch.rand(len(mel)), mel, content, torch.randn(len(mel), 64), labels=mel).loss.backward()
    for part in ("t2s", "s2m", "semantic_codec", "speaker_encoder", "vocoder"):
        for name, parameter in getattr(model, part).named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, f"{part}.{name}"


# --- sizes of the release --------------------------------------------------------------------------------------------------


def test_released_sizes():
    sizes = read_sizes(CONFIGS / "released_sizes.yaml")
    assert sizes["semantic_encoder"] == {"from_pretrained": "facebook/w2v-bert-2.0", "num_hidden_layers": 17}
    # Its settings are the defaults of its class; it cannot be had here.
    sizes["semantic_encoder"] = {"model_type": "wav2vec2-bert", "num_hidden_layers": 17}
    with torch.device("meta"):
        model = make_model(sizes, load_tokenizer(str(BPE_MODEL)))
        defaults = {name: dict(type(getattr(model, name))().config) for name in ("s2m", "semantic_codec", "speaker_encoder", "vocoder")}  # fmt: skip
    for name, settings in defaults.items():
        ours = {key: value for key, value in dict(getattr(model, name).config).items() if key[0] != "_"}
        expected = {key: value for key, value in settings.items() if key[0] != "_"}
        if name == "s2m":
            assert ours.pop("mel_frames_per_token") == pytest.approx(expected.pop("mel_frames_per_token"), rel=2e-3)
        assert json.dumps(ours) == json.dumps(expected)
    ours, expected = (
        json.loads(config.to_json_string(use_diff=False)) for config in (model.t2s.config, IndexTTS2T2SConfig())
    )
    differ = {key for key in expected if ours[key] != expected[key]}
    assert differ - {"dtype", "architectures"} == {
        "text_vocab_size",
        "use_length_row",
        "skip_semantic_position_one",
        "prefix_placeholder_token_id",
    }
    assert model.feature_extractor.to_dict() == IndexTTS2FeatureExtractor().to_dict()
    assert (model.semantic_encoder.config.hidden_size, len(model.semantic_encoder.encoder.layers)) == (1024, 17)


# --- what a user can do wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("t2s", {"feature_size": 32}, "`t2s.feature_size` is 32 in the sizes, but `semantic_encoder.hidden_size` makes it 24"),
        ("t2s", {"text_vocab_size": 5}, "`t2s.text_vocab_size` is 5 in the sizes, but the vocabulary makes it"),
        ("t2s", {"semantic_stop_token_id": 9}, "`semantic_codec.codebook_size` makes it 65. Leave it out"),
        ("t2s", {"use_length_row": False}, "a model trained with these programs makes it True"),
        ("s2m", {"t2s_hidden_size": 9}, "`s2m.t2s_hidden_size` is 9 in the sizes, but `t2s.hidden_size` makes it 32"),
        ("s2m", {"speaker_embed_dim": 9}, "`speaker_encoder.embed_dim` makes it 16"),
        ("semantic_codec", {"feature_size": 9}, "`semantic_encoder.hidden_size` makes it 24"),
        ("speaker_encoder", {"num_mel_bins": 64}, "filter bank makes it 80"),
        ("vocoder", {"sampling_rate": 16000}, "`vocoder.sampling_rate` is 16000 in the sizes, but `sampling_rate` makes it"),
        ("vocoder", {"num_mel_bins": 100}, "`feature_extractor.num_mel_bins` makes it 80"),
        ("feature_extractor", {"hop_length": 200}, "`feature_extractor.hop_length` is 200 but `vocoder.hop_length` is 256"),
        ("generation", {"eos_token_id": 3}, "`generation.eos_token_id` is 3"),
        ("t2s", {"hidden_sise": 32}, "no field 'hidden_sise'. Did you mean 'hidden_size'"),
        ("t2s", {"hidden_size": 30}, "`t2s` cannot be used.*`hidden_size` \\(30\\) must be a multiple"),
        ("t2s", {"hidden_size": "32"}, "`t2s` cannot be used"),
        ("s2m", {"layers": 3}, "`s2m` has no setting 'layers', but num_mel_bins, hidden_size"),
        ("s2m", {"num_layers": "two"}, "`s2m` cannot be made with"),
        ("s2m", {"mel_std": 0.0}, "`mel_std` is 0.0 but must be above 0"),
        ("scheduler", {"sway": -1.0}, "`scheduler` has no setting 'sway', but sway_coefficient, grid"),
        ("scheduler", {"grid": [0.0]}, "`grid` is \\[0.0\\] but must increase strictly"),
        ("vocoder", {"upsample_rates": [8, 8]}, "2 stages but `upsample_kernel_sizes` has 3"),
        ("semantic_encoder", {"layers": 3}, "`semantic_encoder` \\(wav2vec2-bert\\) has no setting 'layers'"),
        ("semantic_encoder", {"from_pretrained": "x"}, "either `model_type` .* or `from_pretrained`"),
        ("semantic_encoder", {"model_type": None}, "either `model_type` .* or `from_pretrained`"),
        ("semantic_encoder", {"model_type": "nonsense"}, "Unrecognized model identifier: nonsense"),
        ("semantic_encoder", {"feature_projection_input_dim": 80}, "Wav2Vec2BertModel cannot read what SeamlessM4TFeatureExtractor gives it"),
        ("t2s", {"semantic_token_rate": 25.0}, "gives (99|100) frames for 2 s, but `t2s.semantic_token_rate` is 25 per second. Set it to 50"),
        ("feature_extractor", {"rate": 1}, "no setting 'rate'"),
        ("generation", {"temprature": 1.0}, "`generation` has no setting 'temprature'"),
        ("nonsense", {}, "has a section 'nonsense', but the sections are"),
    ],
)  # fmt: skip
def test_sizes_that_cannot_be(section, settings, message, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=message):
        make(write_sizes(tmp_path, changed(section, **settings)), tmp_path / "new", monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["sizes.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t2s: {", "cannot be read"),
        ("- 1", "must have the section"),
        ("semantic_encoder: 3", "is 3, but must hold settings"),
    ],
)
def test_files_that_are_no_sizes(text, message, tmp_path, monkeypatch):
    (tmp_path / "sizes.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "sizes.yaml", tmp_path / "new", monkeypatch)


def test_files_that_are_not_there(made, tmp_path, monkeypatch):
    sizes = write_sizes(tmp_path, SIZES)
    with pytest.raises(ValueError, match="cannot be read"):
        make(tmp_path / "nothing.yaml", tmp_path / "new", monkeypatch)
    with pytest.raises(ValueError, match="--tokenizer .*nothing.model is no SentencePiece model"):
        make(sizes, tmp_path / "new", monkeypatch, tokenizer=tmp_path / "nothing.model")
    with pytest.raises(ValueError, match="--tokenizer .*sizes.yaml is no SentencePiece model"):
        make(sizes, tmp_path / "new", monkeypatch, tokenizer=sizes)
    with pytest.raises(ValueError, match="is there already. Name another folder"):
        make(sizes, made, monkeypatch)
    with pytest.raises(OSError, match="cannot be written"):
        make(sizes, sizes / "new", monkeypatch)
    (tmp_path / "empty").mkdir()
    make(sizes, tmp_path / "empty", monkeypatch)
    assert (tmp_path / "empty" / "config.json").is_file()
