"""The measures and the report of `evaluation/evaluate.py`."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile


sys.path.insert(0, str(Path(__file__).parent.parent / "evaluation"))


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
    for name in ("free", "length-0.8", "emotion-happy", "no-emotion", "no-hidden-states"):
        assert evaluate.check_condition(name) == name
    for name in ("length-", "length-0", "emotion-hungry", "fast"):
        with pytest.raises(argparse.ArgumentTypeError, match="is no condition"):
            evaluate.check_condition(name)


def test_the_report(evaluate, tmp_path):
    base = {"text": "a b", "prompt": "anna", "seconds": 1.1, "num_tokens": 50, "has_ended": True}
    prosody = {
        "pitch_semitones": 10.0,
        "pitch_range_semitones": 5.0,
        "speech_s": 1.0,
        "level_db": -20.0,
        "tilt_db": -5.0,
    }
    rows = [
        {"condition": "free", "name": "1", "word_errors": 0, "words": 2, **base, **prosody},
        {"condition": "free", "name": "2", "word_errors": 4, "words": 8, **base, **prosody, "has_ended": False},
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
    ]
    about = {"measured by": {"words": "a recogniser"}}
    evaluate.write_report(tmp_path, rows, ["free", "emotion-sad", "length-0.8"], about)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    assert results["free"]["WER, mean over utterances, %"] == pytest.approx(25)
    assert results["free"]["WER, all words, %"] == pytest.approx(40)
    assert results["free"]["not ended, %"] == 50
    assert results["length-0.8"]["token error, %"] == pytest.approx(25)
    assert results["length-0.8"]["length error, s"] == pytest.approx(0.1)
    # Of five stated changes of sadness, pitch alone went the stated way; what does not change does not agree.
    assert results["emotion-sad"]["pitch_semitones down as expected, %"] == 100
    assert results["emotion-sad"]["changes as expected, %"] == pytest.approx(20)
    assert "| WER, all words, % | 40 | 0 | 0 |" in (tmp_path / "results.md").read_text()
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 5
