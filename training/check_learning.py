"""
Shows that the programs of this folder learn, not only run: each overfits 16 real clips at tiny sizes, and the figures that
come out are held against what is wanted. Takes an hour or two on two CPU cores.

    python training/check_learning.py --data AUDIO_FOLDER --output WORK_FOLDER            # everything, in order
    python training/check_learning.py --data AUDIO_FOLDER --output WORK_FOLDER t2s        # one stage again

`AUDIO_FOLDER` is in the audiofolder layout and has clips of the speakers named in CLIPS. A stage whose run folder is complete is not
trained again; one that was interrupted is resumed. `WORK_FOLDER/results.json` holds the figures, `results.md` the table.

The "held-out" split of these runs is the training clips themselves: overfitting is what is measured here.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from transformers.audio_utils import mel_filter_bank

from data import T2SDataset, load_features, read_manifest
from indextts2_hf import (
    IndexTTS2ForTextToWaveform,
    IndexTTS2T2SForConditionalGeneration,
    IndexTTS2Vocoder,
)
from indextts2_hf.feature_extraction_indextts2 import load_audio, log_mel, resample_soxr


HERE = Path(__file__).parent
# Sixteen short clips of three readers with true transcripts.
CLIPS = {"ls27": 8, "ls26": 4, "ljspeech": 4}
# Speeds at which the targets are prepared, so that a text is heard at many lengths: 0.725 to 1.275 times its own.
SPEEDS = tuple(round(40 / length, 4) for length in range(29, 52))
LENGTH_FACTORS = (0.75, 0.875, 1.0, 1.125, 1.25)
SLOW_SPEED = 0.8
GRIFFIN_LIM_ROUNDS = 60

# The options of each run; the learning rates and steps are for these sizes and 16 clips.
RUNS = {
    "semantic_codec": ["--max_train_steps", 3000, "--batch_size", 8, "--learning_rate", 3e-3, "--eval_steps", 500],
    "t2s": ["--max_train_steps", 2000, "--batch_size", 16, "--learning_rate", 1e-3, "--eval_steps", 200],
    "t2s_lengths": [
        *("--max_train_steps", 3500, "--batch_size", 16, "--learning_rate", 1e-3, "--eval_steps", 500),
        *("--free_length_probability", 0.1, "--length_jitter", 2),
    ],
    "text_recognizer": [
        *("--max_train_steps", 500, "--batch_size", 16, "--learning_rate", 2e-3, "--eval_steps", 100, "--size", 64),
    ],
    "s2m": ["--max_train_steps", 1200, "--batch_size", 8, "--learning_rate", 1e-3, "--eval_steps", 500],
    "vocoder": [
        *("--max_train_steps", 4000, "--batch_size", 4, "--learning_rate", 1e-3, "--eval_steps", 250),
        *(
            "--segment_s",
            0.372,
            "--discriminator_channels",
            4,
            "--discriminator_start_step",
            1500,
            "--max_grad_norm",
            500,
        ),
    ],
    "vocoder_with_source": [
        *("--max_train_steps", 7100, "--batch_size", 4, "--learning_rate", 5e-4, "--eval_steps", 1000),
        *("--source_steps", 6000, "--segment_s", 0.372, "--discriminator_channels", 8),
        *("--discriminator_start_step", 6200, "--discriminator_rate_factor", 2, "--max_grad_norm", 500),
    ],
    "emotion": ["--max_train_steps", 300, "--batch_size", 16, "--learning_rate", 3e-4, "--eval_steps", 100],
    "emotion_lora": [
        "--max_train_steps",
        300,
        "--batch_size",
        16,
        "--learning_rate",
        2e-3,
        "--eval_steps",
        50,
        "--patience",
        100,
    ],
}


# --- clips and programs --------------------------------------------------------------------------------------------------


def choose_clips(source: str, output: Path) -> None:
    """Copies the shortest clips of each reader, as they are and slowed, into folders whose two splits are the same."""
    chosen = []
    for speaker, count in CLIPS.items():
        clips = [clip for clip in read_manifest(source) if clip.speaker == speaker and clip.split != "validation"]
        chosen += sorted(clips, key=lambda clip: soundfile.info(clip.audio).duration)[:count]
    for name, speed in (("clips", 1.0), ("slow", SLOW_SPEED)):
        for split in ("train", "validation"):
            folder = output / name / split
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
                table = csv.writer(file)
                table.writerow(["file_name", "text", "speaker"])
                for clip in chosen:
                    waveform, rate = load_audio(clip.audio)
                    if speed != 1.0:
                        waveform = resample_soxr(waveform, round(rate * speed), rate)
                    file_name = f"{Path(clip.audio).stem}.wav"
                    soundfile.write(folder / file_name, waveform, rate)
                    table.writerow([file_name, clip.text, clip.speaker])


def call(program: str, *options: Any) -> None:
    subprocess.run([sys.executable, str(HERE / f"{program}.py"), *map(str, options)], check=True)


def train(work: Path, program: str, name: str, model: str, data: str, *options: Any) -> float:
    """Trains `work/name` from `work/model` on `work/data`; gives the minutes it took, 0 if it was there."""
    out, start = work / name, time.monotonic()
    done = json.loads((out / "run.json").read_text())["step"] if (out / "run.json").is_file() else 0
    if done < RUNS[name][1]:
        common = ["--warmup_steps", 50, "--log_steps", 50, "--save_steps", 250, "--num_workers", 0, "--resume"]
        files = ["--model", work / model, "--data", work / data, "--output", out]
        call(program, *files, *common, *RUNS[name], *options)
    return (time.monotonic() - start) / 60


def prepare(work: Path, name: str, clips: str, model: str, speeds: tuple[float, ...]) -> None:
    if not (work / name / "features.json").is_file():
        options = ["--model", work / model, "--output", work / name, "--speeds", *speeds, "--num_workers", 2]
        call("prepare_dataset", work / clips, *options)


def evaluations(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [row for row in rows if any(name.startswith("eval/") for name in row)]


# --- stages --------------------------------------------------------------------------------------------------------------


def check_codec(work: Path) -> dict[str, Any]:
    prepare(work, "features_untrained", "clips", "checkpoint", (1.0,))
    minutes = train(work, "train_semantic_codec", "semantic_codec", "checkpoint", "features_untrained")
    best = max(evaluations(work / "semantic_codec"), key=lambda row: row["eval/explained_variance"])
    return {
        "explained variance of the features (wanted: 0.8)": best["eval/explained_variance"],
        "share of the codebook in use (wanted: 0.6)": best["eval/codebook_use"],
        "minutes": minutes,
    }


@torch.no_grad()
def free_tokens(
    t2s: IndexTTS2T2SForConditionalGeneration, dataset: T2SDataset, row: int, count: int | None
) -> torch.LongTensor:
    """Greedy tokens of a clip's text with another clip as the prompt; the count is told, not enforced."""
    target = dataset.features[row]
    prompt = next(
        other
        for other in dataset.rows_of_speaker[dataset.speakers[row]]
        if dataset.clips[other] != dataset.clips[row] and dataset.features[other]["speed"] == 1.0
    )
    features = torch.tensor(dataset.features[prompt]["semantic_features"]).float()[None]
    inputs_embeds, attention_mask = t2s.prepare_prefix(
        torch.tensor(target["input_ids"])[None],
        speaker_latents=t2s.encode_speaker(features),
        emotion_embeds=t2s.encode_emotion(features),
        num_semantic_tokens=count,
    )
    tokens = t2s.generate(
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        do_sample=False,
        num_beams=1,
        max_new_tokens=2 * int(target["num_semantic_tokens"]) + 50,
    )[0]
    is_stop = tokens == t2s.config.semantic_stop_token_id
    return tokens[: int(is_stop.int().argmax())] if is_stop.any() else tokens


def check_t2s(work: Path, name: str = "t2s") -> dict[str, Any]:
    prepare(work, "features", "clips", "semantic_codec", SPEEDS)
    minutes = train(work, "train_t2s", name, "semantic_codec", "features", "--stage", 1, "--dropout", 0)
    t2s = IndexTTS2T2SForConditionalGeneration.from_pretrained(work / name, subfolder="t2s").eval()
    dataset = T2SDataset(load_features(work / "features", "validation"), seed=0)
    equal, total, errors = 0, 0, {factor: [] for factor in LENGTH_FACTORS}
    for row in range(len(dataset.features)):
        truth = torch.tensor(dataset.features[row]["semantic_ids"])
        tokens = free_tokens(t2s, dataset, row, len(truth))
        shared = min(len(tokens), len(truth))
        equal += int((tokens[:shared] == truth[:shared]).sum())
        total += max(len(tokens), len(truth))
        for factor in LENGTH_FACTORS:
            asked = round(factor * len(truth))
            errors[factor].append(abs(len(free_tokens(t2s, dataset, row, asked)) - asked) / asked)
    return {
        "semantic tokens reproduced greedily, % (wanted: 95)": 100 * equal / total,
        **{
            f"token count error at {factor} x the true count, %, mean / worst (wanted: 5)": [
                100 * float(np.mean(values)),
                100 * max(values),
            ]
            for factor, values in errors.items()
        },
        "minutes": minutes,
    }


def check_t2s_lengths(work: Path) -> dict[str, Any]:
    """With told counts that are up to two tokens off: whether a count never heard with a text is met."""
    return check_t2s(work, "t2s_lengths")


def speaker_accuracy(embeds: torch.Tensor, speakers: torch.LongTensor, clips: list[str]) -> float:
    """How often a new linear classifier names the speaker of `(num_rows, hidden_size)` of a clip that it has not seen, in %."""
    embeds = (embeds - embeds.mean(dim=0)) / embeds.std(dim=0).clamp(min=1e-8)
    is_right = []
    for clip in sorted(set(clips)):
        is_held_out = torch.tensor([name == clip for name in clips])
        classifier = torch.nn.Linear(embeds.shape[1], int(speakers.max()) + 1)
        torch.nn.init.zeros_(classifier.weight)
        optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure(chosen=~is_held_out, classifier=classifier, optimizer=optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(classifier(embeds[chosen]), speakers[chosen])
            loss = loss + 0.01 * classifier.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        found = classifier(embeds[is_held_out]).argmax(dim=1)
        is_right.append((found == speakers[is_held_out]).float().mean())
    return 100 * float(torch.stack(is_right).mean())


def check_emotion(work: Path) -> dict[str, Any]:
    """Stage 2 with and without the reversed speaker term: what is found in the emotion vectors afterwards."""
    dataset = T2SDataset(load_features(work / "features", "train"), seed=0)
    speakers = torch.tensor([dataset.speaker_numbers[speaker] for speaker in dataset.speakers])
    shares = torch.bincount(speakers) / len(speakers)
    figures: dict[str, Any] = {"share of the most frequent speaker, which is chance, %": 100 * float(shares.max())}
    for name, weight in (("emotion", 0.1), ("emotion_without_term", 0.0)):
        RUNS[name] = RUNS["emotion"]
        options = ["--stage", 2, "--dropout", 0, "--speaker_loss_weight", weight]
        figures["minutes"] = train(work, "train_t2s", name, "t2s", "features", *options)
        t2s = IndexTTS2T2SForConditionalGeneration.from_pretrained(work / name / "last", subfolder="t2s").eval()
        with torch.no_grad():
            features = (torch.as_tensor(row["semantic_features"]).float()[None] for row in dataset.features)
            embeds = torch.cat([t2s.encode_emotion(row) for row in features])
        figures[f"a new classifier names the speaker of an emotion vector, weight {weight}, %"] = speaker_accuracy(
            embeds, speakers, dataset.clips
        )
        rows = [json.loads(line) for line in (work / name / "log.jsonl").read_text().splitlines()]
        figures[f"the classifier of the run itself at its end, weight {weight}, %"] = [
            100 * row["train/speaker_accuracy"] for row in rows if "train/speaker_accuracy" in row
        ][-1]
        last = evaluations(work / name)[-1]
        figures[f"semantic cross-entropy per token, weight {weight}"] = last["eval/semantic_cross_entropy_per_token"]
    return figures


def check_text_recognizer(work: Path) -> dict[str, Any]:
    prepare(work, "features", "clips", "semantic_codec", SPEEDS)
    minutes = train(work, "train_text_recognizer", "text_recognizer", "semantic_codec", "features")
    best = min(evaluations(work / "text_recognizer"), key=lambda row: row["eval/loss_per_text_token"])
    return {
        "text tokens read wrongly from the semantic tokens, % (wanted: 5)": 100 * best["eval/text_token_error_rate"],
        "minutes": minutes,
    }


def check_s2m(work: Path) -> dict[str, Any]:
    """Mels generated from the true tokens, as the program's own evaluation makes them: with a random part as the prompt."""
    prepare(work, "features_codec", "clips", "t2s", (1.0,))
    minutes = train(work, "train_s2m", "s2m", "t2s", "features_codec", "--num_generated", sum(CLIPS.values()))
    rows = evaluations(work / "s2m")
    best = min(rows, key=lambda row: row["eval/velocity_l1_per_bin"])
    untrained, trained = (row["eval/mel_l1_per_bin"] for row in (rows[0], best))
    return {
        "mel L1 per bin, untrained": untrained,
        "mel L1 per bin, trained": trained,
        "ratio (wanted: below 0.333)": trained / untrained,
        "minutes": minutes,
    }


def griffin_lim(mel: torch.Tensor, extractor: Any) -> np.ndarray:
    """Waveform of `(num_frames, num_mel_bins)` by Griffin and Lim's algorithm, over the pseudo-inverse of the mel filters."""
    n_fft, hop_length, win_length = extractor.n_fft, extractor.hop_length, extractor.win_length
    filters = mel_filter_bank(
        num_frequency_bins=n_fft // 2 + 1,
        num_mel_filters=extractor.num_mel_bins,
        min_frequency=extractor.mel_fmin,
        max_frequency=extractor.mel_fmax or extractor.sampling_rate / 2,
        sampling_rate=extractor.sampling_rate,
        norm="slaney",
        mel_scale="slaney",
    )
    magnitude = (torch.from_numpy(np.linalg.pinv(filters.T)).float() @ mel.exp().T).clamp(min=0)
    window = torch.hann_window(win_length)
    generator = torch.Generator().manual_seed(0)
    phase = torch.polar(torch.ones_like(magnitude), 2 * torch.pi * torch.rand(magnitude.shape, generator=generator))
    length = mel.shape[0] * hop_length
    for _ in range(GRIFFIN_LIM_ROUNDS):
        waveform = torch.istft(magnitude * phase, n_fft, hop_length, win_length, window, length=length)
        spectrum = torch.stft(waveform, n_fft, hop_length, win_length, window, return_complex=True)[
            :, : magnitude.shape[1]
        ]
        phase = spectrum / spectrum.abs().clamp(min=1e-8)
    return waveform.numpy()


def distill_mos(waveforms: list[np.ndarray], sampling_rate: int) -> float | None:
    """Mean DistillMOS, 1 to 5; `None` where the package distillmos is not installed."""
    sys.modules.setdefault("torchaudio", types.ModuleType("torchaudio"))  # imported there, not used for arrays
    try:
        from distillmos import ConvTransformerSQAModel
    except ImportError:
        return None
    predictor = ConvTransformerSQAModel().eval()
    scores = []
    with torch.no_grad():
        for waveform in waveforms:
            waveform = resample_soxr(np.float32(0.9 * waveform / np.abs(waveform).max()), sampling_rate, 16000)
            scores.append(float(predictor(torch.tensor(waveform)[None])))
    return float(np.mean(scores))


def check_vocoder_with_source(work: Path) -> dict[str, Any]:
    base = work / "checkpoint_with_source"
    if not base.is_dir():
        torch.manual_seed(0)
        config = dict(IndexTTS2Vocoder.from_pretrained(work / "checkpoint", subfolder="vocoder").config)
        shutil.copytree(work / "checkpoint", base)
        IndexTTS2Vocoder.from_config({**config, "use_source": True}).save_pretrained(base / "vocoder")
    return check_vocoder(work, "vocoder_with_source", base.name)


@torch.no_grad()
def check_vocoder(work: Path, name: str = "vocoder", base: str = "checkpoint") -> dict[str, Any]:
    minutes = train(work, "train_vocoder", name, base, "clips")
    model = IndexTTS2ForTextToWaveform.from_pretrained(work / base)
    extractor = model.feature_extractor
    # The last one: what the discriminators teach is not what chooses the best.
    trained = IndexTTS2Vocoder.from_pretrained(work / name / "last", subfolder="vocoder").eval()
    rate = extractor.sampling_rate
    settings = {
        name: getattr(extractor, name)
        for name in ("sampling_rate", "num_mel_bins", "n_fft", "win_length", "hop_length", "mel_fmin", "mel_fmax")
    }
    waveforms = {"recordings": [], "untrained": [], "trained": [], "Griffin-Lim": []}
    distances = {"untrained": [], "trained": [], "Griffin-Lim": []}
    for clip in read_manifest(work / "clips"):
        if clip.split == "validation":
            continue
        recording = resample_soxr(*load_audio(clip.audio), rate)
        mel = log_mel(torch.tensor(recording), **settings)
        made = {
            "untrained": model.vocoder(mel[None]).waveform[0].numpy(),
            "trained": trained(mel[None]).waveform[0].numpy(),
            "Griffin-Lim": griffin_lim(mel, extractor),
        }
        waveforms["recordings"].append(recording)
        for name, waveform in made.items():
            waveforms[name].append(waveform)
            again = log_mel(torch.tensor(waveform), **settings)[: len(mel)]
            distances[name].append(float((again - mel[: len(again)]).abs().mean()))
    distances = {name: float(np.mean(values)) for name, values in distances.items()}
    return {
        **{f"mel L1 per bin, {name}": value for name, value in distances.items()},
        "ratio (wanted: at most 0.25)": distances["trained"] / distances["untrained"],
        **{f"DistillMOS, {name}": distill_mos(values, rate) for name, values in waveforms.items()},
        "minutes": minutes,
    }


@torch.no_grad()
def check_lora(work: Path) -> dict[str, Any]:
    """An adapter for a slow manner of speaking: how long the model speaks when the length is free."""
    prepare(work, "features_slow", "slow", "t2s", (1.0,))
    minutes = train(work, "train_emotion_lora", "emotion_lora", "t2s", "features_slow")
    t2s = IndexTTS2T2SForConditionalGeneration.from_pretrained(work / "t2s", subfolder="t2s").eval()
    dataset = T2SDataset(load_features(work / "features", "validation"), seed=0)
    rows = range(len(dataset.features))
    before = [free_tokens(t2s, dataset, row, None) for row in rows]
    t2s.load_adapter(str(work / "emotion_lora"), adapter_name="slow")
    slow = [free_tokens(t2s, dataset, row, None) for row in rows]
    t2s.disable_adapters()
    disabled = [free_tokens(t2s, dataset, row, None) for row in rows]
    truth = [len(dataset.features[row]["semantic_ids"]) for row in rows]
    ratios = [sum(map(len, tokens)) / sum(truth) for tokens in (before, slow, disabled)]
    return {
        "tokens of a free length / true count: base": ratios[0],
        "with the adapter (wanted: towards 1.25)": ratios[1],
        "with the adapter disabled": ratios[2],
        "disabled equals base, token by token": all(map(torch.equal, before, disabled)),
        "minutes": minutes,
    }


STAGES = {
    "semantic_codec": check_codec,
    "t2s": check_t2s,
    "t2s_lengths": check_t2s_lengths,
    "emotion": check_emotion,
    "text_recognizer": check_text_recognizer,
    "s2m": check_s2m,
    "vocoder": check_vocoder,
    "vocoder_with_source": check_vocoder_with_source,
    "emotion_lora": check_lora,
}


def show(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(map(show, value))
    return f"{value:.3g}" if isinstance(value, float) else "not measured" if value is None else str(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"of {', '.join(STAGES)} (default: all)")
    parser.add_argument("--data", required=True, help="folder of recordings")
    parser.add_argument("--output", required=True, type=Path, help="where everything is written")
    parser.add_argument(
        "--sizes", type=Path, default=HERE / "configs" / "tiny_sizes.yaml", help="(default: %(default)s)"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.stages) - set(STAGES)
    if unknown:
        parser.error(f"no stage {', '.join(sorted(unknown))}: choose of {', '.join(STAGES)}")
    work = arguments.output
    if not (work / "clips").is_dir():
        choose_clips(arguments.data, work)
    if not (work / "checkpoint" / "config.json").is_file():
        tokenizer = HERE.parent / "src" / "indextts2_hf" / "embedded"
        call("make_checkpoint", "--sizes", arguments.sizes, "--tokenizer", tokenizer, "--output", work / "checkpoint")
    results_file = work / "results.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    for name in arguments.stages or STAGES:
        figures = STAGES[name](work)
        if not figures["minutes"] and name in results:
            figures["minutes"] = results[name]["minutes"]
        results[name] = figures
        results_file.write_text(json.dumps(results, indent=2))
        lines = ["| stage | figure | |", "|---|---|---|"]
        lines += [
            f"| {stage} | {key} | {show(value)} |" for stage, table in results.items() for key, value in table.items()
        ]
        (work / "results.md").write_text("\n".join(lines) + "\n")
        sys.stdout.write(f"{name}: {json.dumps(figures, indent=2)}\n")


if __name__ == "__main__":
    main()
