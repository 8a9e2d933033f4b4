"""The training of the semantic codec: statistics, codebook, spelling, and that what is saved speaks."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, load_from_disk
from safetensors.torch import load_file

from data import feature_columns, load_features, made_with
from indextts2_hf import IndexTTS2SemanticCodec, IndexTTS2TextToAudioPipeline
from programs import TRAINING, read_log, run_killed, run_program, run_ranks, run_to_error


NAME = "train_semantic_codec"


@pytest.fixture
def options(tiny_checkpoint, tiny_features):
    """A run of six steps on crops, in which codes die early, whose every figure is logged."""
    return [
        *("--model", tiny_checkpoint, "--data", tiny_features, "--max_train_steps", 6, "--batch_size", 2),
        *("--warmup_steps", 1, "--num_workers", 0, "--log_steps", 1, "--crop_frames", 16, "--dead_code_steps", 2),
    ]


def load_codec(folder):
    return IndexTTS2SemanticCodec.from_pretrained(folder, subfolder="semantic_codec")


def all_frames(folder, split) -> np.ndarray:
    return np.concatenate([row["semantic_features"].astype(np.float64) for row in load_features(folder, split)])


def with_rows(features, folder, change) -> None:
    """A copy of prepared features whose training rows `change` has changed."""
    for split in ("train", "validation"):
        table = load_from_disk(features / split / "shard-00000")
        rows = [change(row) if split == "train" else row for row in table.with_format("numpy")]
        Dataset.from_list(rows, features=feature_columns(24, 80)).save_to_disk(folder / split / "shard-00000")
    (folder / "features.json").write_text((features / "features.json").read_text())


# --- the program ---------------------------------------------------------------------------------------------------------


def test_as_a_program_of_its_own(options, tiny_checkpoint, tiny_features, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, TRAINING / f"{NAME}.py", "--output", out, *options, "--gradient_checkpointing"]
    result = subprocess.run([str(item) for item in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "trainable parameters" in result.stderr and "s of speech a step" in result.stderr
    assert f"prepare_dataset.py … --model {out}" in result.stderr

    # What is saved speaks, with the voice that was made anew.
    for folder in (out, out / "last"):
        pipe = IndexTTS2TextToAudioPipeline.from_pretrained(folder)
        assert len(pipe("Hello.", duration_s=0.4, seed=1)["audio"]) == round(0.4 * 22050)

    # The statistics are those of the training split: the base, which has none, left the features as they were.
    frames, codec = all_frames(tiny_features, "train"), load_codec(out / "last")
    np.testing.assert_allclose(codec.feature_mean, frames.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(codec.feature_variance, frames.var(axis=0), rtol=1e-5)

    rows = read_log(out, "train/")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "gradient_norm", "learning_rate", "squared_error_per_value", "codes_moved"}
    assert {key.removeprefix("train/") for key in rows[0]} == names | {"step"}
    assert [row["step"] for row in read_log(out, "eval/")] == [0, 6]
    assert max(row["train/codes_moved"] for row in rows) > 0


def test_the_figures_are_those_of_the_saved_codec(options, tiny_features, tmp_path):
    out = tmp_path / "run"
    run_program(NAME, "--output", out, *options)
    codec = load_codec(out / "last").eval()
    residual, ids, losses = 0.0, [], []
    frames = (
        all_frames(tiny_features, "validation") - codec.feature_mean.numpy()
    ) / codec.feature_variance.sqrt().numpy()
    for row in load_features(tiny_features, "validation"):
        features = codec.normalize(torch.tensor(row["semantic_features"]).float()[None])
        with torch.no_grad():
            output = codec(features)
        residual += float((output.reconstruction - features).double().square().sum())
        ids += output.semantic_ids[0].tolist()
        losses.append(float(output.loss))
    figures = read_log(out, "eval/")[-1]
    total = ((frames - frames.mean(axis=0)) ** 2).sum()
    assert figures["eval/explained_variance"] == pytest.approx(1 - residual / total, abs=1e-5)
    assert figures["eval/squared_error_per_value"] == pytest.approx(residual / frames.size, rel=1e-5)
    assert figures["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    counts = np.bincount(ids, minlength=64)
    shares = counts[counts > 0] / counts.sum()
    assert figures["eval/codebook_use"] == pytest.approx((counts > 0).mean())
    assert figures["eval/codebook_perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-5)


def test_killed_and_resumed_is_uninterrupted(options, tmp_path):
    # The head of the text and the counters of the codes are part of the state.
    options += ["--ctc_weight", 0.1]
    run_program(NAME, "--output", tmp_path / "whole", *options)
    out = tmp_path / "killed"
    run_killed(NAME, "--output", out, *options, "--save_steps", 3, after=out / "state" / "step-00000003" / "run.json")
    run_program(NAME, "--output", out, *options, "--save_steps", 3, "--resume")
    expected, found = read_log(tmp_path / "whole"), read_log(out)
    assert [row.keys() for row in found] == [row.keys() for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    assert max(row.get("train/codes_moved", 0) for row in found if row["step"] > 3) > 0
    for name, tensor in load_codec(tmp_path / "whole" / "last").state_dict().items():
        torch.testing.assert_close(load_codec(out / "last").state_dict()[name], tensor)


def test_two_processes_are_one_with_twice_the_batch(options, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    run_program(NAME, "--output", one, *options, "--batch_size", 4)
    run_ranks(NAME, 2, "--output", two, *options)
    for row, other in zip(read_log(two), read_log(one), strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_a_trained_codec_keeps_its_statistics_and_codebook(options, tiny_checkpoint, tiny_features, tmp_path):
    # A codec that was trained before, and features that it normalised.
    base, features = tmp_path / "base", tmp_path / "features"
    shutil.copytree(tiny_checkpoint, base)
    codec = load_codec(base)
    codec.feature_mean.copy_(torch.linspace(-1, 1, 24))
    codec.feature_variance.copy_(torch.linspace(0.5, 2, 24))
    codec.save_pretrained(base / "semantic_codec")
    shutil.copytree(tiny_features, features)
    (features / "features.json").write_text(json.dumps(made_with(base)))
    options += ["--model", base, "--data", features, "--max_train_steps", 2]

    run_program(NAME, "--output", tmp_path / "kept", *options)
    kept = load_codec(tmp_path / "kept" / "last")
    assert torch.equal(kept.feature_mean, codec.feature_mean)
    assert torch.equal(kept.feature_variance, codec.feature_variance)
    # The first step of the warm-up has the rate 0, the second 3e-3, and no row moves by more than that.
    moved = (kept.quantizer.codebook.weight - codec.quantizer.codebook.weight).abs().max()
    assert 0 < moved < 4e-3

    run_program(NAME, "--output", tmp_path / "new", *options, "--update_statistics")
    new = load_codec(tmp_path / "new" / "last")
    hidden_states = all_frames(features, "train") * codec.feature_variance.sqrt().numpy() + codec.feature_mean.numpy()
    np.testing.assert_allclose(new.feature_mean, hidden_states.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(new.feature_variance, hidden_states.var(axis=0), rtol=1e-4)


def test_features_that_are_no_numbers_are_refused(options, tiny_features, tmp_path):
    def spoil(row):
        if row["clip"] == "speaker1/clip2":
            row["semantic_features"] = np.full_like(row["semantic_features"], np.nan)
        return row

    with_rows(tiny_features, tmp_path / "features", spoil)
    said = run_to_error(NAME, "--output", tmp_path / "run", *options, "--data", tmp_path / "features")
    assert "The features of speaker1/clip2 hold values that are no numbers" in said


def test_a_loss_that_is_no_number_names_its_clips_and_keeps_what_was_good(options, tmp_path):
    out = tmp_path / "run"
    options += [
        "--learning_rate",
        1e30,
        "--warmup_steps",
        2,
        "--save_steps",
        1,
        "--eval_steps",
        100,
        "--max_train_steps",
        9,
    ]
    said = run_to_error(NAME, "--output", out, *options)
    assert re.search(r"The (loss|gradient) is \w+ at step 3", said) and "What was saved before is good" in said
    assert [path.name for path in out.glob("state/*")] == ["step-00000001"]
    weights = load_file(out / "semantic_codec/diffusion_pytorch_model.safetensors").values()
    assert all(bool(tensor.isfinite().all()) for tensor in weights)


def test_ctc_without_texts_is_refused(options, tiny_features, tmp_path):
    def silence(row):
        return row | {"input_ids": row["input_ids"][:0]}

    with_rows(tiny_features, tmp_path / "features", silence)
    options += ["--data", tmp_path / "features", "--ctc_weight", 1]
    said = run_to_error(NAME, "--output", tmp_path / "run", *options)
    assert "None of 12 clips has a text that fits into its frames, but --ctc_weight needs them" in said


# --- its pieces ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def codec() -> IndexTTS2SemanticCodec:
    torch.manual_seed(0)
    return IndexTTS2SemanticCodec(
        feature_size=24, codebook_size=64, codebook_dim=4, hidden_size=16, intermediate_size=32, num_layers=1
    )


def test_examples_are_hidden_states_and_crops_of_them(codec, tiny_features):
    from train_semantic_codec import CodecDataset, collate

    codec.feature_mean.copy_(torch.randn(24))
    codec.feature_variance.copy_(torch.rand(24) + 0.5)
    features = load_features(tiny_features, "train")
    whole = CodecDataset(features, codec, seed=0)
    for index in range(3):
        normal = codec.normalize(whole[index, 7]["hidden_states"])
        expected = torch.tensor(features[index]["semantic_features"]).float()
        torch.testing.assert_close(normal, expected, rtol=0, atol=1e-5)

    cropped = CodecDataset(features, codec, seed=0, crop_frames=16)
    assert cropped.lengths == [16] * len(features)
    assert torch.equal(cropped[2, 5]["hidden_states"], cropped[2, 5]["hidden_states"])
    starts = set()
    for draw in range(30):
        crop = cropped[2, draw]["hidden_states"]
        windows = whole[2, draw]["hidden_states"].unfold(0, 16, 1).transpose(1, 2)
        (start,) = (windows == crop).all(dim=(1, 2)).nonzero()[:, 0].tolist()
        starts.add(start)
    assert len(starts) > 3

    batch = collate([whole[index, 0] for index in range(3)])
    lengths = [features[index]["num_semantic_tokens"] for index in range(3)]
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    assert batch["hidden_states"].shape == (3, max(lengths), 24)
    assert batch["text_lengths"].tolist() == [len(features[index]["input_ids"]) for index in range(3)]


def test_the_first_codebook_is_spread_over_the_latents(codec, tiny_features):
    from train_semantic_codec import CodecDataset, initialize_codebook

    dataset = CodecDataset(load_features(tiny_features, "train"), codec, seed=0)

    def error_and_use() -> tuple[float, int]:
        latents = [codec.encode(dataset[row, 0]["hidden_states"][None]) for row in range(len(dataset))]
        use = len(torch.cat([output.semantic_ids[0] for output in latents]).unique())
        outputs = [codec(dataset[row, 0]["hidden_states"][None]) for row in range(len(dataset))]
        errors = [
            F.mse_loss(codec.quantizer.codebook(output.semantic_ids), output.latents).item() for output in outputs
        ]
        return sum(errors) / len(errors), use

    with torch.no_grad():
        before, use_before = error_and_use()
        initialize_codebook(codec, dataset, seed=0)
        after, use_after = error_and_use()
    assert after < before / 4
    assert use_after > use_before and use_after > 48
    rows = codec.quantizer.codebook.weight.clone()
    initialize_codebook(codec, dataset, seed=0)
    assert torch.equal(rows, codec.quantizer.codebook.weight)


def test_dead_codes_move_onto_latents():
    from train_semantic_codec import CodeUse, move_dead_codes

    rows, use = torch.zeros(6, 2), CodeUse(6)
    for step in range(5):
        latents = torch.randn(20, 2, generator=torch.Generator().manual_seed(step))
        # Codes 0 to 2 are chosen at each step, 3 at the second one, 4 and 5 never.
        use.idle_steps[[0, 1, 2] + [3] * (step == 1)] = 0
        num_moved = move_dead_codes(rows, use, latents, dead_code_steps=3, rng=np.random.default_rng(step))
        assert num_moved == {3: 2, 4: 1}.get(step, 0)
        for code in {3: [4, 5], 4: [3]}.get(step, []):
            assert (latents == rows[code]).all(dim=1).any()
    assert not rows[:3].any()
    assert not torch.equal(rows[4], rows[5])

    # It goes on where the state was saved.
    other = CodeUse(6)
    other.load_state_dict(use.state_dict())
    assert torch.equal(other.idle_steps, use.idle_steps)

    # There may be more dead codes than latents.
    use.idle_steps[:] = 9
    assert move_dead_codes(rows, use, latents[:4], dead_code_steps=3, rng=np.random.default_rng(0)) == 4


def test_the_ctc_loss_is_that_of_all_spellings():
    from train_semantic_codec import ctc_loss

    # Three labels and the blank, four frames: few enough to sum the probability of every path.
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    texts, lengths = [[0, 2], [1]], [4, 3]
    batch = {
        "texts": torch.tensor([[0, 2], [1, 0]]),
        "text_lengths": torch.tensor([2, 1]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    losses = []
    for row, (text, length) in enumerate(zip(texts, lengths, strict=True)):
        probabilities, total = logits[row].softmax(dim=-1), 0.0
        for path in itertools.product(range(4), repeat=length):
            if [token for token, _ in itertools.groupby(path) if token != 3] == text:
                total += float(torch.prod(probabilities[range(length), list(path)]))
        losses.append(-np.log(total) / len(text))
    assert float(ctc_loss(logits, batch)) == pytest.approx(np.mean(losses), rel=1e-5)


def test_spelling_is_part_of_the_loss_and_of_the_choice(options, tmp_path):
    out = tmp_path / "run"
    run_program(NAME, "--output", out, *options, "--ctc_weight", 0.5, "--mixed_precision", "bf16")
    for row in read_log(out, "eval/"):
        expected = row["eval/explained_variance"] - 0.5 * row["eval/ctc_loss_per_label"]
        assert row["eval/score"] == pytest.approx(expected)
        assert row["eval/token_error_rate"] >= 0
    saved = json.loads((out / "run.json").read_text())
    # The first evaluation is of what was never saved: random weights under new statistics.
    assert saved["best"] == max(row["eval/score"] for row in read_log(out, "eval/")[1:])
    # The head stays in the run.
    assert not any("head" in path.name for path in (out / "semantic_codec").iterdir())
    assert all(torch.isfinite(torch.tensor(row["train/ctc_loss_per_label"])) for row in read_log(out, "train/"))
