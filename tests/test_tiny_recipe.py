"""The programs of the tiny recipe, as far as they go without the teachers."""

import csv
import importlib.util
import re
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file

from indextts2_hf import IndexTTS2TextToAudioPipeline


RECIPE = Path(__file__).parents[1] / "training" / "recipes" / "tiny"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPE / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


def run(name: str, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    runpy.run_path(str(RECIPE / f"{name}.py"), run_name="__main__")


@pytest.mark.parametrize(
    ("example", "sentence"),
    [
        ("the cat sat on the mat", "The cat sat on the mat."),
        ("who told you so", "Who told you so."),
        ("where is the old mill", "Where is the old mill?"),
        ("stop it at once!", "Stop it at once!"),
        ("he was born in 1920", None),
        ("the U.S. economy grew", None),
        ("too short", None),
    ],
)
def test_examples_become_sentences(example, sentence):
    assert load("make_texts").make_sentence(example) == sentence


def test_texts(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    syllables = [a + b + c for a in "bdklmnprsvz" for b in "aeou" for c in "lmnrs"]
    for part in ("noun", "verb", "adj", "adv"):
        words = ["".join(rng.choice(syllables, 2)) for _ in range(2400)]
        examples = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
        glosses = (
            f'00001 03 n 02 {example.split()[0]} 0 A_name 0 000 | as {example.replace(" ", " (or so) ", 1)}; a place in Ghent; "{example}"'
            for example in examples
        )
        (tmp_path / f"data.{part}").write_text("\n".join(["  1 a licence", *glosses]))
    for part in ("noun", "verb"):
        (tmp_path / f"{part}.exc").write_text("")
    run("make_texts", monkeypatch, tmp_path, tmp_path / "texts")
    train, held_out, definitions = (
        (tmp_path / "texts" / f"{name}.txt").read_text().splitlines() for name in ("train", "held-out", "definitions")
    )
    assert len(train) + len(held_out) == 1200 and 5 < len(held_out) < 60 and not {*train} & {*held_out}
    # Without what stands in brackets, and without names; some are held out, of other words than the examples.
    assert 1140 <= len(definitions) < 1200
    assert all(re.fullmatch(r"As( [a-z]+){8}\.", definition) for definition in definitions)
    make_texts = load("make_texts")
    assert make_texts.is_held_out(held_out[0]) and not make_texts.is_held_out(train[0])
    # Sentences with every plain word, each of its part of speech as often as the others.
    sentences = (tmp_path / "texts" / "words.txt").read_text().splitlines()
    assert len(sentences) == make_texts.NUM_WORD_SENTENCES
    adjectives = make_texts.read_words(tmp_path, "adj")
    assert 250 < len(adjectives) <= 300 and "A_name" not in adjectives
    heard = Counter(
        sentence.split()[1] for sentence in sentences if re.fullmatch(r"The \w+ \w+ \w+ the \w+\.", sentence)
    )
    assert heard.keys() <= set(adjectives) and all(
        re.fullmatch(r"[A-Z][a-z ,]+[.!?]", sentence) for sentence in sentences
    )
    counts = Counter(word for sentence in sentences for word in re.findall(r"[a-z]+", sentence.lower()))
    assert min(counts[word] for word in adjectives) > 30


@pytest.mark.parametrize(
    ("word", "form", "inflected"),
    [
        ("hiker", "NOUN", "hiker"),
        ("crevasse", "PLURAL", "crevasses"),
        ("county", "PLURAL", "counties"),
        ("boy", "PLURAL", "boys"),
        ("wolf", "PLURAL", "wolves"),  # irregular
        ("hush", "PRESENT", "hushes"),
        ("dip", "PRESENT", "dips"),
        ("dip", "PAST", "dipped"),  # irregular
        ("dip", "PARTICIPLE", "dipping"),  # irregular
        ("sleep", "PAST", "slept"),  # irregular
        ("sleep", "PARTICIPLE", "sleeping"),
        ("escalade", "PAST", "escaladed"),
        ("escalade", "PARTICIPLE", "escalading"),
        ("agree", "PARTICIPLE", "agreeing"),
        ("carry", "PAST", "carried"),
        ("lie", "PARTICIPLE", "lying"),
    ],
)
def test_words_are_inflected(word, form, inflected):
    irregular = {"wolf": ["wolves"], "dip": ["dipped", "dipping"], "sleep": ["slept"]}
    assert load("make_texts").inflect(word, form, irregular) == inflected


def test_recordings_are_cut_at_pauses():
    """Twelve words of half a second; the longest pause that leaves enough on both sides parts them."""
    load("join_data")  # which it imports
    cut = load("cut_readers").cut
    pauses = [0.1] * 11
    pauses[1], pauses[5], pauses[8] = 0.9, 0.6, 0.3  # the first one is too near the beginning
    begins = [0.5 * word + sum(pauses[:word]) for word in range(12)]
    ends = [begin + 0.5 for begin in begins]
    assert cut(begins, ends) == [(0, 6), (6, 12)]
    assert cut(begins[:6], ends[:6]) == [(0, 6)]
    assert cut(begins[:2], ends[:2]) == []
    # Nothing of at least two seconds is on both sides of any pause.
    assert cut([0.0, 5.0], [4.0, 6.5]) == []


def test_voices_and_manners_are_drawn_as_wanted():
    make_speech = load("make_speech")
    assert sum(voice.share for voice in make_speech.VOICES.values()) == pytest.approx(1)
    drawn = [make_speech.choose(f"Sentence {number}.") for number in range(2000)]
    assert drawn[:10] == [make_speech.choose(f"Sentence {number}.") for number in range(10)]
    voices = Counter(voice for voice, _, _ in drawn)
    assert voices["heart"] / 2000 == pytest.approx(make_speech.VOICES["heart"].share, abs=0.04)
    manners = Counter(manner for _, manner, _ in drawn)
    assert 1 - manners[None] / 2000 == pytest.approx(make_speech.MANNER_SHARE, abs=0.05)
    assert set(make_speech.SHIPPED_RECORDINGS) <= make_speech.VOICES.keys()


def test_phones_take_the_time_of_their_marks():
    make_speech = load("make_speech")
    phones, ends, words = make_speech.align(list("ˈɛv hˈY."), np.array([14, 2, 2, 1, 2, 2, 2, 4, 13, 6]))
    assert phones == ["_", "ɛ", "v", "h", "Y", "_", "_"]
    assert ends == [14.0, 18.0, 20.0, 23.0, 29.0, 42.0, 48.0]
    assert words == [(14.0, 20.0), (20.0, 29.0)]
    # From three frames before the first sound to four behind the last.
    assert make_speech.spoken(phones, ends) == (11, 33)
    phones, ends, words = make_speech.align(list("ɑːt, — t"), np.array([1, 2, 3, 4, 5, 0, 1, 0, 2, 1]))
    assert phones == ["_", "ɑ", "t", "_", "_", "t", "_"] and ends == [1.0, 6.0, 10.0, 15.0, 16.0, 18.0, 19.0]
    # A pause is no word's, and a dash between two is none.
    assert words == [(1.0, 10.0), (16.0, 18.0)]


def test_manifests_are_joined(monkeypatch, tmp_path):
    for name, rows in {
        "speech": [["a.flac", "One.", "heart", "happy", "en", ""], ["b.flac", "Two.", "heart", "sad", "en", ""]],
        "real/train": [["c.flac", "Three.", "ls1", "neutral", "en", "9"], ["d.flac", "x", "y", "z", "de", "1"]],
        "real/validation": [["e.flac", "Five.", "ls2", "neutral", "en", "1"]],
        "readers": [
            ["f.flac", "Six.", "ls3", "neutral", "en", "3"],
            ["g.flac", "Seven.", "ls3", "neutral", "en", "3"],
        ],
    }.items():
        (tmp_path / name).mkdir(parents=True)
        with open(tmp_path / name / "metadata.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "text", "speaker", "emotion", "language", "duration_s"])
            table.writerows(rows)
    out = tmp_path / "data.csv"
    folders = [tmp_path / name for name in ("speech", "real", "readers")]
    run("join_data", monkeypatch, *folders, out, "--per_speaker", 1)
    rows = list(csv.DictReader(out.open()))
    assert [row["text"] for row in rows] == ["One.", "Three.", "Six."]
    names = ("speech/a.flac", "real/train/c.flac", "readers/f.flac")
    assert [Path(row["file_name"]) for row in rows] == [tmp_path / name for name in names]


def test_levels_are_of_the_mean_and_leave_no_clipping():
    make_speech = load("make_speech")
    steady, lively = np.ones(1000), np.r_[np.ones(990), np.full(10, 5.0)]
    for waveform in (steady, lively):
        changed = make_speech.set_level(waveform, -25.0)
        assert 20 * np.log10(np.sqrt(np.mean(np.square(changed)))) == pytest.approx(-25.0, abs=0.01)
    assert np.abs(make_speech.set_level(lively, -5.0)).max() == pytest.approx(make_speech.MOST_PEAK)


def test_pitch_is_moved_and_stretched_around_its_mean():
    pitch = np.array([0.0, 100.0, 200.0, 400.0, 0.0], np.float32)
    changed = load("make_speech").change_pitch(pitch, factor=0.5, pitch_range=0.5)
    np.testing.assert_allclose(changed, [0.0, 50 * 2**0.5, 100.0, 100 * 2**0.5, 0.0], rtol=1e-6)


def test_formants_are_moved():
    make_speech = load("make_speech")
    spectrum = np.arange(601.0)[:, None]
    warped = make_speech.warp(spectrum, np.arange(601) / 1.25)
    np.testing.assert_allclose(warped[500], 400.0)
    np.testing.assert_allclose(make_speech.warp(spectrum, np.arange(601) / 0.5)[[100, 400], 0], [200.0, 600.0])


def test_lists_and_picture(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(RECIPE)
    make_test_lists = load("make_test_lists")

    class Teacher:
        """A tone instead of hibari, which is no dependency of the tests."""

        def speak(self, sentence, voice, manner, speed):
            assert manner == make_test_lists.Manner() and speed == 1.0
            times = np.arange(8000) / make_test_lists.SAMPLING_RATE
            return np.float32(0.5 * np.sin(2 * np.pi * 200 * voice.pitch * times)), {}

    monkeypatch.setattr(make_test_lists, "Teacher", Teacher)
    test = tmp_path / "test"
    test.mkdir()
    sentences = make_test_lists.order([f"Sentence {number}." for number in range(20)])
    assert sorted(sentences) != sentences == make_test_lists.order(sorted(sentences))
    make_test_lists.make_voices_list(sentences[:7], test)
    lines = [line.split("|") for line in (test / "voices.lst").read_text().splitlines()]
    assert [text for _, _, _, text, _ in lines] == sentences[:7]
    assert [voice for _, _, voice, _, _ in lines[:6]] == ["heart", "low", "deep", "bright", "child", "heart"]

    for split, readers in {"train": ["ls1"], "validation": ["ls1", "ls2", "ls2", "ls3"]}.items():
        (tmp_path / split).mkdir()
        with open(tmp_path / split / "metadata.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "text", "speaker", "language"])
            for number, reader in enumerate(readers):
                shutil.copy(test / "000.flac", tmp_path / split / f"{number}.flac")
                table.writerow([f"{number}.flac", "Read.", reader, "de" if reader == "ls3" else "en"])
    assert make_test_lists.make_readers_list(sentences[7:], tmp_path, test) == sentences[13:]
    assert (test / "readers.lst").read_text().splitlines() == [
        f"ls2-{place}|Read.|ls2.flac|{sentences[7 + place]}" for place in range(6)
    ]
    assert (test / "ls2.flac").is_file()

    kinds = {
        "validation": [("emodb", ("angry", "sad", "sad", "angry", "angry", "fear", "sad"))],
        "train": [("commands", ("neutral",) * 3), ("ljspeech", ("neutral",))],
    }
    for split, folders in kinds.items():
        with open(tmp_path / split / "metadata.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["file_name", "text", "emotion"])
            for folder, emotions in folders:
                (tmp_path / split / folder).mkdir()
                for number, emotion in enumerate(emotions):
                    shutil.copy(test / "000.flac", tmp_path / split / folder / f"{number}.flac")
                    table.writerow([f"{folder}/{number}.flac", f"{emotion}.", emotion])
    monkeypatch.setattr(make_test_lists, "NUM_RECORDINGS", 5)
    make_test_lists.make_recordings_list(sentences[10:], tmp_path, test)
    chosen = (test / "recordings.lst").read_text()
    recordings = [line.split("|") for line in chosen.splitlines()]
    # Five of seven, of each emotion as many as there are; all of three.
    assert Counter(text for _, text, _, _ in recordings) == {"angry.": 2, "sad.": 2, "fear.": 1, "neutral.": 3}
    assert [name.split("-")[0] for name, _, _, _ in recordings] == ["emodb"] * 5 + ["commands"] * 3
    assert len({name for name, _, _, _ in recordings}) == 8
    assert all(prompt == f"{name}.flac" and (test / prompt).is_file() for name, _, prompt, _ in recordings)
    assert [sentence for _, _, _, sentence in recordings] == sentences[10:18]
    make_test_lists.make_recordings_list(sentences[10:], tmp_path, test)
    assert (test / "recordings.lst").read_text() == chosen

    report = tmp_path / "report"
    (report / "audio" / "free").mkdir(parents=True)
    for name, _, _, _, recording in lines:
        shutil.copy(test / recording, report / "audio" / "free" / f"{name}.wav")
    picture = tmp_path / "picture.png"
    run(
        "draw_spectrograms",
        monkeypatch,
        *(test / "voices.lst", report, picture, "--names", "000", "003"),
    )
    # In colour, which axes alone are not.
    assert np.ptp(imread(picture)[..., :3], axis=-1).max() > 0.5


def test_export(monkeypatch, tiny_checkpoint, tiny_recordings, tmp_path):
    references = tmp_path / "references"
    references.mkdir()
    with open(references / "metadata.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["file_name", "text", "speaker", "shipped"])
        for number, shipped in ((0, "no"), (1, "yes")):
            shutil.copy(tiny_recordings / f"speaker{number}-0.wav", references / f"voice{number}.wav")
            table.writerow([f"voice{number}.wav", "", f"voice{number}", shipped])
    (tmp_path / "table.md").write_text("| a table |\n")
    out = tmp_path / "tiny"
    run(
        "export",
        monkeypatch,
        *(tiny_checkpoint, references, out, "--default_voice", "voice0", "--evaluation", tmp_path / "table.md"),
    )
    assert sorted(path.name for path in (out / "voices").iterdir()) == ["voice0.safetensors", "voice1.safetensors"]
    assert [path.name for path in (out / "references").iterdir()] == ["voice1.wav"]
    assert "| a table |" in (out / "README.md").read_text()
    assert not [path for path in out.rglob("*.json") if "_name_or_path" in path.read_text()]
    for path in out.glob("*/*model.safetensors"):
        assert {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()} == {torch.float16}
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(out)
    assert pipe.model.t2s.dtype == pipe.model.s2m.dtype == pipe.model.vocoder.dtype == torch.float32
    assert pipe.model.config.default_voice == pipe.model.config.default_emotion == "voice0"
    assert pipe.processor.max_text_tokens == 40
    audio = pipe("Hello.", generate_kwargs={"max_new_tokens": 10})["audio"]
    assert np.isfinite(audio).all() and np.abs(audio).max() > 0
