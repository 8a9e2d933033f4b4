"""The semantic-to-mel training: its objective by hand, that it trains what inference calls, and that what is saved speaks."""

import json
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, load_from_disk

from data import feature_columns, load_features
from indextts2_hf import (
    IndexTTS2SemanticCodec,
    IndexTTS2SemanticToMelPipeline,
    IndexTTS2SemanticToMelTransformer,
    IndexTTS2T2SForConditionalGeneration,
    IndexTTS2TextToAudioPipeline,
    VoicePrompt,
)
from programs import TRAINING, read_log, run_killed, run_program, run_ranks, run_to_error


FRAMES_PER_TOKEN = 1.72


def make_options(checkpoint, features) -> list:
    """A run of four steps whose every figure is logged."""
    return [
        *("--model", checkpoint, "--data", features, "--max_train_steps", 4, "--batch_size", 2),
        *("--learning_rate", 1e-3, "--warmup_steps", 1, "--num_workers", 0, "--log_steps", 1, "--num_generated", 3),
    ]


@pytest.fixture
def options(tiny_checkpoint, tiny_features):
    return make_options(tiny_checkpoint, tiny_features)


@pytest.fixture(scope="module")
def finished(tiny_checkpoint, tiny_features, tmp_path_factory):
    """Such a run, by a Python of its own; its folder and what it said."""
    out = tmp_path_factory.mktemp("s2m") / "run"
    command = [
        sys.executable,
        TRAINING / "train_s2m.py",
        "--output",
        out,
        *make_options(tiny_checkpoint, tiny_features),
    ]
    result = subprocess.run([str(item) for item in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return out, result.stderr


def load_s2m(folder, **changes) -> IndexTTS2SemanticToMelTransformer:
    return IndexTTS2SemanticToMelTransformer.from_pretrained(folder, subfolder="s2m", **changes)


def changed_weights(old, new) -> set[str]:
    weights = old.state_dict()
    return {key for key, value in new.state_dict().items() if not torch.equal(value, weights[key])}


@pytest.fixture(scope="module")
def s2m(tiny_checkpoint):
    """Shared: a test must not change it."""
    return load_s2m(tiny_checkpoint).eval()


@pytest.fixture(scope="module")
def codec(tiny_checkpoint):
    return IndexTTS2SemanticCodec.from_pretrained(tiny_checkpoint, subfolder="semantic_codec").eval()


@pytest.fixture(scope="module")
def t2s(tiny_checkpoint):
    return IndexTTS2T2SForConditionalGeneration.from_pretrained(tiny_checkpoint, subfolder="t2s").eval()


def make_dataset(folder, **changes):
    from train_s2m import FlowMatchingDataset

    settings = dict(
        seed=0,
        mel_frames_per_token=FRAMES_PER_TOKEN,
        max_frames=2584,
        prompt_share=(0.1, 0.7),
        timestep_shift=1.0,
        hidden_states_probability=0.5,
    )
    return FlowMatchingDataset(load_features(folder, "train"), **(settings | changes))


def make_batch(dataset, size: int = 5) -> dict:
    from train_s2m import collate

    return collate([dataset[index, 100 + index] for index in range(size)])


def make_model_inputs(batch, s2m, codec, t2s) -> dict:
    from train_s2m import make_inputs

    return make_inputs(batch, s2m, codec, t2s, Accelerator(cpu=True))


# --- the objective -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_loss_by_hand(tiny_features, s2m, codec, t2s):
    from train_s2m import UtteranceVelocity

    batch = make_batch(make_dataset(tiny_features, condition_dropout=0.4), size=8)
    assert batch["is_unconditional"].any() and not batch["is_unconditional"].all()
    assert 0 < len(batch["t2s"]["rows"]) < 8
    loss = UtteranceVelocity(s2m)(**make_model_inputs(batch, s2m, codec, t2s)).loss

    losses = []
    for row in range(8):
        tokens, prompt_tokens = int(batch["semantic_lengths"][row]), int(batch["num_prompt_tokens"][row])
        frames, prompt_frames = int(batch["mel_lengths"][row]), int(batch["num_prompt_frames"][row])
        mel, noise, t = batch["mel"][row, :frames], batch["noise"][row, :frames], batch["timestep"][row]
        embeds = codec.embed(batch["semantic_ids"][row : row + 1, :tokens])
        prompt, target = embeds[:, :prompt_tokens], embeds[:, prompt_tokens:]
        if row in batch["t2s"]["rows"]:
            inputs = {name: value for name, value in batch["t2s"].items() if name not in ("rows", "starts")}
            place = batch["t2s"]["rows"].index(row)
            inputs = {name: value[place : place + 1] for name, value in inputs.items()}
            num_text = int(inputs["attention_mask"].sum())
            voice = inputs["speaker_features"][:, : int(inputs["speaker_feature_lengths"])]
            feeling = inputs["emotion_features"][:, : int(inputs["emotion_feature_lengths"])]
            # As inference makes them: a prefix, then all the codes at once.
            prefix, mask = t2s.prepare_prefix(
                inputs["input_ids"][:, :num_text],
                speaker_latents=t2s.encode_speaker(voice),
                emotion_embeds=t2s.encode_emotion(feeling),
                num_semantic_tokens=tokens,
            )
            ids = batch["semantic_ids"][row : row + 1, :tokens]
            states = t2s(inputs_embeds=prefix, attention_mask=mask, semantic_ids=ids).last_hidden_state[:, :-1]
            target = s2m.add_hidden_states(target, states[:, prompt_tokens:])
        content = torch.cat(
            [
                s2m.regulate_length(prompt, None, torch.tensor([prompt_frames])),
                s2m.regulate_length(target, None, torch.tensor([frames - prompt_frames])),
            ],
            dim=1,
        )
        sample, prompt_mel = (1 - t) * noise + t * mel, mel.clone()
        sample[:prompt_frames], prompt_mel[prompt_frames:] = 0, 0
        is_kept = 0.0 if batch["is_unconditional"][row] else 1.0
        velocity = s2m(
            sample=sample[None],
            timestep=t[None],
            prompt_mel=prompt_mel[None] * is_kept,
            content_embeds=content * is_kept,
            speaker_embeds=batch["speaker_embeds"][row : row + 1] * is_kept,
        ).velocity[0]
        losses.append((velocity - (mel - noise))[prompt_frames:].abs().mean())
    torch.testing.assert_close(loss, torch.stack(losses).mean())


@torch.no_grad()
def test_the_level_loss_by_hand(tiny_features, tiny_checkpoint, codec):
    from train_s2m import level_loss

    s2m = load_s2m(tiny_checkpoint, mel_mean=-5.0, mel_std=2.5)
    batch = make_batch(make_dataset(tiny_features))
    inputs = make_model_inputs(batch, s2m, codec, None)
    velocity = inputs["labels"] + torch.randn_like(inputs["labels"])
    losses = []
    for row, time in enumerate(batch["timestep"]):
        place = slice(int(batch["num_prompt_frames"][row]), int(batch["mel_lengths"][row]))
        mel = batch["mel"][row, place]
        # Where the rest of the way is another one, so much of the difference arrives.
        predicted = mel + 2.5 * (1 - time) * (velocity - inputs["labels"])[row, place]
        power, predicted_power = mel.exp().square().sum(dim=1), predicted.exp().square().sum(dim=1)
        losses.append((predicted_power / power).log().abs().mean())
    torch.testing.assert_close(level_loss(s2m, inputs, velocity), torch.stack(losses).mean())
    assert level_loss(s2m, inputs, inputs["labels"]) < 1e-5


def test_the_velocity_to_learn_leads_from_the_noise_to_the_mel(tiny_features, s2m, codec):
    batch = make_batch(make_dataset(tiny_features))
    inputs = make_model_inputs(batch, s2m, codec, None)
    t, mask = batch["timestep"][:, None, None], inputs["loss_mask"][..., None]
    assert 0 < t.min() and t.max() < 1
    target = batch["mel"].masked_fill(~mask, 0.0)
    torch.testing.assert_close((inputs["sample"] + (1 - t) * inputs["labels"]).masked_fill(~mask, 0.0), target)
    noise = batch["noise"].masked_fill(~mask, 0.0)
    torch.testing.assert_close((inputs["sample"] - t * inputs["labels"]).masked_fill(~mask, 0.0), noise)
    # Every frame is the prompt's, the target's or padding; the network sees the target's mel nowhere but in the sample.
    frames = torch.arange(mask.shape[1])
    is_prompt = frames < batch["num_prompt_frames"][:, None]
    assert torch.equal(is_prompt | inputs["loss_mask"], frames < batch["mel_lengths"][:, None])
    assert not (is_prompt & inputs["loss_mask"]).any()
    assert torch.equal(inputs["prompt_mel"], batch["mel"] * is_prompt[..., None])
    assert not inputs["sample"][~inputs["loss_mask"]].any()


def test_mels_are_normalised_and_padding_is_zero(tiny_features, tiny_checkpoint, s2m, codec):
    normalized = load_s2m(tiny_checkpoint, mel_mean=-5.0, mel_std=3.0)
    batch = make_batch(make_dataset(tiny_features))
    assert batch["mel_lengths"].min() < batch["mel_lengths"].max()
    inputs = make_model_inputs(batch, normalized, codec, None)
    is_frame = torch.arange(batch["mel"].shape[1]) < batch["mel_lengths"][:, None]
    mel = (batch["mel"] + 5) / 3 * is_frame[..., None]
    # What it would be if the data had been normalised before.
    expected = make_model_inputs(batch | {"mel": mel}, s2m, codec, None)
    for name in ("sample", "prompt_mel", "labels"):
        torch.testing.assert_close(inputs[name], expected[name], msg=name)
        assert inputs[name].any() and not inputs[name][~is_frame].any(), name


def test_rows_without_conditions_are_what_the_sampler_calls_unconditional(tiny_features, s2m, codec):
    from train_s2m import UtteranceVelocity

    inputs = make_model_inputs(make_batch(make_dataset(tiny_features)), s2m, codec, None)
    inputs["is_unconditional"] = torch.ones(5, dtype=torch.bool)
    with torch.no_grad():
        output = UtteranceVelocity(s2m)(**inputs)
        expected = s2m(
            sample=inputs["sample"],
            timestep=inputs["timestep"],
            prompt_mel=torch.zeros_like(inputs["prompt_mel"]),
            content_embeds=torch.zeros(*inputs["sample"].shape[:2], s2m.config.content_size),
            speaker_embeds=torch.zeros_like(inputs["speaker_embeds"]),
            mel_lengths=inputs["mel_lengths"],
        ).velocity
    torch.testing.assert_close(output.velocity, expected)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradient_reaches_every_parameter_that_is_used(
    tiny_features, tiny_checkpoint, codec, t2s, gradient_checkpointing
):
    from train_s2m import UtteranceVelocity

    s2m = load_s2m(tiny_checkpoint).train()
    if gradient_checkpointing:
        s2m.enable_gradient_checkpointing()
    for probability, is_used in ((1.0, True), (0.0, False)):
        batch = make_batch(make_dataset(tiny_features, hidden_states_probability=probability))
        s2m.zero_grad()
        UtteranceVelocity(s2m)(**make_model_inputs(batch, s2m, codec, t2s)).loss.backward()
        for name, parameter in s2m.named_parameters():
            # With no states in a batch there still is a gradient, of zeros: other processes may have some.
            assert parameter.grad.any() == (is_used or not name.startswith("t2s_projection")), name


# --- the draws -----------------------------------------------------------------------------------------------------------


def test_examples_depend_on_their_draw_alone(tiny_features):
    from train_s2m import collate

    dataset = make_dataset(tiny_features, condition_dropout=0.1)
    batch = collate([dataset[3, 7], dataset[1, 8]])
    example = make_dataset(tiny_features, condition_dropout=0.1)[1, 8]
    for name in ("semantic_ids", "mel", "noise"):
        assert torch.equal(batch[name][1, : len(example[name])], example[name])
        assert not batch[name][1, len(example[name]) :].any()
    for name in ("timestep", "num_prompt_tokens", "num_prompt_frames", "is_unconditional"):
        assert batch[name][1] == example[name]
    assert not torch.equal(dataset[1, 8]["noise"], dataset[1, 9]["noise"])


def test_how_often_and_where(tiny_features):
    dataset = make_dataset(tiny_features, condition_dropout=0.1)
    examples = [dataset[draw % len(dataset), draw] for draw in range(400)]
    times = np.array([example["timestep"] for example in examples])
    assert np.abs(np.histogram(times, bins=4, range=(0, 1))[0] - 100).max() < 35
    assert 0.06 < np.mean([example["is_unconditional"] for example in examples]) < 0.14
    assert 0.44 < np.mean(["t2s" in example for example in examples]) < 0.56
    shares = [example["num_prompt_tokens"] / len(example["semantic_ids"]) for example in examples]
    assert 0.07 < min(shares) < 0.15 and 0.65 < max(shares) < 0.73
    for example in examples:
        assert example["num_prompt_frames"] == int(example["num_prompt_tokens"] * FRAMES_PER_TOKEN)
    assert abs(np.mean([example["noise"].std() for example in examples]) - 1) < 0.02
    for probability in (0.0, 1.0):
        dataset = make_dataset(tiny_features, hidden_states_probability=probability)
        assert all(("t2s" in dataset[0, draw]) == bool(probability) for draw in range(20))


def test_times_are_shifted_to_the_noise(tiny_features):
    plain, shifted = (make_dataset(tiny_features, timestep_shift=shift) for shift in (1.0, 4.0))
    for draw in range(20):
        before, after = plain[0, draw], shifted[0, draw]
        signal, noise = after["timestep"], 1 - after["timestep"]
        assert noise / signal == pytest.approx(4 * (1 - before["timestep"]) / before["timestep"])
        assert torch.equal(before["noise"], after["noise"])
        assert before["num_prompt_tokens"] == after["num_prompt_tokens"]


def test_speech_at_another_speed_is_no_target(tiny_features):
    features = load_features(tiny_features, "train")
    from train_s2m import FlowMatchingDataset

    speeds = [1.1 if row % 3 else 1.0 for row in range(len(features))]
    mixed = features.remove_columns("speed").add_column("speed", speeds)
    settings = (0, FRAMES_PER_TOKEN, 2584, (0.1, 0.7), 1.0, 0.0)
    dataset = FlowMatchingDataset(mixed, *settings)
    assert dataset.targets == list(range(0, len(features), 3))
    assert FlowMatchingDataset(mixed, *settings, num_rows=2).targets == [0, dataset.targets[len(dataset) // 2]]
    with pytest.raises(ValueError, match="Prepare the data with 1.0 among the --speeds"):
        FlowMatchingDataset(features.remove_columns("speed").add_column("speed", [0.9] * len(features)), *settings)


def test_the_voice_is_another_clip_of_the_speaker(tiny_features, tmp_path):
    dataset = make_dataset(tiny_features, hidden_states_probability=1.0)
    table = load_features(tiny_features, "train")
    features = [torch.tensor(row["semantic_features"]).float() for row in table]
    for draw in range(20):
        voice = dataset[5, draw]["t2s"]["speaker_features"]
        (row,) = (row for row, item in enumerate(features) if torch.equal(item, voice))
        assert table[row]["speaker"] == table[5]["speaker"] and row != 5

    # Where there is no other, it is the same.
    load_from_disk(tiny_features / "train" / "shard-00000").select([5]).save_to_disk(tmp_path / "train/shard-00000")
    (tmp_path / "features.json").write_text((tiny_features / "features.json").read_text())
    alone = make_dataset(tmp_path, hidden_states_probability=1.0)
    assert torch.equal(alone[0, 0]["t2s"]["speaker_features"], features[5])


def test_the_feeling_is_another_clip_of_the_same_label(tiny_features):
    features = load_features(tiny_features, "train")
    table = features.with_format(None)["speaker"]
    alike = [row for row, speaker in enumerate(table) if speaker == table[5]]
    labels = ["glad" if row in (5, alike[0], alike[-1]) else "grave" for row in range(len(features))]
    labelled = features.remove_columns("emotion").add_column("emotion", labels).with_format("numpy")
    from train_s2m import FlowMatchingDataset

    dataset = FlowMatchingDataset(labelled, 0, FRAMES_PER_TOKEN, 2584, (0.1, 0.7), 1.0, 1.0)
    arrays = [torch.tensor(row["semantic_features"]).float() for row in features]
    chosen = set()
    for draw in range(20):
        feeling = dataset[5, draw]["t2s"]["emotion_features"]
        (row,) = (row for row, item in enumerate(arrays) if torch.equal(item, feeling))
        chosen.add(row)
    assert chosen == {alike[0], alike[-1]} - {5}

    # Without a label it is the voice.
    unlabelled = features.remove_columns("emotion").add_column("emotion", [None] * len(features)).with_format("numpy")
    inputs = FlowMatchingDataset(unlabelled, 0, FRAMES_PER_TOKEN, 2584, (0.1, 0.7), 1.0, 1.0)[5, 0]["t2s"]
    assert torch.equal(inputs["emotion_features"], inputs["speaker_features"])


def test_speakers_of_few_utterances_come_more_often(tiny_features):
    """Their utterances are repeated, as evenly as it goes; nobody's become fewer."""
    dataset = make_dataset(tiny_features)
    counts = Counter(dataset.targets)
    of_speaker = Counter(dataset.speakers[row] for row in dataset.targets)
    least = max(of_speaker.values()) + 3
    repeated = make_dataset(tiny_features, least_rows_per_speaker=least)
    assert len(repeated) == len(repeated.lengths) == least * len(of_speaker)
    assert set(Counter(repeated.speakers[row] for row in repeated.targets).values()) == {least}
    repeats = Counter(repeated.targets)
    assert repeats.keys() == counts.keys()
    for speaker in of_speaker:
        numbers = [repeats[row] for row in repeats if repeated.speakers[row] == speaker]
        assert max(numbers) - min(numbers) <= 1
    assert torch.equal(
        repeated[len(repeated) - 1, 0]["semantic_ids"],
        dataset[dataset.targets.index(repeated.targets[-1]), 0]["semantic_ids"],
    )
    assert make_dataset(tiny_features, least_rows_per_speaker=min(of_speaker.values())).targets == dataset.targets


def test_a_prompt_of_another_recording(tiny_features, t2s):
    """Its end and its voice stand before the whole utterance, whose tokens alone have the states of its text."""
    features = load_features(tiny_features, "train")
    dataset = make_dataset(
        tiny_features, hidden_states_probability=1.0, other_prompt_probability=1.0, prompt_share=(0.3, 0.5)
    )
    for draw in range(6):
        example, row = dataset[5, draw], features[5]
        count, frames = example["num_prompt_tokens"], example["num_prompt_frames"]
        assert torch.equal(example["semantic_ids"][count:], torch.tensor(row["semantic_ids"]).long())
        assert torch.equal(example["mel"][frames:], torch.tensor(row["mel"]).float())
        assert example["t2s"]["start"] == 0 and frames == int(count * FRAMES_PER_TOKEN)
        found = [
            torch.equal(example["speaker_embeds"], torch.tensor(other["speaker_embeds"]))
            and torch.equal(example["t2s"]["speaker_features"], torch.tensor(other["semantic_features"]).float())
            and torch.equal(example["semantic_ids"][:count], torch.tensor(other["semantic_ids"][-count:]).long())
            and torch.equal(
                example["mel"][:frames],
                torch.tensor(other["mel"]).float()[int((len(other["semantic_ids"]) - count) * FRAMES_PER_TOKEN) :][
                    :frames
                ],
            )
            for other in features
        ]
        assert sum(found) == 1 and not found[5]

    # Together they are no longer than a crop, which has the beginning.
    cropped = make_dataset(
        tiny_features,
        hidden_states_probability=1.0,
        other_prompt_probability=1.0,
        max_frames=27,
        prompt_share=(0.3, 0.5),
    )
    from train_s2m import collate, compute_hidden_states

    examples = [cropped[index, index] for index in range(4)]
    assert [len(example["semantic_ids"]) for example in examples] == [15] * 4
    batch, whole = collate(examples), collate([dataset[index, index] for index in range(4)])
    (states, is_used), (whole_states, _) = (compute_hidden_states(t2s, of) for of in (batch, whole))
    assert batch["t2s"]["starts"] == [0] * 4
    for row in range(4):
        first = int(batch["num_prompt_tokens"][row])
        whole_first = int(whole["num_prompt_tokens"][row])
        torch.testing.assert_close(states[row, first:15], whole_states[row, whole_first : whole_first + 15 - first])
        assert is_used[row].tolist() == [False] * first + [True] * (15 - first)


def test_long_utterances_are_cropped_tokens_and_frames_together(tiny_features, codec, t2s):
    whole = make_dataset(tiny_features, hidden_states_probability=1.0, prompt_share=(0.01, 0.01))
    cropped = make_dataset(tiny_features, hidden_states_probability=1.0, max_frames=27)
    assert set(cropped.lengths) == {15}
    assert cropped.duration_s == pytest.approx(12 * 15 / 50)
    starts = set()
    for draw in range(12):
        example, original = cropped[2, draw], whole[2, draw]
        start = example["t2s"]["start"] - example["num_prompt_tokens"]
        starts.add(start)
        first_frame = int(start * FRAMES_PER_TOKEN)
        assert torch.equal(example["semantic_ids"], original["semantic_ids"][start : start + 15])
        assert torch.equal(example["mel"], original["mel"][first_frame : first_frame + 25])
        assert 1 <= example["num_prompt_frames"] < 25
    assert len(starts) > 3

    # The T2S reads the whole utterance, of which the states of the crop are taken.
    from train_s2m import collate, compute_hidden_states

    batch, whole_batch = collate([cropped[2, 0], cropped[4, 0]]), collate([whole[2, 0], whole[4, 0]])
    states, is_used = compute_hidden_states(t2s, batch)
    whole_states, _ = compute_hidden_states(t2s, whole_batch)
    for row, start in enumerate(batch["t2s"]["starts"]):
        num_prompt_tokens = int(batch["num_prompt_tokens"][row])
        whole_start, num_tokens = whole_batch["t2s"]["starts"][row], 15 - num_prompt_tokens
        first = int(whole_batch["num_prompt_tokens"][row]) + start - whole_start
        torch.testing.assert_close(states[row, num_prompt_tokens:15], whole_states[row, first : first + num_tokens])
        assert is_used[row].tolist() == [False] * num_prompt_tokens + [True] * (15 - num_prompt_tokens)


# --- evaluation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mel_mean, mel_std", [(0.0, 1.0), (-5.0, 3.0)])
def test_mels_are_generated_as_the_pipeline_does(tiny_features, tiny_checkpoint, codec, t2s, mel_mean, mel_std):
    from train_s2m import NUM_EVALUATION_STEPS, UtteranceVelocity, generate

    s2m = load_s2m(tiny_checkpoint, mel_mean=mel_mean, mel_std=mel_std).eval()
    batch = make_batch(make_dataset(tiny_features, hidden_states_probability=1.0), size=3)
    inputs = make_model_inputs(batch, s2m, codec, t2s)
    mels = generate(UtteranceVelocity(s2m), inputs, batch["noise"])
    pipeline = IndexTTS2SemanticToMelPipeline.from_pretrained(tiny_checkpoint, s2m=s2m)
    pipeline.set_progress_bar_config(disable=True)
    for row in range(3):
        tokens, prompt_tokens = int(batch["semantic_lengths"][row]), int(batch["num_prompt_tokens"][row])
        frames, prompt_frames = int(batch["mel_lengths"][row]), int(batch["num_prompt_frames"][row])
        prompt_ids = batch["semantic_ids"][row : row + 1, :prompt_tokens]
        with torch.no_grad():
            content = s2m.regulate_length(codec.embed(prompt_ids), None, torch.tensor([prompt_frames]))[0]
        voice = VoicePrompt(
            speaker_features=torch.zeros(3, 24),
            emotion_features=torch.zeros(3, 24),
            speaker_embeds=batch["speaker_embeds"][row],
            prompt_mel=batch["mel"][row, :prompt_frames],
            content_embeds=content,
            checkpoint=pipeline.fingerprint,
        )
        (expected,) = pipeline(
            batch["semantic_ids"][row : row + 1, prompt_tokens:tokens],
            voice,
            t2s_hidden_states=inputs["t2s_hidden_states"][row : row + 1, prompt_tokens:tokens],
            mel_lengths=torch.tensor([frames - prompt_frames]),
            latents=batch["noise"][row : row + 1, :frames],
            num_inference_steps=NUM_EVALUATION_STEPS,
            output_type="mel",
        ).mels
        generated = mels[row, prompt_frames:frames] * mel_std + mel_mean
        torch.testing.assert_close(generated, expected, rtol=1e-4, atol=1e-4)
        assert not mels[row, :prompt_frames].any() and not mels[row, frames:].any()


def test_distances_are_those_of_log_mels(tiny_checkpoint, options, tmp_path):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    s2m = load_s2m(tiny_checkpoint, mel_mean=-3.0, mel_std=2.0)
    for parameter in s2m.velocity_projection.parameters():
        torch.nn.init.zeros_(parameter)
    s2m.save_pretrained(folder / "s2m")
    out = tmp_path / "run"
    run_program("train_s2m", *options, "--model", folder, "--output", out, "--max_train_steps", 1)
    # Without a velocity the noise is the mel: N(-3, 2), where the data is N(-5, 1) by its making.
    distance = torch.distributions.Normal(2.0, 5**0.5).sample((100_000,)).abs().mean()
    assert read_log(out, "eval/")[0]["eval/mel_l1_per_bin"] == pytest.approx(float(distance), abs=0.1)
    assert load_s2m(out).config.mel_mean == -3.0 and load_s2m(out).config.mel_std == 2.0


def test_learning_one_utterance(tiny_checkpoint, tiny_features, tmp_path):
    """Two sounds and their codes: which is when is in the codes alone."""
    rng = np.random.default_rng(5)
    ids = np.repeat(rng.permutation([3, 40] * 6), 3)
    sounds = 2 * rng.standard_normal((64, 80)) - 3
    mel = sounds[ids[(np.arange(61) / FRAMES_PER_TOKEN).astype(int)]]
    row = {
        **load_from_disk(tiny_features / "train" / "shard-00000")[0],
        **{"num_semantic_tokens": 36, "semantic_ids": ids, "mel": mel.astype(np.float16), "duration_s": 0.72},
        "semantic_features": np.zeros((36, 24), np.float16),
    }
    for split in ("train", "validation"):
        table = Dataset.from_list([row], features=feature_columns(feature_size=24, num_mel_bins=80))
        table.save_to_disk(tmp_path / "features" / split / "shard-00000")
    (tmp_path / "features/features.json").write_text((tiny_features / "features.json").read_text())
    run_program(
        *("train_s2m", "--model", tiny_checkpoint, "--data", tmp_path / "features", "--output", tmp_path / "run"),
        *("--max_train_steps", 100, "--batch_size", 4, "--learning_rate", 1e-2, "--warmup_steps", 10),
        *("--num_workers", 0, "--t2s_hidden_states_probability", 0, "--prompt_share", 0.2, 0.4),
    )
    before, after = (row["eval/mel_l1_per_bin"] for row in read_log(tmp_path / "run", "eval/"))
    assert after < 0.5 * before
    assert after < 0.95 * np.abs(mel - np.median(mel, axis=0)).mean(), "no better than the best mel that never changes"

    # Without hidden states their projection is left as it was.
    changed = changed_weights(load_s2m(tiny_checkpoint), load_s2m(tmp_path / "run"))
    assert changed == {name for name in load_s2m(tiny_checkpoint).state_dict() if not name.startswith("t2s_proj")}


# --- the program ---------------------------------------------------------------------------------------------------------


def test_learning_levels(finished, options, tmp_path):
    run_program("train_s2m", "--output", tmp_path / "run", *options, "--level_loss_weight", 0.5)
    rows = read_log(tmp_path / "run", "train/")
    for row in rows:
        whole = row["train/velocity_l1_per_bin"] + 0.5 * row["train/level_l1_per_frame"]
        assert row["train/loss"] == pytest.approx(whole)
    # The first batch is that of a run without; the weights that it leaves are not.
    velocities, of_other = (
        [row["train/velocity_l1_per_bin"] for row in log] for log in (rows, read_log(finished[0], "train/"))
    )
    assert velocities[0] == pytest.approx(of_other[0]) and velocities[-1] != pytest.approx(of_other[-1])


def test_as_a_program_of_its_own(finished, tiny_checkpoint):
    out, said = finished
    assert "108,280 trainable parameters" in said and "s of speech a step" in said

    # What is saved speaks, with the voice that came with the checkpoint: its content was made anew.
    audios = []
    for folder in (tiny_checkpoint, out, out / "last"):
        pipe = IndexTTS2TextToAudioPipeline.from_pretrained(folder)
        audios.append(pipe("Hello.", duration_s=0.4, seed=1, num_inference_steps=2)["audio"])
        assert len(audios[-1]) == round(0.4 * 22050)
    assert not np.array_equal(audios[0], audios[1])

    base, last = load_s2m(tiny_checkpoint), load_s2m(out / "last")
    assert changed_weights(base, last) == set(base.state_dict())
    for name in ("t2s", "semantic_codec"):
        (weights,) = (tiny_checkpoint / name).glob("*.safetensors")
        assert (out / name / weights.name).read_bytes() == weights.read_bytes()

    rows = read_log(out, "train/")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    names = {"loss", "gradient_norm", "learning_rate", "velocity_l1_per_bin"}
    assert {key.removeprefix("train/") for key in rows[0]} == names | {"step"}
    rows = read_log(out, "eval/")
    assert [row["step"] for row in rows] == [0, 4]
    assert set(rows[0]) == {"step", "eval/velocity_l1_per_bin", "eval/mel_l1_per_bin"}
    best = json.loads((out / "run.json").read_text())["best"]
    assert best == min(row["eval/velocity_l1_per_bin"] for row in rows)


def test_killed_and_resumed_it_gives_the_same_numbers(options, tmp_path):
    options = [*options, "--save_steps", 2, "--eval_steps", 2, "--gradient_accumulation_steps", 2]
    run_program("train_s2m", "--output", tmp_path / "whole", *options)
    run_killed("train_s2m", "--output", tmp_path / "killed", *options, after=tmp_path / "killed/state/step-00000002")
    assert "Continuing" in run_program("train_s2m", "--output", tmp_path / "killed", *options, "--resume")
    whole, killed = (read_log(tmp_path / name) for name in ("whole", "killed"))
    assert len(whole) == 4 + 3 and whole == killed
    for folder in ("last", "."):
        assert not changed_weights(load_s2m(tmp_path / "whole" / folder), load_s2m(tmp_path / "killed" / folder))


def test_the_run_folder_speaks_at_any_time(options, tmp_path):
    """With its own voices, which are others when what they were made with is."""
    out = tmp_path / "run"
    options += ["--save_steps", 5, "--eval_steps", 5, "--max_train_steps", 1000]
    run_killed("train_s2m", "--output", out, *options, after=out / "state/step-00000005")
    assert changed_weights(load_s2m(out), load_s2m(options[1]))
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(out)
    assert len(pipe("Hello.", duration_s=0.3)["audio"]) == 6615


def test_two_processes_are_one_with_twice_the_batch(options, tiny_checkpoint, tmp_path):
    options = [*options, "--max_train_steps", 6, "--condition_dropout", 0.3]
    run_ranks("train_s2m", 2, "--output", tmp_path / "two", *options)
    run_program("train_s2m", "--output", tmp_path / "one", *options, "--batch_size", 4)
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 8
    for row, expected in zip(two, one, strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    # What is called outside the network's own `forward` has the gradients of both as well.
    base, one, two = (
        load_s2m(folder).state_dict() for folder in (tiny_checkpoint, tmp_path / "one/last", tmp_path / "two/last")
    )
    for name in base:
        step = (one[name] - base[name]).abs().max()
        assert (two[name] - one[name]).abs().max() < 0.02 * step, name


def test_half_precision_and_gradient_checkpointing(options, finished, tmp_path):
    extra = ["--mixed_precision", "bf16", "--gradient_checkpointing"]
    run_program("train_s2m", "--output", tmp_path / "bf16", *options, *extra)
    logs = (read_log(folder) for folder in (tmp_path / "bf16", finished[0]))
    for row, expected in zip(*logs, strict=True):
        for name in row.keys() - {"train/gradient_norm"}:
            assert row[name] == pytest.approx(expected[name], rel=2e-2)
        assert row != expected


# --- wrong input ---------------------------------------------------------------------------------------------------------


def test_a_clip_that_is_no_number(options, tiny_features, tmp_path):
    for split in ("train", "validation"):
        table = load_from_disk(tiny_features / split / "shard-00000")
        rows = table.to_list()
        if split == "train":
            for row in rows:
                row["mel"] = np.full_like(np.array(row["mel"], np.float16), np.nan)
        Dataset.from_list(rows, features=table.features).save_to_disk(tmp_path / "bad" / split / "shard-00000")
    (tmp_path / "bad/features.json").write_text((tiny_features / "features.json").read_text())
    said = run_to_error("train_s2m", "--output", tmp_path / "run", *options, "--data", tmp_path / "bad")
    assert "The loss is nan at step 1, in the batch of speaker" in said
    # The run folder is the checkpoint that it began with.
    assert not changed_weights(load_s2m(options[1]), load_s2m(tmp_path / "run"))


@pytest.mark.parametrize(
    "extra, message",
    [
        (["--prompt_share", 0.7, 0.1], "--prompt_share is 0.7 0.1, but needs two shares"),
        (["--max_frames", 10], "--max_frames is 10, but an utterance needs a second"),
        (["--timestep_shift", 0], "--timestep_shift is 0.0, but needs a number above 0"),
        (["--condition_dropout", 1.5], "--condition_dropout is 1.5, but a probability"),
        (["--level_loss_weight", -0.1], "--level_loss_weight is -0.1, but needs a number of at least 0"),
        (["--level_loss_weight", "nan"], "--level_loss_weight is nan, but needs a number of at least 0"),
        (["--t2s_hidden_states_probability", -1], "--t2s_hidden_states_probability is -1.0, but a probability"),
    ],
)
def test_impossible_options(options, tmp_path, monkeypatch, capsys, extra, message):
    from train_s2m import parse

    command = ["train_s2m.py", "--output", tmp_path / "run", *options, *extra]
    monkeypatch.setattr(sys, "argv", [str(item) for item in command])
    with pytest.raises(SystemExit):
        parse()
    assert message in capsys.readouterr().err


def test_parts_of_other_sizes(options, tiny_checkpoint, tmp_path):
    base = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, base)
    settings = {**load_s2m(base).config, "t2s_hidden_size": 48}
    IndexTTS2SemanticToMelTransformer.from_config(settings).save_pretrained(base / "s2m")
    said = run_to_error("train_s2m", "--output", tmp_path / "run", *options, "--model", base)
    assert "do not fit: `t2s.hidden_size` is 32 but `s2m.t2s_hidden_size` is 48." in said


def test_features_of_another_checkpoint(options, tiny_features, tmp_path):
    other = tmp_path / "features"
    for split in ("train", "validation"):
        load_from_disk(tiny_features / split / "shard-00000").save_to_disk(other / split / "shard-00000")
    made_with = json.loads((tiny_features / "features.json").read_text())
    (other / "features.json").write_text(json.dumps(made_with | {"num_mel_bins": 100}))
    said = run_to_error("train_s2m", "--output", tmp_path / "run", *options, "--data", other)
    assert "num_mel_bins 100, but" in said and "has 80" in said
