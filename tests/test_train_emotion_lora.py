"""The adapter's training, what is saved, what it does to the output, and how adapters are loaded, swapped and left out again."""

import json
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from datasets import load_from_disk
from huggingface_hub import ModelCard
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import pipeline

from data import EndlessBatchSampler, T2SDataset, collate_t2s, load_features
from indextts2_cli import main as command_line
from indextts2_hf import (
    IndexTTS2ForTextToWaveform,
    IndexTTS2T2SForConditionalGeneration,
    IndexTTS2TextToAudioPipeline,
    embedded_checkpoint,
)
from indextts2_hf.modeling_t2s import LORA_TARGET_MODULES
from programs import TRAINING, read_log, run_killed, run_program, run_ranks, run_to_error


STYLE = range(8)  # of 64 codes
FIGURE = "eval/semantic_cross_entropy_per_token"


def change_rows(features, folder, change, num_copies=1):
    """A copy of prepared features in which `change` was made to each row; held-out clips as often as asked, by other names."""
    for split in ("train", "validation"):
        table = load_from_disk(features / split / "shard-00000")
        rows = [change(row) for row in table.to_list()]
        if split == "validation":
            rows = [row | {"clip": f"{copy}{row['clip']}"} for copy in range(num_copies) for row in rows]
        type(table).from_list(rows, features=table.features).save_to_disk(folder / split / "shard-00000")
    shutil.copy(features / "features.json", folder)
    return folder


@pytest.fixture(scope="module")
def style_features(tiny_features, tmp_path_factory):
    """The clips with an eighth of the codes: a manner of speaking of its own."""

    def restrict(row):
        return row | {"semantic_ids": [code % len(STYLE) for code in row["semantic_ids"]]}

    return change_rows(tiny_features, tmp_path_factory.mktemp("style"), restrict, num_copies=2)


@pytest.fixture(scope="module")
def options(tiny_checkpoint, style_features):
    """Four steps without dropout, whose every figure is logged."""
    return [
        *("--model", tiny_checkpoint, "--data", style_features, "--max_train_steps", 4, "--batch_size", 2),
        *("--warmup_steps", 1, "--num_workers", 0, "--log_steps", 1, "--num_spoken", 2, "--rank", 4, "--alpha", 8),
        *("--dropout", 0, "--lora_dropout", 0),
    ]


@pytest.fixture(scope="module")
def adapter(options, tiny_features, tmp_path_factory):
    """An adapter that learnt the style."""
    folder = tmp_path_factory.mktemp("adapters") / "style"
    learning = ["--max_train_steps", 60, "--learning_rate", 2e-2, "--eval_steps", 30, "--batch_size", 4]
    run_program("train_emotion_lora", "--output", folder, *options, *learning, "--replay", tiny_features)
    return folder


@pytest.fixture(scope="module")
def short_run(options, tiny_checkpoint, tmp_path_factory):
    """The folder of a few steps, by the program as a process of its own, to which the base was named by a relative path."""
    out = tmp_path_factory.mktemp("adapters") / "short"
    command = [sys.executable, TRAINING / "train_emotion_lora.py", "--output", out, *options, "--eval_steps", 2]
    command += ["--model", tiny_checkpoint.name]
    result = subprocess.run(
        [str(item) for item in command], capture_output=True, text=True, cwd=tiny_checkpoint.parent
    )
    assert result.returncode == 0, result.stderr
    assert "4,096 trainable parameters" in result.stderr
    assert "minutes of speech in 12 rows of 3 speakers" in result.stderr
    return out


@pytest.fixture
def t2s(tiny_checkpoint):
    return load_t2s(tiny_checkpoint)


def load_t2s(folder):
    return IndexTTS2T2SForConditionalGeneration.from_pretrained(folder, subfolder="t2s")


def make_adapter(tiny_checkpoint, folder, seed=0, **settings):
    """An adapter of random weights."""
    t2s = load_t2s(tiny_checkpoint)
    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGET_MODULES, "fan_in_fan_out": True} | settings
    t2s.add_adapter(LoraConfig(init_lora_weights=False, **settings))
    t2s.save_pretrained(folder)
    return folder


def first_batch(features, size=2):
    """The first batch of a run with the seed 0."""
    dataset = T2SDataset(load_features(features, "train"), 0, with_emotion=True)
    sampler = EndlessBatchSampler(len(dataset), size, 1, seed=0, start=0, stop=1, lengths=dataset.lengths)
    batch = collate_t2s([dataset[key] for key in next(iter(sampler))])
    batch.pop("ids"), batch.pop("speaker_numbers"), batch.pop("emotion_numbers")
    return batch


# --- the program ---------------------------------------------------------------------------------------------------------


@pytest.mark.lora
def test_as_a_program_of_its_own(short_run, tiny_checkpoint, tmp_path, capsys):
    out = short_run
    # The adapter alone, in float32, that names its base so that it is found from any folder.
    for folder in (out, out / "last"):
        names = {path.name for path in folder.iterdir() if path.is_file()} - {"log.jsonl", "run.json"}
        assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
        settings = json.loads((folder / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(tiny_checkpoint)
        assert (settings["r"], settings["lora_alpha"]) == (4, 8) and settings["auto_mapping"]["base_fingerprint"]
        weights = load_file(folder / "adapter_model.safetensors")
        assert len(weights) == 16 and {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)
    assert [row["step"] for row in read_log(out, "train/")] == [1, 2, 3, 4]
    evaluations = read_log(out, "eval/")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    names = {"semantic_cross_entropy_per_token", "token_accuracy", "semantic_tokens_per_text_token"}
    names |= {"num_clips", "standard_error_of_change_per_token"}
    # The base, which a new adapter does not change, and what it learnt.
    assert [row["eval/num_clips"] for row in evaluations] == [12] * 3
    assert (
        evaluations[0]["eval/standard_error_of_change_per_token"]
        == 0
        < evaluations[2]["eval/standard_error_of_change_per_token"]
    )
    assert {key.removeprefix("eval/") for key in evaluations[0]} == names | {
        "step",
        "recorded_semantic_tokens_per_text_token",
    }

    # It speaks through every door.
    ours = IndexTTS2TextToAudioPipeline.from_pretrained(out)
    assert ours.model.config.name_or_path == str(tiny_checkpoint) and ours.model.t2s.active_adapters() == ["default"]
    audio = ours("Hello there.", duration_s=0.4, seed=1)["audio"]
    assert len(audio) == round(0.4 * 22050)
    stock = pipeline("text-to-speech", model=str(out), device="cpu")
    assert np.array_equal(stock("Hello there.", forward_params={"duration_s": 0.4, "seed": 1})["audio"], audio)
    command_line(
        ["speak", "Hello there.", "--model", str(out / "last"), "--duration-s", "0.4", "-o", str(tmp_path / "a.wav")]
    )
    assert (tmp_path / "a.wav").is_file() and "of speech" in capsys.readouterr().out


@pytest.mark.lora
def test_the_loss_by_hand(short_run, t2s, style_features):
    row = read_log(short_run, "train/")[0]
    batch = first_batch(style_features)
    losses = []
    with torch.no_grad():
        logits = t2s(**batch).logits.log_softmax(dim=-1)
    for log_probabilities, labels in zip(logits, batch["labels"], strict=True):
        codes = [*labels[labels >= 0].tolist(), t2s.config.semantic_stop_token_id]
        losses.append(-sum(float(log_probabilities[row, code]) for row, code in enumerate(codes)) / len(codes))
    # A new adapter changes nothing: the first loss is the base's.
    assert row["train/semantic_cross_entropy_per_token"] == pytest.approx(sum(losses) / 2, rel=1e-5)
    total = row["train/semantic_cross_entropy_per_token"] + 0.01 * row["train/text_cross_entropy_per_token"]
    assert row["train/loss"] == pytest.approx(total, rel=1e-5)


@torch.no_grad()
@pytest.mark.lora
def test_the_adapter_is_a_low_rank_sum(adapter, t2s, tiny_checkpoint, style_features):
    weights = load_file(adapter / "adapter_model.safetensors")
    weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    batch = first_batch(style_features)
    base = t2s(**batch).logits
    for name, weight in t2s.state_dict().items():
        name = name.removesuffix(".weight")
        if f"{name}.lora_A.weight" in weights:
            # Alpha / rank is 2; the projections of GPT-2 are stored transposed.
            weight += 2 * (weights[f"{name}.lora_B.weight"] @ weights[f"{name}.lora_A.weight"]).T
    adapted = load_t2s(tiny_checkpoint)
    adapted.load_adapter(str(adapter))
    torch.testing.assert_close(adapted(**batch).logits, t2s(**batch).logits, rtol=1e-4, atol=1e-4)
    assert (adapted(**batch).logits - base).abs().max() > 0.1


@pytest.mark.lora
def test_killed_and_resumed_it_gives_the_same_numbers(options, tmp_path):
    options = [*options, "--max_train_steps", 6, "--save_steps", 2, "--eval_steps", 2, "--lora_dropout", 0.2]
    run_program("train_emotion_lora", "--output", tmp_path / "whole", *options)
    state = tmp_path / "killed/state/step-00000002"
    run_killed("train_emotion_lora", "--output", tmp_path / "killed", *options, after=state)
    said = run_program("train_emotion_lora", "--output", tmp_path / "killed", *options, "--resume")
    assert "Continuing" in said
    whole, killed = (read_log(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == 6 + 4 and whole == killed
    for part in ("adapter_model.safetensors", "last/adapter_model.safetensors"):
        one, other = (load_file(tmp_path / name / part) for name in ("whole", "killed"))
        assert all(torch.equal(one[name], other[name]) for name in one)
    # The state holds what is trained, not the base.
    state = tmp_path / "killed/state/step-00000006"
    assert set(load_file(state / "trained.safetensors")) == {
        name.removeprefix("base_model.model.").replace(".weight", ".default.weight") for name in one
    }
    assert not [path for path in state.iterdir() if path.name.startswith(("model", "pytorch_model"))]


@pytest.mark.lora
def test_two_processes_are_one_with_twice_the_batch(options, tiny_features, tmp_path):
    options = [*options, "--replay", tiny_features]
    run_ranks("train_emotion_lora", 2, "--output", tmp_path / "two", *options)
    run_program("train_emotion_lora", "--output", tmp_path / "one", *options, "--batch_size", 4)
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) == 4 + 2
    for row, expected in zip(two, one, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)


@pytest.mark.lora
def test_half_a_base_and_checkpointing(options, tiny_checkpoint, tmp_path):
    options = [*options, "--mixed_precision", "bf16", "--gradient_checkpointing"]
    run_program("train_emotion_lora", "--output", tmp_path / "run", *options)
    assert {tensor.dtype for tensor in load_file(tmp_path / "run/adapter_model.safetensors").values()} == {
        torch.float32
    }
    rows = read_log(tmp_path / "run", "train/")
    assert all(np.isfinite(row["train/loss"]) and row["train/gradient_norm"] > 0 for row in rows)
    # What was trained on a base in bfloat16 is for the same base in any precision.
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        t2s = IndexTTS2T2SForConditionalGeneration.from_pretrained(tiny_checkpoint, subfolder="t2s", dtype=dtype)
        t2s.load_adapter(str(tmp_path / "run"))
        assert t2s.active_adapters() == ["default"]


@pytest.mark.lora
def test_it_stops_early_and_says_that_it_got_worse(options, tiny_features, tmp_path):
    def part(row):
        # What is held out has nothing of what is learnt.
        return row | {"semantic_ids": [code % 8 + 8 * (row["clip"][-1] in "45") for code in row["semantic_ids"]]}

    out = tmp_path / "run"
    options = [*options, "--data", change_rows(tiny_features, tmp_path / "features", part, 2), "--learning_rate", 0.02]
    options += ["--max_train_steps", 240, "--eval_steps", 30, "--patience", 2, "--batch_size", 4]
    said = run_program("train_emotion_lora", "--output", out, *options)
    evaluations = read_log(out, "eval/")
    best = min(range(1, len(evaluations)), key=lambda index: evaluations[index][FIGURE])
    assert len(evaluations) == best + 1 + 2 < 9 and evaluations[best][FIGURE] > evaluations[0][FIGURE]
    assert "No better evaluation in 2: stopped" in said
    # A little worse at its best, which twelve clips do not show; in the end they do.
    verdicts = (
        "On the held-out clips of the style it goes from",
        "**On the held-out clips of the style it is worse than its base:",
    )
    for verdict, folder, row in zip(verdicts, (out, out / "last"), (evaluations[best], evaluations[-1]), strict=True):
        card = (folder / "README.md").read_text()
        assert f"{verdict} {evaluations[0][FIGURE]:.4g} to {row[FIGURE]:.4g} nats" in card
        assert ("which does not show which is better" in card) is (folder == out)
        assert f"| steps | {row['step']} |" in card
    assert "which does not show which is better" in said
    # It is over, also when it is asked to go on.
    before = (out / "log.jsonl").read_text()
    run_program("train_emotion_lora", "--output", out, *options, "--resume")
    assert (out / "log.jsonl").read_text() == before


@pytest.mark.lora
def test_the_card(adapter, tiny_checkpoint, style_features):
    card = ModelCard.load(adapter / "README.md")
    assert card.data.library_name == "peft" and "lora" in card.data.tags and "base_model" not in card.data.to_dict()
    evaluations = read_log(adapter, "eval/")
    for text in (
        f"| base | `{tiny_checkpoint}` |",
        f"| data | {style_features.name} |",
        "| clips | 12, 0.1 minutes |",
        "| speakers | 3 |",
        "| rank | 4 |",
        "| replay share | 0.25 |",
        f"| token accuracy | {evaluations[0]['eval/token_accuracy']:.4g} |",
        f"On the held-out clips of the style it is better than its base: {evaluations[0][FIGURE]:.4g} to ",
        "nats per semantic token over 12 clips, a change of -",
        # Of ordinary speech only six clips are held out.
        "nats per semantic token over 6 clips; at least 8 are needed to show which is better.",
        "disable_adapters()",
    ):
        assert text in card.text, text
    assert "{{" not in card.text and "{%" not in card.text


def test_the_card_of_an_adapter_for_a_repository(tmp_path):
    from indextts2_hf.cards import write_adapter_card

    figures = {"semantic_cross_entropy_per_token": 4.0, "num_clips": 1}
    write_adapter_card(
        tmp_path, name="happy", base="somebody/base", data={}, settings={}, before=figures, after=figures
    )
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.to_dict()["base_model_relation"]) == ("somebody/base", "adapter")
    assert "| semantic cross entropy per token | 4 | 4 |" in card.text and "num clips" not in card.text


@pytest.mark.parametrize(
    ("after", "num_clips", "error", "verdict"),
    [
        (3.0, 1, None, "On them it goes from 4 to 3 nats per semantic token over 1 clip; at least 8 are needed to show which is better."),
        (3.0, 7, 0.01, "On them it goes from 4 to 3 nats per semantic token over 7 clips; at least 8 are needed"),
        (3.8, 8, 0.09, "On them it is better than its base: 4 to 3.8 nats per semantic token over 8 clips, a change of -0.2 with"),
        (3.8, 8, 0.11, "On them it goes from 4 to 3.8 nats per semantic token over 8 clips, a change of -0.2 with a standard error of 0.11, which does not show which is better."),
        (4.2, 8, 0.11, "On them it goes from 4 to 4.2 nats per semantic token over 8 clips, a change of 0.2 with a standard error of 0.11, which does not show"),
        (4.2, 50, 0.05, "**On them it is worse than its base: 4 to 4.2 nats per semantic token over 50 clips"),
        (4.0, 50, 0.0, "On them it goes from 4 to 4 nats per semantic token over 50 clips, a change of 0 with a standard error of 0, which does not"),
    ],
)  # fmt: skip
def test_which_is_better_is_said_where_it_shows(after, num_clips, error, verdict):
    from indextts2_hf.cards import compare_with_base

    figures = {"semantic_cross_entropy_per_token": after, "num_clips": num_clips}
    if error is not None:
        figures["standard_error_of_change_per_token"] = error
    assert compare_with_base({"semantic_cross_entropy_per_token": 4.0}, figures, "them").startswith(verdict)


def test_the_standard_error_by_hand(short_run, tiny_checkpoint, style_features):
    """Of the change of each clip, one clip at a time, with the adapter and without."""
    from torch.nn.functional import cross_entropy

    clips = load_features(style_features, "train")
    dataset = T2SDataset(load_features(style_features, "validation"), 0, 0.3, True, prompts=clips)
    t2s = load_t2s(tiny_checkpoint)
    t2s.load_adapter(str(short_run / "last"))
    losses = []
    for row in range(len(dataset)):
        batch = collate_t2s([dataset[row, row]])
        targets = torch.cat([batch["labels"], torch.tensor([[t2s.config.semantic_stop_token_id]])], dim=1)
        batch.pop("ids"), batch.pop("speaker_numbers"), batch.pop("emotion_numbers")
        for switch in (t2s.disable_adapters, t2s.enable_adapters):
            switch()
            with torch.no_grad():
                losses.append(float(cross_entropy(t2s(**batch).logits[0], targets[0])))
    base, adapted = np.array(losses[::2]), np.array(losses[1::2])
    first, _, last = read_log(short_run, "eval/")
    assert first[FIGURE] == pytest.approx(base.mean(), rel=1e-5)
    assert last[FIGURE] == pytest.approx(adapted.mean(), rel=1e-5)
    error = np.std(adapted - base, ddof=1) / len(base) ** 0.5
    assert last["eval/standard_error_of_change_per_token"] == pytest.approx(error, rel=1e-2)


def test_replayed_clips_are_chosen_by_the_draw(style_features, tiny_features):
    from train_emotion_lora import WithReplay

    style, replay = (
        T2SDataset(load_features(folder, "train"), 0, with_emotion=True) for folder in (style_features, tiny_features)
    )
    mixed = WithReplay(style, replay, share=0.25, seed=0)
    assert len(mixed) == len(style)
    is_replayed = []
    for draw in range(100):
        index = draw % len(mixed)
        example = mixed[index, draw]
        assert torch.equal(example["semantic_ids"], mixed[index, draw]["semantic_ids"])
        is_replayed.append(example["semantic_ids"].max() >= len(STYLE))
        if not is_replayed[-1]:
            assert torch.equal(example["semantic_ids"], style[index, draw]["semantic_ids"])
    assert 0.15 < sum(is_replayed) / 100 < 0.35


@pytest.mark.lora
def test_one_emotion_of_a_folder(options, tmp_path):
    said = run_program("train_emotion_lora", "--output", tmp_path / "run", *options, "--emotion", "happy")
    # Half of the clips; each speaker holds out one of them, whose prompts are training clips.
    assert "in 6 rows of 3 speakers" in said
    assert "| data | " in (card := (tmp_path / "run/README.md").read_text()) and ", emotion happy |" in card


# --- what it does --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def sample_codes(t2s, features, num_rows=12):
    """Codes of every text, sampled at a free length with one seed."""
    dataset = T2SDataset(load_features(features, "train"), 0, with_emotion=True)
    batch = collate_t2s([dataset[index, index] for index in range(num_rows)])
    torch.manual_seed(3)
    return t2s.eval().generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        speaker_latents=t2s.encode_speaker(batch["speaker_features"], batch["speaker_feature_lengths"]),
        emotion_embeds=t2s.encode_emotion(batch["emotion_features"], batch["emotion_feature_lengths"]),
    )


def share_of_style(codes):
    is_code = codes < 64
    return float(((codes < len(STYLE)) & is_code).sum() / is_code.sum())


@pytest.mark.lora
def test_the_output_moves_towards_the_style(adapter, t2s, tiny_features):
    before, *_, after = read_log(adapter, "eval/")
    gain = before[FIGURE] - after[FIGURE]
    others = FIGURE.replace("/", "/replay_")
    assert gain > 0.5, "held-out clips of the style are not more likely"
    assert gain - (before[others] - after[others]) > 0.5, "other clips gained as much"

    base = sample_codes(t2s, tiny_features)
    t2s.load_adapter(str(adapter), adapter_name="style")
    adapted = sample_codes(t2s, tiny_features)
    assert share_of_style(adapted) > share_of_style(base) + 0.3
    t2s.disable_adapters()
    assert torch.equal(sample_codes(t2s, tiny_features), base)
    t2s.enable_adapters()
    assert torch.equal(sample_codes(t2s, tiny_features), adapted)


SHAPES = [
    (rows, text, codes, frames)
    for rows in (1, 2, 3, 5)
    for text in (1, 7)
    for codes in (1, 8, 33)
    for frames in (3, 64)
]


def all_logits(t2s):
    """Logits over many shapes, with frozen and with living weights alike."""
    logits = []
    for number, (rows, text, codes, frames) in enumerate(SHAPES):
        generator = torch.Generator().manual_seed(number)
        batch = {
            "input_ids": torch.randint(2, 900, (rows, text), generator=generator),
            "speaker_features": torch.randn(rows, frames, 24, generator=generator),
            "speaker_feature_lengths": torch.randint(3, frames + 1, (rows,), generator=generator),
            "emotion_features": torch.randn(rows, frames, 24, generator=generator),
            "labels": torch.randint(0, 64, (rows, codes), generator=generator),
        }
        output = t2s(**batch)
        logits += [output.logits.detach(), output.text_logits.detach()]
    return logits


@pytest.mark.lora
@pytest.mark.parametrize("with_gradient", [False, True])
def test_disabled_it_is_the_base_bit_for_bit(with_gradient, t2s, tiny_checkpoint, tmp_path):
    make_adapter(tiny_checkpoint, tmp_path / "one")
    with torch.set_grad_enabled(with_gradient):
        base = all_logits(t2s)
        t2s.load_adapter(str(tmp_path / "one"))
        adapted = all_logits(t2s)
        assert not any(torch.equal(one, other) for one, other in zip(base, adapted, strict=True))
        t2s.disable_adapters()
        disabled = all_logits(t2s)
        assert all(torch.equal(one, other) for one, other in zip(base, disabled, strict=True))
        # The base, as another process would load it.
        fresh = all_logits(load_t2s(tiny_checkpoint))
        assert all(torch.equal(one, other) for one, other in zip(fresh, disabled, strict=True))


@pytest.mark.lora
def test_disabled_it_gives_the_tokens_and_the_audio_of_the_base(adapter, pipe):
    def speak(pipeline, **settings):
        inputs = pipeline.preprocess(["Hello there.", "Well."])
        return pipeline.model.generate(**inputs, seed=5, max_new_tokens=20, num_inference_steps=2, **settings)

    adapted = IndexTTS2TextToAudioPipeline.from_pretrained(adapter)
    for settings in ({"num_beams": 1}, {"do_sample": False, "num_beams": 2}, {"segment_batch_size": 1}):
        base, style = speak(pipe, **settings), speak(adapted, **settings)
        assert not any(map(torch.equal, base.audio, style.audio))
        adapted.model.t2s.disable_adapters()
        disabled = speak(adapted, **settings)
        adapted.model.t2s.enable_adapters()
        assert all(map(torch.equal, base.audio, disabled.audio))
        for ours, theirs in zip(base.semantic_ids, disabled.semantic_ids, strict=True):
            assert all(map(torch.equal, ours, theirs))


@torch.no_grad()
@pytest.mark.lora
def test_several_adapters_on_one_base(t2s, tiny_checkpoint, style_features, tmp_path):
    happy, sad = (
        str(make_adapter(tiny_checkpoint, tmp_path / name, seed)) for seed, name in enumerate(["happy", "sad"])
    )
    batch = first_batch(style_features)
    alone = {}
    for name, folder in (("happy", happy), ("sad", sad)):
        single = load_t2s(tiny_checkpoint)
        single.load_adapter(folder, adapter_name=name)
        alone[name] = single(**batch).logits
    t2s.load_adapter(happy, adapter_name="happy")
    t2s.load_adapter(sad, adapter_name="sad")
    for name in ("sad", "happy", "sad"):
        t2s.set_adapter(name)
        assert t2s.active_adapters() == [name] and torch.equal(t2s(**batch).logits, alone[name])
    t2s.set_adapter(["happy", "sad"])
    both = t2s(**batch).logits
    assert not torch.allclose(both, alone["happy"], atol=0.1) and not torch.allclose(both, alone["sad"], atol=0.1)

    # In the place of another, with the same settings; the other one stays.
    t2s.load_adapter(sad, adapter_name="happy", hotswap=True)
    for name in ("happy", "sad"):
        t2s.set_adapter(name)
        assert torch.equal(t2s(**batch).logits, alone["sad"])
    t2s.load_adapter(happy, adapter_name="happy", hotswap=True)
    t2s.set_adapter("happy")
    assert torch.equal(t2s(**batch).logits, alone["happy"])


# --- wrong input ---------------------------------------------------------------------------------------------------------


def drop_fingerprint(folder):
    """As an adapter is that was made by PEFT alone."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"auto_mapping": None}))


@pytest.fixture
def other_base(tiny_checkpoint, tmp_path):
    """`other_base(seed=…, num_hidden_layers=…)`: an adapter folder for a base with other weights or sizes."""
    from conftest import make_tiny_t2s, randomize

    def make(seed=0, **sizes):
        t2s = make_tiny_t2s(**sizes)
        if seed:
            randomize(t2s, seed)
        t2s.name_or_path = "somebody/other"
        t2s.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=LORA_TARGET_MODULES, fan_in_fan_out=True))
        t2s.save_pretrained(tmp_path / "other")
        return tmp_path / "other"

    return make


@pytest.mark.lora
@pytest.mark.parametrize("changes", [{"seed": 7}, {"hidden_size": 64}, {"num_hidden_layers": 3}])
def test_an_adapter_of_another_base(changes, other_base, t2s, tiny_checkpoint, style_features, tmp_path, capsys):
    folder = other_base(**changes)
    make_adapter(tiny_checkpoint, tmp_path / "own")
    t2s.load_adapter(str(tmp_path / "own"), adapter_name="own")
    batch = first_batch(style_features)
    before = t2s(**batch).logits
    message = (
        rf"was made for 'somebody/other' \(weights \w+-\w+\), but '{tiny_checkpoint}' \(weights 2x32-\w+\) is loaded"
    )
    for arguments in ({"adapter_name": "new"}, {"adapter_name": "own", "hotswap": True}):
        with pytest.raises(ValueError, match=message):
            t2s.load_adapter(str(folder), **arguments)
    # Nothing of it stays.
    assert list(t2s.peft_config) == t2s.active_adapters() == ["own"]
    assert torch.equal(t2s(**batch).logits, before)

    # The same through the other doors.
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": str(tiny_checkpoint)})
    )
    with pytest.raises(ValueError, match=r"was made for .* \(weights"):
        IndexTTS2TextToAudioPipeline.from_pretrained(folder)
    assert command_line(["speak", "Hello.", "--model", str(folder), "-o", str(tmp_path / "a.wav")]) != 0
    assert f"The adapter '{folder}' cannot be used: The adapter '{folder}' was made for" in capsys.readouterr().err


@pytest.mark.lora
@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"num_hidden_layers": 1}])
def test_an_adapter_of_other_sizes_that_does_not_say_its_base(changes, other_base, t2s, style_features, tmp_path):
    folder = other_base(**changes)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"auto_mapping": None}))
    batch = first_batch(style_features)
    before = t2s(**batch).logits
    with pytest.raises(ValueError, match="made for 'somebody/other', is damaged or does not fit"):
        t2s.load_adapter(str(folder))
    assert not hasattr(t2s, "peft_config") and torch.equal(t2s(**batch).logits, before)


@torch.no_grad()
@pytest.mark.lora
def test_a_base_that_was_trained_a_little_further_is_another(t2s, tiny_checkpoint):
    fingerprints = {t2s.to(dtype).fingerprint for dtype in (torch.bfloat16, torch.float16)}
    t2s = load_t2s(tiny_checkpoint)
    fingerprints.add(t2s.fingerprint)
    t2s.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, fan_in_fan_out=True))
    fingerprints.add(t2s.fingerprint)
    assert len(fingerprints) == 1
    further = load_t2s(tiny_checkpoint)
    for parameter in further.model.parameters():
        parameter.add_(0.01 * parameter.std(correction=0) * torch.randn(parameter.shape))
    assert further.fingerprint not in fingerprints


@pytest.mark.lora
def test_a_damaged_adapter(t2s, tiny_checkpoint, style_features, tmp_path):
    own, damaged = (make_adapter(tiny_checkpoint, tmp_path / name) for name in ("own", "damaged"))
    t2s.load_adapter(str(own), adapter_name="own")
    batch = first_batch(style_features)
    before = t2s(**batch).logits
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is damaged or does not fit"):
        t2s.load_adapter(str(damaged), adapter_name="new")
    weights.unlink()
    with pytest.raises(OSError, match="adapter_model"):
        t2s.load_adapter(str(damaged), adapter_name="new")
    assert list(t2s.peft_config) == t2s.active_adapters() == ["own"]
    assert torch.equal(t2s(**batch).logits, before)


@pytest.mark.lora
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 16}, "lora_alpha 16 .now 8."),
        ({"r": 8}, "r 8 .now 4."),
        ({"target_modules": ["c_attn"]}, r"target_modules \['c_attn'\]"),
    ],
)
def test_a_swap_keeps_the_settings(settings, message, t2s, tiny_checkpoint, style_features, tmp_path):
    own, other = (
        make_adapter(tiny_checkpoint, tmp_path / "own"),
        make_adapter(tiny_checkpoint, tmp_path / "other", **settings),
    )
    t2s.load_adapter(str(own), adapter_name="style")
    batch = first_batch(style_features)
    before = t2s(**batch).logits
    with pytest.raises(ValueError, match=f"cannot take the place of 'style', from which it differs in {message}"):
        t2s.load_adapter(str(other), adapter_name="style", hotswap=True)
    assert torch.equal(t2s(**batch).logits, before)


@pytest.mark.lora
def test_an_adapter_whose_base_is_not_there(tiny_checkpoint, tmp_path, capsys):
    folder = make_adapter(tiny_checkpoint, tmp_path / "style")
    assert command_line(["info", str(folder)]) != 0
    assert f"is an adapter of '{tiny_checkpoint}'" in capsys.readouterr().err
    settings = json.loads((folder / "adapter_config.json").read_text())
    for base, message in (
        (
            "/no/such/base",
            "is for the base '/no/such/base', which is no folder here or beside it and could not be had",
        ),
        ("runs/base", "is for the base 'runs/base', which is no folder here or beside it and could not be had"),
        ("", "does not say what its base is"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))
        with pytest.raises(ValueError, match=message):
            IndexTTS2ForTextToWaveform.from_pretrained(folder, local_files_only=True)


def name_base(folder, base):
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": base}))


def read_base(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


@pytest.mark.lora
def test_the_base_is_named_by_what_lasts(tiny_checkpoint, tmp_path, monkeypatch):
    """A folder by its whole path, however it was named; the checkpoint of the package by `tiny`."""
    monkeypatch.chdir(tiny_checkpoint.parent)
    relative = tiny_checkpoint.name
    alone = load_t2s(relative)
    composite = IndexTTS2ForTextToWaveform.from_pretrained(relative).t2s
    embedded = load_t2s(str(embedded_checkpoint()))
    expected = {"alone": str(tiny_checkpoint), "composite": str(tiny_checkpoint), "embedded": "tiny"}
    for name, t2s in {"alone": alone, "composite": composite, "embedded": embedded}.items():
        t2s.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGET_MODULES, fan_in_fan_out=True))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT warns where it asked the Hub for the base in vain
            t2s.save_pretrained(tmp_path / name)
        assert read_base(tmp_path / name) == expected[name]
    monkeypatch.chdir(tmp_path)
    assert IndexTTS2ForTextToWaveform.from_pretrained("alone").config.name_or_path == str(tiny_checkpoint)
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained("embedded")
    assert pipe.model.config.name_or_path == str(embedded_checkpoint())
    assert len(pipe("Hello there.", duration_s=1.0)["audio"]) == pipe.model.config.sampling_rate
    # An old one, whose path was relative, names its base anew when it is saved again.
    monkeypatch.chdir(tiny_checkpoint.parent)
    name_base(tmp_path / "alone", relative)
    t2s = IndexTTS2ForTextToWaveform.from_pretrained(tmp_path / "alone").t2s
    t2s.save_pretrained(tmp_path / "again")
    assert read_base(tmp_path / "again") == str(tiny_checkpoint)


@pytest.mark.lora
def test_the_base_of_a_repository_is_that_commit(tiny_checkpoint, tmp_path):
    from test_hub_round_trip import put_into_cache

    put_into_cache(tiny_checkpoint, "someone/base", tmp_path / "cache")
    cache = {"cache_dir": tmp_path / "cache"}
    base = IndexTTS2TextToAudioPipeline.from_pretrained("someone/base", **cache)
    base.model.t2s.add_adapter(LoraConfig(r=4, target_modules=LORA_TARGET_MODULES, fan_in_fan_out=True))
    base.model.t2s.save_pretrained(tmp_path / "style")
    settings = json.loads((tmp_path / "style/adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("someone/base", "0" * 40)
    # Since then the repository has other weights.
    repository = tmp_path / "cache/models--someone--base"
    newer = shutil.copytree(repository / "snapshots" / ("0" * 40), repository / "snapshots" / ("1" * 40))
    (repository / "refs/main").write_text("1" * 40)
    (newer / "processor_config.json").unlink()
    path = newer / "t2s/model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(tmp_path / "style", **cache)
    assert pipe.model.config.name_or_path == "someone/base" and pipe.model.t2s.revision == "0" * 40
    # The adapter is new and changes nothing.
    assert np.array_equal(*(speaker("Hello.", seed=1, duration_s=0.4)["audio"] for speaker in (base, pipe)))


@pytest.mark.parametrize("named", ["/no/such/folder/tiny-random", "tiny-random", "models/tiny-random"])
@pytest.mark.lora
def test_a_base_that_was_moved_with_its_adapter(named, tiny_checkpoint, tmp_path):
    folder = make_adapter(tiny_checkpoint, tmp_path / "runs/style/last")
    name_base(folder, named)
    base = tmp_path / ("models" if named.startswith("models") else "runs") / "tiny-random"
    with pytest.raises(ValueError, match="which is no folder here or beside it"):
        IndexTTS2ForTextToWaveform.from_pretrained(folder, local_files_only=True)
    shutil.copytree(tiny_checkpoint, base)
    model = IndexTTS2ForTextToWaveform.from_pretrained(folder)
    assert model.config.name_or_path == str(base) and model.t2s.active_adapters() == ["default"]
    # What is found there must be what the adapter was made for.
    path = base / "t2s/model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"was made for .* \(weights .* is loaded. Load that base, or train"):
        IndexTTS2ForTextToWaveform.from_pretrained(folder)


@pytest.mark.lora
def test_the_base_named_beside_the_adapter(tiny_checkpoint, tmp_path, capsys):
    """The way out that the error names."""
    folder = make_adapter(tiny_checkpoint, tmp_path / "style")
    options = ["speak", "Hello.", "--seed", "1", "--duration-s", "0.4", "-o"]
    assert command_line([*options, str(tmp_path / "a.wav"), "--model", str(folder)]) == 0
    name_base(folder, "/no/such/base")
    assert command_line([*options, str(tmp_path / "b.wav"), "--model", str(folder)]) == 2
    errors = capsys.readouterr().err
    assert "which is no folder here or beside it" in errors and "--model BASE with --adapter" in errors
    model = ["--model", str(tiny_checkpoint), "--adapter", str(folder)]
    assert command_line([*options, str(tmp_path / "b.wav"), *model]) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert command_line([*options, str(tmp_path / "c.wav"), "--adapter", str(folder)]) == 2
    assert "was made for '/no/such/base' (weights" in capsys.readouterr().err
    assert not (tmp_path / "c.wav").exists()


@pytest.mark.lora
def test_no_path_of_this_machine_is_published(short_run, tiny_checkpoint, tmp_path):
    from indextts2_hf.hub import assemble_hub_folder

    with pytest.raises(ValueError, match="The base of this adapter is the folder .*--base-model"):
        assemble_hub_folder(short_run, tmp_path / "out", "someone/style")
    assemble_hub_folder(short_run, tmp_path / "named", "someone/style", base_model="someone/base")
    own = shutil.copytree(short_run, tmp_path / "own", ignore=shutil.ignore_patterns("README.md"))
    for name, folder in {"own-card": short_run, "new-card": own}.items():
        # The checkpoint of the package has a name everywhere.
        folder = shutil.copytree(folder, tmp_path / "sources" / name)
        name_base(folder, "tiny")
        assemble_hub_folder(folder, tmp_path / name, "someone/style")
        assert read_base(tmp_path / name) == "tiny"
        card = ModelCard.load(tmp_path / name / "README.md")
        assert "| base | `tiny` |" in card.text and "base_model" not in card.data.to_dict()
    assert read_base(tmp_path / "named") == "someone/base"
    for name in ("named", "own-card", "new-card"):
        for path in (tmp_path / name).iterdir():
            assert not any(part in path.read_bytes() for part in (b"/tmp", bytes(tiny_checkpoint.parent))), path


@pytest.mark.lora
def test_a_model_with_an_adapter_is_not_saved_in_the_place_of_its_base(short_run, tmp_path):
    model = IndexTTS2ForTextToWaveform.from_pretrained(short_run)
    with pytest.raises(ValueError, match=r"has the adapters \['default'\], which would be saved in its place"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    model.t2s.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["auto_mapping"]["base_fingerprint"]


def test_wrong_clips(options, tiny_features, tmp_path):
    out = ["--output", tmp_path / "run", *options]
    said = run_to_error("train_emotion_lora", *out, "--emotion", "angry")
    assert "--emotion is 'angry', but the clips in" in said and "have the labels happy, sad" in said
    lonely = change_rows(tiny_features, tmp_path / "lonely", lambda row: row | {"speaker": row["clip"]})
    assert "No speaker of the training split has two clips" in run_to_error(
        "train_emotion_lora", *out, "--data", lonely
    )

    def rename_held_out(row):
        return row | {"speaker": row["clip"] if row["clip"][-1] in "45" else row["speaker"]}

    alone = change_rows(tiny_features, tmp_path / "alone", rename_held_out)
    said = run_to_error("train_emotion_lora", *out, "--data", alone)
    assert "None of the 6 held-out clips has another clip of its speaker" in said


@pytest.mark.lora
def test_a_loss_that_is_no_number_keeps_the_last_good_adapter(options, style_features, tmp_path):
    def spoil(row):
        return row | {"semantic_features": (np.array(row["semantic_features"]) * np.nan).tolist()}

    out, spoilt = tmp_path / "run", change_rows(style_features, tmp_path / "spoilt", spoil)
    options = ["--output", out, *options, "--max_train_steps", 200, "--eval_steps", 1, "--save_steps", 2]
    run_killed("train_emotion_lora", *options, after=out / "state" / "step-00000002")
    before = (out / "adapter_model.safetensors").read_bytes()
    said = run_to_error("train_emotion_lora", *options, "--data", spoilt, "--resume")
    assert "The loss is nan at step" in said and "in the batch of speaker" in said
    assert (out / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.lora
def test_wrong_folders(options, tiny_checkpoint, adapter, tmp_path):
    output = shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    said = run_to_error("train_emotion_lora", "--output", output, *options)
    assert "holds a checkpoint, but an adapter has a folder of its own" in said
    assert not (output / "log.jsonl").exists()
    said = run_to_error("train_emotion_lora", "--output", tmp_path / "run", *options, "--model", adapter)
    assert "is no checkpoint: it has no config.json" in said
    said = run_to_error("train_emotion_lora", "--output", tmp_path / "run", *options, "--replay_share", 1)
    assert "--replay_share is 1.0, but it must be at least 0 and below 1" in said


@pytest.mark.lora
def test_resuming_on_another_base(options, short_run, tiny_checkpoint, tmp_path):
    out = shutil.copytree(short_run, tmp_path / "run")
    other = shutil.copytree(tiny_checkpoint, tmp_path / "other")
    path = other / "t2s" / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    options = [*options, "--eval_steps", 2, "--model", other, "--resume"]
    said = run_to_error("train_emotion_lora", "--output", out, *options)
    assert f"was begun with other weights than --model {other} has" in said
