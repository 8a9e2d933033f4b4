"""The training of the recogniser: that it learns, alone; what it is given; and that what is saved chooses among candidates."""

import itertools
import json
import shutil

import pytest
import torch
from datasets import load_from_disk
from rapidfuzz.distance import Levenshtein

from data import load_features
from indextts2_hf import IndexTTS2T2SForConditionalGeneration, IndexTTS2TextToAudioPipeline
from programs import read_log, run_killed, run_program, run_ranks, run_to_error


NAME = "train_text_recognizer"


@pytest.fixture
def options(tiny_checkpoint, tiny_features):
    return [
        *("--model", tiny_checkpoint, "--data", tiny_features, "--max_train_steps", 6, "--batch_size", 4),
        *("--warmup_steps", 1, "--num_workers", 0, "--log_steps", 1, "--learning_rate", 1e-2),
    ]


def load_t2s(folder):
    return IndexTTS2T2SForConditionalGeneration.from_pretrained(folder, subfolder="t2s")


def test_it_learns_alone_and_chooses(options, tiny_checkpoint, tiny_features, tmp_path):
    out = tmp_path / "run"
    said = run_program(NAME, "--output", out, *options, "--size", 24)
    assert "trainable parameters" in said
    losses = [row["train/loss"] for row in read_log(out, "train/")]
    assert losses[-1] < 0.7 * losses[0]
    rows = read_log(out, "eval/")
    assert [row["step"] for row in rows] == [0, 6]
    assert rows[-1]["eval/loss_per_text_token"] < rows[0]["eval/loss_per_text_token"]
    # The figures, row by row.
    recognizer, losses, error_rates = load_t2s(out / "last").text_recognizer, [], []
    for row in load_features(tiny_features, "validation"):
        tokens, text = (torch.as_tensor(row[name]).long() for name in ("semantic_ids", "input_ids"))
        lengths = [torch.tensor([len(ids)]) for ids in (tokens, text)]
        losses.append(-recognizer(tokens[None], lengths[0], text[None], lengths[1]).item())
        path = recognizer.log_probs(tokens[None], lengths[0])[0].argmax(dim=-1).tolist()
        found = [token for token, _ in itertools.groupby(path) if token != recognizer.blank_id]
        error_rates.append(Levenshtein.distance(found, text.tolist()) / len(text))
    assert rows[-1]["eval/loss_per_text_token"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)
    assert rows[-1]["eval/text_token_error_rate"] == pytest.approx(sum(error_rates) / len(error_rates), rel=1e-6)

    before, after = load_t2s(tiny_checkpoint).state_dict(), load_t2s(out).state_dict()
    assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
    assert {key.split(".")[0] for key in after.keys() - before.keys()} == {"text_recognizer"}
    assert load_t2s(out / "last").config.text_recognizer_size == 24
    # The settings of generation are those of the checkpoint.
    ours, theirs = ((folder / "t2s" / "generation_config.json").read_text() for folder in (out, tiny_checkpoint))
    assert json.loads(ours) == json.loads(theirs)
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(out)
    assert len(pipe("Hello.", duration_s=0.4, seed=1, num_candidates=3)["audio"]) == round(0.4 * 22050)

    # One that is there is trained further, from where it was; another width is an error.
    again = tmp_path / "again"
    run_program(NAME, "--output", again, *options, "--model", out)
    loss = read_log(again, "eval/")[0]["eval/loss_per_text_token"]
    assert loss == pytest.approx(rows[-1]["eval/loss_per_text_token"], rel=1e-5)
    said = run_to_error(NAME, "--output", tmp_path / "other", *options, "--model", out, "--size", 8)
    assert "A recogniser of width 8 was asked for, but this checkpoint has one of width 24" in said

    # The training of T2S leaves it as it is.
    t2s_options = [option for option in options if option not in ("--learning_rate", 1e-2)]
    run_program("train_t2s", "--stage", 3, "--output", tmp_path / "t2s", *t2s_options, "--model", out)
    trained = load_t2s(tmp_path / "t2s" / "last")
    for key, tensor in trained.text_recognizer.state_dict().items():
        assert torch.equal(tensor, after[f"text_recognizer.{key}"]), key
    assert not torch.equal(trained.semantic_head.weight, after["semantic_head.weight"])


def test_a_width_is_needed(options, tmp_path):
    said = run_to_error(NAME, "--output", tmp_path / "run", *options)
    assert "has no recogniser yet. Say how wide it is to be, for example --size 256." in said


def test_killed_and_resumed_it_gives_the_same_numbers(options, tmp_path):
    options = [*options, "--size", 24, "--save_steps", 2, "--eval_steps", 2]
    run_program(NAME, "--output", tmp_path / "whole", *options)
    run_killed(NAME, "--output", tmp_path / "killed", *options, after=tmp_path / "killed/state/step-00000002")
    assert "Continuing" in run_program(NAME, "--output", tmp_path / "killed", *options, "--resume")
    whole, killed = (read_log(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == 6 + 4 and whole == killed
    whole, killed = (load_t2s(tmp_path / name / "last").state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(tensor, killed[key]) for key, tensor in whole.items())


def test_two_processes_or_two_batches_are_one_batch_twice_as_large(options, tmp_path):
    options = [*options, "--size", 24]
    run_program(NAME, "--output", tmp_path / "one", *options)
    run_ranks(NAME, 2, "--output", tmp_path / "two", *options, "--batch_size", 2)
    halves = ["--batch_size", 2, "--gradient_accumulation_steps", 2]
    run_program(NAME, "--output", tmp_path / "accumulated", *options, *halves)
    one = read_log(tmp_path / "one")
    for name in ("two", "accumulated"):
        for row, expected in zip(read_log(tmp_path / name), one, strict=True):
            assert row == pytest.approx(expected, rel=1e-3), name


def test_rows_that_ctc_cannot_spell_are_left_out(options, tiny_features, tmp_path):
    from train_text_recognizer import TokenDataset, collate

    features = load_features(tiny_features, "train")
    whole = TokenDataset(features)
    batch = collate([whole[index, index] for index in range(3)])
    for row in range(3):
        clip = features[whole.rows[row]]
        assert batch["clips"][row] == clip["clip"]
        assert batch["semantic_ids"][row, : batch["num_semantic_tokens"][row]].tolist() == list(clip["semantic_ids"])
        assert batch["text_ids"][row, : batch["num_text_tokens"][row]].tolist() == list(clip["input_ids"])

    # A text that is longer than its tokens, and none.
    folder = tmp_path / "features"
    shutil.copytree(tiny_features, folder)
    shard = next((folder / "train").glob("shard-*"))
    texts = iter([[7] * 2000, []])
    load_from_disk(str(shard)).map(lambda row: {"input_ids": next(texts, row["input_ids"])}).save_to_disk(
        str(folder / "train" / "changed")
    )
    shutil.rmtree(shard)
    (folder / "train" / "changed").rename(shard)
    changed = TokenDataset(load_features(folder, "train"))
    assert changed.num_left_out == 2 and len(changed) == len(whole) - 2
    said = run_program(NAME, "--output", tmp_path / "run", *options, "--data", folder, "--size", 24)
    assert "2 clips are left out, because CTC cannot spell their text in their tokens." in said


def test_no_texts(options, tiny_features, tmp_path):
    folder = tmp_path / "features"
    shutil.copytree(tiny_features, folder)
    for shard in list((folder / "train").glob("shard-*")):
        changed = shard.with_name("changed")
        load_from_disk(str(shard)).map(lambda row: {"input_ids": []}).save_to_disk(str(changed))
        shutil.rmtree(shard)
        changed.rename(shard)
    said = run_to_error(NAME, "--output", tmp_path / "run", *options, "--data", folder, "--size", 24)
    assert "has a text that fits into its semantic tokens. Prepare the data with texts." in said
