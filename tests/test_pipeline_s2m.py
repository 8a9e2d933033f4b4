"""Semantic tokens to speech: the sampling loop, batches, options, loading by diffusers, and voices on disk."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SAMPLING_RATE, make_speech
from diffusers import DiffusionPipeline
from safetensors.torch import save as save_tensors

from indextts2_hf import (
    IndexTTS2FlowMatchScheduler,
    IndexTTS2ForTextToWaveform,
    IndexTTS2SemanticToMelPipeline,
    VoicePrompt,
)
from indextts2_hf.pipeline_s2m import IndexTTS2SemanticToMelPipelineOutput


@pytest.fixture(scope="module")
def semantic_to_mel(tiny_model) -> IndexTTS2SemanticToMelPipeline:
    return tiny_model.semantic_to_mel


def codes(*lengths: int, seed: int = 0) -> torch.LongTensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 64, (len(lengths), max(lengths)), generator=generator)


def states(semantic_ids: torch.LongTensor) -> torch.Tensor:
    return torch.randn(*semantic_ids.shape, 32, generator=torch.Generator().manual_seed(9))


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --- the loop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.7, 1.0])
def test_loop_is_the_one_written_by_hand(semantic_to_mel, tiny_voice, guidance_scale):
    parts, num_steps = semantic_to_mel.components, 3
    ids = codes(9)
    hidden_states = states(ids)
    num_prompt, num_frames = len(tiny_voice.prompt_mel), int(9 * 1.72)
    noise = torch.randn(1, num_prompt + num_frames, 80, generator=torch.Generator().manual_seed(5))
    output = semantic_to_mel(
        ids,
        tiny_voice,
        t2s_hidden_states=hidden_states,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        latents=noise,
        output_type="pt",
    )

    with torch.no_grad():
        embeds = parts["semantic_codec"].embed(ids) + parts["s2m"].t2s_projection(hidden_states)
        content = parts["s2m"].regulate_length(embeds, None, torch.tensor([num_frames]))
        content = torch.cat([tiny_voice.content_embeds[None], content], dim=1)
        prompt = torch.zeros(1, num_prompt + num_frames, 80)
        prompt[:, :num_prompt] = tiny_voice.prompt_mel
        sample = noise.clone()
        sample[:, :num_prompt] = 0
        for step in range(num_steps):
            time = torch.tensor([step / num_steps])
            speaker = tiny_voice.speaker_embeds[None]
            velocity = parts["s2m"](sample, time, prompt, content, speaker).velocity
            if guidance_scale > 1:
                empty = [torch.zeros_like(tensor) for tensor in (prompt, content, speaker)]
                null = parts["s2m"](sample, time, *empty).velocity
                velocity = null + guidance_scale * (velocity - null)
            sample = sample + velocity / num_steps
            sample[:, :num_prompt] = 0
        mel = sample[:, num_prompt:]
        waveform = parts["vocoder"](mel).waveform[0]
    torch.testing.assert_close(output.mels[0], mel[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.audios[0], waveform, rtol=0, atol=1e-4)
    assert output.mels[0].std() > 0.1 and 0.01 < output.audios[0].std() < 0.5


def test_without_guidance_the_network_is_called_for_one_branch(semantic_to_mel, tiny_voice):
    shapes = []
    hook = semantic_to_mel.s2m.register_forward_hook(
        lambda module, args, kwargs, output: shapes.append(len(kwargs["sample"])), with_kwargs=True
    )
    try:
        plain, less = (
            semantic_to_mel(
                codes(5),
                tiny_voice,
                num_inference_steps=4,
                guidance_scale=scale,
                generator=generators(1),
                output_type="mel",
            ).mels[0]
            for scale in (1.0, 0.3)
        )
        assert shapes == [1] * 8 and torch.equal(plain, less)
        semantic_to_mel(codes(5), tiny_voice, num_inference_steps=4, output_type="mel")
        assert shapes[8:] == [2] * 4
    finally:
        hook.remove()


@pytest.mark.parametrize("guidance_scale", [1.7, 1.0])
def test_normalised_mels(semantic_to_mel, tiny_voice, other_voice, guidance_scale):
    s2m = semantic_to_mel.s2m
    other_s2m = type(s2m).from_config(s2m.config, mel_mean=-5.0, mel_std=3.0).eval()
    other_s2m.load_state_dict(s2m.state_dict())
    pipeline = IndexTTS2SemanticToMelPipeline(**(semantic_to_mel.components | {"s2m": other_s2m}))
    pipeline.set_progress_bar_config(disable=True)
    # Prompts of two lengths: what lies behind the shorter is no mel.
    voices = [tiny_voice, other_voice]
    other_voices = [replace(voice, prompt_mel=3 * voice.prompt_mel - 5) for voice in voices]
    options = dict(num_inference_steps=3, guidance_scale=guidance_scale, output_type="pt")
    options["semantic_lengths"] = torch.tensor([9, 6])
    plain = semantic_to_mel(codes(9, 6), voices, generator=generators(0, 1), **options)
    normalized = pipeline(codes(9, 6), other_voices, generator=generators(0, 1), **options)
    for mel, other_mel, audio in zip(plain.mels, normalized.mels, normalized.audios, strict=True):
        torch.testing.assert_close(other_mel, 3 * mel - 5, rtol=0, atol=1e-4)
        torch.testing.assert_close(audio, pipeline.decode([other_mel])[0], rtol=0, atol=1e-4)


def test_hidden_states_are_heard(semantic_to_mel, tiny_voice):
    arguments = dict(num_inference_steps=2, output_type="mel")
    ids = codes(6)
    plain = semantic_to_mel(ids, tiny_voice, generator=generators(1), **arguments).mels[0]
    heard = semantic_to_mel(ids, tiny_voice, states(ids), generator=generators(1), **arguments).mels[0]
    assert not torch.allclose(plain, heard, atol=1e-3)


# --- batches -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.7, 1.0])
def test_a_row_alone_is_the_row_in_a_batch(semantic_to_mel, tiny_voice, other_voice, guidance_scale):
    assert len(tiny_voice.prompt_mel) != len(other_voice.prompt_mel)
    ids = codes(13, 6, 9, 1)
    hidden_states = states(ids)
    lengths, mel_lengths = torch.tensor([13, 6, 9, 1]), torch.tensor([22, 10, 40, 1])
    voices = [tiny_voice, other_voice, other_voice, tiny_voice]
    options = dict(num_inference_steps=3, guidance_scale=guidance_scale, output_type="pt")
    batch = semantic_to_mel(
        ids, voices, hidden_states, lengths, mel_lengths, generator=generators(0, 1, 2, 3), **options
    )
    assert [mel.shape for mel in batch.mels] == [(22, 80), (10, 80), (40, 80), (1, 80)]
    for row, (length, frames) in enumerate(zip(lengths.tolist(), mel_lengths.tolist(), strict=True)):
        alone = semantic_to_mel(
            ids[row : row + 1, :length],
            voices[row],
            hidden_states[row : row + 1, :length],
            mel_lengths=torch.tensor([frames]),
            generator=generators(row),
            **options,
        )
        torch.testing.assert_close(batch.mels[row], alone.mels[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(batch.audios[row], alone.audios[0], rtol=0, atol=1e-4)
        assert len(batch.audios[row]) == frames * 256


def test_one_voice_for_all_rows(semantic_to_mel, tiny_voice):
    options = dict(num_inference_steps=2, output_type="mel")
    one = semantic_to_mel(codes(5, 5), tiny_voice, generator=generators(0, 1), **options).mels
    two = semantic_to_mel(codes(5, 5), [tiny_voice] * 2, generator=generators(0, 1), **options).mels
    assert all(torch.equal(mel, other) for mel, other in zip(one, two, strict=True))
    assert len(one[0]) == int(5 * 1.72)


# --- options -----------------------------------------------------------------------------------------------------------


def test_noise(semantic_to_mel, tiny_voice):
    options = dict(num_inference_steps=2, output_type="mel")
    one = semantic_to_mel(codes(5), tiny_voice, generator=torch.Generator().manual_seed(3), **options).mels[0]
    many = semantic_to_mel(codes(5), tiny_voice, generator=generators(3), **options).mels[0]
    torch.manual_seed(3)
    general = semantic_to_mel(codes(5), tiny_voice, **options).mels[0]
    other = semantic_to_mel(codes(5), tiny_voice, generator=generators(4), **options).mels[0]
    assert torch.equal(one, many) and torch.equal(one, general) and not torch.equal(one, other)
    num_frames = len(tiny_voice.prompt_mel) + len(one)
    latents = torch.randn(1, num_frames, 80, generator=torch.Generator().manual_seed(3))
    kept = latents.clone()
    assert torch.equal(semantic_to_mel(codes(5), tiny_voice, latents=latents, **options).mels[0], one)
    assert torch.equal(latents, kept)


def test_output_types(semantic_to_mel, tiny_voice):
    outputs = {
        output_type: semantic_to_mel(
            codes(5), tiny_voice, num_inference_steps=2, generator=generators(0), output_type=output_type
        )
        for output_type in ("np", "pt", "mel")
    }
    assert all(isinstance(output, IndexTTS2SemanticToMelPipelineOutput) for output in outputs.values())
    audio = outputs["np"].audios[0]
    assert isinstance(audio, np.ndarray) and audio.dtype == np.float32 and audio.shape == (8 * 256,)
    assert np.array_equal(audio, outputs["pt"].audios[0].numpy())
    assert outputs["mel"].audios is None
    assert all(torch.equal(output.mels[0], outputs["np"].mels[0]) for output in outputs.values())
    assert outputs["np"].sampling_rate == SAMPLING_RATE
    audios, mels, sampling_rate = semantic_to_mel(
        codes(5), tiny_voice, num_inference_steps=2, generator=generators(0), return_dict=False
    )
    assert np.array_equal(audios[0], audio) and torch.equal(mels[0], outputs["np"].mels[0])
    assert sampling_rate == SAMPLING_RATE


def test_callback(semantic_to_mel, tiny_voice):
    num_prompt = len(tiny_voice.prompt_mel)
    seen = []

    def replace(pipeline, step, timestep, tensors):
        assert pipeline is semantic_to_mel and set(tensors) == {"sample"}
        assert not tensors["sample"][:, :num_prompt].any()
        seen.append((step, float(timestep)))
        return {"sample": torch.full_like(tensors["sample"], 0.5)} if step == pipeline.num_timesteps - 1 else {}

    mel = semantic_to_mel(
        codes(5),
        tiny_voice,
        num_inference_steps=4,
        guidance_scale=2.5,
        callback_on_step_end=replace,
        output_type="mel",
    ).mels[0]
    assert seen == [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75)]
    assert (mel == 0.5).all()
    assert semantic_to_mel.guidance_scale == 2.5
    empty = []
    semantic_to_mel(
        codes(5),
        tiny_voice,
        num_inference_steps=2,
        callback_on_step_end=lambda pipeline, step, timestep, tensors: empty.append(tensors) or {},
        callback_on_step_end_tensor_inputs=[],
        output_type="mel",
    )
    assert empty == [{}, {}]


def test_progress_bar(tiny_model, tiny_voice, capsys):
    pipeline = tiny_model.semantic_to_mel
    pipeline(codes(5), tiny_voice, num_inference_steps=3, output_type="mel")
    assert not capsys.readouterr().err
    pipeline.set_progress_bar_config(disable=False)
    pipeline(codes(5), tiny_voice, num_inference_steps=3, output_type="mel")
    assert "3/3" in capsys.readouterr().err


def test_steps(semantic_to_mel, tiny_voice, tiny_checkpoint):
    semantic_to_mel(codes(2), tiny_voice, output_type="mel")
    assert semantic_to_mel.num_timesteps == 25
    pipeline = IndexTTS2SemanticToMelPipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(generator=generators(0), output_type="mel")
    four = pipeline(codes(5), tiny_voice, num_inference_steps=4, **options).mels[0]
    pipeline.scheduler = IndexTTS2FlowMatchScheduler.from_config(
        pipeline.scheduler.config, grid=[0.0, 0.25, 0.5, 0.75, 1.0]
    )
    options = dict(generator=generators(0), output_type="mel")
    torch.testing.assert_close(pipeline(codes(5), tiny_voice, **options).mels[0], four, rtol=0, atol=1e-5)
    assert pipeline.num_timesteps == 4
    pipeline.scheduler = IndexTTS2FlowMatchScheduler.from_config(pipeline.scheduler.config, sway_coefficient=-1.0)
    options = dict(generator=generators(0), output_type="mel")
    assert not torch.allclose(pipeline(codes(5), tiny_voice, **options).mels[0], four, atol=1e-3)


def test_level_of_the_noise(semantic_to_mel, tiny_voice, tiny_checkpoint):
    pipeline = IndexTTS2SemanticToMelPipeline.from_pretrained(tiny_checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=2, output_type="mel")
    num_frames = len(tiny_voice.prompt_mel) + len(semantic_to_mel(codes(5), tiny_voice, **options).mels[0])
    latents = torch.randn(1, num_frames, 80, generator=torch.Generator().manual_seed(3))
    expected = semantic_to_mel(codes(5), tiny_voice, latents=0.5 * latents, **options).mels[0]
    pipeline.scheduler = IndexTTS2FlowMatchScheduler(init_noise_sigma=0.5)
    torch.testing.assert_close(
        pipeline(codes(5), tiny_voice, latents=latents, **options).mels[0], expected, rtol=0, atol=1e-5
    )


# --- recordings --------------------------------------------------------------------------------------------------------


def test_encoding(semantic_to_mel, tiny_voice, speech):
    again = semantic_to_mel.encode_voice({"array": speech, "sampling_rate": SAMPLING_RATE})
    assert isinstance(again, VoicePrompt)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in tiny_voice.tensors().items())
    emotion = semantic_to_mel.encode_emotion((make_speech(0.7, seed=3), SAMPLING_RATE))
    assert emotion.ndim == 2 and emotion.shape[1] == 24 and abs(len(emotion) - 35) <= 1
    assert semantic_to_mel.encode_content(
        codes(5), torch.tensor([5]), semantic_to_mel.default_mel_lengths(torch.tensor([5]))
    ).shape == (1, 8, 16)
    with pytest.raises(ValueError, match="There is no audio"):
        semantic_to_mel.encode_emotion(None)


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"semantic_ids": codes(5)[0]}, r"shape \(batch_size, num_semantic_tokens\), both at least 1, but it has \(5,\)"),
        ({"semantic_ids": torch.zeros(1, 0).long()}, r"but it has \(1, 0\)"),
        ({"semantic_ids": codes(5, 5), "voice": "one"}, "There are 1 voices for 2 rows"),
        ({"t2s_hidden_states": torch.zeros(1, 4, 32)}, r"each of the \(1, 5\) semantic ids, but has the shape \(1, 4, 32\)"),
        ({"semantic_lengths": torch.tensor([6])}, r"`semantic_lengths` must hold .* 1 rows, from 1 to 5, but it is \[6\]"),
        ({"semantic_lengths": torch.tensor([5, 5])}, r"`semantic_lengths` must hold .* but it is \[5, 5\]"),
        ({"mel_lengths": torch.tensor([0])}, r"`mel_lengths` must hold .* from 1 to inf, but it is \[0\]"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan, but it must be a finite number"),
        ({"output_type": "wav"}, "`output_type` is 'wav', but it must be 'np', 'pt' or 'mel'"),
        ({"callback_on_step_end_tensor_inputs": ["velocity"]}, r"asks for \['velocity'\], but only \['sample'\]"),
        ({"generator": generators(0, 1)}, "There are 2 generators for 1 rows"),
        ({"latents": torch.zeros(1, 3, 80)}, r"`latents` must have the shape \(1, 111, 80\), but it has \(1, 3, 80\)"),
        ({"num_inference_steps": 0}, "`num_inference_steps` is 0 but at least one step is needed"),
    ],
)  # fmt: skip
def test_errors(semantic_to_mel, tiny_voice, changes, message):
    if changes.get("voice") == "one":
        changes = changes | {"voice": [tiny_voice]}
    with pytest.raises(ValueError, match=message):
        semantic_to_mel(**({"semantic_ids": codes(5), "voice": tiny_voice, "num_inference_steps": 2} | changes))


def test_voice_of_another_checkpoint(semantic_to_mel, tiny_voice):
    tensors = tiny_voice.tensors()
    stranger = VoicePrompt(**tensors, checkpoint="elsewhere@0123456789abcdef")
    with pytest.raises(ValueError, match="made with the checkpoint 'elsewhere@0123456789abcdef' but 'unsaved@"):
        semantic_to_mel(codes(5, 5), [tiny_voice, stranger])
    # The name is for the reader; the fingerprint decides.
    semantic_to_mel.check_voice(VoicePrompt(**tensors, checkpoint="moved@" + tiny_voice.checkpoint.split("@")[1]))


# --- diffusers ---------------------------------------------------------------------------------------------------------


def test_loading_with_diffusers(tiny_checkpoint, semantic_to_mel, tiny_voice):
    ours = IndexTTS2SemanticToMelPipeline.from_pretrained(tiny_checkpoint)
    generic = DiffusionPipeline.from_pretrained(
        tiny_checkpoint, custom_pipeline="pipelines/semantic_to_mel", trust_remote_code=True
    )
    assert type(ours) is IndexTTS2SemanticToMelPipeline and type(generic).__name__ == type(ours).__name__
    expected = semantic_to_mel(codes(7), tiny_voice, num_inference_steps=2, generator=generators(0)).audios[0]
    for pipeline in (ours, generic):
        audio = pipeline(codes(7), tiny_voice, num_inference_steps=2, generator=generators(0)).audios[0]
        np.testing.assert_allclose(audio, expected, atol=1e-5)


def test_model_index(tiny_checkpoint):
    index = json.loads((tiny_checkpoint / "model_index.json").read_text())
    assert {name: value for name, value in index.items() if isinstance(value, list)} == {
        "feature_extractor": ["indextts2_hf.feature_extraction_indextts2", "IndexTTS2FeatureExtractor"],
        "s2m": ["indextts2_hf.modeling_s2m", "IndexTTS2SemanticToMelTransformer"],
        "scheduler": ["indextts2_hf.scheduling_flow_match_s2m", "IndexTTS2FlowMatchScheduler"],
        "semantic_codec": ["indextts2_hf.modeling_semantic_codec", "IndexTTS2SemanticCodec"],
        "semantic_encoder": ["transformers", "Wav2Vec2BertModel"],
        "speaker_encoder": ["indextts2_hf.modeling_speaker_encoder", "IndexTTS2SpeakerEncoder"],
        "vocoder": ["indextts2_hf.modeling_vocoder", "IndexTTS2Vocoder"],
    }
    assert index["_class_name"] == "IndexTTS2SemanticToMelPipeline"


@pytest.mark.parametrize("part", ["s2m", "scheduler", "semantic_codec", "speaker_encoder", "vocoder"])
def test_unknown_settings_are_named(part, tiny_checkpoint, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "sway_coefficent": -1.0}))
    with pytest.raises(ValueError, match="'sway_coefficent', but it knows"):
        IndexTTS2ForTextToWaveform.from_pretrained(folder)


# --- voices as files and folders -----------------------------------------------------------------------------------------


def test_a_voice_keeps_what_it_brings(tiny_voice, tiny_adapter, tmp_path):
    given = {"license": "cc-by-4.0", "consent": "Agreed, 语音.", "emotion_weights": (0.0, 1.2, 0, 0, 0, 0, 0, 0.25)}
    voice = replace(tiny_voice, **given)
    voice.save(tmp_path / "voice.safetensors")
    voice.save(tmp_path / "pack")
    replace(voice, adapter=str(tiny_adapter)).save(tmp_path / "with-adapter")
    for name, adapter in (
        ("voice.safetensors", None),
        ("pack", None),
        ("with-adapter", str(tmp_path / "with-adapter")),
    ):
        loaded = VoicePrompt.load(tmp_path / name)
        assert {key: getattr(loaded, key) for key in given} == given and loaded.adapter == adapter
        assert loaded.checkpoint == voice.checkpoint
        assert all(torch.equal(tensor, loaded.tensors()[key]) for key, tensor in voice.tensors().items())
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "with-adapter" / name).read_bytes() == (tiny_adapter / name).read_bytes()
    # Nothing is told where there is nothing to tell.
    tiny_voice.save(tmp_path / "plain.safetensors")
    plain = VoicePrompt.load(tmp_path / "plain.safetensors")
    assert (plain.license, plain.consent, plain.emotion_weights, plain.adapter) == (None, None, None, None)


def test_voices_that_cannot_be_saved(tiny_voice, tiny_adapter, tmp_path):
    with pytest.raises(ValueError, match="has an adapter, which the file .* cannot hold. Save it in a folder"):
        replace(tiny_voice, adapter=str(tiny_adapter)).save(tmp_path / "voice.safetensors")
    with pytest.raises(FileNotFoundError, match="no folder .* to save the voice in"):
        tiny_voice.save(tmp_path / "missing" / "pack")
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "mine.txt").touch()
    with pytest.raises(FileExistsError, match="exists. Name a new folder for the voice pack"):
        tiny_voice.save(tmp_path / "pack")
    with pytest.raises(FileNotFoundError):
        replace(tiny_voice, adapter=str(tmp_path)).save(tmp_path / "half")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine.txt", "pack"]


@pytest.mark.parametrize(
    "weights", [(0.5,), (0.5,) * 7 + (1.3,), (0.5,) * 7 + (float("nan"),), (-0.1,) * 8, ("a",) * 8]
)
def test_emotion_weights_of_a_voice_are_checked(weights, tiny_voice, tmp_path):
    with pytest.raises(ValueError, match="must be eight numbers from 0 to 1.2"):
        replace(tiny_voice, emotion_weights=weights)
    # In a file as well.
    path = tmp_path / "voice.safetensors"
    metadata = {"format": "indextts2-voice-1", "checkpoint": "a@b", "emotion_weights": json.dumps(weights)}
    path.write_bytes(
        save_tensors({name: tensor.contiguous() for name, tensor in tiny_voice.tensors().items()}, metadata)
    )
    with pytest.raises(ValueError, match="voice.safetensors' is no usable voice: .* Make it again"):
        VoicePrompt.load(path)


def test_a_pack_with_half_an_adapter(tiny_voice, tiny_adapter, tmp_path):
    replace(tiny_voice, adapter=str(tiny_adapter)).save(tmp_path / "pack")
    # No other file is taken for its weights.
    (tmp_path / "pack/adapter_model.safetensors").rename(tmp_path / "pack/adapter_model.bin")
    with pytest.raises(ValueError, match="has the adapter_config.json of an adapter but not its adapter_model.safet"):
        VoicePrompt.load(tmp_path / "pack")
