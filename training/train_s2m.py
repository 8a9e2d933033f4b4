"""
Trains the semantic-to-mel network: flow matching with an L1 loss (paper, section 3.2), in one stage.

    python training/train_s2m.py --model CHECKPOINT --data FEATURES --output RUN
    accelerate launch training/train_s2m.py --config training/configs/s2m.yaml --model … --data … --output …

`CHECKPOINT` is a folder or a Hub repository: released and converted, trained before, or new (`make_checkpoint.py`). `FEATURES` comes
from `prepare_dataset.py`. `RUN` becomes a whole checkpoint: `indextts2 speak "Hello." --model RUN`.

Each utterance is cut at random into a prompt and a target. The network sees the prompt's mel, the voice, what both parts say and
the target's mel mixed with noise, and learns the way from the noise to the mel. In half of the draws, what the target says comes
with the hidden states of the checkpoint's own text-to-semantic transformer: train that one first.

A prompt of the same utterance is as loud and as high as the target. In speech with emotion it would tell level, tilt and pitch, which
then need not be learnt from tokens and states; with `--other_prompt_probability` it is the end of another recording of the speaker, and
the target the beginning of the utterance, as in inference.

Where the mel is uncertain, the L1 distance asks for the median of its logarithm, whose power is too low: in the small checkpoint
happy and angry speech was no louder than neutral. `--level_loss_weight` adds the L1 distance between the level of the target's frames and that of
the mel to which the velocity leads in one step.

The paper states the random cut, the three conditions, the 0.5 and the L1 loss. The released code states the uniform times and the
0.1 of dropped conditions. Where utterances are cut, prompts of other recordings, the shift of times, the levels, batch, rate, steps and
schedule are ours.
"""

import argparse
import math
from collections import defaultdict
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import get_cosine_schedule_with_warmup

from checkpoint import load_part
from data import draw_generator, load_features
from indextts2_hf import (
    IndexTTS2FlowMatchScheduler,
    IndexTTS2SemanticCodec,
    IndexTTS2SemanticToMelTransformer,
    IndexTTS2T2SForConditionalGeneration,
)
from indextts2_hf.modeling_s2m import IndexTTS2SemanticToMelOutput, frame_l1_loss
from run import Run, add_run_arguments, parse_arguments, positive_int, run_program


# How mels are generated in an evaluation: the released guidance; fewer steps than the released 25, for time.
NUM_EVALUATION_STEPS = 10
GUIDANCE_SCALE = 1.7


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--prompt_share",
        type=float,
        nargs=2,
        metavar=("LEAST", "MOST"),
        default=[0.1, 0.7],
        help="how much of an utterance is the prompt (ours: %(default)s)",
    )
    parser.add_argument(
        "--other_prompt_probability",
        type=float,
        default=0.0,
        help="how often the prompt is the end of another recording of the speaker, and the utterance from its beginning the target (ours: %(default)s)",
    )
    parser.add_argument(
        "--least_rows_per_speaker",
        type=positive_int,
        default=1,
        help="a speaker with fewer utterances comes as often as one with so many (default: %(default)s)",
    )
    parser.add_argument(
        "--max_frames",
        type=positive_int,
        default=2584,
        help="mel frames of an utterance, prompt included; longer ones are cropped (ours: %(default)s, 30 s)",
    )
    parser.add_argument(
        "--timestep_shift",
        type=float,
        default=1.0,
        help="above 1 more times are near the noise, where what is said decides; 1 is the released code's (default: %(default)s)",
    )
    parser.add_argument(
        "--t2s_hidden_states_probability",
        type=float,
        default=0.5,
        help="how often the target comes with T2S hidden states; 0 loads no T2S (paper: %(default)s)",
    )
    parser.add_argument(
        "--condition_dropout",
        type=float,
        default=0.1,
        help="how often an utterance has no conditions, which guidance needs (released code: %(default)s)",
    )
    parser.add_argument(
        "--level_loss_weight",
        type=float,
        default=0.0,
        help="how much the level of each frame counts beside the velocity (ours; default: %(default)s)",
    )
    parser.add_argument(
        "--num_generated",
        type=positive_int,
        default=4,
        help="held-out utterances whose mel is generated in an evaluation (default: %(default)s)",
    )
    add_run_arguments(parser)
    parser.set_defaults(batch_size=16, learning_rate=1e-4, max_train_steps=300_000)
    arguments = parse_arguments(parser)
    least, most = arguments.prompt_share
    if not 0.0 < least <= most < 1.0:
        parser.error(f"--prompt_share is {least} {most}, but needs two shares between 0 and 1, the lower one first")
    if arguments.max_frames < 86:
        parser.error(f"--max_frames is {arguments.max_frames}, but an utterance needs a second, which is 86 frames")
    if not 0.0 < arguments.timestep_shift <= 100.0:
        parser.error(f"--timestep_shift is {arguments.timestep_shift}, but needs a number above 0, at most 100")
    for name in ("t2s_hidden_states_probability", "condition_dropout", "other_prompt_probability"):
        if not 0.0 <= getattr(arguments, name) <= 1.0:
            parser.error(f"--{name} is {getattr(arguments, name)}, but a probability is a number from 0 to 1")
    if not 0.0 <= arguments.level_loss_weight < math.inf:
        parser.error(f"--level_loss_weight is {arguments.level_loss_weight}, but needs a number of at least 0")
    return arguments


# --- data ----------------------------------------------------------------------------------------------------------------


class FlowMatchingDataset(Dataset):
    r"""
    Utterances cut into a prompt and a target, or behind a prompt of another recording of the speaker, each with its noise and its time.

    Args:
        features (`datasets.Dataset`): from `load_features`.
        seed (`int`): of everything that is drawn.
        mel_frames_per_token (`float`): that of the network; says at which frame a token begins.
        max_frames (`int`): longer utterances are cropped to about that many mel frames, prompt included.
        prompt_share (`tuple[float, float]`): least and most share of the tokens that is the prompt.
        timestep_shift (`float`): 1 draws times evenly; above 1 they are nearer to 0, the noise.
        hidden_states_probability (`float`): how often an example comes with the inputs of the T2S.
        condition_dropout (`float`, defaults to 0.0): how often it has no conditions.
        other_prompt_probability (`float`, defaults to 0.0): how often the prompt is the end of another recording, where there is one.
        num_rows (`int`, *optional*): only so many utterances, spread evenly.
        least_rows_per_speaker (`int`, defaults to 1): the utterances of a speaker with fewer are repeated up to so many.
    """

    def __init__(
        self,
        features: datasets.Dataset,
        seed: int,
        mel_frames_per_token: float,
        max_frames: int,
        prompt_share: tuple[float, float],
        timestep_shift: float,
        hidden_states_probability: float,
        condition_dropout: float = 0.0,
        other_prompt_probability: float = 0.0,
        num_rows: int | None = None,
        least_rows_per_speaker: int = 1,
    ):
        self.seed = seed
        self.mel_frames_per_token = mel_frames_per_token
        self.max_tokens = int(max_frames / mel_frames_per_token)
        self.prompt_share = prompt_share
        self.timestep_shift = timestep_shift
        self.hidden_states_probability = hidden_states_probability
        self.condition_dropout = condition_dropout
        self.other_prompt_probability = other_prompt_probability
        # The features of a target are large and not needed; those of a voice are all that is.
        self.utterances = features.select_columns(["input_ids", "semantic_ids", "mel", "speaker_embeds"])
        self.voices = features.select_columns(["semantic_features"])
        table = features.with_format(None).select_columns(
            ["clip", "speaker", "emotion", "num_semantic_tokens", "duration_s", "speed"]
        )
        self.clips, self.speakers, self.emotions, lengths, durations, speeds = (
            list(table[name]) for name in table.column_names
        )
        self.rows_of_speaker: dict[str, list[int]] = defaultdict(list)
        for row, speaker in enumerate(self.speakers):
            self.rows_of_speaker[speaker].append(row)
        # Speech at another speed is for the T2S; its pitch is nobody's.
        rows = [row for row, speed in enumerate(speeds) if speed == 1.0]
        if not rows:
            raise ValueError(
                f"None of the {len(speeds)} rows is of speed 1. Prepare the data with 1.0 among the --speeds."
            )
        num_rows = min(num_rows or len(rows), len(rows))
        self.targets = [rows[number * len(rows) // num_rows] for number in range(num_rows)]
        of_speaker: dict[str, list[int]] = defaultdict(list)
        for row in self.targets:
            of_speaker[self.speakers[row]].append(row)
        for rows in of_speaker.values():
            self.targets += [rows[number % len(rows)] for number in range(len(rows), least_rows_per_speaker)]
        self.lengths = [min(lengths[row], self.max_tokens) for row in self.targets]
        self.duration_s = sum(
            durations[row] * length / lengths[row] for row, length in zip(self.targets, self.lengths, strict=True)
        )

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        """The example of a pair (index, number of the draw)."""
        index, draw = key
        rng = draw_generator(self.seed, draw)
        row = self.targets[index]
        utterance = self.utterances[row]

        # Everything is drawn whether it is used or not: one option does not change what another one does.
        crop, share, time, no_conditions, with_states, voice, feeling, other_prompt = rng.random(8).tolist()

        # As in inference, voice and prompt are of one recording.
        others = [other for other in self.rows_of_speaker[self.speakers[row]] if self.clips[other] != self.clips[row]]
        voice_row = others[int(voice * len(others))] if others else row

        whole_ids = torch.as_tensor(utterance["semantic_ids"]).long()
        mel = torch.as_tensor(utterance["mel"]).float()
        least, most = self.prompt_share
        num_tokens = min(len(whole_ids), self.max_tokens)
        num_prompt_tokens = min(max(round((least + share * (most - least)) * num_tokens), 1), num_tokens - 1)
        speaker_embeds = torch.as_tensor(utterance["speaker_embeds"]).float()
        if others and other_prompt < self.other_prompt_probability:
            prompt = self.utterances[voice_row]
            prompt_ids = torch.as_tensor(prompt["semantic_ids"]).long()
            prompt_mel = torch.as_tensor(prompt["mel"]).float()
            speaker_embeds = torch.as_tensor(prompt["speaker_embeds"]).float()
            num_prompt_tokens = min(num_prompt_tokens, len(prompt_ids))
            # As in inference, where a recording ends and a sentence begins: from random places a beginning would hardly be seen.
            prompt_ids, prompt_mel, _ = self._cut(prompt_ids, prompt_mel, num_prompt_tokens, 1.0)
            semantic_ids, mel, start = self._cut(whole_ids, mel, self.max_tokens - num_prompt_tokens, 0.0)
            num_prompt_frames = len(prompt_mel)
            semantic_ids, mel = torch.cat([prompt_ids, semantic_ids]), torch.cat([prompt_mel, mel])
        else:
            semantic_ids, mel, start = self._cut(whole_ids, mel, self.max_tokens, crop)
            start += num_prompt_tokens
            # All frames behind the prompt are the target's: the regulator learns how long speech really is.
            num_prompt_frames = min(int(num_prompt_tokens * self.mel_frames_per_token), len(mel) - 1)

        example = {
            "id": self.clips[row],
            "semantic_ids": semantic_ids,
            "num_prompt_tokens": num_prompt_tokens,
            "mel": mel,
            "num_prompt_frames": num_prompt_frames,
            "speaker_embeds": speaker_embeds,
            # A mel's values spread more widely than those of the noise: it is seen early, and even times teach little of what is said.
            # The shift is that of Stable Diffusion 3 (arXiv:2403.03206, section 5.3.2).
            "timestep": time / (time + self.timestep_shift * (1.0 - time)),
            "noise": torch.from_numpy(rng.standard_normal(tuple(mel.shape), dtype="float32")),
            # For each row alone, so that it does not depend on its batch; the original drops a whole batch's.
            "is_unconditional": no_conditions < self.condition_dropout,
        }
        if with_states < self.hidden_states_probability:
            # As in stages 2 and 3 of T2S: a clip of the same emotion. Without one, the voice's own recording.
            alike = [other for other in others if self.emotions[row] and self.emotions[other] == self.emotions[row]]
            emotion_row = alike[int(feeling * len(alike))] if alike else voice_row
            example["t2s"] = {
                "start": start,
                "input_ids": torch.as_tensor(utterance["input_ids"]).long(),
                "semantic_ids": whole_ids,
                "speaker_features": torch.as_tensor(self.voices[voice_row]["semantic_features"]).float(),
                "emotion_features": torch.as_tensor(self.voices[emotion_row]["semantic_features"]).float(),
            }
        return example

    def _cut(
        self, semantic_ids: torch.LongTensor, mel: torch.Tensor, num_tokens: int, place: float
    ) -> tuple[torch.LongTensor, torch.Tensor, int]:
        """At most `num_tokens` of an utterance with their frames, at a `place` from 0 to 1; and the first one's number."""
        if num_tokens >= len(semantic_ids):
            return semantic_ids, mel, 0
        start = min(int(place * (len(semantic_ids) - num_tokens + 1)), len(semantic_ids) - num_tokens)
        first_frame = int(start * self.mel_frames_per_token)
        mel = mel[first_frame : first_frame + int(num_tokens * self.mel_frames_per_token)]
        return semantic_ids[start : start + num_tokens], mel, start


def collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows padded on the right, with zeros. What the T2S reads is under `t2s`, for the rows that have it alone."""
    batch = {
        "ids": [example["id"] for example in examples],
        "semantic_lengths": torch.tensor([len(example["semantic_ids"]) for example in examples]),
        "mel_lengths": torch.tensor([len(example["mel"]) for example in examples]),
        "timestep": torch.tensor([example["timestep"] for example in examples], dtype=torch.float32),
        "speaker_embeds": torch.stack([example["speaker_embeds"] for example in examples]),
    }
    for name in ("semantic_ids", "mel", "noise"):
        batch[name] = pad_sequence([example[name] for example in examples], batch_first=True)
    for name in ("num_prompt_tokens", "num_prompt_frames", "is_unconditional"):
        batch[name] = torch.tensor([example[name] for example in examples])
    rows = [row for row, example in enumerate(examples) if "t2s" in example]
    if rows:
        parts = [examples[row]["t2s"] for row in rows]
        batch["t2s"] = {
            "rows": rows,
            "starts": [part["start"] for part in parts],
            "attention_mask": pad_sequence([torch.ones_like(part["input_ids"]) for part in parts], batch_first=True),
            "num_semantic_tokens": torch.tensor([len(part["semantic_ids"]) for part in parts]),
            "speaker_feature_lengths": torch.tensor([len(part["speaker_features"]) for part in parts]),
            "emotion_feature_lengths": torch.tensor([len(part["emotion_features"]) for part in parts]),
        }
        for name in ("input_ids", "semantic_ids", "speaker_features", "emotion_features"):
            batch["t2s"][name] = pad_sequence([part[name] for part in parts], batch_first=True)
    return batch


# --- model ---------------------------------------------------------------------------------------------------------------


class UtteranceVelocity(nn.Module):
    """
    From the tokens of prompt and target to the velocity, in one call: what the pipeline does in three (`add_hidden_states`,
    `regulate_length`, `forward`). Processes share gradients only of what runs in the `forward` of the module that was prepared.
    """

    _no_split_modules = IndexTTS2SemanticToMelTransformer._no_split_modules  # for FSDP

    def __init__(self, s2m: IndexTTS2SemanticToMelTransformer):
        super().__init__()
        self.s2m = s2m

    def forward(
        self,
        semantic_embeds: torch.Tensor,
        semantic_lengths: torch.LongTensor,
        num_prompt_tokens: torch.LongTensor,
        num_prompt_frames: torch.LongTensor,
        mel_lengths: torch.LongTensor,
        t2s_hidden_states: torch.Tensor | None,
        has_hidden_states: torch.BoolTensor | None,
        is_unconditional: torch.BoolTensor,
        prompt_mel: torch.Tensor,
        speaker_embeds: torch.Tensor,
        **inputs: torch.Tensor,
    ) -> IndexTTS2SemanticToMelOutput:
        r"""
        Args:
            semantic_embeds (`torch.Tensor` of shape `(batch_size, num_semantic_tokens, semantic_size)`):
                Codebook vectors of whole utterances.
            semantic_lengths, num_prompt_tokens (`torch.LongTensor` of shape `(batch_size,)`):
                Tokens of each row, and how many of them are the prompt.
            mel_lengths, num_prompt_frames (`torch.LongTensor` of shape `(batch_size,)`):
                Mel frames of each row, and how many of them are the prompt.
            t2s_hidden_states (`torch.Tensor` of shape `(batch_size, num_semantic_tokens, t2s_hidden_size)` or `None`):
                T2S states of the tokens.
            has_hidden_states (`torch.BoolTensor` of shape `(batch_size, num_semantic_tokens)` or `None`):
                To which tokens they are added.
            is_unconditional (`torch.BoolTensor` of shape `(batch_size,)`):
                Rows without prompt, content and voice.
            prompt_mel, speaker_embeds, inputs:
                As in the network's `forward`, as is what is returned.
        """
        if t2s_hidden_states is not None:
            # In every row, so that the projection has a gradient in every process, if only zero.
            with_states = self.s2m.add_hidden_states(semantic_embeds, t2s_hidden_states)
            semantic_embeds = torch.where(has_hidden_states[..., None], with_states, semantic_embeds)

        # Prompt and target are two utterances to the regulator, as in the pipeline.
        counts = list(zip(num_prompt_tokens.tolist(), semantic_lengths.tolist(), strict=True))
        parts = [row[:prompt] for row, (prompt, _) in zip(semantic_embeds, counts, strict=True)]
        parts += [row[prompt:length] for row, (prompt, length) in zip(semantic_embeds, counts, strict=True)]
        content = self.s2m.regulate_length(
            pad_sequence(parts, batch_first=True),
            torch.cat([num_prompt_tokens, semantic_lengths - num_prompt_tokens]),
            torch.cat([num_prompt_frames, mel_lengths - num_prompt_frames]),
        )
        frames = zip(*content.chunk(2), num_prompt_frames.tolist(), mel_lengths.tolist(), strict=True)
        rows = [torch.cat([said[:prompt], to_say[: length - prompt]]) for said, to_say, prompt, length in frames]
        content_embeds = pad_sequence(rows, batch_first=True)

        # Zeros where the sampler has them in guidance, before the content projection. The original trains with zeros behind
        # it, but samples with zeros before it as well, so that it meets the projection's bias unprepared.
        prompt_mel, content_embeds = (
            condition.masked_fill(is_unconditional[:, None, None], 0.0) for condition in (prompt_mel, content_embeds)
        )
        speaker_embeds = speaker_embeds.masked_fill(is_unconditional[:, None], 0.0)
        return self.s2m(
            prompt_mel=prompt_mel,
            content_embeds=content_embeds,
            speaker_embeds=speaker_embeds,
            mel_lengths=mel_lengths,
            **inputs,
        )


@torch.no_grad()
def compute_hidden_states(
    t2s: IndexTTS2T2SForConditionalGeneration, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.BoolTensor]:
    """
    T2S states of the target's tokens, read with their text, and with voice and emotion of other clips, as if they had been generated,
    zero where they are not asked for; and the tokens to which they are added.
    """
    states = batch["mel"].new_zeros((*batch["semantic_ids"].shape, t2s.config.hidden_size))
    is_used = torch.zeros(states.shape[:2], dtype=torch.bool, device=states.device)
    if "t2s" in batch:
        inputs = dict(batch["t2s"])
        rows, starts = inputs.pop("rows"), inputs.pop("starts")
        output = t2s(
            **inputs,
            use_cache=False,
            logits_to_keep=1,  # only the states are wanted
        )
        whole_states = output.last_hidden_state[:, :-1].float()
        lengths, num_prompt_tokens = batch["semantic_lengths"].tolist(), batch["num_prompt_tokens"].tolist()
        for row, start, of_row in zip(rows, starts, whole_states, strict=True):
            prompt, length = num_prompt_tokens[row], lengths[row]
            states[row, prompt:length] = of_row[start : start + length - prompt]
            is_used[row, prompt:length] = True
    return states, is_used


@torch.no_grad()
def make_inputs(
    batch: dict[str, Any],
    s2m: IndexTTS2SemanticToMelTransformer,
    codec: IndexTTS2SemanticCodec,
    t2s: IndexTTS2T2SForConditionalGeneration | None,
    accelerator: Accelerator,
) -> dict[str, torch.Tensor | None]:
    """
    Arguments of `UtteranceVelocity.forward` for a batch of log-mels, velocity to learn and frames to learn it on included. Their
    mels are normalised.
    """
    steps = torch.arange(batch["mel"].shape[1], device=batch["mel"].device)
    is_prompt = steps < batch["num_prompt_frames"][:, None]
    is_frame = steps < batch["mel_lengths"][:, None]
    is_target = ~is_prompt & is_frame
    mel = s2m.normalize_mel(batch["mel"]).masked_fill(~is_frame[..., None], 0.0)
    sample = IndexTTS2FlowMatchScheduler().scale_noise(mel, batch["timestep"], batch["noise"])
    states = has_states = None
    if t2s is not None:
        with accelerator.autocast():
            states, has_states = compute_hidden_states(t2s, batch)
    names = ["semantic_lengths", "num_prompt_tokens", "num_prompt_frames", "mel_lengths", "timestep", "speaker_embeds"]
    return {
        **{name: batch[name] for name in [*names, "is_unconditional"]},
        "semantic_embeds": codec.embed(batch["semantic_ids"]),
        "t2s_hidden_states": states,
        "has_hidden_states": has_states,
        "sample": sample.masked_fill(~is_target[..., None], 0.0),
        "prompt_mel": mel.masked_fill(~is_prompt[..., None], 0.0),
        "labels": mel - batch["noise"],
        "loss_mask": is_target,
    }


def level_loss(
    s2m: IndexTTS2SemanticToMelTransformer, inputs: dict[str, torch.Tensor | None], velocity: torch.Tensor
) -> torch.Tensor:
    r"""
    Mean L1 distance between the level of the target's frames and that of the mel to which a velocity leads in one step.

    Args:
        s2m: whose normalisation the mels have.
        inputs (`dict`): from `make_inputs`.
        velocity (`torch.Tensor` of shape `(batch_size, num_mel_frames, num_mel_bins)`): as predicted.

    Returns:
        `torch.Tensor` of shape `()`, in nats of power: 0.23 are a decibel.
    """
    way = 1.0 - inputs["timestep"][:, None, None]
    predicted, recorded = (
        # The sum of the power over all bins: a log-mel is of amplitudes.
        (2.0 * s2m.denormalize_mel(inputs["sample"] + way * of_time.float())).logsumexp(dim=-1, keepdim=True)
        for of_time in (velocity, inputs["labels"])
    )
    return frame_l1_loss(predicted, recorded, inputs["loss_mask"])


# --- evaluation ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(model: nn.Module, inputs: dict[str, torch.Tensor | None], noise: torch.Tensor) -> torch.Tensor:
    """
    Normalised mel `(batch_size, num_mel_frames, num_mel_bins)` from noise of that shape, zero on the prompt and behind the end.
    """
    scheduler = IndexTTS2FlowMatchScheduler()
    scheduler.set_timesteps(NUM_EVALUATION_STEPS, device=noise.device)
    is_target = inputs["loss_mask"][..., None]
    # Guidance: every row with its conditions, then every row without.
    conditions = {name: value for name, value in inputs.items() if name not in ("sample", "timestep", "labels")}
    conditions = {name: value if value is None else torch.cat([value, value]) for name, value in conditions.items()}
    conditions["is_unconditional"] = torch.arange(2 * len(noise), device=noise.device) >= len(noise)
    sample = noise.masked_fill(~is_target, 0.0)
    for timestep in scheduler.timesteps:
        output = model(sample=torch.cat([sample, sample]), timestep=timestep.expand(2 * len(noise)), **conditions)
        conditional, unconditional = output.velocity.chunk(2)
        velocity = GUIDANCE_SCALE * conditional - (GUIDANCE_SCALE - 1.0) * unconditional
        sample = scheduler.step(velocity, timestep, sample).prev_sample.masked_fill(~is_target, 0.0)
    return sample


@torch.no_grad()
def evaluate(
    run: Run,
    model: nn.Module,
    frozen: tuple[IndexTTS2SemanticCodec, IndexTTS2T2SForConditionalGeneration | None],
    held_out_set: FlowMatchingDataset,
    generated_set: FlowMatchingDataset,
) -> dict[str, float]:
    """
    Figures of the held-out split, both L1 distances per mel bin: of the velocity, and of log-mels that are generated from the true
    tokens. Where mels are normalised, the velocity is theirs: then the first compares with no other checkpoint's. Cuts, times,
    noise and voices are the same every time.
    """
    s2m = run.accelerator.unwrap_model(model).s2m
    model.eval()
    velocities, mels = [], []
    for batch, count in run.evaluation_batches(held_out_set, collate):
        output = model(**make_inputs(batch, s2m, *frozen, run.accelerator))
        velocities.append(({"velocity_l1_per_bin": output.loss}, count))
    for batch, count in run.evaluation_batches(generated_set, collate):
        inputs = make_inputs(batch, s2m, *frozen, run.accelerator)
        generated = s2m.denormalize_mel(generate(model, inputs, batch["noise"]))
        distance = (generated - batch["mel"]).abs().mean(dim=-1)
        of_rows = (distance * inputs["loss_mask"]).sum(dim=1) / inputs["loss_mask"].sum(dim=1)
        mels.append(({"mel_l1_per_bin": of_rows.mean()}, count))
    model.train()
    return run.mean_over_rows(velocities) | run.mean_over_rows(mels)


def main() -> None:
    arguments = parse()
    run = Run(arguments, parts=("s2m",), can_shard=True)
    accelerator = run.accelerator

    # Model
    s2m = load_part(IndexTTS2SemanticToMelTransformer, run.base, "s2m")
    codec = load_part(IndexTTS2SemanticCodec, run.base, "semantic_codec")
    codec.eval().requires_grad_(False).to(accelerator.device)
    t2s = None
    if arguments.t2s_hidden_states_probability > 0:
        t2s = load_part(IndexTTS2T2SForConditionalGeneration, run.base, "t2s")
        t2s.eval().requires_grad_(False).to(accelerator.device)
    else:
        # It is never used: weight decay would still change it.
        s2m.t2s_projection.requires_grad_(False)
    sizes = [("semantic_codec.feature_size", codec.config.feature_size, "s2m.semantic_size", s2m.config.semantic_size)]
    if t2s is not None:
        sizes.append(("t2s.hidden_size", t2s.config.hidden_size, "s2m.t2s_hidden_size", s2m.config.t2s_hidden_size))
    for name, size, other_name, other_size in sizes:
        if size != other_size:
            raise ValueError(
                f"The parts of {run.base} do not fit: `{name}` is {size} but `{other_name}` is {other_size}. Make or convert them together."
            )
    if arguments.gradient_checkpointing:
        s2m.enable_gradient_checkpointing()
    model = UtteranceVelocity(s2m).train()

    # Data
    cutting = (arguments.seed, s2m.config.mel_frames_per_token, arguments.max_frames, arguments.prompt_share)
    settings = (*cutting, arguments.timestep_shift)
    probability = arguments.t2s_hidden_states_probability
    train_features, held_out_features = (
        load_features(arguments.data, split, run.base) for split in ("train", "validation")
    )
    train_set = FlowMatchingDataset(
        train_features,
        *settings,
        probability,
        arguments.condition_dropout,
        arguments.other_prompt_probability,
        least_rows_per_speaker=arguments.least_rows_per_speaker,
    )
    held_out_set = FlowMatchingDataset(held_out_features, *settings, probability)
    # As in inference: with hidden states always, if ever.
    generated_set = FlowMatchingDataset(
        held_out_features, *settings, float(probability > 0), num_rows=arguments.num_generated
    )
    loader = run.make_loader(train_set, collate, train_set.lengths)

    # Optimiser
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    num_parameters = sum(parameter.numel() for parameter in parameters)
    optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, weight_decay=arguments.weight_decay)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.warmup_steps, arguments.max_train_steps)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    run.restore()
    s2m = accelerator.unwrap_model(model).s2m

    rows_per_step = arguments.batch_size * arguments.gradient_accumulation_steps * accelerator.num_processes
    run.say(
        f"{num_parameters:,} trainable parameters; {train_set.duration_s / 3600:.2f} h of speech in {len(train_set)} rows; "
        f"{train_set.duration_s / len(train_set) * rows_per_step:.0f} s of speech a step"
    )

    # Loop
    sets = (held_out_set, generated_set)
    if run.step == 0:
        run.keep_best(evaluate(run, model, (codec, t2s), *sets), "velocity_l1_per_bin", {"s2m": s2m})
    for batch in run.batches(loader):
        with accelerator.accumulate(model):
            inputs = make_inputs(batch, s2m, codec, t2s, accelerator)
            output = model(**inputs)
            figures = {"velocity_l1_per_bin": output.loss}
            loss = output.loss
            if arguments.level_loss_weight:
                figures["level_l1_per_frame"] = level_loss(s2m, inputs, output.velocity)
                loss = loss + arguments.level_loss_weight * figures["level_l1_per_frame"]
            run.check_loss(loss, batch["ids"])
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                run.clip_gradients(model.parameters())
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        run.record(figures)
        if not accelerator.sync_gradients:
            continue
        run.advance(scheduler.get_last_lr()[0])
        if run.should_evaluate:
            run.keep_best(evaluate(run, model, (codec, t2s), *sets), "velocity_l1_per_bin", {"s2m": s2m})
        if run.should_save:
            run.save_state()
        if run.is_done:
            break
    run.finish({"s2m": s2m})


if __name__ == "__main__":
    run_program(main)
