"""The stages of the text-to-semantic training: what is trained, what is reported, and that what is saved speaks."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import Dataset, load_from_disk

from data import Alignments, T2SDataset, collate_t2s, feature_columns, load_features
from indextts2_hf import IndexTTS2Processor, IndexTTS2T2SForConditionalGeneration, IndexTTS2TextToAudioPipeline
from programs import TRAINING, read_log, run_killed, run_program, run_ranks, run_to_error


@pytest.fixture
def options(tiny_checkpoint, tiny_features):
    """A run of four steps without dropout, whose every figure is logged."""
    return [
        *("--model", tiny_checkpoint, "--data", tiny_features, "--max_train_steps", 4, "--batch_size", 2),
        *("--warmup_steps", 1, "--num_workers", 0, "--log_steps", 1, "--dropout", 0),
    ]


def load_t2s(folder):
    return IndexTTS2T2SForConditionalGeneration.from_pretrained(folder, subfolder="t2s")


def changed_parts(old, new) -> set[str]:
    """Top-level modules with a weight that is not what it was."""
    weights = old.state_dict()
    return {key.split(".")[0] for key, value in new.state_dict().items() if not torch.equal(value, weights[key])}


# --- the stages ----------------------------------------------------------------------------------------------------------


TRUNK = {"model", "slot_embedding", "text_embedding", "text_position_embedding", "semantic_embedding", "text_head"}
TRUNK |= {"semantic_position_embedding", "semantic_head"}
SPEAKER_PATH = {"speaker_conformer", "speaker_perceiver"}
EMOTION_PATH = {"emotion_conformer", "emotion_perceiver", "emotion_in_proj", "emotion_out_proj"}


def test_stage_one_as_a_program_of_its_own(options, tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, TRAINING / "train_t2s.py", "--stage", "1", "--output", out, *options]
    result = subprocess.run([str(item) for item in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "trainable parameters" in result.stderr and "s of speech a step" in result.stderr

    # What is saved speaks, the best and the last.
    for folder in (out, out / "last"):
        pipe = IndexTTS2TextToAudioPipeline.from_pretrained(folder)
        assert len(pipe("Hello.", duration_s=0.4, seed=1)["audio"]) == round(0.4 * 22050)

    # The emotion path is left out: what it would give is zero.
    last = load_t2s(out / "last")
    assert (
        last.config.attn_pdrop == 0
        and "attn_pdrop" not in (out / "last" / "t2s" / "generation_config.json").read_text()
    )
    assert changed_parts(load_t2s(tiny_checkpoint), last) == TRUNK | SPEAKER_PATH | {"emotion_out_proj"}
    assert not last.encode_emotion(torch.randn(1, 9, 24)).any()

    rows = read_log(out, "train/")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = {"loss", "gradient_norm", "learning_rate", "semantic_cross_entropy_per_token"}
    names |= {"text_cross_entropy_per_token", "token_accuracy"}
    assert {key.removeprefix("train/") for key in rows[0]} == names | {"step"}
    assert [row["step"] for row in read_log(out, "eval/")] == [0, 4]


def test_stage_two_trains_the_emotion_path_against_a_speaker_classifier(options, tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    said = run_program("train_t2s", "--stage", 2, "--output", out, *options, "--learning_rate", 1e-3)
    last = load_t2s(out / "last")
    assert changed_parts(load_t2s(tiny_checkpoint), last) == TRUNK | EMOTION_PATH | {"emotion_prototypes"}
    row = read_log(out, "train/")[-1]
    assert 0 <= row["train/speaker_accuracy"] <= 1
    loss = row["train/semantic_cross_entropy_per_token"] + 0.01 * row["train/text_cross_entropy_per_token"]
    assert row["train/loss"] == pytest.approx(loss + 0.1 * row["train/speaker_cross_entropy_per_clip"], rel=1e-5)
    # The clips are happy or sad: these two weights have an effect of their own now.
    assert "Emotion weights know happy, sad." in said


def test_stage_three_freezes_the_conditioners(options, tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    run_program("train_t2s", "--stage", 3, "--output", out, *options)
    assert changed_parts(load_t2s(tiny_checkpoint), load_t2s(out / "last")) == TRUNK | {"emotion_prototypes"}


def test_the_gradient_reversal_hides_the_speaker():
    from train_t2s import SpeakerClassifier

    torch.manual_seed(0)
    voices = torch.randn(4, 8)

    def train(classifier, path, path_rate, num_steps) -> float:
        groups = [{"params": classifier.parameters()}, {"params": path.parameters(), "lr": path_rate}]
        optimizer = torch.optim.AdamW(groups, lr=3e-3)
        accuracies = []
        for _ in range(num_steps):
            speakers = torch.randint(4, (64,))
            features = torch.cat([torch.randn(64, 8), voices[speakers]], dim=1)
            loss, accuracy = classifier(path(features), speakers)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            accuracies.append(accuracy.item())
        return sum(accuracies[-50:]) / 50

    # From features that tell the speaker to an "emotion vector", before and after training against the classifier.
    path = torch.nn.Linear(16, 8)
    accuracies = []
    for is_trained in (False, True):
        if is_trained:
            # The classifier ten times as fast as the vector, as in the program.
            train(SpeakerClassifier(8, 32, 4), path, 3e-4, 800)
        accuracies.append(train(SpeakerClassifier(8, 32, 4), path, 0.0, 300))
    assert accuracies[0] > 0.9
    assert accuracies[1] < 0.55, "a new classifier still finds the speaker"


def test_the_reversed_term_is_bounded():
    from train_t2s import SpeakerClassifier

    torch.manual_seed(0)
    classifier = SpeakerClassifier(8, 32, 4)
    torch.nn.init.normal_(classifier.out_proj.weight, std=10.0)
    embeds = torch.randn(1, 8).repeat(4, 1).requires_grad_()
    losses = -classifier.classify(embeds[:1]).log_softmax(dim=1)[0].detach()
    is_found = losses < 2 * math.log(4)
    assert is_found.any() and not is_found.all()
    # The same vector as that of each of the four speakers: it is pushed by those who are found, away from them.
    loss, _ = classifier(embeds, torch.arange(4))
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, embeds)
    assert torch.equal(gradient.abs().sum(dim=1) > 0, is_found)
    plain = torch.nn.functional.cross_entropy(classifier.classify(embeds), torch.arange(4))
    torch.testing.assert_close(gradient[is_found], -torch.autograd.grad(plain, embeds)[0][is_found])


@pytest.mark.parametrize("stage", [2, 3])
def test_the_states_learn_to_tell_the_emotion(options, tmp_path, stage):
    arguments = [
        "--stage",
        stage,
        *options,
        "--max_train_steps",
        80,
        "--learning_rate",
        3e-3,
        "--speaker_loss_weight",
        0,
    ]
    run_program("train_t2s", "--output", tmp_path / "run", *arguments, "--emotion_loss_weight", 0.5)
    rows = read_log(tmp_path / "run", "train/")
    loss = rows[0]["train/semantic_cross_entropy_per_token"] + 0.01 * rows[0]["train/text_cross_entropy_per_token"]
    losses = [row["train/emotion_cross_entropy_per_token"] for row in rows]
    assert rows[0]["train/loss"] == pytest.approx(loss + 0.5 * losses[0], rel=1e-5)
    # Happy or sad, half of each: 0.69 without knowing.
    assert losses[0] > 0.5 and sum(losses[-10:]) / 10 < 0.45

    # The head is thrown away: a checkpoint has the same weights with and without.
    run_program("train_t2s", "--output", tmp_path / "plain", *arguments, "--max_train_steps", 1)
    assert "train/emotion_cross_entropy_per_token" not in read_log(tmp_path / "plain", "train/")[0]
    assert load_t2s(tmp_path / "run").state_dict().keys() == load_t2s(tmp_path / "plain").state_dict().keys()


def test_the_terms_of_the_states_are_of_tokens_whose_name_is_known():
    from train_t2s import StateHead

    torch.manual_seed(0)
    head = StateHead(8, 3)
    states = torch.randn(3, 5, 8, requires_grad=True)
    labels = torch.tensor([[1, 1, 1, 1], [1, 1, -100, -100], [1, 1, 1, 1]])
    targets = torch.tensor([[2, 1, -100, 1], [0, 0, 0, 0], [-100, -100, -100, -100]])
    loss = head(states, labels, targets)
    log_probs = head.out_proj(states).log_softmax(dim=-1)
    first = log_probs[0, 0, 2] + log_probs[0, 1, 1] + log_probs[0, 3, 1]
    torch.testing.assert_close(loss, -(first / 4 + log_probs[1, :2, 0].mean()) / 3)
    (gradient,) = torch.autograd.grad(loss, states)
    is_taught = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]).bool()
    assert torch.equal(gradient.abs().sum(dim=-1) > 0, is_taught)


@pytest.fixture
def aligned(tiny_features, tmp_path):
    """A folder with an alignment for each clip: its words share out its time."""
    folder = tmp_path / "aligned"
    for row in load_features(tiny_features, "train"):
        num_words = len(row["text"].split())
        times = [row["duration_s"].item() * number / num_words for number in range(num_words + 1)]
        path = (folder / row["clip"]).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"word_begins_s": times[:-1], "word_ends_s": times[1:]}))
    return folder


def test_the_states_learn_to_tell_the_piece_that_is_spoken(options, aligned, tmp_path):
    arguments = ["--stage", 1, *options, "--max_train_steps", 80, "--learning_rate", 3e-3, "--alignments", aligned]
    arguments += ["--guided_attention_weight", 0, "--piece_loss_weight", 0.5]
    run_program("train_t2s", "--output", tmp_path / "run", *arguments)
    rows = read_log(tmp_path / "run", "train/")
    loss = rows[0]["train/semantic_cross_entropy_per_token"] + 0.01 * rows[0]["train/text_cross_entropy_per_token"]
    losses = [row["train/piece_cross_entropy_per_token"] for row in rows]
    assert rows[0]["train/loss"] == pytest.approx(loss + 0.5 * losses[0], rel=1e-5)
    assert sum(losses[-10:]) / 10 < 0.5 * losses[0]


def test_attention_is_guided(options, aligned, tiny_features, tmp_path):
    from train_t2s import GuidedAttention

    out, plain = tmp_path / "run", tmp_path / "plain"
    arguments = ["--stage", 1, *options, "--max_train_steps", 40, "--learning_rate", 3e-3]
    run_program("train_t2s", "--output", out, *arguments, "--alignments", aligned, "--guided_attention_weight", 2)
    run_program("train_t2s", "--output", plain, *arguments)
    row = read_log(out, "train/")[0]
    loss = row["train/semantic_cross_entropy_per_token"] + 0.01 * row["train/text_cross_entropy_per_token"]
    assert row["train/loss"] == pytest.approx(loss + 2 * row["train/guided_attention_cross_entropy"], rel=1e-5)

    # Against the attention of transformers itself: after guidance more of it lies on what is spoken.
    tokenizer = IndexTTS2Processor.from_pretrained(out).tokenizer
    rate = load_t2s(out).config.semantic_token_rate
    dataset = T2SDataset(load_features(tiny_features, "train"), 0, alignments=Alignments(aligned, tokenizer, rate))
    batch = collate_t2s([dataset[index, index] for index in range(len(dataset))])
    batch.pop("ids"), batch.pop("speaker_numbers"), batch.pop("emotion_numbers")
    positions = batch.pop("text_positions")
    assert (positions >= 0).any()
    means = {}
    for folder in (out / "last", plain / "last"):
        t2s = load_t2s(folder).train()
        t2s.set_attn_implementation("eager")
        for module in t2s.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        guided = GuidedAttention(t2s)
        attentions = t2s(**batch, use_cache=False, output_attentions=True).attentions
        counts = batch["attention_mask"].sum(dim=1)
        start = attentions[0].shape[-1] - positions.shape[1] - 1
        logs = [
            -attention[row, 0, start + step, start - 1 - counts[row] + positions[row, step]].log()
            for attention in attentions[1:]
            for row, step in (positions >= 0).nonzero().tolist()
        ]
        means[folder] = torch.stack(logs).mean()
        torch.testing.assert_close(guided.loss(batch["attention_mask"], positions), means[folder])
    assert means[out / "last"] < means[plain / "last"] - 0.5


def test_no_alignments(options, tmp_path):
    said = run_to_error("train_t2s", "--stage", 1, "--output", tmp_path / "run", *options, "--alignments", tmp_path)
    assert "has a JSON file there" in said and "prepare_dataset.py" in said


def test_the_prototypes_are_the_means_of_each_speakers_clips(tiny_checkpoint, tiny_features):
    from train_t2s import store_emotion_prototypes

    dataset = T2SDataset(load_features(tiny_features, "train"), seed=0, with_emotion=True)
    t2s = load_t2s(tiny_checkpoint)
    before = t2s.emotion_prototypes.emotion_embeds.clone()
    assert store_emotion_prototypes(t2s, dataset) == ["happy", "sad"]
    clips = [row for row in range(len(dataset.clips)) if dataset.emotions[row] == "happy"]
    first_speaker = [row for row in clips if dataset.speakers[row] == dataset.speakers[clips[0]]]
    embeds = [
        t2s.encode_emotion(torch.tensor(dataset.features[row]["semantic_features"]).float()[None])[0]
        for row in first_speaker
    ]
    torch.testing.assert_close(t2s.emotion_prototypes.emotion_embeds[0], torch.stack(embeds).mean(dim=0))
    # The other six emotions keep theirs: counts are 1, 2, 1, 2, 1, 1, 1, 3.
    assert torch.equal(t2s.emotion_prototypes.emotion_embeds[1:3], before[1:3])
    assert torch.equal(t2s.emotion_prototypes.emotion_embeds[4:], before[4:])
    assert not torch.equal(t2s.emotion_prototypes.emotion_embeds[3], before[3])


# --- the length ----------------------------------------------------------------------------------------------------------


def test_the_natural_length_of_a_text_is_fitted(monkeypatch):
    """12 tokens and 5 for each piece of the text, with noise; clips at another tempo do not count."""
    monkeypatch.syspath_prepend(TRAINING)
    from train_t2s import MIN_CLIPS_OF_FIT, fit_natural_length

    generator = np.random.default_rng(0)
    rows = []
    for number in range(2 * MIN_CLIPS_OF_FIT):
        length, speed = int(generator.integers(3, 40)), (1.0, 0.5)[number % 2]
        num_tokens = round((12 + 5 * length + generator.normal(0, 3)) / speed)
        row = {"clip": f"{number}", "speaker": "anna", "speed": speed, "input_ids": [2] * length}
        rows.append(row | {"num_semantic_tokens": num_tokens, "semantic_ids": [0] * num_tokens})
    fit = fit_natural_length(T2SDataset(make_rows(rows), seed=0))
    assert fit == [pytest.approx(12, abs=1.5), pytest.approx(5, abs=0.1)]
    # Too few clips say nothing.
    assert fit_natural_length(T2SDataset(make_rows(rows[2:]), seed=0)) is None


def make_rows(rows: list[dict]) -> Dataset:
    """A table of features from some of their columns; the others are empty."""
    empty = {"emotion": None, "language": None, "text": "", "duration_s": 1.0, "speaker_embeds": [0.0]}
    empty |= {"semantic_features": np.zeros((1, 4), np.float16), "mel": np.zeros((1, 8), np.float16)}
    return Dataset.from_list([empty | row for row in rows], features=feature_columns(4, 8)).with_format("numpy")


def test_the_length_is_told_in_seven_draws_of_ten(tiny_features):
    dataset = T2SDataset(load_features(tiny_features, "train"), seed=0)
    examples = [dataset[draw % len(dataset), draw] for draw in range(400)]
    assert 0.22 < sum(example["is_free"] for example in examples) / 400 < 0.38
    batch = collate_t2s(examples[:32])
    counts = (batch["labels"] >= 0).sum(dim=1)
    is_free = torch.tensor([example["is_free"] for example in examples[:32]])
    assert is_free.any() and torch.equal(batch["num_semantic_tokens"], counts.masked_fill(is_free, 0))


def test_the_length_is_told_loosely_in_training_and_exactly_in_evaluation(options, tmp_path):
    rows = {}
    # Far beyond the 200 tokens for which the model has positions.
    for jitter in (0, 1000):
        out = tmp_path / f"jitter{jitter}"
        options = [*options, "--max_train_steps", 1, "--free_length_probability", 0, "--length_jitter", jitter]
        run_program("train_t2s", "--stage", 1, "--output", out, *options)
        rows[jitter] = [read_log(out, prefix)[0] for prefix in ("eval/", "train/")]
    assert rows[0][0]["step"] == 0 and rows[0][0] == rows[1000][0]
    name = "train/semantic_cross_entropy_per_token"
    assert rows[0][1]["step"] == 1 and abs(rows[0][1][name] - rows[1000][1][name]) > 1e-4


@pytest.mark.parametrize("option", ["--wrong_history_probability", "--text_dropout_probability"])
def test_wrong_tokens_and_lost_texts_are_read_in_training_alone(options, tmp_path, option):
    rows = {}
    for probability in (0, 1):
        out = tmp_path / f"run{probability}"
        run_program("train_t2s", "--stage", 1, "--output", out, *options, "--max_train_steps", 1, option, probability)
        rows[probability] = [read_log(out, prefix)[0] for prefix in ("eval/", "train/")]
    assert rows[0][0]["step"] == 0 and rows[0][0] == rows[1][0]
    name = "train/semantic_cross_entropy_per_token"
    assert rows[0][1]["step"] == 1 and abs(rows[0][1][name] - rows[1][1][name]) > 1e-4


# --- resuming, processes -------------------------------------------------------------------------------------------------


def test_killed_and_resumed_with_dropout_it_gives_the_same_numbers(options, tmp_path):
    options = ["--stage", 2, *options, "--dropout", 0.2, "--save_steps", 2, "--eval_steps", 2, "--max_train_steps", 6]
    run_program("train_t2s", "--output", tmp_path / "whole", *options)
    run_killed("train_t2s", "--output", tmp_path / "killed", *options, after=tmp_path / "killed/state/step-00000002")
    said = run_program("train_t2s", "--output", tmp_path / "killed", *options, "--resume")
    assert "Continuing" in said
    whole, killed = (read_log(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == 6 + 4 and whole == killed
    assert changed_parts(load_t2s(tmp_path / "whole/last"), load_t2s(tmp_path / "killed/last")) == set()
    assert changed_parts(load_t2s(tmp_path / "whole"), load_t2s(tmp_path / "killed")) == set()


def test_two_processes_or_two_batches_are_one_batch_twice_as_large(options, tmp_path):
    options = ["--stage", 2, *options]
    run_program("train_t2s", "--output", tmp_path / "one", *options, "--batch_size", 4)
    run_ranks("train_t2s", 2, "--output", tmp_path / "two", *options)
    run_program("train_t2s", "--output", tmp_path / "accumulated", *options, "--gradient_accumulation_steps", 2)
    one = read_log(tmp_path / "one")
    for name in ("two", "accumulated"):
        rows = read_log(tmp_path / name)
        assert len(rows) == len(one) == 6
        for row, expected in zip(rows, one, strict=True):
            assert row == pytest.approx(expected, rel=1e-4), name


# --- wrong input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "jitter, message", [(-1, "-1 is not at least 0"), (0.5, "invalid non_negative_int value: '0.5'")]
)
def test_impossible_length_jitter(options, tmp_path, monkeypatch, capsys, jitter, message):
    from train_t2s import parse

    command = ["train_t2s.py", "--stage", 1, "--output", tmp_path / "run", *options, "--length_jitter", jitter]
    monkeypatch.setattr(sys, "argv", [str(item) for item in command])
    with pytest.raises(SystemExit):
        parse()
    assert f"argument --length_jitter: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--wrong_history_probability", "--text_dropout_probability"])
def test_impossible_probability(options, tmp_path, monkeypatch, capsys, option):
    from train_t2s import parse

    command = ["train_t2s.py", "--stage", 1, "--output", tmp_path, *options, option, 1.5]
    monkeypatch.setattr(sys, "argv", [str(item) for item in command])
    with pytest.raises(SystemExit):
        parse()
    assert f"{option} is 1.5, but a probability is a number from 0 to 1" in capsys.readouterr().err


def test_terms_of_the_states_without_emotions_or_alignments(options, tiny_features, tmp_path, monkeypatch, capsys):
    from train_t2s import parse

    command = ["train_t2s.py", "--stage", 1, "--output", tmp_path / "run", *options, "--emotion_loss_weight", 0.1]
    monkeypatch.setattr(sys, "argv", [str(item) for item in command])
    with pytest.raises(SystemExit):
        parse()
    assert "--emotion_loss_weight needs stage 2 or 3: in stage 1 there is no emotion" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [str(item) for item in command[:-2]] + ["--piece_loss_weight", "0.1"])
    with pytest.raises(SystemExit):
        parse()
    assert "--piece_loss_weight needs --alignments, which say what is spoken when" in capsys.readouterr().err

    happy = [row for row, name in enumerate(load_features(tiny_features, "train")["emotion"]) if name == "happy"]
    features = copy_features(tiny_features, tmp_path / "features", happy, [0, 2])
    command[2] = 2
    said = run_to_error("train_t2s", *command[1:], "--data", features)
    assert "needs clips of at least two emotions" in said and "has happy" in said


def copy_features(source, folder, train_rows, held_out_rows, strangers=()):
    """These rows of the two splits; the held-out clips that are named have speakers of their own."""
    for split, rows in (("train", train_rows), ("validation", held_out_rows)):
        table = load_from_disk(source / split / "shard-00000").select(rows)
        rows = [row | {"speaker": row["clip"]} if row["clip"] in strangers else row for row in table.to_list()]
        type(table).from_list(rows, features=table.features).save_to_disk(folder / split / "shard-00000")
    shutil.copy(source / "features.json", folder)
    return folder


def test_one_held_out_clip_is_enough(options, tiny_features, tmp_path):
    features = copy_features(tiny_features, tmp_path / "features", range(12), [0, 2], ["speaker1/clip4"])
    out = tmp_path / "run"
    said = run_program("train_t2s", "--stage", 1, "--output", out, *options, "--data", features)
    assert "1 speakers of the held-out split have one clip alone, which has no prompt: left out." in said
    assert "of the training split" not in said
    assert [row["step"] for row in read_log(out, "eval/")] == [0, 4]


def test_no_pairs(options, tiny_features, tmp_path):
    options = ["--stage", 1, "--output", tmp_path / "run", *options]
    lonely = copy_features(tiny_features, tmp_path / "lonely", [0], [0])
    said = run_to_error("train_t2s", *options, "--data", lonely)
    assert "No speaker of the training split has two clips (1 speakers, 1 clips)" in said
    strange = copy_features(tiny_features, tmp_path / "strange", range(12), [0], ["speaker0/clip4"])
    said = run_to_error("train_t2s", *options, "--data", strange)
    assert "None of the 1 held-out clips has another clip of its speaker as a prompt" in said
