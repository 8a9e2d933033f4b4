"""The front door: every way to say who speaks, how, and how long; the stock pipeline; streaming."""

import inspect
import io
import os
import types
from dataclasses import replace
from typing import get_overloads

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLING_RATE, make_speech, make_tiny_model
from test_emotion import build_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM, pipeline

from indextts2_hf import EmotionTextModel, IndexTTS2Segment, IndexTTS2TextToAudioPipeline, set_num_threads


TEXT = "Hello there. 你好。"
TEXTS = [TEXT, "Good morning to you all."]
FAST = dict(num_inference_steps=2, max_new_tokens=10)
HAPPY = [0.5, 0, 0, 0, 0, 0, 0, 0.25]


def same(one, other, atol: float = 1e-4) -> bool:
    one, other = (item["audio"] if isinstance(item, dict) else np.asarray(item) for item in (one, other))
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=0, atol=atol))


@pytest.fixture(scope="module")
def stock(tiny_checkpoint):
    return pipeline("text-to-speech", model=str(tiny_checkpoint), device="cpu")


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("audio") / "low.wav"
    soundfile.write(path, make_speech(0.8, pitch_hz=210.0, seed=1), SAMPLING_RATE, subtype="FLOAT")
    return str(path)


# --- the same as the stock pipeline and as the model -------------------------------------------------------------------


def test_one_text(pipe, stock):
    ours = pipe(TEXT, seed=1, **FAST)
    assert set(ours) == {"audio", "sampling_rate"} and ours["sampling_rate"] == SAMPLING_RATE
    assert ours["audio"].ndim == 1 and ours["audio"].dtype == np.float32
    assert 0.01 < ours["audio"].std() < 0.5
    assert same(ours, stock(TEXT, forward_params={"seed": 1, **FAST}))
    assert same(ours, stock(TEXT, generate_kwargs={"seed": 1, **FAST}))
    assert same(ours, pipe(TEXT, forward_params={"seed": 1, **FAST}))
    generated = pipe.model.generate(**pipe.processor(TEXT), seed=1, **FAST)
    assert same(ours, generated.audio[0])
    assert not same(ours, pipe(TEXT, seed=2, **FAST))


def test_several_texts(pipe, stock):
    alone = [pipe(text, seed=1, **FAST) for text in TEXTS]
    results = {
        "ours": pipe(TEXTS, seed=1, **FAST),
        "tuple": pipe(tuple(TEXTS), seed=1, **FAST),
        "batch_size": pipe(TEXTS, seed=1, batch_size=2, **FAST),
        "batch_size 1": pipe(TEXTS, seed=1, batch_size=1, num_workers=0, **FAST),
        "stock": stock(TEXTS, forward_params={"seed": 1, **FAST}),
        "stock batch_size": stock(TEXTS, forward_params={"seed": 1, **FAST}, batch_size=2),
        "generator": list(pipe((text for text in TEXTS), seed=1, **FAST)),
        "stock generator": list(stock((text for text in TEXTS), forward_params={"seed": 1, **FAST})),
    }
    for name, result in results.items():
        assert len(result) == 2, name
        assert all(same(one, other) for one, other in zip(result, alone, strict=True)), name
        assert all(item["sampling_rate"] == SAMPLING_RATE for item in result), name
    generated = pipe.model.generate(**pipe.processor(TEXTS), seed=1, **FAST)
    assert all(same(one, other) for one, other in zip(generated.audio, alone, strict=True))
    one = pipe([TEXT], seed=1, **FAST)
    assert isinstance(one, list) and same(one[0], alone[0])


def test_a_generator_is_lazy(pipe):
    taken = []

    def texts():
        for text in TEXTS * 5:
            taken.append(text)
            yield text

    results = pipe(texts(), seed=1, **FAST)
    assert same(next(iter(results)), pipe(TEXT, seed=1, **FAST))
    assert len(taken) < 10


def test_factory(tiny_checkpoint, pipe):
    made = pipeline(
        "text-to-speech", model=str(tiny_checkpoint), pipeline_class=IndexTTS2TextToAudioPipeline, device="cpu"
    )
    assert type(made) is IndexTTS2TextToAudioPipeline
    assert same(made(TEXT, seed=1, duration_s=0.8, **FAST), pipe(TEXT, seed=1, duration_s=0.8, **FAST))


def test_recordings_through_the_stock_pipeline(pipe, stock, recording):
    expected = pipe(TEXT, voice=recording, seed=1, **FAST)
    parameters = {"seed": 1, **FAST}
    assert same(expected, stock(TEXT, forward_params=parameters, preprocess_params={"speaker_audio": recording}))
    expected = pipe(TEXT, emotion_weights=HAPPY, seed=1, **FAST)
    assert same(expected, stock(TEXT, forward_params=parameters, preprocess_params={"emotion_weights": HAPPY}))
    half = pipeline("text-to-speech", model=stock.model.config.name_or_path, dtype=torch.bfloat16, device="cpu")
    assert half.model.t2s.dtype == torch.bfloat16
    inputs = half.preprocess(TEXT, speaker_audio=recording)
    assert inputs["prompt_mel"].dtype == inputs["speaker_input_features"].dtype == torch.float32
    assert np.isfinite(half(TEXT, forward_params=parameters)["audio"]).all()


# --- who speaks --------------------------------------------------------------------------------------------------------


def test_every_form_of_a_voice(pipe, other_voice, recording, tmp_path):
    path = tmp_path / "low.safetensors"
    other_voice.save(path)
    with open(recording, "rb") as file:
        content = file.read()
    array, rate = soundfile.read(recording, dtype="float32")
    forms = {
        "VoicePrompt": other_voice,
        "saved voice": str(path),
        "saved voice as a path": path,
        "recording": recording,
        "bytes": content,
        "file": io.BytesIO(content),
        "array": (array, rate),
        "dict": {"array": array, "sampling_rate": rate},
        "dict of bytes": {"bytes": content, "path": None},
    }
    arguments = dict(seed=1, duration_s=0.8, **FAST)
    expected = pipe(TEXT, voice=other_voice, **arguments)
    for name, form in forms.items():
        assert same(pipe(TEXT, voice=form, **arguments), expected), name
    default = pipe(TEXT, **arguments)
    assert same(pipe(TEXT, voice="buzz", **arguments), default) and not same(default, expected)

    voices = [*forms.values(), "buzz", None]
    mixed = pipe([TEXT] * len(voices), voice=voices, **arguments)
    assert all(same(one, expected) for one in mixed[:-2])
    assert same(mixed[-2], default) and same(mixed[-1], default)


def test_a_recording_is_read_once(pipe, recording, monkeypatch):
    calls = []
    encode = pipe.model.encode_voice
    monkeypatch.setattr(pipe.model, "encode_voice", lambda audio: calls.append(audio) or encode(audio))
    pipe([TEXT] * 3, voice=[recording, None, recording], seed=1, **FAST)
    assert calls == [recording]


def test_a_long_recording_is_cut_and_that_is_said_once(pipe, caplog):
    array = make_speech(16.0, sampling_rate=16000)
    with caplog.at_level("WARNING"):
        pipe(TEXTS, voice=(array, 16000), seed=1, duration_s=1.0, **FAST)
    assert sum("16.0 s long" in record.message for record in caplog.records) == 1


def test_voices_that_cannot_be_used(pipe, tiny_voice, tmp_path):
    with pytest.raises(ValueError, match=r"no voice named 'lou', but \['buzz'\]"):
        pipe(TEXT, voice="lou")
    with pytest.raises(FileNotFoundError, match="There is no audio file 'missing.wav'"):
        pipe(TEXT, voice="missing.wav")
    with pytest.raises(FileNotFoundError, match="There is no voice file 'missing.safetensors'"):
        pipe(TEXT, voice="missing.safetensors")
    with pytest.raises(TypeError, match="Audio cannot be a `int`"):
        pipe(TEXT, voice=5)
    with pytest.raises(ValueError, match=r"`voice` has 2 values for 1 text\(s\)"):
        pipe(TEXT, voice=["buzz", "buzz"])
    with pytest.raises(ValueError, match="Pass the pair"):
        pipe(TEXT, voice=np.zeros(20000, dtype=np.float32))
    model = make_tiny_model()
    model.semantic_codec.feature_mean.add_(1.0)
    foreign = tmp_path / "foreign.safetensors"
    model.encode_voice((make_speech(0.5), SAMPLING_RATE)).save(foreign)
    with pytest.raises(ValueError, match="This voice was made with the checkpoint 'unsaved@.*' but 'tiny-random@"):
        pipe(TEXT, voice=str(foreign))


# --- how -----------------------------------------------------------------------------------------------------------------


def test_emotion_of_a_recording(pipe, recording):
    arguments = dict(seed=1, duration_s=0.8, **FAST)
    plain = pipe(TEXT, **arguments)
    array, rate = soundfile.read(recording, dtype="float32")
    full = pipe(TEXT, emotion_audio=recording, **arguments)
    assert same(pipe(TEXT, emotion_audio=(array, rate), **arguments), full) and not same(full, plain)
    features = pipe.model.encode_emotion(recording)
    assert same(pipe(TEXT, emotion_features=features, **arguments), full)
    half = pipe(TEXT, emotion_audio=recording, emotion_strength=0.5, **arguments)
    assert not same(half, full)
    listed = pipe([TEXT] * 3, emotion_audio=[recording, None, (array, rate)], **arguments)
    assert same(listed[0], full) and same(listed[1], plain) and same(listed[2], full)
    listed = pipe([TEXT] * 2, emotion_audio=[recording, None], emotion_strength=0.5, **arguments)
    assert same(listed[0], half) and same(listed[1], plain)


def test_emotion_weights(pipe):
    arguments = dict(seed=1, duration_s=0.8, **FAST)
    plain = pipe(TEXT, **arguments)
    happy = pipe(TEXT, emotion_weights=HAPPY, **arguments)
    assert not same(happy, plain)
    assert same(pipe(TEXT, emotion_weights={"happy": 0.5, "calm": 0.25}, **arguments), happy)
    listed = pipe([TEXT] * 3, emotion_weights=[HAPPY, None, {"happy": 0.5, "calm": 0.25}], **arguments)
    assert same(listed[0], happy) and same(listed[1], plain) and same(listed[2], happy)
    assert all(same(one, happy) for one in pipe([TEXT] * 2, emotion_weights=[HAPPY, HAPPY], **arguments))
    half = pipe(TEXT, emotion_weights=HAPPY, emotion_strength=0.5, **arguments)
    assert same(half, pipe(TEXT, emotion_weights=[weight / 2 for weight in HAPPY], **arguments))
    assert same(pipe(TEXT, emotion_weights=HAPPY, emotion_strength=0.0, **arguments), plain)


@pytest.fixture(scope="module")
def emotion_text_model() -> EmotionTextModel:
    tokenizer = build_tokenizer()
    torch.manual_seed(2)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=3,
        initializer_range=0.5,
    )
    return EmotionTextModel(Qwen3ForCausalLM(config).eval(), tokenizer)


def test_emotion_of_a_text(pipe, emotion_text_model, tmp_path):
    with pytest.raises(OSError, match="no emotion language model under 'emotion_text'"):
        pipe(TEXT, emotion_text="what a day", **FAST)
    folder = tmp_path / "with-emotion-text"
    pipe.save_pretrained(folder)
    emotion_text_model.save_pretrained(folder)
    reader = IndexTTS2TextToAudioPipeline.from_pretrained(folder)
    assert reader.emotion_text_model is None
    arguments = dict(seed=1, duration_s=0.8, **FAST)
    texts = ["what a day", "gloomy"]
    weights = emotion_text_model(texts).tolist()
    assert weights[0] == pytest.approx([1.2, 0, 0, 0, 0, 0, 0, 0]) and weights[1] == [0.0] * 7 + [1.0]
    described = [reader("Hello.", emotion_text=text, **arguments) for text in texts]
    for one, row in zip(described, weights, strict=True):
        assert same(one, pipe("Hello.", emotion_weights=row, **arguments))
    listed = reader(["Hello."] * 3, emotion_text=[*texts, None], **arguments)
    assert same(listed[0], described[0]) and same(listed[1], described[1])
    assert same(listed[2], pipe("Hello.", **arguments))
    assert all(same(one, described[0]) for one in reader(["Hello."] * 2, emotion_text=texts[0], **arguments))
    own = reader(texts, emotion_text=True, **arguments)
    for one, text, row in zip(own, texts, weights, strict=True):
        assert same(one, pipe(text, emotion_weights=row, **arguments))
    assert same(reader("Hello.", emotion_text=False, **arguments), listed[2])
    assert same(
        reader("Hello.", emotion_text=texts[0], emotion_strength=0.4, **arguments),
        pipe("Hello.", emotion_weights=weights[0], emotion_strength=0.4, **arguments),
    )
    reader.emotion_text_model.model.generation_config.do_sample = True
    sampled = reader(texts, emotion_text=True, **(arguments | {"seed": [1, 5]}))
    assert same(sampled[1], reader(texts[1], emotion_text=True, **(arguments | {"seed": 5})))
    with pytest.raises(ValueError, match=r"`emotion_text` has 2 descriptions for 1 text\(s\)"):
        reader("Hello.", emotion_text=texts)
    with pytest.raises(ValueError, match="must be one or more texts that are not empty"):
        reader("Hello.", emotion_text=" ")

    reader.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "emotion_text" / "config.json").is_file()
    given = IndexTTS2TextToAudioPipeline(
        model=pipe.model,
        processor=pipe.processor,
        tokenizer=pipe.tokenizer,
        device="cpu",
        emotion_text_model=emotion_text_model,
    )
    assert same(given("Hello.", emotion_text=texts[0], **arguments), described[0])


def test_two_emotions(pipe, recording):
    kinds = {
        "emotion_audio": recording,
        "emotion_features": torch.zeros(9, 24),
        "emotion_weights": HAPPY,
        "emotion_text": "gloomy",
    }
    names = list(kinds)
    for index, one in enumerate(names):
        for other in names[index + 1 :]:
            given = {one: kinds[one], other: kinds[other]}
            for call in (pipe, lambda text, **kwargs: next(pipe.stream(text, **kwargs))):
                with pytest.raises(ValueError, match=f"Both `{one}` and `{other}` were given: give one emotion"):
                    call(TEXT, **given)


# --- how long, and the rest ----------------------------------------------------------------------------------------------


def test_lengths(pipe):
    results = pipe(TEXTS, seed=1, duration_s=[1.25, None], **FAST)
    assert len(results[0]["audio"]) == round(1.25 * SAMPLING_RATE)
    assert same(results[1], pipe(TEXTS[1], seed=1, **FAST))
    results = pipe(TEXTS, seed=1, num_semantic_tokens=[None, 21], **FAST)
    assert len(results[1]["audio"]) == int(21 * 1.72) * 256
    text = "One sentence here. And another one there."
    whole = pipe(text, seed=1, duration_s=2.0, max_text_tokens=8, segment_silence_s=0.5, **FAST)
    assert len(whole["audio"]) == 2 * SAMPLING_RATE
    with pytest.raises(ValueError, match="Both `num_semantic_tokens`"):
        pipe(TEXT, duration_s=1.0, num_semantic_tokens=50)


def test_seed_for_each(pipe):
    results = pipe([TEXT] * 3, seed=[1, 2, 1], **FAST)
    assert same(results[0], results[2]) and not same(results[0], results[1])
    assert same(results[1], pipe(TEXT, seed=2, **FAST))


def test_generation_settings(pipe):
    one, other = (pipe(TEXT, seed=1, temperature=temperature, **FAST) for temperature in (0.01, 5.0))
    assert not same(one, other)
    assert same(pipe(TEXT, seed=1, do_sample=False, **FAST), pipe(TEXT, seed=1, top_k=1, **FAST))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "nothing in it to speak"),
        ("  \n ", "nothing in it to speak"),
        (["Hello.", ""], "nothing in it to speak"),
        ("🙂", "only characters that the vocabulary lacks"),
        ([], "`text` must be a string or a list of at least one string"),
        (3, "`text` must be a string or a list of at least one string"),
        (None, "`text` must be a string or a list of at least one string"),
        (["Hello.", 3], "`text` must be a string or a list of at least one string"),
    ],
)
def test_no_text(pipe, text, message):
    with pytest.raises(ValueError, match=message):
        pipe(text, seed=1, **FAST)


def test_unknown_arguments(pipe):
    with pytest.raises(TypeError, match="IndexTTS2 takes no 'speed'"):
        pipe(TEXT, speed=1.5)
    with pytest.raises(TypeError, match="IndexTTS2 takes no 'speed'"):
        next(pipe.stream(TEXT, speed=1.5))


def test_streaming(pipe, recording):
    texts = ["One sentence here. And another one there. 你好。", "Good morning."]
    arguments = dict(seed=1, max_text_tokens=8, voice=[recording, "buzz"], emotion_weights=[HAPPY, None], **FAST)
    stream = pipe.stream(texts, **arguments)
    assert isinstance(stream, types.GeneratorType)
    segments = list(stream)
    assert all(isinstance(segment, IndexTTS2Segment) for segment in segments)
    order = [(segment.text_index, segment.segment_index) for segment in segments]
    assert order == sorted(order) and len(order) > 3
    pause = torch.zeros(int(0.2 * SAMPLING_RATE))
    for index, result in enumerate(pipe(texts, **arguments)):
        parts = [segment for segment in segments if segment.text_index == index]
        assert [part.is_last for part in parts] == [False] * (len(parts) - 1) + [True]
        joined = torch.cat([item for part in parts for item in (part.audio, pause)])[: -len(pause)]
        assert same(result, joined)
    one = list(pipe.stream(TEXT, seed=1, **FAST))
    assert same(pipe(TEXT, seed=1, **FAST), one[0].audio) and len(one) == 1


def test_progress(pipe):
    calls = []
    pipe(TEXT, seed=1, progress_callback=lambda *call: calls.append(call), **FAST)
    assert {kind for kind, _, _ in calls} == {"tokens", "mel"} and calls[-1] == ("mel", 2, 2)


class Cancelled(Exception):
    pass


def cancel_at(stage, place):
    """A `progress_callback` that ends the call at that step of a half, and a list of what it was called with."""
    calls = []

    def report(*call):
        calls.append(call)
        if call[0] == stage and call[1] == place:
            raise Cancelled

    return report, calls


def state_of(pipe):
    """What a call could leave behind."""
    t2s = pipe.model.t2s
    switches = [getattr(module, "disable_adapters", None) for module in t2s.modules()]
    return {
        "adapters": t2s.active_adapters() if t2s._hf_peft_config_loaded else [],
        "are off": any(is_off is True for is_off in switches),
        "random": torch.get_rng_state().tolist(),
        "settings": t2s.generation_config.to_dict(),
        "scheduler": {
            name: value for name, value in vars(pipe.model.scheduler).items() if not isinstance(value, torch.Tensor)
        },
        "training": [module.training for module in pipe.model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in t2s.modules()],
    }


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}], ids=str)
def test_a_call_that_ends_early_leaves_nothing_behind(settings, tiny_checkpoint, tiny_adapter, tiny_voice):
    """Between segments and within one, in either half; in the manner of an adapter, which the voice brings, with and without another."""
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint)
    text, options = (
        "Good morning, my friend. How are you today?",
        {"seed": 1, **FAST, **settings, "max_text_tokens": 8},
    )
    styled = replace(tiny_voice, adapter=str(tiny_adapter))
    voices = [tiny_voice, styled]
    plain, adapted = (pipe(text, voice=voice, **options)["audio"] for voice in voices)
    assert not same(plain, adapted)
    for own_adapter in (False, True):
        if own_adapter:
            pipe.model.t2s.load_adapter(str(tiny_adapter), "own")
        before = state_of(pipe)
        assert before["are off"] is not own_adapter

        for voice in voices:
            # Between segments: one and no more.
            for segment in pipe.stream(text, voice=voice, **options):
                assert not segment.is_last
                break
            assert state_of(pipe) == before
            # Within one.
            for stage, place in (("tokens", 3), ("mel", 1)):
                report, calls = cancel_at(stage, place)
                with pytest.raises(Cancelled):
                    pipe(text, voice=voice, progress_callback=report, **options)
                assert calls[-1][:2] == (stage, place)
                with pytest.raises(Cancelled):
                    list(pipe.stream(text, voice=voice, progress_callback=cancel_at(stage, place)[0], **options))
                assert state_of(pipe) == before
        expected = [adapted, adapted] if own_adapter else [plain, adapted]
        for voice, audio in zip(voices, expected, strict=True):
            assert np.array_equal(pipe(text, voice=voice, **options)["audio"], audio)


def test_saving_and_loading(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "again")
    loaded = IndexTTS2TextToAudioPipeline.from_pretrained(tmp_path / "again", dtype=torch.float32)
    arguments = dict(seed=1, duration_s=0.8, **FAST)
    assert same(loaded(TEXT, **arguments), pipe(TEXT, **arguments), atol=1e-6)
    assert loaded.device.type == "cpu" and not loaded.model.training


def test_settings_of_the_constructor_stay(pipe):
    settled = IndexTTS2TextToAudioPipeline(
        model=pipe.model, processor=pipe.processor, tokenizer=pipe.tokenizer, device="cpu", duration_s=1.0, seed=3
    )
    expected = pipe("Hello.", duration_s=1.0, seed=3)["audio"]
    assert len(expected) == 22050
    np.testing.assert_array_equal(settled("Hello.")["audio"], expected)
    np.testing.assert_array_equal(settled(["Hello."])[0]["audio"], expected)
    np.testing.assert_array_equal(next(settled.stream("Hello.")).audio.numpy(), expected)
    assert len(settled("Hello.", duration_s=0.5)["audio"]) == 11025


def test_the_overloads_have_the_arguments_of_the_call():
    names = [
        [(item.name, item.default) for item in inspect.signature(function).parameters.values()]
        for function in (IndexTTS2TextToAudioPipeline.__call__, *get_overloads(IndexTTS2TextToAudioPipeline.__call__))
    ]
    assert names == [names[0]] * 4


def test_threads_are_for_programs_to_set(tiny_checkpoint, monkeypatch):
    for name in ("OMP_NUM_THREADS", "INDEXTTS2_THREADS"):
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    with torch.device("meta"):
        large = torch.nn.Linear(10_000, 10_000)
    try:
        torch.set_num_threads(3)
        model = IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint).model
        assert torch.get_num_threads() == 3
        set_num_threads(large)
        assert torch.get_num_threads() == 3
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        set_num_threads(model)
        assert torch.get_num_threads() == 3
        monkeypatch.delenv("OMP_NUM_THREADS")
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        for load, expected in ((0.2, 2), (2.5, 2), (2.6, 1), (9.0, 1)):
            monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
            set_num_threads(model)
            assert torch.get_num_threads() == expected
        monkeypatch.setenv("INDEXTTS2_THREADS", "2")
        set_num_threads(model)
        assert torch.get_num_threads() == 2
        set_num_threads(model, 4)
        assert torch.get_num_threads() == 4
        monkeypatch.setenv("INDEXTTS2_THREADS", "many")
        with pytest.raises(
            ValueError, match="`INDEXTTS2_THREADS` is 'many', but it must be a whole number of at least 1"
        ):
            set_num_threads(model)
        with pytest.raises(ValueError, match="`num_threads` is 0, but it must be a whole number of at least 1"):
            set_num_threads(model, 0)
    finally:
        torch.set_num_threads(before)
