"""Audio in every accepted form, the bad ones, and the three front ends against the parity set."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file
from transformers import AutoFeatureExtractor

from indextts2_hf import feature_extraction_indextts2 as module
from indextts2_hf.feature_extraction_indextts2 import (
    IndexTTS2FeatureExtractor,
    kaldi_fbank,
    load_audio,
    log_mel,
    resample_sinc,
    resample_soxr,
)


PARITY = Path(__file__).parent / "assets" / "parity"


def tone(duration_s: float, sampling_rate: int = 22050, num_channels: int = 1) -> np.ndarray:
    """A gliding tone in noise, float32; `(num_samples,)` or `(num_samples, num_channels)`."""
    num_samples = round(duration_s * sampling_rate)
    time = np.arange(num_samples) / sampling_rate
    noise = np.random.default_rng(0).standard_normal((num_samples, num_channels))
    waveform = 0.3 * np.sin(2 * np.pi * (200 + 300 * time) * time)[:, None] + 0.02 * noise
    return waveform.astype(np.float32).squeeze(1) if num_channels == 1 else waveform.astype(np.float32)


@pytest.fixture(scope="module")
def extractor() -> IndexTTS2FeatureExtractor:
    return IndexTTS2FeatureExtractor()


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    messages = []
    monkeypatch.setattr(module.logger, "warning", messages.append)
    return messages


def assert_equal_features(one, other) -> None:
    assert one.keys() == other.keys()
    for key in one:
        assert torch.equal(one[key], other[key]), key


# --- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("extension", ["wav", "flac", "ogg", "mp3"])
def test_one_file_read_in_every_form_is_the_same(tmp_path, extension):
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, tone(0.5, 24000), 24000)
    data = path.read_bytes()
    expected, sampling_rate = load_audio(path)
    assert sampling_rate == 24000
    assert expected.dtype == np.float32 and expected.ndim == 1
    with path.open("rb") as file:
        file.seek(17)
        forms = [str(path), data, io.BytesIO(data), file, {"bytes": data, "path": None}, {"path": str(path)}]
        for form in [*forms, {"array": expected, "sampling_rate": 24000}, (expected, 24000)]:
            waveform, rate = load_audio(form)
            assert rate == 24000
            assert np.array_equal(waveform, expected)


def test_file_objects_that_cannot_seek_are_read():
    class Pipe(io.BytesIO):
        def seekable(self) -> bool:
            return False

    buffer = Pipe()
    soundfile.write(buffer, tone(0.5), 22050, format="wav")
    assert load_audio(Pipe(buffer.getvalue()))[0].shape == (11025,)


def test_one_file_object_for_both_clips(extractor, tmp_path):
    path = tmp_path / "clip.wav"
    soundfile.write(path, tone(0.5), 22050)
    with path.open("rb") as file:
        assert_equal_features(extractor(file, file), extractor(path, path))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "float16", "float32", "float64"])
def test_arrays_of_each_type_are_scaled(dtype):
    waveform = tone(0.5)
    array = waveform
    if dtype in module.FULL_SCALE:
        array = np.round(waveform * (module.FULL_SCALE[dtype] - 1)) + (128 if dtype == "uint8" else 0)
    array = array.astype(dtype)
    tolerance = {"int8": 0.02, "uint8": 0.02, "float16": 1e-3}.get(dtype, 1e-4)
    for form in (array, torch.from_numpy(array)):
        read, _ = load_audio((form, 22050))
        assert read.dtype == np.float32
        assert np.abs(read - waveform).max() < tolerance


def test_int16_array_equals_16_bit_file(tmp_path):
    array = (tone(0.5) * 32767).astype(np.int16)
    soundfile.write(tmp_path / "clip.wav", array, 22050)
    assert np.array_equal(load_audio((array, 22050))[0], load_audio(tmp_path / "clip.wav")[0])


def test_other_forms_of_arrays():
    waveform = tone(0.3)
    assert np.array_equal(load_audio((waveform.tolist(), 22050.0))[0], waveform)
    tracked = torch.tensor(waveform, requires_grad=True)
    assert np.array_equal(load_audio((tracked, torch.tensor(22050)))[0], waveform)
    assert np.allclose(load_audio((tracked.bfloat16(), np.int64(22050)))[0], waveform, atol=1e-2)


def test_channels_are_averaged(tmp_path):
    stereo = tone(0.5, num_channels=2)
    soundfile.write(tmp_path / "stereo.wav", stereo, 22050, subtype="FLOAT")
    for form in (tmp_path / "stereo.wav", (stereo, 22050)):
        assert np.array_equal(load_audio(form)[0], (stereo[:, 0] + stereo[:, 1]) / 2)


def test_max_duration_cuts(tmp_path):
    waveform = tone(2.0)
    soundfile.write(tmp_path / "clip.wav", waveform, 22050, subtype="FLOAT")
    for form in (tmp_path / "clip.wav", (waveform, 22050)):
        assert np.array_equal(load_audio(form, max_duration_s=0.5)[0], waveform[:11025])


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no audio file .*nothing.wav.*local file"):
        load_audio(tmp_path / "nothing.wav")
    with pytest.raises(IsADirectoryError, match="is a folder. Name a file"):
        load_audio(str(tmp_path))


@pytest.mark.parametrize("data", [b"", b"This is no audio. " * 50], ids=["empty", "text"])
def test_files_that_are_no_audio(tmp_path, data):
    path = tmp_path / "clip.wav"
    path.write_bytes(data)
    for form in (path, data, io.BytesIO(data)):
        with pytest.raises(ValueError, match="empty, damaged or in an unknown format .*ffmpeg"):
            load_audio(form)


def test_file_without_samples(tmp_path):
    soundfile.write(tmp_path / "clip.wav", np.zeros(0, dtype=np.float32), 22050)
    with pytest.raises(ValueError, match="audio is empty.*at least 0.25 s"):
        load_audio(tmp_path / "clip.wav")


@pytest.mark.parametrize("extension", ["wav", "mp3", "flac", "ogg"])
def test_truncated_files(tmp_path, warnings, extension):
    path = tmp_path / f"clip.{extension}"
    soundfile.write(path, tone(2.0), 22050)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    if extension in ("flac", "ogg"):
        with pytest.raises(ValueError, match="damaged"):
            load_audio(path)
        return
    waveform, _ = load_audio(path)
    assert 0.5 * 22050 < len(waveform) < 1.5 * 22050
    if extension == "mp3":  # a WAV's announcement is corrected by the reader before anybody sees it
        assert len(warnings) == 1 and "announces 2.00 s: it was cut short" in warnings[0]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite(tmp_path, value):
    waveform = tone(0.5)
    waveform[100:103] = value
    soundfile.write(tmp_path / "clip.wav", waveform, 22050, subtype="FLOAT")
    for form in (tmp_path / "clip.wav", (waveform, 22050)):
        with pytest.raises(ValueError, match="3 samples that are NaN or infinite"):
            load_audio(form)


def test_float_samples_on_the_scale_of_integers():
    with pytest.raises(ValueError, match=r"audio reaches \d+ .*Divide by the full scale"):
        load_audio((tone(0.5) * 32768, 22050))


@pytest.mark.parametrize("sampling_rate", [None, 0, -22050, 22.05, 16, 22050.5, np.nan, "fast"])
def test_bad_sampling_rates(sampling_rate):
    for form in ((tone(0.5), sampling_rate), {"array": tone(0.5), "sampling_rate": sampling_rate}):
        with pytest.raises(ValueError, match="sampling rate is .* whole number of Hz, at least 4000"):
            load_audio(form)


def test_missing_sampling_rate():
    for form in (tone(0.5), torch.zeros(100), [0.0, 0.1]):
        with pytest.raises(ValueError, match="without a sampling rate"):
            load_audio(form)
    with pytest.raises(ValueError, match="sampling rate is None"):
        load_audio({"array": tone(0.5)})


def test_pair_the_wrong_way_round():
    with pytest.raises(ValueError, match=r"is `\(sampling_rate, array\)`"):
        load_audio((22050, tone(0.5)))


@pytest.mark.parametrize("shape", [(2, 22050), (1, 22050), (1, 1, 22050), ()])
def test_wrong_shapes(shape):
    with pytest.raises(ValueError, match="has the shape .* transpose"):
        load_audio((np.zeros(shape, dtype=np.float32), 22050))


def test_empty_arrays():
    for array in (np.zeros(0, dtype=np.float32), torch.zeros(0, 2), []):
        with pytest.raises(ValueError, match="audio is empty"):
            load_audio((array, 22050))


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex64"])
def test_arrays_of_a_type_without_scale(dtype):
    with pytest.raises(ValueError, match=f"type `{dtype}`, whose full scale is unknown"):
        load_audio((np.ones(22050, dtype=dtype), 22050))


def test_other_things():
    with pytest.raises(TypeError, match="Audio cannot be a `int`"):
        load_audio(7)
    with pytest.raises(ValueError, match=r"keys \['bytes', 'path'\] but no value"):
        load_audio({"bytes": None, "path": None})


# --- front ends --------------------------------------------------------------------------------------------------------


def test_soxr_length_is_rounded_up_with_zeros():
    waveform = tone(1.0, 24000)[:1001]
    resampled = resample_soxr(waveform, 24000, 16000)
    assert resampled.shape == (668,) and resampled.dtype == np.float32
    assert resampled[-1] == 0
    assert resample_soxr(waveform, 24000, 24000) is waveform


def test_sinc_resampler():
    waveform = torch.from_numpy(tone(0.5)).reshape(5, 1, -1)
    resampled = resample_sinc(waveform, 22050, 16000)
    assert resampled.shape == (5, 1, -(-waveform.shape[-1] * 320 // 441))
    torch.testing.assert_close(resampled[3, 0], resample_sinc(waveform[3, 0], 22050, 16000))
    assert resample_sinc(waveform, 16000, 16000) is waveform
    time = torch.arange(16000) / 16000
    low = torch.sin(2 * torch.pi * 440 * torch.arange(22050) / 22050)
    torch.testing.assert_close(
        resample_sinc(low, 22050, 16000)[100:-100], torch.sin(2 * torch.pi * 440 * time)[100:-100], atol=2e-3, rtol=0
    )


def test_front_ends_batch_equals_loop_and_have_gradients():
    batch = torch.from_numpy(tone(1.5)).reshape(3, -1).requires_grad_()
    mel, fbank = log_mel(batch), kaldi_fbank(resample_sinc(batch, 22050, 16000))
    num_samples = batch.shape[1]
    assert mel.shape == (3, num_samples // 256, 80)
    assert fbank.shape == (3, 1 + (-(-num_samples * 320 // 441) - 400) // 160, 80)
    for row in range(3):
        torch.testing.assert_close(mel[row], log_mel(batch[row]))
        torch.testing.assert_close(fbank[row], kaldi_fbank(resample_sinc(batch[row], 22050, 16000)), atol=5e-4, rtol=0)
    (mel.sum() + fbank.sum()).backward()
    assert torch.isfinite(batch.grad).all() and (batch.grad != 0).any(dim=1).all()


def test_log_mel_settings():
    waveform = torch.from_numpy(tone(1.0, 16000))
    mel = log_mel(
        waveform, 16000, num_mel_bins=40, n_fft=512, win_length=400, hop_length=160, mel_fmin=60.0, mel_fmax=7600.0
    )
    assert mel.shape == (100, 40)
    assert mel.min() >= np.log(1e-5) - 1e-5


def test_front_ends_refuse_less_than_a_frame():
    with pytest.raises(ValueError, match="384 samples but the mel needs more than 384"):
        log_mel(torch.zeros(384))
    with pytest.raises(ValueError, match="399 samples but one frame is 400"):
        kaldi_fbank(torch.zeros(399))


def test_stock_extractor_is_our_fbank_on_16_bit_scale(extractor):
    waveform = torch.from_numpy(tone(1.0, 16000))
    fbank = kaldi_fbank(waveform * 32768)
    fbank = (fbank - fbank.mean(0)) / torch.sqrt(fbank.var(0) + 1e-7)
    assert len(fbank) == 98
    features = extractor(emotion_audio=(waveform, 16000))["emotion_input_features"]
    torch.testing.assert_close(features[0].reshape(98, 80), fbank, atol=1e-3, rtol=0)


# --- the extractor -----------------------------------------------------------------------------------------------------


def test_shapes_and_dtypes(extractor):
    features = extractor((tone(1.0), 22050), (tone(0.5), 22050))
    assert list(features) == [
        "speaker_input_features",
        "speaker_attention_mask",
        "prompt_mel",
        "speaker_fbank",
        "speaker_emotion_input_features",
        "speaker_emotion_attention_mask",
        "emotion_input_features",
        "emotion_attention_mask",
    ]
    assert set(features) == set(extractor.model_input_names)
    shapes = {key: tuple(value.shape) for key, value in features.items()}
    assert shapes == {
        "speaker_input_features": (1, 49, 160),
        "speaker_attention_mask": (1, 49),
        "prompt_mel": (1, 86, 80),
        "speaker_fbank": (1, 98, 80),
        "speaker_emotion_input_features": (1, 49, 160),
        "speaker_emotion_attention_mask": (1, 49),
        "emotion_input_features": (1, 24, 160),
        "emotion_attention_mask": (1, 24),
    }
    for key, value in features.items():
        assert value.dtype == (torch.int64 if key.endswith("mask") else torch.float32)
    torch.testing.assert_close(features["speaker_fbank"].mean(dim=1), torch.zeros(1, 80), atol=1e-4, rtol=0)


def test_emotion_is_read_straight_and_alone(extractor):
    clip = (tone(1.0, 24000), 24000)
    alone = extractor(emotion_audio=clip)
    assert set(alone) == {"emotion_input_features", "emotion_attention_mask"}
    voice = extractor(clip)
    assert not any(name.startswith("emotion") for name in voice)
    assert torch.equal(voice["speaker_emotion_input_features"], alone["emotion_input_features"])
    assert not torch.equal(voice["speaker_input_features"], voice["speaker_emotion_input_features"])
    # A reference stands beside the voice's own emotion and does not replace it.
    other = extractor(clip, (tone(0.5), 22050))
    assert other["emotion_input_features"].shape == (1, 24, 160)
    assert all(torch.equal(other[name], tensor) for name, tensor in voice.items())


@pytest.mark.parametrize("sampling_rate", [16000, 24000])
def test_at_one_rate_both_paths_are_one(monkeypatch, sampling_rate):
    """A checkpoint at 16 kHz hears a clip once, and as it hears an emotion clip."""
    extractor = IndexTTS2FeatureExtractor(sampling_rate=16000)
    clip = (tone(1.3, sampling_rate), sampling_rate)
    alone = extractor(emotion_audio=clip)
    calls = []
    hear = IndexTTS2FeatureExtractor._semantic_input
    monkeypatch.setattr(
        IndexTTS2FeatureExtractor, "_semantic_input", lambda *given: calls.append(given[1]) or hear(*given)
    )
    both = extractor(clip)
    assert calls == ["speaker"]
    for name in ("input_features", "attention_mask"):
        assert torch.equal(both[f"speaker_emotion_{name}"], alone[f"emotion_{name}"])
        assert torch.equal(both[f"speaker_emotion_{name}"], both[f"speaker_{name}"])


def test_odd_number_of_frames_masks_the_half_frame(extractor):
    features = extractor(emotion_audio=(tone(1.1, 16000)[: 400 + 98 * 160], 16000))
    assert features["emotion_input_features"].shape == (1, 50, 160)
    assert features["emotion_attention_mask"].tolist() == [[1] * 49 + [0]]
    assert (features["emotion_input_features"][0, -1, 80:] == 1).all()


def test_numpy_tensors(extractor):
    features = extractor((tone(0.5), 22050), return_tensors="np")
    assert isinstance(features["prompt_mel"], np.ndarray)


@pytest.mark.parametrize("sampling_rate", [8000, 11025, 44100, 48000, 96000])
def test_other_sampling_rates(extractor, tmp_path, sampling_rate):
    soundfile.write(tmp_path / "clip.wav", tone(1.0, sampling_rate), sampling_rate)
    features = extractor(tmp_path / "clip.wav")
    assert features["prompt_mel"].shape == (1, 86, 80)
    assert features["speaker_input_features"].shape == (1, 49, 160)
    assert all(torch.isfinite(value).all() for value in features.values())


def test_ten_minutes_are_cut_exactly_and_quickly(extractor, tmp_path, warnings):
    """Only what is needed is read, and it is what the whole file gives, cut after resampling."""
    sampling_rate = 24000
    waveform = np.tile(tone(10.0, sampling_rate), 60)
    soundfile.write(tmp_path / "clip.wav", waveform, sampling_rate, subtype="FLOAT")
    features = extractor(tmp_path / "clip.wav")
    assert len(warnings) == 1
    assert "`speaker_audio` is 600.0 s long: the first 15 s are used, the other 585.0 s are cut" in warnings[0]
    assert features["prompt_mel"].shape == (1, 1291, 80)
    assert features["speaker_input_features"].shape == (1, 749, 160)
    assert features["speaker_attention_mask"].sum() == 749

    whole = torch.from_numpy(resample_soxr(waveform, sampling_rate, 22050)[:330750])
    assert torch.equal(log_mel(whole[None]), features["prompt_mel"])
    fbank = kaldi_fbank(resample_sinc(whole, 22050, 16000))
    assert torch.equal((fbank - fbank.mean(dim=0))[None], features["speaker_fbank"])
    straight = resample_soxr(waveform, sampling_rate, 16000)[:240000]
    expected = extractor(emotion_audio=(straight, 16000))["emotion_input_features"]
    assert torch.equal(features["speaker_emotion_input_features"], expected)
    assert len(warnings) == 1


@pytest.mark.parametrize("sampling_rate", [4000, 8000, 11025, 16000, 22051, 44100, 48000, 96000])
@pytest.mark.parametrize("new_sampling_rate", [22050, 16000])
def test_the_margin_keeps_resampling_exact(sampling_rate, new_sampling_rate):
    waveform = tone(6.0, sampling_rate)
    whole = resample_soxr(waveform, sampling_rate, new_sampling_rate)
    part = resample_soxr(
        waveform[: int((3.0 + module.RESAMPLING_MARGIN_S) * sampling_rate)], sampling_rate, new_sampling_rate
    )
    assert np.array_equal(whole[: 3 * new_sampling_rate], part[: 3 * new_sampling_rate])


def test_the_shortest_clip(extractor):
    features = extractor((tone(module.MIN_AUDIO_S, 8000), 8000))
    assert features["speaker_input_features"].shape[1] >= 3
    assert features["speaker_fbank"].shape[1] >= 3
    assert features["prompt_mel"].shape[1] >= 3
    assert all(torch.isfinite(value).all() for value in features.values())


def test_too_short(extractor):
    with pytest.raises(ValueError, match="`speaker_audio` is 0.050 s long but at least 0.25 s"):
        extractor((tone(0.05), 22050))
    with pytest.raises(ValueError, match="`emotion_audio` is 0.050 s long but at least 0.25 s"):
        extractor((tone(1.0), 22050), (tone(0.05), 22050))


def test_silent(extractor):
    silence = np.zeros(40 * 8000, dtype=np.float32)
    with pytest.raises(ValueError, match="`speaker_audio` is silent in its first 15 s"):
        extractor((silence, 8000))
    silence[20 * 8000 :] = 0.1
    with pytest.raises(ValueError, match="`emotion_audio` is silent"):
        extractor(emotion_audio=(silence, 8000))


def test_no_audio(extractor):
    with pytest.raises(ValueError, match="There is no audio"):
        extractor()


# --- configuration -----------------------------------------------------------------------------------------------------


def test_saving_and_loading(tmp_path, extractor):
    for one in (
        extractor,
        IndexTTS2FeatureExtractor(num_mel_bins=40, hop_length=128, mel_fmax=8000.0, max_audio_s=5.0),
    ):
        config = one.to_dict()
        json.dumps(config)
        assert config["feature_extractor_type"] == "IndexTTS2FeatureExtractor"
        assert config["semantic_feature_extractor"]["feature_extractor_type"] == "SeamlessM4TFeatureExtractor"
        assert config["semantic_feature_extractor"]["padding_value"] == 1.0
        assert IndexTTS2FeatureExtractor.from_dict(config).to_dict() == config
        one.save_pretrained(tmp_path)
        assert IndexTTS2FeatureExtractor.from_pretrained(tmp_path).to_dict() == config
    assert IndexTTS2FeatureExtractor.from_pretrained(tmp_path, max_audio_s=3.0).max_audio_s == 3.0


def test_inside_a_processor_file(tmp_path, extractor):
    (tmp_path / "processor_config.json").write_text(json.dumps({"feature_extractor": extractor.to_dict()}))
    loaded = IndexTTS2FeatureExtractor.from_pretrained(tmp_path)
    assert loaded.to_dict() == extractor.to_dict()
    assert_equal_features(loaded((tone(0.5), 22050)), extractor((tone(0.5), 22050)))


def test_nested_extractor_is_the_stock_one(tmp_path, extractor):
    nested = extractor.semantic_feature_extractor
    nested.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert IndexTTS2FeatureExtractor(semantic_feature_extractor=config).to_dict() == extractor.to_dict()
    assert AutoFeatureExtractor.from_pretrained(tmp_path).to_dict() == nested.to_dict()


def test_another_nested_extractor():
    extractor = IndexTTS2FeatureExtractor(
        semantic_feature_extractor={"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000}
    )
    features = extractor(emotion_audio=(tone(0.5, 16000), 16000))
    assert features["emotion_input_features"].shape == features["emotion_attention_mask"].shape == (1, 8000)
    assert IndexTTS2FeatureExtractor.from_dict(extractor.to_dict()).to_dict() == extractor.to_dict()


def test_configuration_errors():
    with pytest.raises(ValueError, match="`semantic_sampling_rate` is 24000 .* works at 16000 Hz"):
        IndexTTS2FeatureExtractor(semantic_sampling_rate=24000)
    with pytest.raises(ValueError, match="`max_audio_s` is 0.1 but a clip needs at least 0.25 s"):
        IndexTTS2FeatureExtractor(max_audio_s=0.1)
    for name in ("NoSuchFeatureExtractor", "GPT2Config", None):
        with pytest.raises(ValueError, match="no audio feature extractor of transformers"):
            IndexTTS2FeatureExtractor(semantic_feature_extractor={"feature_extractor_type": name})


# --- parity ------------------------------------------------------------------------------------------------------------


def assert_parity(case: str, values: dict[str, torch.Tensor]) -> None:
    expected = load_file(PARITY / "cases" / f"{case}.safetensors")
    tolerances = json.loads((PARITY / "tensors.json").read_text())[case]
    for key, value in values.items():
        if key in expected:
            tolerance = tolerances[key].get("suggested_atol", 0)
            torch.testing.assert_close(value.to(expected[key].dtype), expected[key], atol=tolerance, rtol=0, msg=key)


@pytest.mark.parametrize("clip", ["spk", "emo"])
def test_parity_of_reading_and_resampling(clip):
    waveform, sampling_rate = load_audio(PARITY / "audio" / f"{clip}.wav")
    at_22050 = torch.from_numpy(resample_soxr(waveform, sampling_rate, 22050))
    values = {
        "wav_22050_file_loader": at_22050,
        "wav_16000_file_loader": torch.from_numpy(resample_soxr(waveform, sampling_rate, 16000)),
        "wav_16000_from_22050": resample_sinc(at_22050, 22050, 16000),
        "wav_16000_from_24000_kernel_check": resample_sinc(at_22050, 24000, 16000),
    }
    assert_parity("audio", {f"out.{clip}.{key}": value for key, value in values.items()})


def test_parity_of_the_mel():
    inputs = load_file(PARITY / "cases" / "mel.safetensors")
    values = {
        "out.log_mel": log_mel(inputs["in.wav_22050"][None]),
        "out.short_log_mel": log_mel(inputs["in.short_wav_22050"][None]),
    }
    assert_parity("mel", {key: value.transpose(1, 2) for key, value in values.items()})


def test_parity_of_the_fbank():
    fbank = kaldi_fbank(load_file(PARITY / "cases" / "fbank.safetensors")["in.wav_16000"])
    assert_parity("fbank", {"out.fbank": fbank, "out.fbank_mean_removed": fbank - fbank.mean(dim=0)})


@pytest.mark.parametrize("name", ["a", "b", "emo"])
def test_parity_of_the_speech_encoder_input(extractor, name):
    waveform = load_file(PARITY / "cases" / "w2v_features.safetensors")[f"in.{name}.wav_16000"]
    features = extractor(emotion_audio=(waveform, 16000))
    values = {key: features[f"emotion_{key}"] for key in ("input_features", "attention_mask")}
    assert_parity("w2v_features", {f"out.{name}.{key}": value for key, value in values.items()})


def test_parity_of_the_whole_path(extractor):
    features = extractor(PARITY / "audio" / "spk.wav", PARITY / "audio" / "emo.wav")
    values = {"a": features["speaker_input_features"], "emo": features["emotion_input_features"]}
    assert_parity("w2v_features", {f"out.{name}.input_features": value for name, value in values.items()})
    assert_parity("mel", {"out.log_mel": features["prompt_mel"].transpose(1, 2)})
    assert_parity("fbank", {"out.fbank_mean_removed": features["speaker_fbank"][0]})


def test_an_unknown_setting_is_named():
    with pytest.raises(ValueError, match="has no setting 'max_audio_seconds'"):
        IndexTTS2FeatureExtractor(max_audio_seconds=3)
