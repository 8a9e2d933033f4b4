"""The measures and the report of `evaluation/evaluate.py`."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from transformers import (
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMForXVector,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from indextts2_hf.cards import read_evaluation


EVALUATION = Path(__file__).parent.parent / "evaluation"
sys.path.insert(0, str(EVALUATION))


@pytest.fixture(scope="module")
def metrics():
    import metrics

    return metrics


@pytest.fixture(scope="module")
def evaluate():
    import evaluate

    return evaluate


def test_words_as_seed_tts_eval_counts_them(metrics):
    assert metrics.split_words("Don't stop — it's 5 o'clock, Mr. Smith!", "en") == [
        *("don't", "stop", "it's", "5", "o'clock", "mr", "smith")
    ]
    assert metrics.split_words("你好，世界。 A", "zh") == ["你", "好", "世", "界", "A"]
    assert metrics.word_errors("the cat sat on the mat", "The cat sat on a mat!", "en") == (1, 6)
    assert metrics.word_errors("one two", "zero one two three", "en") == (2, 2)
    assert metrics.word_errors("one two", "", "en") == (2, 2)
    with pytest.raises(ValueError, match="has no words to compare with"):
        metrics.word_errors("—!", "a", "en")
    assert metrics.spell_alike("The colour of twenty cats isn't grey.") == metrics.spell_alike(
        "the color of 20 cats is not gray"
    )


def test_prosody_of_tones(metrics):
    times = np.arange(32000) / 16000

    def tone(pitch, level=0.3):
        phase = 2 * np.pi * np.cumsum(np.broadcast_to(pitch, times.shape)) / 16000
        wave = sum(np.sin(number * phase) / number for number in range(1, 6))
        return level * wave / np.abs(wave).max() * ((times > 0.5) & (times < 1.5))

    flat, high = metrics.prosody(tone(110.0)), metrics.prosody(tone(220.0, 0.15))
    wide = metrics.prosody(tone(110 * 2 ** (0.5 * np.sin(2 * np.pi * 2 * times))))
    assert flat["pitch_semitones"] == pytest.approx(12, abs=0.2)
    assert high["pitch_semitones"] == pytest.approx(24, abs=0.2)
    assert flat["pitch_range_semitones"] < 0.5 and 9 < wide["pitch_range_semitones"] < 13
    assert flat["speech_s"] == pytest.approx(1.0, abs=0.05)
    assert high["level_db"] - flat["level_db"] == pytest.approx(-6, abs=0.5)
    assert high["tilt_db"] > flat["tilt_db"] + 3


def test_how_an_utterance_begins_and_ends(metrics):
    speech = 0.3 * np.sin(2 * np.pi * 200 * np.arange(16000) / 16000)
    before, after = np.zeros(8000), np.zeros(1600)
    whole = metrics.edges(np.concatenate([before, speech, after]))
    cut = metrics.edges(np.concatenate([before, speech]))
    assert whole == {"silence_before_s": pytest.approx(0.5, abs=0.011), "is_cut_off": False}
    assert cut == {"silence_before_s": pytest.approx(0.5, abs=0.011), "is_cut_off": True}
    # A soft end is no cut.
    faded = np.concatenate([speech, speech[:1600] * np.linspace(1, 0, 1600) ** 2])
    assert metrics.edges(faded) == {"silence_before_s": 0.0, "is_cut_off": False}


def test_lists(evaluate, tmp_path):
    soundfile.write(tmp_path / "prompt.wav", np.zeros(16000), 16000)
    path = tmp_path / "meta.lst"
    path.write_text("a|what it says|prompt.wav|Hello.|prompt.wav\n\nb||anna|Good day.\n")
    first, second = evaluate.read_list(path, {"anna"})
    assert (first.name, first.text, first.prompt) == ("a", "Hello.", str(tmp_path / "prompt.wav"))
    assert first.recording == str(tmp_path / "prompt.wav")
    assert (second.prompt, second.speaker, second.recording) == ("anna", "anna", None)
    with pytest.raises(FileNotFoundError, match="line 3 names anna, which is not there"):
        evaluate.read_list(path, set())
    path.write_text("a|b|c\n")
    with pytest.raises(ValueError, match="line 1 has 3 fields, but"):
        evaluate.read_list(path, set())


def test_folders_give_each_clip_another_prompt_of_its_speaker(evaluate, tiny_recordings, tmp_path):
    utterances = evaluate.read_folder(tiny_recordings)
    assert len(utterances) > 3
    for utterance in utterances:
        assert utterance.prompt != utterance.recording and Path(utterance.prompt).is_file()
        assert utterance.speaker in Path(utterance.prompt).name
    with pytest.raises(FileNotFoundError, match="has no metadata.csv"):
        evaluate.read_folder(tmp_path)


def test_conditions(evaluate):
    for name in ("free", "length-0.8", "told-1.25", "emotion-happy", "no-emotion", "no-hidden-states"):
        assert evaluate.check_condition(name) == name
    for name in ("length-", "length-0", "emotion-hungry", "fast"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no condition"):
            evaluate.check_condition(name)


def test_the_report(evaluate, tmp_path):
    base = {"text": "a b", "prompt": "anna", "seconds": 1.1, "num_tokens": 50, "has_ended": True}
    base |= {"silence_before_s": 0.25, "is_cut_off": False}
    prosody = {
        "pitch_semitones": 10.0,
        "pitch_range_semitones": 5.0,
        "speech_s": 1.0,
        "level_db": -20.0,
        "tilt_db": -5.0,
    }
    rows = [
        {"condition": "free", "name": "1", "word_errors": 0, "words": 2, **base, **prosody},
        {
            "condition": "free",
            "name": "2",
            "word_errors": 4,
            "words": 8,
            **base,
            **prosody,
            "has_ended": False,
            "is_cut_off": True,
        },
        {
            "condition": "emotion-sad",
            "name": "1",
            "word_errors": 0,
            "words": 2,
            **base,
            **prosody,
            "pitch_semitones": 8.0,
        },
        {
            "condition": "length-0.8",
            "name": "1",
            "word_errors": 0,
            "words": 2,
            **base,
            "asked_tokens": 40,
            "asked_s": 1.0,
        },
        {"condition": "emotion-angry", "name": "1", **base, **prosody, "tilt_db": float("nan")},
    ]
    about = {"measured by": {"words": "a recogniser"}}
    evaluate.write_report(tmp_path, rows, ["free", "emotion-sad", "length-0.8", "emotion-angry"], about)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["free"]["WER, mean over utterances, %"] == pytest.approx(25)
    assert results["free"]["WER, all words, %"] == pytest.approx(40)
    assert results["free"]["not ended, %"] == results["free"]["cut off at the end, %"] == 50
    assert results["free"]["silence before speech, s"] == 0.25
    assert results["length-0.8"]["token error, %"] == pytest.approx(25)
    assert results["length-0.8"]["length error, s"] == pytest.approx(0.1)
    assert "change of tilt_db" not in results["emotion-angry"]
    # Of five stated changes of sadness, pitch alone went the stated way; what does not change does not agree.
    assert results["emotion-sad"]["pitch_semitones down as expected, %"] == 100
    assert results["emotion-sad"]["changes as expected, %"] == pytest.approx(20)
    assert "| WER, all words, % | 40 | 0 | 0 |  |" in (tmp_path / "results.md").read_text()
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 6


# --- the program ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recognizer(tmp_path_factory):
    """A tiny Whisper with random weights: what it hears is noise, but every step is there."""
    torch.manual_seed(0)
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    names = [*bytes_to_unicode().values(), *special]
    tokenizer = WhisperTokenizer(
        vocab={name: number for number, name in enumerate(names)}, merges=[], unk_token="<|endoftext|>"
    )
    end, start, english, transcribe, no_timestamps = tokenizer.convert_tokens_to_ids(special)
    sizes = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = WhisperConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **sizes,
    )
    model = WhisperForConditionalGeneration(config)
    settings = model.generation_config
    settings.lang_to_id, settings.task_to_id = {"<|en|>": english}, {"transcribe": transcribe}
    settings.is_multilingual, settings.no_timestamps_token_id = True, no_timestamps
    settings.max_length, settings._from_model_config = 12, False
    folder = tmp_path_factory.mktemp("whisper")
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def speaker_model(tmp_path_factory):
    torch.manual_seed(0)
    config = WavLMConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(16, 16),
        conv_stride=(8, 8),
        conv_kernel=(8, 8),
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        tdnn_dim=(16, 16),
        tdnn_kernel=(3, 1),
        tdnn_dilation=(1, 1),
        xvector_output_dim=8,
    )
    folder = tmp_path_factory.mktemp("wavlm")
    WavLMForXVector(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return folder


def run_evaluate(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EVALUATION / "evaluate.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_the_embedded_checkpoint_is_measured_by_default(evaluate, monkeypatch):
    import benchmark

    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--list", "meta.lst", "--output", "report"])
    assert evaluate.parse_arguments().model == "tiny"
    monkeypatch.setattr(sys, "argv", ["benchmark.py"])
    assert (benchmark.parse_arguments().model, benchmark.parse_arguments().threads) == ("tiny", None)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--random"])
    assert benchmark.parse_arguments().random


def test_a_list_from_end_to_end(tiny_checkpoint, tiny_recordings, recognizer, speaker_model, tmp_path):
    prompt = tiny_recordings / "speaker1-0.wav"
    (tmp_path / "buzz.wav").write_bytes((tiny_recordings / "speaker0-0.wav").read_bytes())
    (tmp_path / "meta.lst").write_text(f"a||buzz|Hello there.\nb|text|{prompt}|Good day.\n")
    out = tmp_path / "report"
    conditions = ["length-0.5", "told-0.5", "emotion-happy", "no-hidden-states", "no-emotion"]
    options = [
        *("--model", tiny_checkpoint, "--list", tmp_path / "meta.lst", "--output", out, "--conditions", *conditions),
        *("--asr", recognizer, "--speaker_model", speaker_model, "--measures", "words", "voice", "prosody"),
    ]
    result = run_evaluate(*options)
    assert result.returncode == 1 and "no recording of the voice 'buzz' to compare with" in result.stderr
    result = run_evaluate(*options, "--references", tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(
        "| | free | length-0.5 | told-0.5 | emotion-happy | no-hidden-states | no-emotion |"
    )

    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert [(row["condition"], row["name"]) for row in rows] == [
        (condition, name) for condition in ("free", *conditions) for name in "ab"
    ]
    of = {(row["condition"], row["name"]): row for row in rows}
    for name in "ab":
        row = of["length-0.5", name]
        assert row["num_tokens"] == row["asked_tokens"] == max(1, round(0.5 * of["free", name]["num_tokens"]))
        assert row["asked_s"] == row["asked_tokens"] / 50
        told = of["told-0.5", name]  # an untrained model does not listen, and goes on to the end
        assert told["asked_tokens"] == row["asked_tokens"] < told["num_tokens"]
        info = soundfile.info(out / "audio" / "length-0.5" / f"{name}.wav")
        assert info.frames / info.samplerate == row["seconds"]
        assert all(of["free", name][key] is not None for key in ("word_errors", "similarity_to_others", "speech_s"))
    results = json.loads((out / "results.json").read_text())
    assert results["results"]["length-0.5"]["token error, %"] == 0
    assert results["about"]["measured by"]["words"] == f"{recognizer.name}, transformers, greedy"
    # A card has the same table, and says on what.
    table, found = read_evaluation(out / "results.json")
    assert (out / "results.md").read_text().strip() in table and "2 utterances of meta.lst, seed" in table
    assert {result.dataset_config for result in found} == {"free", *conditions}
    assert str(tmp_path) not in table

    # What is there is not made again; what is missing is.
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.wav")}
    lines = (out / "scores.jsonl").read_text().splitlines(keepends=True)
    (out / "scores.jsonl").write_text("".join(lines[:-1]))
    result = run_evaluate(*options, "--references", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (out / "scores.jsonl").read_text() == "".join(lines)
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == [out / "audio" / "no-emotion" / "b.wav"]


def test_segments_as_short_as_asked(evaluate, tiny_checkpoint):
    pipe = evaluate.IndexTTS2TextToAudioPipeline.from_pretrained(tiny_checkpoint)
    utterance = evaluate.Utterance("a", "One sentence is here. Another one is there.", "buzz", "buzz")
    counts = []
    for max_text_tokens in (None, 10):
        speaker = evaluate.Speaker(pipe, 0, {"max_new_tokens": 5, "segment_silence_s": 1.0}, max_text_tokens)
        [speech] = speaker.say([utterance], [0], "free", [None])
        counts.append(len(speech.waveform) // pipe.model.config.sampling_rate)
    # A pause of a second for each further segment.
    assert counts[0] == 0 and counts[1] >= 1


def test_recordings_come_first(tiny_checkpoint, tiny_recordings, recognizer, tmp_path):
    options = ["--model", tiny_checkpoint, "--data", tiny_recordings, "--output", tmp_path / "report", "--limit", 2]
    result = run_evaluate(*options, "--asr", recognizer, "--measures", "words", "--conditions", "length-1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("| | recording | free | length-1 |")
    rows = [json.loads(line) for line in (tmp_path / "report/scores.jsonl").read_text().splitlines()]
    # The count is that of the recording, which lasts as long.
    for recorded, said in zip(rows[:2], rows[4:], strict=True):
        assert said["asked_s"] == pytest.approx(recorded["seconds"], abs=0.05)
