"""The emotion language model learns to write the answers that inference reads, and what is saved reads them."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from indextts2_hf import EMOTIONS, EmotionTextModel, IndexTTS2TextToAudioPipeline
from indextts2_hf.emotion import CHINESE_EMOTIONS, SYSTEM_MESSAGE
from programs import TRAINING, read_log, run_killed, run_program, run_ranks, run_to_error


# Eight texts, each emotion the strongest of one; one has a word at which the reader swaps sad and melancholic.
TEXTS = [
    ("You did it! I am so proud.", {"happy": 0.75, "surprised": 0.25}),
    ("Get out of my house, now.", {"angry": 1.0}),
    ("She never came back.", {"sad": 0.8, "melancholic": 0.15, "calm": 0.05}),
    ("There is somebody behind the door.", {"afraid": 0.62, "surprised": 0.38}),
    ("It smells as if something died in here.", {"disgusted": 0.9, "angry": 0.1}),
    ("A gloomy afternoon, like all the others.", {"melancholic": 0.7, "sad": 0.2, "calm": 0.1}),
    ("今天竟然下雪了！", {"surprised": 0.55, "happy": 0.45}),
    ("The train leaves at nine.", {"calm": 1}),
]

# How Qwen3 cuts a text before it is encoded, and its conversation.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)


def build_tokenizer(vocab_size: int = 360) -> PreTrainedTokenizerFast:
    """Bytes and the pairs that are frequent in answers, as Qwen3 has them: a digit is a token, and so is an emotion word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    answer = json.dumps(dict.fromkeys(CHINESE_EMOTIONS, 0.25), ensure_ascii=False)
    tokenizer.train_from_iterator([answer] * 9 + [SYSTEM_MESSAGE, "system user assistant"] * 5, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE,
    )


def build_emotion_text(seed: int = 0, vocab_size: int = 360, dtype: torch.dtype = torch.float32) -> EmotionTextModel:
    """A random Qwen3 of two layers. Its output weights are large enough that a trained layer can make a token certain."""
    tokenizer = build_tokenizer(vocab_size)
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return EmotionTextModel(Qwen3ForCausalLM(config).to(dtype).eval(), tokenizer)


def write_texts(path, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "emotions": emotions}, ensure_ascii=False) for text, emotions in texts]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """The folder of a language model alone."""
    folder = tmp_path_factory.mktemp("qwen") / "language-model"
    build_emotion_text().save_pretrained(folder, subfolder="")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_checkpoint, language_model):
    """A checkpoint that brings it. It stops at any byte, so that its answers are short, random as they are."""
    folder = tmp_path_factory.mktemp("with") / "emotion-text"
    shutil.copytree(tiny_checkpoint, folder)
    shutil.copytree(language_model, folder / "emotion_text")
    settings = json.loads((folder / "emotion_text" / "generation_config.json").read_text())
    settings["eos_token_id"] = [settings["eos_token_id"], *range(5, 261)]
    (folder / "emotion_text" / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same eight texts for training and validation."""
    folder = tmp_path_factory.mktemp("texts")
    for split in ("train", "validation"):
        write_texts(folder / f"{split}.jsonl")
    return folder


@pytest.fixture
def options(checkpoint, data):
    """A run of three steps without dropout, whose every figure is logged."""
    return [
        *("--model", checkpoint, "--data", data, "--max_train_steps", 3, "--batch_size", 2, "--learning_rate", 5e-3),
        *("--warmup_steps", 1, "--log_steps", 1, "--dropout", 0, "--num_answers", 2),
    ]


def load_weights(folder) -> dict[str, torch.Tensor]:
    with safe_open(folder / "emotion_text" / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- what is learned -----------------------------------------------------------------------------------------------------


def test_what_it_learned_is_read_from_the_texts_and_spoken(tiny_checkpoint, language_model, data, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, TRAINING / "train_emotion_text.py", "--model", tiny_checkpoint, "--data", data]
    command += ["--language_model", language_model, "--output", out, "--max_train_steps", 120, "--warmup_steps", 20]
    command += ["--learning_rate", 1e-2, "--dropout", 0, "--eval_steps", 120]
    result = subprocess.run([str(item) for item in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "29,696 trainable parameters; 8 texts, 8 held out; 8 texts and" in result.stderr

    texts = [text for text, _ in TEXTS]
    expected = torch.tensor([[float(emotions.get(name, 0)) for name in EMOTIONS] for _, emotions in TEXTS])
    assert not torch.allclose(EmotionTextModel.from_pretrained(language_model, subfolder="")(texts), expected)
    for folder in (out, out / "last"):
        torch.testing.assert_close(EmotionTextModel.from_pretrained(folder)(texts), expected)
        pipe = IndexTTS2TextToAudioPipeline.from_pretrained(folder)
        read = pipe("Hello.", emotion_text=texts[5], duration_s=0.4, seed=1)["audio"]
        given = pipe("Hello.", emotion_weights=TEXTS[5][1], duration_s=0.4, seed=1)["audio"]
        other = pipe("Hello.", emotion_weights=TEXTS[1][1], duration_s=0.4, seed=1)["audio"]
        assert (read == given).all() and (read != other).any()

    first, *_, last = read_log(out, "eval/")
    assert first["step"] == 0 and first["eval/readable_answers"] == 0
    assert first["eval/weight_l1"] > 0.1 and last["eval/weight_l1"] < 1e-6
    assert last["eval/readable_answers"] == last["eval/strongest_emotion_accuracy"] == 1
    # The soft labels are met: what is left is the entropy of the distributions themselves.
    entropy = -torch.xlogy(expected, expected).sum(dim=1).mean().item()
    assert entropy <= last["eval/emotion_cross_entropy_per_text"] < entropy + 0.01
    assert last["eval/answer_cross_entropy_per_token"] < 0.02
    assert last["eval/loss"] == pytest.approx(
        last["eval/answer_cross_entropy_per_token"] + last["eval/emotion_cross_entropy_per_text"]
    )


def test_both_terms_by_hand_and_each_row_alone():
    import train_emotion_text as program

    emotion_text = build_emotion_text()
    tokenizer, model = emotion_text.tokenizer, emotion_text.model
    rows = [
        {"text": text, "weights": [float(emotions.get(name, 0)) for name in EMOTIONS], "id": text}
        for text, emotions in [*TEXTS[1:3], TEXTS[5], ("a", {"happy": 0.3, "calm": 0.1})]
    ]
    dataset = program.EmotionTextDataset(rows, emotion_text)
    batch = program.collate([dataset[row, row] for row in range(len(rows))], tokenizer.pad_token_id)
    answer_loss, soft_label_loss = program.compute_losses(model, batch, program.emotion_token_ids(emotion_text))

    answers = [
        '{"高兴": 0.0, "愤怒": 1.0, "悲伤": 0.0, "恐惧": 0.0, "反感": 0.0, "低落": 0.0, "惊讶": 0.0, "自然": 0.0}',
        '{"高兴": 0.0, "愤怒": 0.0, "悲伤": 0.8, "恐惧": 0.0, "反感": 0.0, "低落": 0.15, "惊讶": 0.0, "自然": 0.05}',
        # "gloomy": the reader swaps what is written here.
        '{"高兴": 0.0, "愤怒": 0.0, "悲伤": 0.7, "恐惧": 0.0, "反感": 0.0, "低落": 0.2, "惊讶": 0.0, "自然": 0.1}',
        '{"高兴": 0.3, "愤怒": 0.0, "悲伤": 0.0, "恐惧": 0.0, "反感": 0.0, "低落": 0.0, "惊讶": 0.0, "自然": 0.1}',
    ]
    distributions = [{"愤怒": 1.0}, {"悲伤": 0.8, "低落": 0.15, "自然": 0.05}, {"悲伤": 0.7, "低落": 0.2, "自然": 0.1}]
    distributions += [{"高兴": 0.75, "自然": 0.25}]
    answer_losses, soft_label_losses = [], []
    for row, answer, distribution in zip(rows, answers, distributions, strict=True):
        prompt = (
            f"<|im_start|>system\n{SYSTEM_MESSAGE}<|im_end|>\n<|im_start|>user\n{row['text']}<|im_end|>\n"
            "<|im_start|>assistant\n<think>\n\n</think>\n\n"
        )
        prompt, answer = tokenizer(prompt).input_ids, tokenizer(answer + "<|im_end|>").input_ids
        log_probabilities = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(dim=-1)
        told = [log_probabilities[len(prompt) - 1 + place, token] for place, token in enumerate(answer)]
        answer_losses.append(-sum(told) / len(told))
        words = {word: log_probabilities[len(prompt) - 1, tokenizer(word).input_ids[0]] for word in CHINESE_EMOTIONS}
        total = torch.stack(list(words.values())).logsumexp(dim=0)
        soft_label_losses.append(-sum(share * (words[word] - total) for word, share in distribution.items()))
    torch.testing.assert_close(answer_loss, sum(answer_losses) / 4, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(soft_label_loss, sum(soft_label_losses) / 4, rtol=1e-4, atol=1e-4)

    # Each term moves what it is about, and without a weight the second one costs nothing.
    answer_only, nothing = program.compute_losses(model, batch, None)
    assert torch.equal(answer_only, answer_loss) and nothing == 0


def test_the_soft_labels_leave_the_first_token_of_the_answer_alone():
    import train_emotion_text as program

    emotion_text = build_emotion_text()
    rows = [{"text": "a", "weights": [0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5], "id": "a"}]
    batch = program.collate(
        [program.EmotionTextDataset(rows, emotion_text)[0, 0]], emotion_text.tokenizer.pad_token_id
    )
    ids = program.emotion_token_ids(emotion_text)
    logits = emotion_text.model(batch["input_ids"]).logits.detach().requires_grad_()

    def model(logits_to_keep, **kwargs):
        return type("Output", (), {"logits": logits[:, -logits_to_keep:]})

    program.compute_losses(model, batch, ids)[1].backward()
    place = batch["input_ids"].shape[1] - batch["labels"].shape[1] - 1
    gradient = logits.grad[0]
    assert gradient[:place].eq(0).all() and gradient[place + 1 :].eq(0).all()
    others = [token for token in range(gradient.shape[1]) if token not in ids]
    assert gradient[place, others].eq(0).all() and gradient[place, ids].ne(0).all()
    # In sum the words are made neither more nor less likely.
    assert gradient[place].sum().abs() < 1e-6


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (json.dumps(dict.fromkeys(CHINESE_EMOTIONS, 0.1)), True),
        (json.dumps(dict.fromkeys(CHINESE_EMOTIONS[1:], 0.1)), False),
        (json.dumps(dict.fromkeys(CHINESE_EMOTIONS, "0.1")), False),
        ('"高兴"', False),
        ('{"高兴": 0.1', False),
        ("[" * 5000, False),
    ],
)
def test_readable_answers(answer, expected):
    import train_emotion_text as program

    assert program.is_readable(answer) == expected


# --- what is saved -------------------------------------------------------------------------------------------------------


def test_the_adapter_and_the_merged_model_are_the_same_and_keep_the_dtype(options, tiny_checkpoint, tmp_path):
    base = tmp_path / "base"
    build_emotion_text(dtype=torch.bfloat16).save_pretrained(base, subfolder="")
    # A checkpoint with another language model: nothing of it stays.
    old = tmp_path / "old"
    shutil.copytree(tiny_checkpoint, old)
    build_emotion_text(seed=1).save_pretrained(old)
    (old / "emotion_text" / "added_tokens.json").write_text("{}")
    out = tmp_path / "run"
    run_program("train_emotion_text", *options, "--model", old, "--language_model", base, "--output", out)
    assert not (out / "emotion_text" / "added_tokens.json").exists()
    for folder in (out, out / "last"):
        adapted = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder / "adapter"
        )
        merged = adapted.merge_and_unload().state_dict()
        before = AutoModelForCausalLM.from_pretrained(base).state_dict()
        found = load_weights(folder)
        changed = {name for name in found if not torch.equal(found[name], before[name])}
        assert changed == {name for name in found if ".layers." in name and "norm" not in name}
        assert all(torch.equal(found[name], merged[name].bfloat16()) for name in found)


def test_killed_and_resumed_with_dropout_it_gives_the_same_numbers(options, tmp_path):
    options = [*options, "--dropout", 0.3, "--save_steps", 2, "--eval_steps", 2, "--max_train_steps", 6]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run_program("train_emotion_text", "--output", whole, *options)
    run_killed("train_emotion_text", "--output", killed, *options, after=killed / "state/step-00000002")
    assert "Continuing" in run_program("train_emotion_text", "--output", killed, *options, "--resume")
    assert len(read_log(whole)) == 6 + 4 and read_log(whole) == read_log(killed)
    for folder in ("", "last"):
        assert are_equal(load_weights(whole / folder), load_weights(killed / folder))

    # A state holds the adapter alone.
    state = killed / "state" / "step-00000006"
    assert not list(state.glob("*model*"))
    with safe_open(state / "trained.safetensors", framework="pt") as file:
        assert len(file.keys()) == 2 * 7 * 2 and all("lora_" in name for name in file.keys())


def test_another_language_model_is_no_base_for_a_saved_adapter(options, tiny_checkpoint, tmp_path):
    options = [*options, "--save_steps", 1, "--num_answers", 1]
    run_program("train_emotion_text", "--output", tmp_path / "run", *options)
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    build_emotion_text(seed=1).save_pretrained(other)
    options = [*options, "--model", other, "--resume"]
    said = run_to_error("train_emotion_text", "--output", tmp_path / "run", *options)
    assert "The run was begun on a base with the weights" in said and "was begun with" in said


def test_two_processes_or_two_batches_are_one_batch_twice_as_large(options, tmp_path):
    run_program("train_emotion_text", "--output", tmp_path / "one", *options, "--batch_size", 4)
    run_ranks("train_emotion_text", 2, "--output", tmp_path / "two", *options)
    run_program(
        "train_emotion_text", "--output", tmp_path / "accumulated", *options, "--gradient_accumulation_steps", 2
    )
    one = read_log(tmp_path / "one")
    for name in ("two", "accumulated"):
        rows = read_log(tmp_path / name)
        assert len(rows) == len(one) == 3 + 2
        for row, expected in zip(rows, one, strict=True):
            assert row == pytest.approx(expected, rel=1e-4), name


def test_less_memory_gives_the_same_numbers_and_half_precision_nearly(options, tmp_path):
    run_program("train_emotion_text", "--output", tmp_path / "plain", *options)
    run_program("train_emotion_text", "--output", tmp_path / "checkpointing", *options, "--gradient_checkpointing")
    run_program("train_emotion_text", "--output", tmp_path / "bf16", *options, "--mixed_precision", "bf16")
    plain = read_log(tmp_path / "plain", "train/loss")
    for name, tolerance in (("checkpointing", 1e-5), ("bf16", 0.02)):
        for row, expected in zip(read_log(tmp_path / name, "train/loss"), plain, strict=True):
            assert row == pytest.approx(expected, rel=tolerance), name
    assert {weight.dtype for weight in load_weights(tmp_path / "bf16").values()} == {torch.float32}


# --- wrong input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 'a'}", "no JSON"),
        ('["a", 1]', r"this is \['a', 1\], without `text` and `emotions`"),
        ('{"text": "a", "happy": 1}', "this is an object with text, happy, without"),
        ('{"text": " ", "emotions": {"sad": 1}}', "`text` is ' ' but must be"),
        ('{"text": 3, "emotions": {"sad": 1}}', "`text` is 3 but must be"),
        ('{"text": "a", "emotions": [1, 0, 0, 0, 0, 0, 0, 0]}', r"`emotions` is \[1, .* must be weights by name"),
        ('{"text": "a", "emotions": {"joy": 1}}', "'joy' is none of the eight emotions"),
        ('{"text": "a", "emotions": {"sad": 1.1}}', "sad is 1.1 but must be a number from 0 to 1"),
        ('{"text": "a", "emotions": {"sad": -0.1}}', "sad is -0.1 but"),
        ('{"text": "a", "emotions": {"sad": NaN}}', "sad is nan but"),
        ('{"text": "a", "emotions": {"sad": true}}', "sad is True but"),
        ('{"text": "a", "emotions": {"sad": "0.5"}}', "sad is '0.5' but"),
        ('{"text": "a", "emotions": {"sad": 0.001}}', "no emotion has at least 0.01"),
        ('{"text": "a", "emotions": {}}', "no emotion has at least 0.01"),
    ],
)
def test_bad_lines(line, message, tmp_path):
    import train_emotion_text as program

    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "a", "emotions": {"sad": 1}}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"texts.jsonl, line 3: .*{message}.*Expected is {{\"text\""):
        program.read_texts(path)


def test_what_is_held_out(tmp_path):
    import train_emotion_text as program

    write_texts(tmp_path / "texts.jsonl", TEXTS)
    train, held_out = program.read_splits(tmp_path / "texts.jsonl", 0.25, seed=0)
    assert len(train) == 6 and len(held_out) == 2
    assert {row["text"] for row in train + held_out} == {text for text, _ in TEXTS}
    assert program.read_splits(tmp_path / "texts.jsonl", 0.25, seed=0)[1] == held_out
    assert (
        train[0]
        == {
            "text": TEXTS[0][0],
            "weights": [0.75, 0, 0, 0, 0, 0, 0.25, 0],
            "id": "texts.jsonl line 1",
        }
        or held_out[0]["id"] == "texts.jsonl line 1"
    )
    with pytest.raises(ValueError, match="has 8 texts, of which --validation_fraction 1.0 cannot be held out"):
        program.read_splits(tmp_path / "texts.jsonl", 1.0, seed=0)
    with pytest.raises(ValueError, match="there is no .*train.jsonl. Name a file of JSON lines"):
        program.read_splits(tmp_path, 0.1, seed=0)
    write_texts(tmp_path / "train.jsonl", TEXTS[:1])
    with pytest.raises(ValueError, match="has 1 texts, of which --validation_fraction 0.1"):
        program.read_splits(tmp_path, 0.1, seed=0)
    write_texts(tmp_path / "validation.jsonl", TEXTS[3:5])
    train, held_out = program.read_splits(tmp_path, 0.1, seed=0)
    assert [row["id"] for row in train + held_out] == [
        "train.jsonl line 1",
        "validation.jsonl line 1",
        "validation.jsonl line 2",
    ]
    (tmp_path / "train.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="train.jsonl has no texts"):
        program.read_splits(tmp_path, 0.1, seed=0)


def test_bad_input_is_one_line(options, tiny_checkpoint, language_model, tmp_path):
    def run(*more) -> str:
        return run_to_error("train_emotion_text", "--output", tmp_path / "run", *options, *more)

    said = run("--model", tiny_checkpoint)
    assert "has no emotion_text/ to start from. Name a language model with --language_model" in said
    said = run("--language_model", tiny_checkpoint)
    assert "is a 'indextts2', which is no causal language model. Name one of the Qwen3 class" in said
    write_texts(tmp_path / "bad.jsonl", [*TEXTS[:2], ("a", {"joy": 1})])
    assert "bad.jsonl, line 3: 'joy' is none of the eight emotions" in run("--data", tmp_path / "bad.jsonl")
    write_texts(tmp_path / "long.jsonl", [*TEXTS[:2], ("很长" * 200, {"calm": 1})])
    said = run("--data", tmp_path / "long.jsonl")
    assert "long.jsonl line 3: with " in said and "longer than the 512 that the language model can read" in said


def test_a_loss_that_is_no_number_names_its_texts_and_keeps_what_is_good(options, checkpoint, tmp_path):
    out = tmp_path / "run"
    said = run_to_error("train_emotion_text", "--output", out, *options, "--learning_rate", 1e30, "--warmup_steps", 0)
    assert re.search(
        r"The loss is \w+ at step 2, in the batch of train.jsonl line \d, train.jsonl line \d: look", said
    ), said
    assert are_equal(load_weights(out), load_weights(checkpoint))


def test_unfit_language_models(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    import train_emotion_text as program

    emotion_text = build_emotion_text()
    config = GPT2Config(vocab_size=400, n_embd=8, n_layer=1, n_head=1, bos_token_id=1, eos_token_id=2)
    EmotionTextModel(GPT2LMHeadModel(config), emotion_text.tokenizer).save_pretrained(tmp_path, subfolder="")
    arguments = type("Arguments", (), {"language_model": str(tmp_path), "model": "x"})
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layers q_proj, .*Qwen3 class"):
        program.load_language_model(arguments, tmp_path)

    # Bytes alone: words that begin with one byte.
    with pytest.raises(ValueError, match="begins two of the words 高兴, .* or --soft_label_weight 0"):
        program.emotion_token_ids(build_emotion_text(vocab_size=261))

    # The end that generation knows, even if the tokenizer calls another one so; there must be one.
    assert program.end_token_id(emotion_text) == emotion_text.tokenizer.convert_tokens_to_ids("<|im_end|>")
    emotion_text.model.generation_config.eos_token_id = [4, 1]
    assert program.end_token_id(emotion_text) == 4
    emotion_text.model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="no `eos_token_id` in its generation config"):
        program.end_token_id(emotion_text)


def test_the_recipe_has_known_options(monkeypatch, tmp_path):
    import train_emotion_text as program

    command = [
        "--config",
        TRAINING / "configs" / "emotion_text.yaml",
        "--model",
        "m",
        "--data",
        "d",
        "--output",
        tmp_path,
    ]
    monkeypatch.setattr(sys, "argv", ["train_emotion_text.py", *map(str, command)])
    assert program.parse().rank > 0
