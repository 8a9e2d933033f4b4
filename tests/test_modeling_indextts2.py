"""The whole model: batches, segments, seeds, lengths, emotions, voices, and the checkpoint folder."""

import copy
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import SAMPLING_RATE, make_speech, make_tiny_model
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from safetensors.torch import save_file
from transformers import AutoModelForTextToWaveform, LogitsProcessor, LogitsProcessorList, pipeline

from indextts2_hf import (
    IndexTTS2Config,
    IndexTTS2FeatureExtractor,
    IndexTTS2FlowMatchScheduler,
    IndexTTS2ForTextToWaveform,
    IndexTTS2GenerationConfig,
    IndexTTS2Processor,
    IndexTTS2Segment,
    IndexTTS2SemanticCodec,
    IndexTTS2SpeakerEncoder,
    IndexTTS2Vocoder,
    VoicePrompt,
)
from indextts2_hf import modeling_indextts2 as module
from indextts2_hf.modeling_indextts2 import share_out


PAUSE = int(0.2 * SAMPLING_RATE)
HELLO = [11, 12, 13, 14, 15]
MORNING = [21, 22, 23]
WELL = [31, 32, 33, 34, 35, 36, 37, 38, 39]
GREEDY = dict(do_sample=False, num_beams=1, max_new_tokens=12)
BEAMS = dict(do_sample=False, num_beams=3, max_new_tokens=12)
SAMPLED = dict(do_sample=True, num_beams=1, max_new_tokens=12)


def batch_of(*texts: list[list[int]]) -> dict[str, torch.Tensor]:
    """Texts, each a list of segments, as the processor gives them: padded on the left, joined by the stop id."""
    rows = [[token for segment in text for token in [*segment, 1]][:-1] for text in texts]
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[1] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def speak(model, *texts, **kwargs):
    return model.generate(**batch_of(*texts), **({"num_inference_steps": 2} | kwargs))


def assert_same(actual: list[torch.Tensor], expected: list[torch.Tensor], atol: float = 1e-4) -> None:
    assert [len(item) for item in actual] == [len(item) for item in expected]
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def emotion(tiny_model) -> torch.Tensor:
    return tiny_model.encode_emotion((make_speech(0.9, pitch_hz=300.0, seed=2), SAMPLING_RATE))


# --- shapes and segments -----------------------------------------------------------------------------------------------


def test_shapes(tiny_model, tiny_voice):
    output = speak(tiny_model, [HELLO, MORNING], [WELL], voice=tiny_voice, seed=0, **SAMPLED)
    assert len(output.audio) == len(output.semantic_ids) == 2
    assert [len(ids) for ids in output.semantic_ids] == [2, 1]
    for audio, segments in zip(output.audio, output.semantic_ids, strict=True):
        assert audio.ndim == 1 and audio.dtype == torch.float32 and audio.abs().max() <= 1
        assert all(ids.ndim == 1 and 1 <= len(ids) <= 12 and ids.max() < 64 for ids in segments)
        frames = [int(len(ids) * 1.72) for ids in segments]
        assert len(audio) == sum(frames) * 256 + PAUSE * (len(segments) - 1)


def test_stream_gives_the_segments(tiny_model, tiny_voice):
    texts = batch_of([HELLO, MORNING], [WELL])
    arguments = dict(voice=tiny_voice, seed=4, num_inference_steps=2, **SAMPLED)
    segments = list(tiny_model.stream(**texts, **arguments))
    assert all(isinstance(segment, IndexTTS2Segment) for segment in segments)
    assert [(item.text_index, item.segment_index, item.is_last) for item in segments] == [
        (0, 0, False),
        (0, 1, True),
        (1, 0, True),
    ]
    output = tiny_model.generate(**texts, **arguments)
    joined = torch.cat([segments[0].audio, torch.zeros(PAUSE), segments[1].audio])
    assert_same([joined, segments[2].audio], output.audio)
    assert torch.equal(segments[1].semantic_ids, output.semantic_ids[0][1])


def test_the_first_segment_is_ready_before_the_second_is_begun(tiny_model, tiny_voice):
    calls = []
    stream = tiny_model.stream(
        **batch_of([HELLO, MORNING]),
        voice=tiny_voice,
        seed=0,
        num_inference_steps=2,
        progress_callback=lambda *call: calls.append(call),
        **SAMPLED,
    )
    next(stream)
    num_calls = len(calls)
    assert calls[-1] == ("mel", 2, 2)
    next(stream)
    assert len(calls) > num_calls


@pytest.mark.parametrize("segment_silence_s", [0.0, 0.05, 0.2, 1.3])
def test_pauses(tiny_model, tiny_voice, segment_silence_s):
    arguments = dict(voice=tiny_voice, seed=0, **SAMPLED)
    audio = speak(tiny_model, [HELLO, MORNING, WELL], segment_silence_s=segment_silence_s, **arguments).audio[0]
    segments = list(tiny_model.stream(**batch_of([HELLO, MORNING, WELL]), num_inference_steps=2, **arguments))
    pause = int(segment_silence_s * SAMPLING_RATE)
    assert len(audio) == sum(len(item.audio) for item in segments) + 2 * pause
    start = len(segments[0].audio)
    assert not audio[start : start + pause].any()
    assert audio[:start].any() and audio[start + pause :].any()


def test_a_text_of_several_segments_is_its_segments_one_by_one(tiny_model, tiny_voice):
    arguments = dict(voice=tiny_voice, num_inference_steps=2, **GREEDY)
    together = tiny_model.stream(**batch_of([HELLO, MORNING, WELL]), seed=0, segment_batch_size=3, **arguments)
    alone = [next(tiny_model.stream(**batch_of([part]), seed=0, **arguments)) for part in (HELLO, MORNING, WELL)]
    together = list(together)
    assert [item.semantic_ids.tolist() for item in together] == [item.semantic_ids.tolist() for item in alone]
    # Each segment draws noise of its own; the first one of a text is the same alone.
    assert_same([together[0].audio], [alone[0].audio])


@pytest.mark.parametrize("settings", [GREEDY, BEAMS, SAMPLED], ids=["greedy", "beams", "sampled"])
def test_segment_batch_size_changes_nothing(tiny_model, tiny_voice, other_voice, settings):
    arguments = dict(voice=[tiny_voice, other_voice], seed=3, **settings)
    one = speak(tiny_model, [HELLO, MORNING, WELL], [MORNING, HELLO], segment_batch_size=1, **arguments)
    many = speak(tiny_model, [HELLO, MORNING, WELL], [MORNING, HELLO], segment_batch_size=8, **arguments)
    assert_same(one.audio, many.audio)
    for ids, others in zip(one.semantic_ids, many.semantic_ids, strict=True):
        assert [item.tolist() for item in ids] == [item.tolist() for item in others]


@pytest.mark.parametrize("settings", [GREEDY, BEAMS, SAMPLED], ids=["greedy", "beams", "sampled"])
@pytest.mark.parametrize("quirks", [False, True], ids=["trained_here", "released"])
def test_a_row_alone_is_the_row_in_a_batch(tiny_model, tiny_voice, other_voice, emotion, settings, quirks):
    model = tiny_model
    if quirks:
        model = make_tiny_model(use_length_row=False, skip_semantic_position_one=True, prefix_placeholder_token_id=1)
    texts = [[HELLO], [WELL, MORNING], [MORNING], [WELL]]
    weights = torch.full((4, 8), math.nan)
    weights[1] = torch.tensor([0.4, 0, 0, 0.1, 0, 0, 0, 0.2])
    each = dict(
        voice=[tiny_voice, other_voice, tiny_voice, other_voice],
        emotion_features=[None, None, emotion, emotion],
        emotion_strength=[1.0, 1.0, 0.6, 1.0],
        duration_s=[None, 0.9, 0.31, None],
        seed=[5, 6, 7, 5],
    )
    batch = speak(model, *texts, emotion_weights=weights, **each, **settings)
    for index, text in enumerate(texts):
        mine = {name: values[index : index + 1] for name, values in each.items()}
        alone = speak(model, text, emotion_weights=weights[index : index + 1], **mine, **settings)
        assert [ids.tolist() for ids in alone.semantic_ids[0]] == [ids.tolist() for ids in batch.semantic_ids[index]]
        assert_same(alone.audio, batch.audio[index : index + 1])


def test_a_free_row_ends_where_it_ends_alone(tiny_model, tiny_voice):
    for settings in (GREEDY, BEAMS, SAMPLED):
        settings = settings | {"max_new_tokens": 4}
        alone = speak(tiny_model, [WELL], voice=tiny_voice, seed=1, **settings)
        batch = speak(
            tiny_model, [WELL], [HELLO], voice=tiny_voice, seed=1, num_semantic_tokens=[None, 30], **settings
        )
        assert alone.semantic_ids[0][0].tolist() == batch.semantic_ids[0][0].tolist()
        assert len(batch.semantic_ids[1][0]) == 30


def test_padding_on_the_right_is_padding(tiny_model, tiny_voice):
    ids = torch.tensor([[*MORNING, 7, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    padded = tiny_model.generate(ids, attention_mask=mask, voice=tiny_voice, seed=0, num_inference_steps=2, **GREEDY)
    assert_same(padded.audio, speak(tiny_model, [MORNING], voice=tiny_voice, seed=0, **GREEDY).audio)


# --- seeds -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED, SAMPLED | {"num_beams": 2}], ids=["greedy", "sampled", "beams"])
def test_seed(tiny_model, tiny_voice, settings):
    arguments = dict(voice=tiny_voice, **settings)
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    first = speak(tiny_model, [HELLO, WELL], seed=1, **arguments)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert_same(speak(tiny_model, [HELLO, WELL], seed=1, **arguments).audio, first.audio, atol=0)
    other = speak(tiny_model, [HELLO, WELL], seed=2, **arguments)
    assert len(other.audio[0]) != len(first.audio[0]) or not torch.equal(other.audio[0], first.audio[0])


def test_segments_of_a_text_do_not_share_their_noise(tiny_model, tiny_voice):
    segments = list(
        tiny_model.stream(**batch_of([HELLO, HELLO]), voice=tiny_voice, seed=0, num_inference_steps=2, **GREEDY)
    )
    assert torch.equal(segments[0].semantic_ids, segments[1].semantic_ids)
    assert not torch.equal(segments[0].audio, segments[1].audio)


def test_without_a_seed_torch_governs(tiny_model, tiny_voice):
    arguments = dict(voice=tiny_voice, **SAMPLED)
    audio = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        audio.append(speak(tiny_model, [HELLO], [HELLO], **arguments).audio)
    assert_same(audio[0], audio[1], atol=0)
    assert len(audio[0][0]) != len(audio[2][0]) or not torch.equal(audio[0][0], audio[2][0])
    assert len(audio[0][0]) != len(audio[0][1]) or not torch.equal(audio[0][0], audio[0][1])
    # A second call goes on, it does not repeat.
    assert not torch.equal(speak(tiny_model, [HELLO], voice=tiny_voice, **GREEDY).audio[0], audio[2][0])


def test_one_seed_for_each(tiny_model, tiny_voice):
    arguments = dict(voice=tiny_voice, **SAMPLED)
    batch = speak(tiny_model, [HELLO], [HELLO], [HELLO], seed=[1, 2, 1], **arguments).audio
    assert torch.equal(batch[0], batch[2])
    assert len(batch[0]) != len(batch[1]) or not torch.equal(batch[0], batch[1])
    with pytest.raises(ValueError, match=r"`seed` has 2 values for 1 text\(s\)"):
        speak(tiny_model, [HELLO], seed=[1, 2], **arguments)


# --- lengths -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("duration_s", [0.1, 0.25, 1 / 3, 0.5, 0.7777, 1.0, 1.0001, 2.005, 3.9])
def test_duration_is_exact(tiny_model, tiny_voice, duration_s):
    arguments = dict(voice=tiny_voice, seed=0, duration_s=duration_s, **SAMPLED)
    output = speak(tiny_model, [HELLO], **arguments)
    assert len(output.audio[0]) == round(duration_s * SAMPLING_RATE)
    assert len(output.semantic_ids[0][0]) == round(duration_s * 50)


@pytest.mark.parametrize("duration_s", [0.8, 1.23456, 2.5])
@pytest.mark.parametrize("segment_silence_s", [0.0, 0.0777, 0.2])
def test_duration_includes_the_pauses(tiny_model, tiny_voice, duration_s, segment_silence_s):
    audio = speak(
        tiny_model,
        [HELLO, MORNING, WELL],
        voice=tiny_voice,
        seed=0,
        duration_s=duration_s,
        segment_silence_s=segment_silence_s,
        **SAMPLED,
    ).audio[0]
    assert len(audio) == round(duration_s * SAMPLING_RATE)


def test_one_duration_for_each(tiny_model, tiny_voice):
    texts = ([HELLO], [MORNING, WELL], [WELL])
    audio = speak(tiny_model, *texts, voice=tiny_voice, seed=0, duration_s=[0.5, None, 1.1], **SAMPLED).audio
    array = np.array([0.5, 1.1])
    both = speak(tiny_model, texts[0], texts[2], voice=tiny_voice, seed=0, duration_s=array, **SAMPLED).audio
    assert_same(both, [audio[0], audio[2]])
    assert [len(audio[0]), len(audio[2])] == [round(0.5 * SAMPLING_RATE), round(1.1 * SAMPLING_RATE)]
    free = speak(tiny_model, texts[1], voice=tiny_voice, seed=0, **SAMPLED).audio
    assert_same(audio[1:2], free)
    both = speak(
        tiny_model, *texts[:2], voice=tiny_voice, seed=0, duration_s=[0.5, None], num_semantic_tokens=[None, 9]
    )
    assert len(both.audio[0]) == round(0.5 * SAMPLING_RATE)
    assert sum(len(ids) for ids in both.semantic_ids[1]) == 9


def test_silence_follows_speech_that_cannot_be_so_long(tiny_model, tiny_voice):
    """The tiny model has positions for 4 s: the rest of the time is silent."""
    arguments = dict(voice=tiny_voice, seed=0, **SAMPLED)
    output = speak(tiny_model, [HELLO], duration_s=5.5, **arguments)
    longest = speak(tiny_model, [HELLO], duration_s=4.0, **arguments)
    audio, [[duration]] = output.audio[0], output.durations
    assert len(audio) == round(5.5 * SAMPLING_RATE) and not audio[len(longest.audio[0]) :].any()
    assert_same([audio[: len(longest.audio[0])]], longest.audio)
    assert duration.requested_s == 5.5 and duration.padding_s == 1.5
    assert (duration.natural_s, duration.token_rate_factor) == (None, None)
    assert duration.mel_factor == pytest.approx(1.0, abs=0.01)
    assert longest.durations[0][0].padding_s == 0
    assert speak(tiny_model, [HELLO], **arguments).durations == [[None]]


@pytest.mark.parametrize("num_segments", [1, 3])
def test_duration_where_the_natural_length_is_known(tiny_voice, num_segments):
    """Natural are 10 and 2 tokens for each text token: 20 for HELLO, 0.4 s."""
    model = make_tiny_model(natural_semantic_tokens=[10.0, 2.0])
    text, natural_s = [HELLO] * num_segments, 0.4 * num_segments
    arguments = dict(voice=tiny_voice, seed=0, segment_silence_s=0.1, **SAMPLED)
    pauses_s = 0.1 * (num_segments - 1)
    shortest_s, longest_s = (share * natural_s for share in (module._SHORTEST_SHARE, module._LONGEST_SHARE))
    with pytest.raises(ValueError, match=f"needs at least {shortest_s + pauses_s:.2f} s, pauses included"):
        speak(model, text, duration_s=shortest_s + pauses_s - 0.01, **arguments)
    for share, speech_s in ((0.65, 0.65 * natural_s), (1.0, natural_s), (1.4, 1.4 * natural_s), (4.0, longest_s)):
        output = speak(model, text, duration_s=share * natural_s + pauses_s, **arguments)
        assert len(output.audio[0]) == round((share * natural_s + pauses_s) * SAMPLING_RATE)
        num_tokens = sum(map(len, output.semantic_ids[0]))
        assert num_tokens == pytest.approx(50 * speech_s, abs=0.6 * num_segments)
        *others, last = output.durations[0]
        assert last.padding_s == pytest.approx(share * natural_s - speech_s, abs=0.001)
        assert all(duration.padding_s == 0 for duration in others)
        for duration in output.durations[0]:
            assert duration.natural_s == 0.4
            assert duration.token_rate_factor == pytest.approx(natural_s / speech_s, rel=0.05)
            assert duration.mel_factor == pytest.approx(1.0, abs=0.06)


def test_a_longer_segment_gets_the_longer_share(tiny_voice):
    model = make_tiny_model(natural_semantic_tokens=[10.0, 2.0])
    output = speak(model, [HELLO, WELL], voice=tiny_voice, seed=0, duration_s=1.16, **SAMPLED)
    # 0.96 s without the pause for 20 and 28 natural tokens.
    assert [len(ids) for ids in output.semantic_ids[0]] == [20, 28]


class EndsAfter(LogitsProcessor):
    """T2S ends by itself after so many tokens, as a checkpoint may that ignores lengths."""

    def __init__(self, model, num_tokens: int, prefix_length: int):
        self.stop = model.t2s.config.semantic_stop_token_id
        self.length = prefix_length + num_tokens

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, self.stop] = 1e4 if input_ids.shape[1] >= self.length else -torch.inf
        return scores


def test_duration_of_a_checkpoint_that_has_not_learnt_lengths(tiny_voice):
    """What T2S says by itself, 20 tokens here, the length regulator makes as long as was asked for."""
    model = make_tiny_model(use_length_row=False)
    latents = model.t2s.encode_speaker(tiny_voice.speaker_features[None])
    prefix = model.t2s.prepare_prefix(torch.tensor([HELLO]), speaker_latents=latents)[0]
    ends = LogitsProcessorList([EndsAfter(model, 20, prefix.shape[1])])
    arguments = dict(voice=tiny_voice, seed=0, logits_processor=ends, **(GREEDY | {"max_new_tokens": 60}))
    usual_s = len(speak(model, [HELLO], **arguments).audio[0]) / SAMPLING_RATE

    for duration_s in (0.21, 0.4, 0.7, 3.0):
        output = speak(model, [HELLO], duration_s=duration_s, **arguments)
        [[ids]], [[duration]] = output.semantic_ids, output.durations
        assert len(ids) == 20
        assert len(output.audio[0]) == round(duration_s * SAMPLING_RATE)
        assert duration.mel_factor == pytest.approx(min(duration_s / usual_s, 2.0), abs=1e-3)
        assert duration.padding_s == pytest.approx(max(0.0, duration_s - 2 * usual_s), abs=1e-3)
        assert duration.token_rate_factor is None
    shortest = f"took {usual_s:.2f} s, of which {usual_s / 2:.2f} s is the shortest"
    with pytest.raises(ValueError, match=f"Segment 0 of text 0 is to last 0.15 s, but it {shortest}"):
        speak(model, [HELLO], duration_s=0.15, **arguments)
    # A number of tokens is exact everywhere.
    output = speak(model, [HELLO], voice=tiny_voice, seed=0, num_semantic_tokens=7, **GREEDY)
    assert len(output.semantic_ids[0][0]) == 7 and output.durations == [[None]]


@pytest.mark.parametrize("settings", [GREEDY, BEAMS, SAMPLED, SAMPLED | {"num_beams": 2}])
def test_token_count_is_exact(tiny_model, tiny_voice, settings):
    texts = ([HELLO, MORNING, WELL], [WELL], [MORNING])
    counts = [29, None, 1]
    output = speak(tiny_model, *texts, voice=tiny_voice, seed=0, num_semantic_tokens=counts, **settings)
    lengths = [[len(ids) for ids in segments] for segments in output.semantic_ids]
    assert sum(lengths[0]) == 29 and lengths[2] == [1]
    assert lengths[0][2] > lengths[0][0] > lengths[0][1] >= 1


@pytest.mark.parametrize("count", [6, 7, 11, 40, 200])
def test_a_count_is_shared_out_exactly(tiny_model, count):
    for text_lengths in ([1, 1, 1, 1, 50, 50], [100, 1, 1, 1, 1, 1], [3, 3, 3, 3, 3, 3]):
        rows = [module._Row(0, index, False, [5] * length) for index, length in enumerate(text_lengths)]
        tiny_model._plan_lengths(rows, count, None, 0.2)
        shares = [row.num_semantic_tokens for row in rows]
        assert sum(shares) == count and min(shares) >= 1
    assert sum(share_out(count, [7, 1, 90])) == count


def test_impossible_lengths(tiny_model, tiny_voice):
    def ask(*texts, **kwargs):
        speak(tiny_model, *texts, voice=tiny_voice, seed=0, **kwargs)

    for duration_s in (0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="`duration_s` is .* but it must be a finite number of seconds above 0"):
            ask([HELLO], duration_s=duration_s)
    with pytest.raises(ValueError, match=r"text of 5 tokens in 1 segment\(s\) needs at least 0.10 s"):
        ask([HELLO], duration_s=0.09)
    with pytest.raises(ValueError, match=r"text of 8 tokens in 2 segment\(s\) needs at least 0.36 s, pauses included"):
        ask([HELLO, MORNING], duration_s=0.3)
    with pytest.raises(ValueError, match="in at most 4.0 s, and at most 60 s of silence follow it"):
        ask([HELLO], duration_s=64.1)
    with pytest.raises(ValueError, match="`num_semantic_tokens` is 201 but .* at most 200 in one segment"):
        ask([HELLO], num_semantic_tokens=201)
    for count in (0, -3, 1.5, True):
        with pytest.raises(ValueError, match=f"`num_semantic_tokens` is {count}, but it must be a whole number"):
            ask([HELLO], num_semantic_tokens=count)
    with pytest.raises(ValueError, match=r"at least 1 for each of the 2 segment\(s\)"):
        ask([HELLO, MORNING], num_semantic_tokens=1)
    with pytest.raises(ValueError, match=r"Both `num_semantic_tokens` \(30\) and `duration_s` \(1.0\)"):
        ask([HELLO], num_semantic_tokens=30, duration_s=1.0)
    with pytest.raises(ValueError, match=r"`duration_s` has 3 values for 1 text\(s\)"):
        ask([HELLO], duration_s=[1.0, 1.0, 1.0])
    for silence in (-0.1, math.nan, math.inf):
        with pytest.raises(ValueError, match="`segment_silence_s` is .* 0 or more"):
            ask([HELLO], segment_silence_s=silence)
    with pytest.raises(ValueError, match="`segment_batch_size` is 0"):
        ask([HELLO], segment_batch_size=0)


def test_no_text(tiny_model, tiny_voice):
    with pytest.raises(ValueError, match="Text 1 has no tokens"):
        tiny_model.generate(torch.tensor([[5, 6], [1, 1]]), voice=tiny_voice)


def test_a_segment_that_wants_to_stop_at_once_says_something(tiny_voice):
    model = make_tiny_model()
    with torch.no_grad():
        model.t2s.semantic_head.bias[65] = 1e4
    for settings in (GREEDY, BEAMS, SAMPLED, SAMPLED | {"num_beams": 2}):
        output = speak(model, [HELLO], [WELL], voice=tiny_voice, seed=0, **settings)
        assert [len(ids[0]) for ids in output.semantic_ids] == [1, 1]
        assert all(len(audio) == 256 for audio in output.audio)


def test_cut_off_is_said(tiny_model, tiny_voice, caplog):
    with caplog.at_level("WARNING"):
        speak(tiny_model, [HELLO], voice=tiny_voice, seed=0, **GREEDY | {"max_new_tokens": 3})
    assert [record.message.split(" without")[0] for record in caplog.records] == [
        "Segment 0 of text 0 was cut off after 3 semantic tokens (0.1 s)"
    ]
    caplog.clear()
    with caplog.at_level("WARNING"):
        speak(tiny_model, [HELLO], voice=tiny_voice, seed=0, num_semantic_tokens=3, **GREEDY)
    assert not caplog.records


# --- emotions ----------------------------------------------------------------------------------------------------------


def conditions(model, voices, features=None, weights=None, strength=1.0):
    count = len(voices)
    features = features if isinstance(features, list) else [features] * count
    return model._encode_conditions(voices, features, weights, [strength] * count)


def test_strength_of_a_reference(tiny_model, tiny_voice, emotion):
    t2s = tiny_model.t2s
    with torch.no_grad():
        base = t2s.encode_emotion(tiny_voice.speaker_features[None])
        own = t2s.encode_emotion(tiny_voice.emotion_features[None])
        reference = t2s.encode_emotion(emotion[None])
        assert not torch.allclose(base, own, atol=1e-5)
        assert torch.equal(conditions(tiny_model, [tiny_voice])[1], own)
        # Without a reference a strength has nothing to act on.
        assert torch.equal(conditions(tiny_model, [tiny_voice], strength=0.3)[1], own)
        assert torch.equal(conditions(tiny_model, [tiny_voice], emotion, strength=0.0)[1], base)
        assert torch.equal(conditions(tiny_model, [tiny_voice], emotion, strength=1.0)[1], reference)
        mixed = conditions(tiny_model, [tiny_voice], emotion, strength=0.35)[1]
        torch.testing.assert_close(mixed, base + 0.35 * (reference - base))


def test_weights(tiny_model, tiny_voice, other_voice):
    weights = torch.tensor([[0.5, 0, 0, 0.3, 0, 0, 0.4, 0.2], [math.nan] * 8])
    with torch.no_grad():
        embeds = conditions(tiny_model, [tiny_voice, other_voice], weights=weights)[1]
        own = conditions(tiny_model, [tiny_voice, other_voice])[1]
        prototypes = tiny_model.t2s.emotion_prototypes(weights[:1], tiny_voice.speaker_embeds[None])
    assert weights[0].sum() > 1
    torch.testing.assert_close(embeds[:1], prototypes + (1 - weights[0].sum()) * own[:1])
    assert torch.equal(embeds[1], own[1])
    audio = speak(tiny_model, [HELLO], [HELLO], voice=tiny_voice, emotion_weights=weights, seed=0, **GREEDY).audio
    assert_same(audio[1:], speak(tiny_model, [HELLO], voice=tiny_voice, seed=0, **GREEDY).audio)
    assert len(audio[0]) != len(audio[1]) or not torch.allclose(audio[0], audio[1], atol=1e-3)


def test_wrong_weights(tiny_model, tiny_voice):
    with pytest.raises(ValueError, match=r"`emotion_weights` must have the shape \(1, 8\).* has \(2, 8\)"):
        speak(tiny_model, [HELLO], voice=tiny_voice, emotion_weights=torch.zeros(2, 8))
    model = make_tiny_model()
    model.t2s.emotion_prototypes.emotion_embeds.zero_()
    with pytest.raises(ValueError, match="has no emotion prototypes"):
        speak(model, [HELLO], voice=tiny_voice, emotion_weights=torch.zeros(1, 8))


def test_recordings_of_the_processor_may_stand_for_values(tiny_model, tiny_voice, emotion, speech):
    inputs = tiny_model.feature_extractor(speaker_audio=(speech, SAMPLING_RATE))
    expected = speak(tiny_model, [HELLO], voice=tiny_voice, seed=0, **GREEDY).audio
    assert_same(speak(tiny_model, [HELLO], seed=0, **inputs, **GREEDY).audio, expected)
    inputs = tiny_model.feature_extractor(emotion_audio=(make_speech(0.9, pitch_hz=300.0, seed=2), SAMPLING_RATE))
    expected = speak(tiny_model, [HELLO], voice=tiny_voice, emotion_features=emotion, seed=0, **GREEDY).audio
    assert_same(speak(tiny_model, [HELLO], voice=tiny_voice, seed=0, **inputs, **GREEDY).audio, expected)


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
def test_strength_acts_on_recordings_of_the_processor(tiny_model, tokenizer, tiny_voice, emotion, speech, strength):
    """Both recordings through the processor: the reference is told apart from the voice's own emotion."""
    processor = IndexTTS2Processor(tiny_model.feature_extractor, tokenizer)
    clips = {"speaker_audio": (speech, SAMPLING_RATE)}
    clips["emotion_audio"] = (make_speech(0.9, pitch_hz=300.0, seed=2), SAMPLING_RATE)
    inputs = processor("Hello.", **clips)
    settings = {"emotion_strength": strength, "seed": 0, **GREEDY}
    found = tiny_model.generate(**inputs, **settings).audio
    text = processor("Hello.")
    expected = tiny_model.generate(**text, voice=tiny_voice, emotion_features=emotion, **settings).audio
    assert_same(found, expected)


def test_default_emotion(tiny_voice, other_voice, emotion, speech):
    """A recording without an emotion of its own speaks with that of the voice which the checkpoint names."""
    model = make_tiny_model()
    own = model.encode_voice((speech, SAMPLING_RATE))
    model.voices = {"anna": other_voice}
    model.config.default_emotion = "anna"
    voice = model.encode_voice((speech, SAMPLING_RATE))
    assert torch.equal(voice.emotion_features, other_voice.emotion_features)
    for name in own.tensors().keys() - {"emotion_features"}:
        assert torch.equal(voice.tensors()[name], own.tensors()[name])
    # The processor's tensors of a recording are the same voice.
    inputs = model.feature_extractor(speaker_audio=(speech, SAMPLING_RATE))
    expected = speak(model, [HELLO], voice=voice, seed=0, **GREEDY).audio
    assert_same(speak(model, [HELLO], seed=0, **inputs, **GREEDY).audio, expected)
    # What is asked for goes first; a strength of 0 leaves the emotion that the voice speaks with.
    with torch.no_grad():
        default, reference = (model.t2s.encode_emotion(item[None]) for item in (other_voice.emotion_features, emotion))
        assert torch.equal(conditions(model, [voice])[1], default)
        assert torch.equal(conditions(model, [voice], emotion, strength=1.0)[1], reference)
        assert torch.equal(conditions(model, [voice], emotion, strength=0.0)[1], default)
    # A voice of the checkpoint keeps its own.
    assert model.get_voice("anna") is other_voice

    model.config.default_emotion = "bert"
    with pytest.raises(
        ValueError, match=r"`config.default_emotion` is 'bert', but this checkpoint has the voices \['anna'\]"
    ):
        model.encode_voice((speech, SAMPLING_RATE))


# --- voices ------------------------------------------------------------------------------------------------------------


def test_voice_of_a_recording(tiny_model, tiny_voice, speech):
    seconds = len(speech) / SAMPLING_RATE
    assert tiny_voice.speaker_features.shape[1] == tiny_voice.emotion_features.shape[1] == 24
    assert abs(len(tiny_voice.speaker_features) - 50 * seconds) < 2
    assert tiny_voice.speaker_embeds.shape == (16,)
    assert tiny_voice.prompt_mel.shape == (len(speech) // 256, 80)
    assert tiny_voice.content_embeds.shape == (len(speech) // 256, 16)
    assert not torch.equal(tiny_voice.speaker_features, tiny_voice.emotion_features)
    inputs = tiny_model.feature_extractor(speaker_audio=(speech, SAMPLING_RATE))
    again = tiny_model.encode_voice(inputs)
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in tiny_voice.tensors().items())
    assert tiny_model.encode_emotion((speech, SAMPLING_RATE)).equal(tiny_voice.emotion_features)


def test_voices_by_name(tiny_voice, other_voice):
    model = make_tiny_model()
    with pytest.raises(ValueError, match="No voice was given and this checkpoint has no default voice"):
        speak(model, [HELLO])
    with pytest.raises(ValueError, match="no voice named 'buzz', but none at all"):
        speak(model, [HELLO], voice="buzz")
    model.voices |= {"buzz": tiny_voice, "low": other_voice}
    model.config.default_voice = "buzz"
    arguments = dict(seed=0, **GREEDY)
    by_name = speak(model, [HELLO], [HELLO], [HELLO], voice=["low", None, tiny_voice], **arguments).audio
    assert_same(by_name[:1], speak(model, [HELLO], voice=other_voice, **arguments).audio)
    assert torch.equal(by_name[1], by_name[2])
    assert_same(by_name[1:2], speak(model, [HELLO], **arguments).audio)
    with pytest.raises(ValueError, match=r"no voice named 'lou', but \['buzz', 'low'\]"):
        speak(model, [HELLO], voice="lou")
    with pytest.raises(TypeError, match="`voice` is a dict, but it must be a `VoicePrompt` or a name"):
        speak(model, [HELLO], voice={})
    with pytest.raises(ValueError, match=r"`voice` has 2 values for 1 text\(s\)"):
        speak(model, [HELLO], voice=[tiny_voice, tiny_voice])


def test_voice_of_another_checkpoint(tiny_voice):
    model = make_tiny_model()
    with torch.no_grad():
        model.speaker_encoder.get_parameter(next(iter(dict(model.speaker_encoder.named_parameters())))).add_(0.1)
    ours = model.semantic_to_mel.fingerprint
    with pytest.raises(ValueError, match=f"made with the checkpoint '{tiny_voice.checkpoint}' but '{ours}' is loaded"):
        speak(model, [HELLO], voice=tiny_voice)


def fingerprint_of(model) -> str:
    return model.semantic_to_mel.fingerprint.split("@")[1]


def test_fingerprint(tiny_model, tiny_checkpoint, tmp_path):
    expected = fingerprint_of(tiny_model)
    loaded = IndexTTS2ForTextToWaveform.from_pretrained(tiny_checkpoint)
    assert loaded.semantic_to_mel.fingerprint == f"tiny-random@{expected}"
    loaded.save_pretrained(tmp_path / "again")
    again = IndexTTS2ForTextToWaveform.from_pretrained(tmp_path / "again")
    assert again.semantic_to_mel.fingerprint == f"again@{expected}"
    half = make_tiny_model()
    half.to(torch.bfloat16)
    assert fingerprint_of(half) == expected


def test_name_of_a_repository_in_the_cache(tiny_model):
    pipeline = tiny_model.semantic_to_mel
    name = pipeline.s2m.config.get("_name_or_path")
    try:
        pipeline.s2m.register_to_config(_name_or_path="/cache/models--someone--tiny-tts/snapshots/0a1b2c/s2m")
        assert pipeline.fingerprint.startswith("someone/tiny-tts@")
    finally:
        pipeline.s2m.register_to_config(_name_or_path=name)


@pytest.mark.parametrize("part", ["semantic_encoder", "semantic_codec", "speaker_encoder", "s2m.length_regulator"])
def test_fingerprint_depends_on_weights(tiny_model, part):
    model = make_tiny_model()
    with torch.no_grad():
        for parameter in model.get_submodule(part).parameters():
            parameter.add_(0.01)
    assert fingerprint_of(model) != fingerprint_of(tiny_model)


def test_fingerprint_depends_on_what_a_voice_does(tiny_model):
    model = make_tiny_model()
    with torch.no_grad():
        model.vocoder.conv_in.weight.add_(1.0)
        model.t2s.text_embedding.weight.add_(1.0)
        model.semantic_codec.feature_mean.add_(0.0)
    assert fingerprint_of(model) == fingerprint_of(tiny_model)
    model.semantic_codec.feature_mean.add_(0.5)
    assert fingerprint_of(model) != fingerprint_of(tiny_model)
    model = make_tiny_model()
    model.feature_extractor = IndexTTS2FeatureExtractor(mel_fmax=8000.0)
    assert fingerprint_of(model) != fingerprint_of(tiny_model)
    model.feature_extractor = IndexTTS2FeatureExtractor()
    model.feature_extractor.auto_map = {"AutoFeatureExtractor": "a.B"}
    assert fingerprint_of(model) == fingerprint_of(tiny_model)


def test_voice_file(tiny_voice, tmp_path):
    path = tmp_path / "voice.safetensors"
    tiny_voice.save(path)
    tiny_voice.save(path)
    assert [item.name for item in tmp_path.iterdir()] == ["voice.safetensors"]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    loaded = VoicePrompt.load(path)
    assert loaded.checkpoint == tiny_voice.checkpoint
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in tiny_voice.tensors().items())
    half = loaded.to(torch.bfloat16)
    assert {tensor.dtype for tensor in half.tensors().values()} == {torch.bfloat16}
    assert half.checkpoint == loaded.checkpoint
    assert {tensor.dtype for tensor in loaded.tensors().values()} == {torch.float32}


def test_a_voice_is_a_value(tiny_voice):
    assert tiny_voice == tiny_voice and tiny_voice != tiny_voice.to(torch.float32)
    assert len({tiny_voice, tiny_voice}) == 1
    with pytest.raises(AttributeError):
        tiny_voice.checkpoint = "other"


def test_nothing_half_written_is_left(tiny_voice, tmp_path, monkeypatch):
    path = tmp_path / "voice.safetensors"
    tiny_voice.save(path)
    before = path.read_bytes()

    def fail(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("indextts2_hf.pipeline_s2m.os.replace", fail)
    with pytest.raises(OSError, match="No space"):
        tiny_voice.to(torch.bfloat16).save(path)
    assert [item.name for item in tmp_path.iterdir()] == ["voice.safetensors"]
    assert path.read_bytes() == before
    with pytest.raises(FileNotFoundError, match="There is no folder '.*missing'"):
        tiny_voice.save(tmp_path / "missing" / "voice.safetensors")


def test_files_that_are_no_voice(tiny_voice, tmp_path):
    path = tmp_path / "voice.safetensors"
    with pytest.raises(FileNotFoundError, match="There is no voice file '.*voice.safetensors'. Make one with"):
        VoicePrompt.load(path)
    tiny_voice.save(path)
    whole = path.read_bytes()
    for content in (b"", b"RIFF....WAVE", whole[:100], whole[:-7], whole + b"rest"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a readable safetensors file"):
            VoicePrompt.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"holds no voice: format None with \['a'\], expected 'indextts2-voice-1'"):
        VoicePrompt.load(path)
    tensors = {name: tensor.contiguous() for name, tensor in tiny_voice.tensors().items()}
    metadata = {"format": "indextts2-voice-1", "checkpoint": tiny_voice.checkpoint}
    save_file(tensors | {"prompt_mel": tensors["prompt_mel"][:-1]}, path, metadata=metadata)
    with pytest.raises(ValueError, match="wrong shapes for a voice"):
        VoicePrompt.load(path)
    save_file(tensors | {"speaker_embeds": torch.zeros(2, 2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"wrong shapes for a voice: .*'speaker_embeds': \(2, 2\)"):
        VoicePrompt.load(path)


# --- parts and folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "replacement", "message"),
    [
        ("vocoder", lambda: IndexTTS2Vocoder(num_mel_bins=40, initial_channels=64), "num_mel_bins` is 80 .* is 40"),
        (
            "vocoder",
            lambda: IndexTTS2Vocoder(initial_channels=64, sampling_rate=24000),
            "`config.sampling_rate` is 22050 but `vocoder.sampling_rate` is 24000",
        ),
        (
            "speaker_encoder",
            lambda: IndexTTS2SpeakerEncoder(embed_dim=12, growth_rate=4, initial_channels=8, block_layers=(2, 2, 2)),
            "`s2m.speaker_embed_dim` is 16 but `speaker_encoder.embed_dim` is 12",
        ),
        (
            "semantic_codec",
            lambda: IndexTTS2SemanticCodec(feature_size=32, hidden_size=16, intermediate_size=32, num_layers=1),
            "`t2s.feature_size` is 24 but `semantic_codec.feature_size` is 32",
        ),
        (
            "semantic_codec",
            lambda: IndexTTS2SemanticCodec(
                feature_size=24, codebook_size=70, hidden_size=16, intermediate_size=32, num_layers=1
            ),
            "codebook_size` is 70 but `t2s.semantic_start_token_id` is 64: the start token must lie behind the codes",
        ),
        (
            "feature_extractor",
            lambda: IndexTTS2FeatureExtractor(hop_length=512),
            "`feature_extractor.hop_length` is 512 but `vocoder.hop_length` is 256",
        ),
    ],
)
def test_parts_that_do_not_fit(tiny_model, part, replacement, message):
    names = [
        "t2s",
        "s2m",
        "scheduler",
        "semantic_encoder",
        "semantic_codec",
        "speaker_encoder",
        "vocoder",
        "feature_extractor",
    ]
    parts = {name: getattr(tiny_model, name) for name in names}
    with pytest.raises(ValueError, match=message):
        IndexTTS2ForTextToWaveform(IndexTTS2Config(), **(parts | {part: replacement()}))


def test_saving_and_loading(tiny_model, tiny_voice, tiny_checkpoint):
    loaded = IndexTTS2ForTextToWaveform.from_pretrained(tiny_checkpoint)
    assert not any(module.training for module in loaded.modules())
    assert isinstance(loaded.generation_config, IndexTTS2GenerationConfig)
    assert loaded.generation_config is loaded.t2s.generation_config
    assert list(loaded.voices) == ["buzz"] and loaded.config.default_voice == "buzz"
    expected = tiny_model.state_dict()
    state = loaded.state_dict()
    assert set(state) == set(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    arguments = dict(seed=0, duration_s=1.0, **SAMPLED)
    saved = speak(tiny_model, [HELLO], [WELL, MORNING], voice=tiny_voice, **arguments)
    assert_same(speak(loaded, [HELLO], [WELL, MORNING], **arguments).audio, saved.audio, atol=1e-5)


def test_dtype_is_that_of_t2s(tiny_checkpoint):
    model = AutoModelForTextToWaveform.from_pretrained(tiny_checkpoint, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.t2s.parameters()} == {torch.bfloat16}
    others = [parameter for name, parameter in model.named_parameters() if not name.startswith("t2s.")]
    assert {parameter.dtype for parameter in others} == {torch.float32}
    assert model.t2s.dtype == torch.bfloat16 and model.dtype == torch.float32
    weights = torch.tensor([[0.5, 0, 0, 0, 0, 0, 0, 0.1]])
    output = speak(model, [HELLO], [WELL], seed=0, emotion_weights=weights.repeat(2, 1), **SAMPLED)
    assert all(audio.dtype == torch.float32 and torch.isfinite(audio).all() for audio in output.audio)


def test_arguments_of_loading(tiny_checkpoint):
    with pytest.raises(TypeError, match="takes no 'device_map'. Load on the CPU and use `model.to"):
        AutoModelForTextToWaveform.from_pretrained(tiny_checkpoint, device_map="cpu")
    model = IndexTTS2ForTextToWaveform.from_pretrained(
        tiny_checkpoint, config=IndexTTS2Config(), attn_implementation="eager"
    )
    assert model.config.default_voice is None
    assert model.t2s.config._attn_implementation == "eager"
    assert model.config.name_or_path == model.t2s.name_or_path == str(tiny_checkpoint)


@pytest.mark.lora
def test_adapter_folder(tiny_checkpoint, tmp_path):
    base = AutoModelForTextToWaveform.from_pretrained(tiny_checkpoint)
    base.t2s.add_adapter(LoraConfig(r=4, target_modules=["c_attn", "c_proj", "c_fc"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in base.t2s.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=generator)
    base.t2s.save_pretrained(tmp_path)
    assert f'"base_model_name_or_path": "{tiny_checkpoint}"' in (tmp_path / "adapter_config.json").read_text()
    assert not (tmp_path / "model.safetensors").exists()

    plain = AutoModelForTextToWaveform.from_pretrained(tiny_checkpoint)
    adapted = AutoModelForTextToWaveform.from_pretrained(tmp_path)
    assert isinstance(adapted, IndexTTS2ForTextToWaveform) and not adapted.training
    inputs = dict(
        input_ids=torch.tensor([HELLO]),
        speaker_latents=torch.ones(1, 4, 32),
        semantic_ids=torch.tensor([[3, 4, 5]]),
    )
    with torch.no_grad():
        logits = [model.t2s(**inputs).logits for model in (plain, base, adapted)]
    torch.testing.assert_close(logits[1], logits[2])
    assert (logits[0] - logits[2]).abs().max() > 0.1

    speech = pipeline("text-to-speech", model=str(tmp_path), device="cpu")
    assert speech.model.t2s.active_adapters() == ["default"]
    parameters = {"seed": 0, "num_inference_steps": 2, "do_sample": False, "max_new_tokens": 8}
    audio = speech("Hello there.", forward_params=parameters)["audio"]
    assert audio.dtype == np.float32 and np.isfinite(audio).all() and len(audio) > 256


# --- options -----------------------------------------------------------------------------------------------------------


def test_progress(tiny_model, tiny_voice):
    calls = []
    speak(
        tiny_model,
        [HELLO, MORNING],
        voice=tiny_voice,
        seed=0,
        num_semantic_tokens=13,
        segment_batch_size=1,
        progress_callback=lambda *call: calls.append(call),
        **GREEDY,
    )
    first = [("tokens", step, None) for step in range(1, 9)] + [("mel", 1, 2), ("mel", 2, 2)]
    assert calls[:9] != first  # the stop token is a step, too
    starts = [index for index, call in enumerate(calls) if call == ("tokens", 1, None)]
    ends = [index for index, call in enumerate(calls) if call == ("mel", 2, 2)]
    assert len(starts) == len(ends) == 2
    assert starts[0] == 0 and starts[1] == ends[0] + 1 and ends[1] == len(calls) - 1
    assert sum(kind == "tokens" for kind, _, _ in calls) == 13 + 2


def test_another_scheduler(tiny_model, tiny_voice):
    arguments = dict(voice=tiny_voice, seed=0, **GREEDY)

    def audio_of(scheduler, **kwargs):
        batch = batch_of([HELLO])
        return tiny_model.generate(**batch, noise_scheduler=scheduler, **kwargs, **arguments).audio[0]

    uniform = speak(tiny_model, [HELLO], num_inference_steps=4, **arguments).audio[0]
    warped = audio_of(IndexTTS2FlowMatchScheduler(sway_coefficient=-1.0), num_inference_steps=4)
    explicit = audio_of(IndexTTS2FlowMatchScheduler(grid=[0.0, 0.25, 0.5, 0.75, 1.0]))
    assert not torch.allclose(uniform, warped, atol=1e-4)
    torch.testing.assert_close(uniform, explicit, rtol=0, atol=1e-5)
    assert tiny_model.scheduler.config.grid is None
    with pytest.raises(ValueError, match="`num_inference_steps` is 3 but the `grid` of this scheduler has 2 steps"):
        audio_of(IndexTTS2FlowMatchScheduler(grid=[0.0, 0.5, 1.0]), num_inference_steps=3)
    with pytest.raises(ValueError, match="FlowMatchEulerDiscreteScheduler begins at time 1000.0"):
        audio_of(FlowMatchEulerDiscreteScheduler())
    num_steps = []
    tiny_model.generate(
        **batch_of([MORNING]), progress_callback=lambda kind, step, total: num_steps.append(total), **arguments
    )
    assert num_steps[-1] == 25


def test_generation_settings(tiny_model, tiny_voice):
    arguments = dict(voice=tiny_voice, seed=0)
    before = tiny_model.generation_config.to_dict()
    config = IndexTTS2GenerationConfig(do_sample=False, max_new_tokens=5, num_semantic_tokens=None)
    given = speak(tiny_model, [HELLO], generation_config=config, **arguments)
    named = speak(tiny_model, [HELLO], do_sample=False, max_new_tokens=5, **arguments)
    assert_same(given.audio, named.audio)
    assert tiny_model.generation_config.to_dict() == before
    assert config.to_diff_dict() == IndexTTS2GenerationConfig(do_sample=False, max_new_tokens=5).to_diff_dict()
    longer = speak(tiny_model, [HELLO], generation_config=config, min_new_tokens=5, **arguments)
    assert len(longer.semantic_ids[0][0]) == 5
    conditioned, plain = (
        speak(tiny_model, [HELLO], num_semantic_tokens=20, duration_conditioning=asked, **arguments, **GREEDY)
        for asked in (True, False)
    )
    assert not torch.equal(conditioned.audio[0], plain.audio[0])
    config = IndexTTS2GenerationConfig(do_sample=False, text_guidance_scale=3.0)
    guided, configured, unguided, standard = (
        speak(tiny_model, [HELLO], num_semantic_tokens=20, **options, **arguments)
        for options in (
            {"text_guidance_scale": 3.0, **GREEDY},
            {"generation_config": config, "text_guidance_scale": None},
            {"generation_config": config, "text_guidance_scale": 1.0},
            GREEDY,
        )
    )
    assert_same(guided.audio, configured.audio)
    assert_same(unguided.audio, standard.audio)
    assert not torch.equal(guided.audio[0], unguided.audio[0])


def test_candidates_alone_and_in_a_batch(tiny_model, tiny_voice):
    settings = {"voice": tiny_voice, "do_sample": True, "num_beams": 1, "num_candidates": 3, "max_new_tokens": 20}
    texts = [[HELLO], [MORNING, WELL]]
    both = speak(tiny_model, *texts, seed=[1, 2], segment_batch_size=2, **settings)
    for index, text in enumerate(texts):
        alone = speak(tiny_model, text, seed=index + 1, segment_batch_size=1, **settings)
        for ids, expected in zip(both.semantic_ids[index], alone.semantic_ids[0], strict=True):
            assert torch.equal(ids, expected)
    plain = speak(tiny_model, [HELLO], seed=1, **(settings | {"num_candidates": 1}))
    assert not torch.equal(plain.semantic_ids[0][0], both.semantic_ids[0][0])


def test_candidates_are_read(tiny_model, tiny_voice):
    """The same candidates with and without a recogniser: where it chooses another one, that can be read better."""
    settings = {"voice": tiny_voice, "do_sample": True, "num_beams": 1, "num_candidates": 4, "max_new_tokens": 40}
    model = copy.deepcopy(tiny_model)
    model.t2s.add_text_recognizer(16)
    recognizer = model.t2s.text_recognizer
    read = speak(model, [HELLO], [MORNING], [WELL], seed=[1, 2, 3], **settings).semantic_ids
    model.t2s.text_recognizer = None
    likely = speak(model, [HELLO], [MORNING], [WELL], seed=[1, 2, 3], **settings).semantic_ids

    def score(ids, text):
        lengths = torch.tensor([len(ids)]), torch.tensor([len(text)])
        return recognizer(ids[None], lengths[0], torch.tensor([text]), lengths[1]).item()

    assert any(not torch.equal(ids[0], others[0]) for ids, others in zip(read, likely, strict=True))
    for ids, others, text in zip(read, likely, [HELLO, MORNING, WELL], strict=True):
        assert score(ids[0], text) >= score(others[0], text)


def test_unknown_arguments(tiny_model, tiny_voice):
    for call in (tiny_model.generate, lambda **kwargs: next(tiny_model.stream(**kwargs))):
        with pytest.raises(TypeError, match="IndexTTS2 takes no 'voize', 'speed'"):
            call(**batch_of([HELLO]), voice=tiny_voice, voize=1, speed=2.0)


def test_the_stock_search_options_pass(tiny_model, tiny_voice):
    seen = []

    def forbid_even_codes(input_ids, scores):
        seen.append(input_ids.shape)
        scores = scores.clone()
        scores[:, 0:64:2] = -math.inf
        return scores

    ids = speak(
        tiny_model, [HELLO], voice=tiny_voice, seed=0, logits_processor=[forbid_even_codes], **GREEDY
    ).semantic_ids[0][0]
    assert seen and (ids % 2 == 1).all()
    stops = [lambda input_ids, scores, **kwargs: torch.ones(len(input_ids), dtype=torch.bool)]
    ids = speak(
        tiny_model, [HELLO], voice=tiny_voice, seed=0, stopping_criteria=stops, num_semantic_tokens=None, **GREEDY
    ).semantic_ids[0][0]
    assert len(ids) == 1


def test_a_tokenizer_of_another_checkpoint_is_named(tiny_model, tiny_voice):
    with pytest.raises(
        ValueError, match="token 1000 but this model knows 1000: the tokenizer belongs to another checkpoint"
    ):
        tiny_model.generate(torch.tensor([[5, 1000]]), voice=tiny_voice)


def test_calls_in_threads_do_not_disturb_each_other(tiny_model, tiny_voice):
    input_ids = torch.tensor([[5, 6, 7]])

    def speak(seed: int) -> torch.Tensor:
        return tiny_model.generate(input_ids, voice=tiny_voice, seed=seed, num_semantic_tokens=12).audio[0]

    alone = [speak(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(speak, range(4)))
    for expected, waveform in zip(alone, together, strict=True):
        torch.testing.assert_close(waveform, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strength", [float("nan"), -3.0, 1.5])
def test_a_strength_out_of_range_is_refused(tiny_model, tiny_voice, other_voice, strength):
    with pytest.raises(ValueError, match="`emotion_strength` is .*, but it must be a number from 0"):
        tiny_model.generate(
            torch.tensor([[5, 6]]),
            voice=tiny_voice,
            emotion_features=other_voice.emotion_features,
            emotion_strength=strength,
        )


def test_a_too_long_segment_is_refused_before_any_work(tiny_model, tiny_voice):
    stop = tiny_model.t2s.config.text_stop_token_id
    input_ids = torch.tensor([[5, 6, stop] + [7] * 131])
    with pytest.raises(ValueError, match="a segment of 131 tokens but this checkpoint has positions for 130"):
        next(tiny_model.stream(input_ids, voice=tiny_voice))


def test_shapes_and_seeds_are_checked(tiny_model, tiny_voice):
    with pytest.raises(ValueError, match=r"`input_ids` must have the shape \(num_texts, text_length\)"):
        tiny_model.generate(torch.tensor([5, 6]), voice=tiny_voice)
    for features in (torch.zeros(1, 9, 24), torch.zeros(2, 24)):
        with pytest.raises(ValueError, match="`emotion_features` must have the shape"):
            tiny_model.generate(torch.tensor([[5, 6]]), voice=tiny_voice, emotion_features=[features])
    for seed in ("abc", 1.5, True):
        with pytest.raises(ValueError, match="`seed` is .*, but it must be a whole number"):
            tiny_model.generate(torch.tensor([[5, 6]]), voice=tiny_voice, seed=seed)
    with pytest.raises(ValueError, match="`num_return_sequences` is 2, but each text is spoken once"):
        tiny_model.generate(torch.tensor([[5, 6]]), voice=tiny_voice, num_beams=2, num_return_sequences=2)


@pytest.mark.parametrize("weight", [5.0, -0.1, float("inf"), float("nan")])
def test_weights_that_no_processor_checked_are_refused(tiny_model, tiny_voice, weight):
    weights = torch.tensor([[weight] + [0.0] * 7])
    with pytest.raises(ValueError, match="`emotion_weights` are .*, but each must be a number from 0 to 1.2"):
        tiny_model.generate(torch.tensor([[5, 6]]), voice=tiny_voice, emotion_weights=weights)


@pytest.mark.parametrize("seconds", [1e305, "3", True])
def test_durations_that_were_not_meant(tiny_model, tiny_voice, seconds):
    with pytest.raises(ValueError, match="`duration_s` is .*, but it must be a finite number"):
        tiny_model.generate(torch.tensor([[5, 6]]), voice=tiny_voice, duration_s=seconds)
    if seconds is not True:
        with pytest.raises(ValueError, match="`segment_silence_s` is .*, but it must be a number"):
            tiny_model.generate(torch.tensor([[5, 6]]), voice=tiny_voice, segment_silence_s=seconds)


@pytest.mark.parametrize("path", ["config.json", "t2s/config.json", "scheduler/scheduler_config.json"])
def test_settings_that_are_not_there(tiny_checkpoint, tmp_path, path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / path).unlink()
    with pytest.raises(ValueError, match=f"is no whole IndexTTS2 checkpoint: {path} cannot be read"):
        IndexTTS2ForTextToWaveform.from_pretrained(folder)
    (folder / path).write_text("[]")
    with pytest.raises(ValueError, match=f"{path} holds a list instead of settings"):
        IndexTTS2ForTextToWaveform.from_pretrained(folder)


@pytest.mark.parametrize(("part", "setting"), [("t2s", "num_hidden_layers"), ("s2m", "num_layers")])
def test_settings_of_a_smaller_model(tiny_checkpoint, tmp_path, part, setting):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), setting: 1}))
    with pytest.raises(ValueError, match=f"The weights in .*{part}' do not fit the `config.json` beside them"):
        IndexTTS2ForTextToWaveform.from_pretrained(folder)


def test_a_checkpoint_loaded_from_where_one_stands_has_a_name(tiny_checkpoint, monkeypatch):
    monkeypatch.chdir(tiny_checkpoint)
    model = IndexTTS2ForTextToWaveform.from_pretrained(".")
    assert model.semantic_to_mel.fingerprint.startswith("tiny-random@")
