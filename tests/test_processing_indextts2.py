"""Text, recordings and weights to model inputs."""

import math
import random
import re

import numpy as np
import pytest
import torch
from conftest import SAMPLING_RATE, make_speech
from transformers import AutoProcessor, BatchFeature

from indextts2_hf import IndexTTS2FeatureExtractor, IndexTTS2Processor
from indextts2_hf.processing_indextts2 import cut_as_spoken


HAPPY = [0.5, 0, 0, 0, 0, 0, 0, 0.25]
TEXT = "Good morning, my friend. How are you today? 你好。"


@pytest.fixture(scope="module")
def processor(tokenizer) -> IndexTTS2Processor:
    return IndexTTS2Processor(IndexTTS2FeatureExtractor(), tokenizer)


# --- text --------------------------------------------------------------------------------------------------------------


def test_one_text(processor):
    inputs = processor("Hello there.")
    assert isinstance(inputs, BatchFeature) and set(inputs) == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["input_ids"].dtype == torch.int64 and inputs["attention_mask"].all()
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert tokens == processor.tokenizer.tokenize("Hello there.")


def test_several_texts_are_padded_on_the_left(processor):
    inputs = processor(["Hello there.", TEXT])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert mask[1].all() and not mask[0, 0] and mask[0, -1]
    assert (ids[0][mask[0] == 0] == processor.tokenizer.pad_token_id).all()
    assert torch.equal(ids[0][mask[0] == 1], processor("Hello there.")["input_ids"][0])
    assert torch.equal(ids[1], processor([TEXT])["input_ids"][0])


def test_the_end_id_separates_segments(processor):
    ids = processor(TEXT, max_text_tokens=8)["input_ids"][0].tolist()
    segments = processor.tokenizer.split_text(TEXT, 8)
    assert len(segments) > 2
    joined = [token for pieces in segments for token in [*processor.tokenizer.convert_tokens_to_ids(pieces), 1]]
    assert ids == joined[:-1]
    assert 1 not in processor(TEXT)["input_ids"]


def test_segments_as_text(processor):
    assert processor.split_text(TEXT) == ["GOOD MORNING, MY FRIEND. HOW ARE YOU TODAY?你好."]
    assert "".join(processor.split_text(TEXT, max_text_tokens=8)).replace(" ", "") == (
        "GOODMORNING,MYFRIEND.HOWAREYOUTODAY?你好."
    )
    short = IndexTTS2Processor(processor.feature_extractor, processor.tokenizer, max_text_tokens=8)
    assert short.split_text(TEXT) == processor.split_text(TEXT, max_text_tokens=8)
    assert torch.equal(short(TEXT)["input_ids"], processor(TEXT, max_text_tokens=8)["input_ids"])


@pytest.mark.parametrize(
    ("text", "spoken", "written"),
    [
        # Numbers, which are words when they are spoken; a cut behind one, and within one.
        (
            "It's 5 km. We paid $20. 7 miles on, it ended.",
            ["IT IS FIVE KILOMETERS.", "WE PAID TWENTY DOLLARS.", "SEVEN MILES ON,", "IT ENDED."],
            ["It's 5 km.", "We paid $20.", "7 miles on,", "it ended."],
        ),
        ("Of 1,267 none.", ["OF ONE THOUSAND TWO HUN", "DRED SIXTY SEVEN", "NONE."], ["Of 1,267", "", "none."]),
        # Quotes and brackets stay with their words, a dash with the one before it.
        (
            'He said: "Stop it." — “Never,” she wrote (twice). (The end.)',
            ["HE SAID,", "'STOP IT.", "'NEVER,", "' SHE WROTE 'TWICE'.", "'THE END.'"],
            ["He said:", '"Stop it." —', "“Never,”", "she wrote (twice).", "(The end.)"],
        ),
        # A word that is said twice.
        ("No, no, no. No! No more, no.", ["NO, NO,", "NO. NO!", "NO MORE,", "NO."], ["No, no,", "no. No!", "No more,", "no."]),
        # Cut within a word, which is where it begins.
        ("One twelve three.", ["ONE TWE", "LVE THREE."], ["One twelve", "three."]),
        # Chinese, between whose characters no space stands, and both together.
        ("他说：“你好。我有20只猫，你有5公里。”", ["他说,'你好.", "我有二十只猫,", "你有五公里.'"], ["他说：“你好。", "我有20只猫，", "你有5公里。”"]),
        ("你好，Tom！ “很 好”吗？", ["你好,", "TOM!", "'很好'", "吗?"], ["你好，", "Tom！", "“很 好”", "吗？"]),
        # What is not spoken at all.
        ("Look 🙂 at\n\nthis. 🙂 Now.", ["LOOK AT THIS.", "NOW."], ["Look 🙂 at\n\nthis. 🙂", "Now."]),
        ("One.", ["ONE."], ["One."]),
    ],
)  # fmt: skip
def test_segments_as_written(text, spoken, written):
    assert cut_as_spoken(text, spoken) == written


def test_nothing_written_is_lost_or_doubled(processor):
    rng = random.Random(0)
    words = "the Cat, cat 12 $3.50 5km — “quoted” (so) end. Why? 你好。 2024年 don't U.S. a,b 🙂 it's No. no! … half".split(
        " "
    )
    for _ in range(30):
        text = rng.choice(["", " ", "“"]) + rng.choice([" ", "\n", "  "]).join(
            rng.choices(words, k=rng.randint(3, 60))
        )
        if not any(map(str.isalpha, text)):
            continue
        most = rng.randint(3, 30)
        spoken, written = processor.split_text(text, most), processor.split_written_text(text, most)
        assert len(spoken) == len(written)
        assert "".join("".join(written).split()) == "".join(text.split()), text
        # In Latin script words stay whole.
        if not re.search("[一-鿿]", text):
            assert " ".join(written).split() == text.split()


def test_a_very_long_text_as_written():
    text = "In 1984 this was one of very many sentences, and 好的。 " * 2500
    words = text.upper().replace("1984", "NINETEEN EIGHTY FOUR").replace("。", ".").split()
    spoken = [" ".join(words[start : start + 31]) for start in range(0, len(words), 31)]
    written = cut_as_spoken(text, spoken)
    assert len(text) > 100_000 and len(written) == len(spoken) > 800
    assert "".join("".join(written).split()) == "".join(text.split())
    # It does not drift: what follows a cut is the same in both, numbers aside.
    for ours, theirs in zip(written, spoken, strict=True):
        if theirs.split()[0] not in ("NINETEEN", "EIGHTY", "FOUR"):
            assert ours.split()[0].upper().replace("。", ".") == theirs.split()[0]


def test_an_early_start(processor):
    text = "One more sentence, then. " * 60
    whole, early = (processor(text, quick_streaming_tokens=tokens)["input_ids"][0].tolist() for tokens in (0, 100))
    assert early.index(1) < whole.index(1) <= 120


def test_a_very_long_text(processor):
    text = "This is one of very many sentences, and 好的。 " * 2300
    assert len(text) > 100_000
    segments = processor.split_text(text)
    assert len(segments) > 100
    rows = processor.tokenizer.split_text(text)
    assert max(map(len, rows)) <= 120
    assert sum(segment.count("SENTENCES") for segment in segments) == 2300


@pytest.mark.parametrize("text", ["", " \n\t ", ["Hello.", ""], ["Hello.", "   "]])
def test_nothing_to_say(processor, text):
    with pytest.raises(ValueError, match="nothing in it to speak. Give at least one word"):
        processor(text)


def test_only_an_emoji(processor):
    for call in (processor, processor.split_text):
        with pytest.raises(ValueError, match="only characters that the vocabulary lacks"):
            call("🙂")


@pytest.mark.parametrize("text", [None, 3, [], [None], ["Hello.", 3], {"text": "Hello."}, b"Hello."])
def test_no_text(processor, text):
    with pytest.raises(ValueError, match="`text` must be a string or a list of at least one string"):
        processor(text)


def test_wrong_options(processor):
    with pytest.raises(TypeError, match="IndexTTS2Processor takes no 'voice', 'padding'"):
        processor("Hello.", voice="x", padding=True)
    with pytest.raises(ValueError, match="`return_tensors` is 'np', but IndexTTS2 works with PyTorch tensors"):
        processor("Hello.", return_tensors="np")
    for call in (processor, processor.split_text):
        with pytest.raises(ValueError, match="`max_text_tokens` is 0"):
            call("Hello.", max_text_tokens=0)


# --- recordings --------------------------------------------------------------------------------------------------------


def test_recordings(processor, speech):
    both = processor("Hello.", speaker_audio=(speech, SAMPLING_RATE), emotion_audio=(speech[::-1], SAMPLING_RATE))
    assert set(both) == set(processor.model_input_names) - {"emotion_weights"}
    expected = processor.feature_extractor((speech, SAMPLING_RATE), (speech[::-1], SAMPLING_RATE))
    assert all(torch.equal(both[name], tensor) for name, tensor in expected.items())
    voice = processor(["Hello.", "There."], speaker_audio=(speech, SAMPLING_RATE))
    assert len(voice["input_ids"]) == 2 and len(voice["prompt_mel"]) == 1
    emotion = processor("Hello.", emotion_audio=(speech, SAMPLING_RATE))
    assert set(emotion) == {"input_ids", "attention_mask", "emotion_input_features", "emotion_attention_mask"}


def test_a_long_recording_is_cut_and_that_is_said_once(processor, caplog):
    recording = (make_speech(17.0, sampling_rate=16000), 16000)
    with caplog.at_level("WARNING"):
        inputs = processor("Hello.", speaker_audio=recording)
    assert [record.message.split(":")[0] for record in caplog.records] == ["`speaker_audio` is 17.0 s long"]
    assert inputs["prompt_mel"].shape[1] == 15 * SAMPLING_RATE // 256
    assert inputs["speaker_input_features"].shape[1] == inputs["speaker_emotion_input_features"].shape[1] == 749


# --- emotions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "weights",
    [
        HAPPY,
        tuple(HAPPY),
        {"calm": 0.25, "happy": 0.5},
        np.array(HAPPY),
        torch.tensor(HAPPY),
        [torch.tensor(weight) for weight in HAPPY],
    ],
    ids=["list", "tuple", "dict", "numpy", "torch", "list of tensors"],
)
def test_one_set_of_weights(processor, weights):
    inputs = processor(["Hello.", "There."], emotion_weights=weights)
    assert inputs["emotion_weights"].tolist() == [HAPPY, HAPPY]
    assert inputs["emotion_weights"].dtype == torch.float32


@pytest.mark.parametrize(
    "weights",
    [
        [HAPPY, {"calm": 1.0}, None],
        ({"happy": 0.5, "calm": 0.25}, torch.tensor([0.0] * 7 + [1.0]), None),
        [np.array(HAPPY), np.array([0.0] * 7 + [1.0]), None],
    ],
)
def test_one_set_of_weights_for_each(processor, weights):
    rows = processor(["Hello.", "There.", "You."], emotion_weights=weights)["emotion_weights"]
    assert rows[:2].tolist() == [HAPPY, [0.0] * 7 + [1.0]]
    assert rows[2].isnan().all()
    for matrix in (torch.tensor([HAPPY] * 2), np.array([HAPPY] * 2)):
        assert processor(["Hello.", "There."], emotion_weights=matrix)["emotion_weights"].tolist() == [HAPPY] * 2


def test_strength(processor):
    rows = processor(["Hello.", "There."], emotion_weights=[HAPPY, None], emotion_strength=0.33333)["emotion_weights"]
    torch.testing.assert_close(rows[0], torch.tensor([0.1666, 0, 0, 0, 0, 0, 0, 0.0833]))
    assert rows[1].isnan().all()
    with pytest.raises(ValueError, match="`emotion_strength` is NaN"):
        processor("Hello.", emotion_weights=HAPPY, emotion_strength=math.nan)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([HAPPY, HAPPY], r"`emotion_weights` has 2 rows for 1 text\(s\)"),
        ([None, None], r"`emotion_weights` has 2 rows for 1 text\(s\)"),
        (0.5, "must be eight numbers in the order happy"),
        ("happy", "must be eight numbers in the order happy"),
        (["happy"], "must be eight numbers in the order happy"),
        ([0.5] * 7, "has 7 values but there are eight emotions"),
        ([[0.5] * 7], "has 7 values but there are eight emotions"),
        ([], "has 0 values but there are eight emotions"),
        ({"joy": 1.0}, "names 'joy', which is none of the eight"),
        ([-0.1] + [0.0] * 7, "weight of 'happy' in `emotion_weights` is -0.1"),
        ([[math.nan] * 8], "weight of 'happy' in `emotion_weights` is nan"),
    ],
)
def test_wrong_weights(processor, weights, message):
    with pytest.raises(ValueError, match=message):
        processor("Hello.", emotion_weights=weights)


def test_two_emotions(processor, speech):
    with pytest.raises(ValueError, match="Both `emotion_audio` and `emotion_weights` were given: give one emotion"):
        processor("Hello.", emotion_audio=(speech, SAMPLING_RATE), emotion_weights=HAPPY)


# --- files -------------------------------------------------------------------------------------------------------------


def test_saving_and_loading(processor, tmp_path):
    changed = IndexTTS2Processor(IndexTTS2FeatureExtractor(max_audio_s=9.0), processor.tokenizer, max_text_tokens=17)
    changed.save_pretrained(tmp_path)
    for loaded in (IndexTTS2Processor.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)):
        assert type(loaded) is IndexTTS2Processor
        assert loaded.max_text_tokens == 17 and loaded.feature_extractor.max_audio_s == 9.0
        assert torch.equal(loaded(TEXT)["input_ids"], changed(TEXT)["input_ids"])


def test_the_processor_of_a_checkpoint(processor, tiny_checkpoint):
    loaded = AutoProcessor.from_pretrained(tiny_checkpoint)
    assert type(loaded) is IndexTTS2Processor and loaded.max_text_tokens == 120
    assert torch.equal(loaded(TEXT)["input_ids"], processor(TEXT)["input_ids"])


def test_a_strength_for_each_text(tiny_checkpoint):
    processor = IndexTTS2Processor.from_pretrained(tiny_checkpoint)
    inputs = processor(["One.", "Two."], emotion_weights={"happy": 1.0}, emotion_strength=[0.5, 1.0])
    assert inputs["emotion_weights"][:, 0].tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match=r"`emotion_strength` has 1 values for 2 text\(s\)"):
        processor(["One.", "Two."], emotion_weights={"happy": 1.0}, emotion_strength=[0.5])
