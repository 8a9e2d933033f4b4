"""Weights of the eight emotions: checks, scaling, and reading them from a text."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from indextts2_hf import emotion as module
from indextts2_hf.emotion import (
    EMOTIONS,
    EmotionTextModel,
    balance_emotion_weights,
    check_emotion_weights,
    emotion_scores,
    read_emotion_answer,
    scale_emotion_weights,
)


PARITY = Path(__file__).parent / "assets" / "parity"

WEIGHTS = [0.55, 0.0, 0.2, 0.1, 0.0, 0.3, 0.0, 0.25]
CALM = [0.0] * 7 + [1.0]


def weights_of(**named: float) -> list[float]:
    return [named.get(name, 0.0) for name in EMOTIONS]


# --- weights -----------------------------------------------------------------------------------------------------------


def test_order():
    assert EMOTIONS == ("happy", "angry", "sad", "afraid", "disgusted", "melancholic", "surprised", "calm")


@pytest.mark.parametrize(
    "weights",
    [
        weights_of(happy=0.5, calm=0.25),
        tuple(weights_of(happy=0.5, calm=0.25)),
        {"calm": 0.25, "happy": 0.5},
        np.array(weights_of(happy=0.5, calm=0.25)),
        torch.tensor(weights_of(happy=0.5, calm=0.25)),
    ],
)
def test_forms_of_weights(weights):
    checked = check_emotion_weights(weights)
    assert checked == [0.5, 0, 0, 0, 0, 0, 0, 0.25]
    assert all(type(weight) is float for weight in checked)


def test_edges_are_allowed():
    assert check_emotion_weights([0.0] * 8) == [0.0] * 8
    assert check_emotion_weights({"sad": 1.2})[2] == 1.2


@pytest.mark.parametrize("weight", [-0.1, 1.21, math.nan, math.inf, -math.inf])
def test_weight_out_of_range_is_named(weight):
    for check in (check_emotion_weights, balance_emotion_weights, lambda weights: scale_emotion_weights(weights, 0.5)):
        with pytest.raises(ValueError, match="weight of 'afraid' .* from 0 to 1.2"):
            check(weights_of(afraid=weight))


def test_wrong_weights():
    with pytest.raises(ValueError, match="has 7 values but there are eight emotions"):
        check_emotion_weights([0.1] * 7)
    with pytest.raises(ValueError, match="names 'joy', which is none .* happy, angry"):
        check_emotion_weights({"joy": 0.5})
    for wrong in (None, 0.5, "calm", ["a"] * 8, [None] * 8, torch.zeros(1, 8), np.zeros((8, 2)), {"sad": None}):
        with pytest.raises(ValueError, match="must be eight numbers in the order happy"):
            check_emotion_weights(wrong)


def test_sum_above_one_warns_once(monkeypatch):
    messages = []
    monkeypatch.setattr(module.logger, "warning_once", messages.append)
    check_emotion_weights([0.125] * 8)
    assert not messages
    assert check_emotion_weights(WEIGHTS) == WEIGHTS
    assert len(messages) == 1 and "sum to 1.40" in messages[0]
    balance_emotion_weights(WEIGHTS)
    scale_emotion_weights(WEIGHTS, 0.5)
    assert len(messages) == 1


def test_scaling_truncates_and_clamps():
    assert scale_emotion_weights({"happy": 0.99999}, 0.5)[0] == 0.4999
    assert scale_emotion_weights({"happy": 0.123456}, 1.0)[0] == 0.123456
    assert scale_emotion_weights({"happy": 0.123456}, 7)[0] == 0.123456
    assert scale_emotion_weights(WEIGHTS, -1.0) == [0.0] * 8
    with pytest.raises(ValueError, match="`emotion_strength` is NaN"):
        scale_emotion_weights(WEIGHTS, math.nan)


def test_balancing():
    assert balance_emotion_weights({"calm": 1.0}) == weights_of(calm=0.5625)
    assert balance_emotion_weights({"calm": 1.0}, use_bias=False) == weights_of(calm=0.8)
    assert balance_emotion_weights({"happy": 0.3, "sad": 0.2}, use_bias=False) == weights_of(happy=0.3, sad=0.2)
    assert sum(balance_emotion_weights([1.0] * 8)) == pytest.approx(0.8)


def test_parity_of_scaling_and_balancing():
    settings = json.loads((PARITY / "case_settings.json").read_text())["emotion"]
    assert tuple(settings["order"]) == EMOTIONS
    for case in settings["normalise"]:
        assert balance_emotion_weights(case["inp"]) == pytest.approx(case["with_bias"], abs=1e-12)
        assert balance_emotion_weights(case["inp"], use_bias=False) == pytest.approx(case["without_bias"], abs=1e-12)
    for case in settings["scaled"]:
        assert scale_emotion_weights(case["inp"], case["emo_alpha"]) == case["out"]


# --- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"高兴": 0.9, "惊讶": 0.1}', weights_of(happy=0.9, surprised=0.1)),
        ('{"高兴": 1.5, "愤怒": -0.3}', weights_of(happy=1.2)),
        ('{"高兴": "0.5", "恐惧": " 0.25 "}', weights_of(happy=0.5, afraid=0.25)),
        ('{"高兴": 0.6, "愤怒": 0.2', weights_of(happy=0.6, angry=0.2)),
        ("高兴：0.6，愤怒: 1", weights_of(happy=0.6, angry=1.0)),
        ("```json\n{'反感': '0.4'}\n```", weights_of(disgusted=0.4)),
        ('"高兴"', weights_of(happy=1.0)),
        ('" Surprised "', weights_of(surprised=1.0)),
        ('{"emotion": "angry"}', weights_of(angry=1.0)),
        ('{"label": null, "情绪": "低落"}', weights_of(melancholic=1.0)),
        ('{"label": "SAD", "高兴": 0.2}', weights_of(happy=0.2)),
        ('{"高兴": "愤怒", "恐惧": 0.2}', weights_of(angry=1.0, afraid=0.2)),
        ('{"高兴": null, "恐惧": 0.2}', weights_of(afraid=0.2)),
        ('{"高兴": NaN, "恐惧": Infinity}', weights_of(afraid=1.2)),
        ('{"高兴": 1' + "0" * 400 + "}", CALM),
        ('{"emotion": "bored"}', CALM),
        ('{"高兴": 0.0}', CALM),
        ("{}", CALM),
        ("[0.5]", CALM),
        ("0.5", CALM),
        ("null", CALM),
        ("[" * 5000, CALM),
        ("no emotion at all", CALM),
        ("", CALM),
    ],
)
def test_answers(answer, expected):
    assert read_emotion_answer("x", answer) == expected


@pytest.mark.parametrize("text", ["I feel GLOOMY", "我很低落", "Melancholy", "a depressed man"])
def test_sad_and_melancholic_are_swapped(text):
    answer = '{"悲伤": 0.8, "低落": 0.05, "恐惧": 0.1}'
    assert read_emotion_answer(text, answer) == weights_of(sad=0.05, melancholic=0.8, afraid=0.1)
    assert read_emotion_answer(text, '{"悲伤": 0.7}') == weights_of(melancholic=0.7)
    # A label has nothing to swap; the original fails on the first and ignores the second.
    assert read_emotion_answer(text, '"悲伤"') == CALM
    assert read_emotion_answer(text, '{"label": "悲伤"}') == CALM


def test_parity_of_answers():
    for case in json.loads((PARITY / "text" / "emotion_answers.json").read_text())["cases"]:
        # Where the original fails, ours is calm.
        assert read_emotion_answer(case["text"], case["answer"]) == case.get("weights", CALM), case


def test_an_answer_of_scores_is_read_as_the_weights():
    rng = np.random.default_rng(0)
    for text in ("what a day", "I feel gloomy", "我很低落"):
        for weights in rng.integers(0, 121, (20, 8)) / 100:
            answer = json.dumps(emotion_scores(text, weights), ensure_ascii=False)
            assert read_emotion_answer(text, answer) == weights.tolist()
            assert json.loads(answer).keys() == dict.fromkeys(module.CHINESE_EMOTIONS).keys()
    assert list(emotion_scores("x", {"happy": 0.666, "calm": 1}).items()) == [
        *[("高兴", 0.67), ("愤怒", 0.0), ("悲伤", 0.0), ("恐惧", 0.0)],
        *[("反感", 0.0), ("低落", 0.0), ("惊讶", 0.0), ("自然", 1.0)],
    ]
    assert emotion_scores("gloomy", {"sad": 0.7, "melancholic": 0.3})["悲伤"] == 0.3
    with pytest.raises(ValueError, match="below 0.005: an answer of eight zeros is read as calm"):
        emotion_scores("x", {"happy": 0.004})


# --- the language model ------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|> {{ message.role }} {{ message.content }} <|im_end|> {% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|> assistant {% if not enable_thinking %}<think> </think> {% endif %}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>"]
    words = ["<think>", "</think>", "system", "user", "assistant", module.SYSTEM_MESSAGE, "what", "a", "day", "gloomy"]
    pieces = [*module.CHINESE_EMOTIONS, *'0123456789.,:{}"']
    vocabulary = {token: index for index, token in enumerate(special + words + pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="module")
def emotion_text() -> EmotionTextModel:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
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
    )
    return EmotionTextModel(Qwen3ForCausalLM(config).eval(), tokenizer)


def test_weights_of_texts(emotion_text):
    weights = emotion_text(["what a day", "gloomy", "a"], max_new_tokens=24)
    assert weights.shape == (3, 8) and weights.dtype == torch.float32
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all() and (weights <= module.MAX_WEIGHT).all()
    assert (weights.sum(dim=1) > 0).all()
    assert emotion_text("what a day", max_new_tokens=24).shape == (1, 8)


class _Recorder:
    """Notes what the model is asked and what it writes."""

    def __init__(self, emotion_text: EmotionTextModel, monkeypatch: pytest.MonkeyPatch):
        self.prompts, self.answers = [], []
        generate = emotion_text.model.generate

        def record(input_ids, attention_mask, **kwargs):
            sequences = generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            self.prompts += [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
            self.answers += list(sequences[:, input_ids.shape[1] :])
            self.attention_mask = attention_mask
            return sequences

        monkeypatch.setattr(emotion_text.model, "generate", record)


def test_prompt_and_left_padding(emotion_text, monkeypatch):
    recorder = _Recorder(emotion_text, monkeypatch)
    emotion_text(["what a day", "gloomy"], max_new_tokens=12)
    emotion_text("gloomy", max_new_tokens=12)
    assert (
        emotion_text.tokenizer.decode(recorder.prompts[1]).split()
        == (
            "<|im_start|> system 文本情感分类 <|im_end|> <|im_start|> user gloomy <|im_end|> <|im_start|> assistant "
            "<think> </think>"
        ).split()
    )
    alone, batched = recorder.answers[2], recorder.answers[1]
    assert torch.equal(recorder.prompts[1], recorder.prompts[2])
    assert torch.equal(alone, batched[: len(alone)])


def test_answers_as_they_are(emotion_text):
    texts = ["what a day", "gloomy"]
    answers = emotion_text.write_answers(texts, max_new_tokens=24)
    expected = [read_emotion_answer(text, answer) for text, answer in zip(texts, answers, strict=True)]
    torch.testing.assert_close(emotion_text(texts, max_new_tokens=24), torch.tensor(expected))
    assert not any("<|im_end|>" in answer for answer in answers)


def test_answers_are_taken_after_the_thoughts(emotion_text, monkeypatch):
    tokenizer = emotion_text.tokenizer
    answers = [
        "{ 高兴 : 1 } </think> { 悲伤 : 1 } </think> { 恐惧 : 0 } <|im_end|> <pad>",
        "{ 惊讶 : 1 } <|im_end|> <pad> <pad> <pad> <pad> <pad> <pad> <pad>",
    ]

    def generate(input_ids, **kwargs):
        ids = [tokenizer.encode(answer, add_special_tokens=False) for answer in answers]
        width = max(map(len, ids))
        return torch.cat([input_ids, torch.tensor([row + [0] * (width - len(row)) for row in ids])], dim=1)

    monkeypatch.setattr(emotion_text.model, "generate", generate)
    assert emotion_text(["a", "day"]).tolist() == [CALM, weights_of(surprised=1.0)]


def test_end_of_thought():
    assert module._drop_thoughts([5, 9, 6, 9, 7, 8], 9) == [7, 8]
    assert module._drop_thoughts([5, 6, 9], 9) == []
    assert module._drop_thoughts([5, 6], 9) == [5, 6]


def test_seed_fixes_sampled_answers_and_leaves_the_random_state(emotion_text, monkeypatch):
    monkeypatch.setattr(emotion_text.model.generation_config, "do_sample", True)
    recorder = _Recorder(emotion_text, monkeypatch)
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    for seed in (3, 3, 4):
        emotion_text("what a day", seed=seed, max_new_tokens=24)
    assert torch.equal(state, torch.random.get_rng_state())
    first, second, other = recorder.answers
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    emotion_text("what a day", max_new_tokens=24)
    assert not torch.equal(state, torch.random.get_rng_state())


def test_saving_and_loading(emotion_text, tmp_path):
    emotion_text.save_pretrained(tmp_path)
    expected = emotion_text(["what a day", "gloomy"], max_new_tokens=24)
    for path, subfolder in ((tmp_path, "emotion_text"), (tmp_path / "emotion_text", "")):
        loaded = EmotionTextModel.from_pretrained(path, subfolder=subfolder)
        assert not loaded.model.training
        assert torch.equal(loaded(["what a day", "gloomy"], max_new_tokens=24), expected)
    loaded = EmotionTextModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.dtype == torch.bfloat16


def test_missing_folder(tmp_path):
    with pytest.raises(OSError, match="no emotion language model under 'emotion_text' .* pass `emotion_weights`"):
        EmotionTextModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="no emotion language model"):
        EmotionTextModel.from_pretrained(tmp_path / "nowhere", local_files_only=True)


def test_unfit_tokenizer(emotion_text):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="has no chat template"):
        EmotionTextModel(emotion_text.model, tokenizer)
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="has no padding token"):
        EmotionTextModel(emotion_text.model, tokenizer)


@pytest.mark.parametrize("texts", [[], "", [" "], [None], ["a", ""]])
def test_no_text(emotion_text, texts):
    with pytest.raises(ValueError, match="must be one or more texts that are not empty"):
        emotion_text(texts)
