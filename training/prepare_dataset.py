"""
Recordings with their texts to the features that the training programs read: semantic features and ids, mel, speaker vector and
text ids, made as inference makes them.

    python training/prepare_dataset.py RECORDINGS --model CHECKPOINT --output FEATURES --num_workers 8
    python training/prepare_dataset.py RECORDINGS --model CHECKPOINT --output FEATURES --device cuda --speeds 0.9 1.0 1.1

RECORDINGS is a folder with `metadata.csv` or `metadata.jsonl` (at its top, or in its folders `train` and `validation`), such a file
itself, or a repository of `datasets`; its columns are `file_name`, `text`, `speaker` and, if you like, `emotion` and `language`.

    FEATURES/train/shard-00000 …        Arrow, one row for each clip and speed
    FEATURES/validation/shard-00000 …
    FEATURES/features.json              what they were made with, and how many there are; written last
    FEATURES/report.jsonl               what was left out, and why

A shard is written whole or not at all: after an interruption the same call makes the missing ones only.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import soxr
import torch
import transformers
from tqdm import tqdm

from checkpoint import find_checkpoint
from data import SPLITS, Clip, add_columns_argument, choose_splits, feature_columns, made_with, read_manifest
from indextts2_hf import (
    IndexTTS2FeatureExtractor,
    IndexTTS2Processor,
    IndexTTS2SemanticToMelPipeline,
    IndexTTS2T2SConfig,
)
from indextts2_hf.configuration_indextts2 import EMBEDDED_NAME
from indextts2_hf.feature_extraction_indextts2 import MIN_AUDIO_S, SILENT_PEAK, load_audio
from indextts2_hf.modeling_indextts2 import check_settings_files, check_weights, read_weight_shapes
from run import positive_int, run_program


DEFAULT_MAX_DURATION_S = 15.0
# Files of the output.
FEATURES, SETTINGS, REPORT = "features.json", "settings.json", "report.jsonl"


@dataclass
class Settings:
    """What a worker needs to know beside its clips."""

    checkpoint: str
    speeds: list[float]
    max_duration_s: float
    device: str


@dataclass
class Shard:
    """Clips that are prepared together, and the folder they go to."""

    folder: Path
    split: str
    clips: list[Clip]


class Skipped(Exception):
    """A clip, or a clip at one speed, that is left out. Arguments: the reason, and what exactly."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Make the features that the training programs read.", allow_abbrev=False
    )
    parser.add_argument("source", help="folder of recordings, manifest file, or repository of `datasets`")
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        metavar="FOLDER",
        help="checkpoint that makes the features: folder, repository, or that of the package (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="where they are written")
    add_columns_argument(parser)
    parser.add_argument(
        "--speeds",
        nargs="+",
        type=float,
        default=[1.0],
        metavar="FACTOR",
        help="speeds at which each training clip is prepared, among which training draws (the paper changes the speed of prompt "
        "and target at random and gives no range; ours is 0.9 1.0 1.1). Validation clips keep theirs. (default: 1.0)",
    )
    parser.add_argument(
        "--max_duration_s",
        type=float,
        metavar="SECONDS",
        help=f"longer clips are left out (default: {DEFAULT_MAX_DURATION_S:g}, or what the checkpoint hears at most)",
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.02,
        metavar="FRACTION",
        help="share of the clips that is held out where the manifest holds out none; 0 for none (default: %(default)s)",
    )
    parser.add_argument(
        "--clips_per_shard",
        type=positive_int,
        default=100,
        help="clips that are written, and after an interruption made again, together (default: %(default)s)",
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        default=0,
        help="processes; each loads the checkpoint (default: %(default)s, this one)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: %(default)s)")
    arguments = parser.parse_args()
    if not all(0.5 <= speed <= 2.0 for speed in arguments.speeds):
        parser.error(f"--speeds {arguments.speeds} must lie between 0.5 and 2")
    if not 0.0 <= arguments.validation_fraction < 1.0:
        parser.error(f"--validation_fraction {arguments.validation_fraction} must be at least 0 and below 1")
    if arguments.max_duration_s is not None and not arguments.max_duration_s > 0:
        parser.error(f"--max_duration_s {arguments.max_duration_s} must be above 0")
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {arguments.device} cannot be used here: {str(error).splitlines()[0]}")
    return arguments


def say(text: str) -> None:
    tqdm.write(text, file=sys.stderr)


# --- shards ----------------------------------------------------------------------------------------------------------------


def plan_shards(splits: dict[str, list[Clip]], output: Path, clips_per_shard: int) -> list[Shard]:
    return [
        Shard(output / split / f"shard-{start // clips_per_shard:05d}", split, clips[start : start + clips_per_shard])
        for split, clips in splits.items()
        for start in range(0, len(clips), clips_per_shard)
    ]


# --- one clip --------------------------------------------------------------------------------------------------------------


def change_speed(waveform: np.ndarray, speed: float) -> np.ndarray:
    """The waveform, float32 of shape `(num_samples,)`, played `speed` times as fast, which moves its pitch as well."""
    return waveform if speed == 1.0 else soxr.resample(waveform, speed, 1.0, "HQ")


class Preparer:
    """
    The parts of a checkpoint that make features, loaded once.

    Args:
        settings (`Settings`): the checkpoint and what to make with it.

    Raises:
        ValueError: the checkpoint is damaged or not whole.
    """

    def __init__(self, settings: Settings):
        self.settings = settings
        folder = Path(settings.checkpoint)
        parts = IndexTTS2SemanticToMelPipeline.load_parts(folder)
        for name in ("semantic_encoder", "semantic_codec", "speaker_encoder"):
            check_weights(parts[name], str(folder / name), read_weight_shapes(str(folder / name)))
        self.pipeline = IndexTTS2SemanticToMelPipeline(**parts).to(settings.device)
        self.device = self.pipeline.device  # which it looks for in all its modules
        self.tokenizer = IndexTTS2Processor.from_pretrained(folder).tokenizer
        self.t2s = IndexTTS2T2SConfig.from_pretrained(folder, subfolder="t2s")
        self.columns = feature_columns(parts["semantic_codec"].feature_size, parts["s2m"].config.num_mel_bins)

    def prepare_shard(self, shard: Shard) -> Iterator[Clip]:
        """Writes a shard, after it has yielded its clips one by one as they are done."""
        rows, report = [], []
        for clip in shard.clips:
            try:
                input_ids = self.read_text(clip)
                waveform, sampling_rate = self.read_audio(clip)
            except Skipped as skipped:
                report.append(report_line(clip, shard.split, skipped))
            else:
                for speed in self.settings.speeds if shard.split == "train" else [1.0]:
                    try:
                        rows.append(self.make_row(clip, input_ids, waveform, sampling_rate, speed))
                    except Skipped as skipped:
                        report.append(report_line(clip, shard.split, skipped, speed))
            yield clip
        columns = {name: [row[name] for row in rows] for name in self.columns}  # all of them, even without rows
        temporary = shard.folder.with_name(f".{shard.folder.name}.{os.getpid()}.tmp")
        try:
            datasets.Dataset.from_dict(columns, features=self.columns).save_to_disk(temporary, num_shards=1)
            write_lines(temporary / REPORT, report)
            os.replace(temporary, shard.folder)
        except OSError as error:
            raise OSError(
                f"{shard.folder} could not be written: {error}. The shards that are there are whole: make room, then call again."
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def read_text(self, clip: Clip) -> list[int]:
        """Text ids as the text-to-semantic transformer gets them, without start and stop."""
        limit = self.t2s.max_text_tokens
        if not any(character.isalnum() for character in clip.text):
            raise Skipped("no text", f"{clip.text!r} has no letter and no digit")
        try:
            segments = self.tokenizer.split_text(clip.text, limit)
        except ValueError as error:
            raise Skipped("no text", str(error)) from error
        num_tokens = sum(map(len, segments))
        if num_tokens > limit:
            raise Skipped("text too long", f"{num_tokens} tokens, but the model reads at most {limit}")
        return self.tokenizer.convert_tokens_to_ids(segments[0])

    def read_audio(self, clip: Clip) -> tuple[np.ndarray, int]:
        """Waveform of shape `(num_samples,)` at its own sampling rate."""
        longest = self.settings.max_duration_s
        if clip.audio is None:
            raise Skipped("no file", "the manifest names none")
        try:
            waveform, sampling_rate = load_audio(clip.audio, longest + 1.0)
        except FileNotFoundError as error:
            raise Skipped("no file", str(error)) from error
        except (ValueError, OSError) as error:
            raise Skipped("unreadable", str(error)) from error
        if len(waveform) > longest * sampling_rate:
            raise Skipped("too long", f"more than {longest:g} s")
        if len(waveform) < MIN_AUDIO_S * sampling_rate:
            raise Skipped(
                "too short", f"{len(waveform) / sampling_rate:.3f} s, but at least {MIN_AUDIO_S} s are needed"
            )
        if np.abs(waveform).max() < SILENT_PEAK:
            raise Skipped("silent", f"no sample above {SILENT_PEAK:g}")
        return waveform, sampling_rate

    @torch.no_grad()
    def make_row(
        self, clip: Clip, input_ids: list[int], waveform: np.ndarray, sampling_rate: int, speed: float
    ) -> dict[str, Any]:
        """The row of a clip at a speed, with the columns of `feature_columns`."""
        waveform = change_speed(waveform, speed)
        duration_s = len(waveform) / sampling_rate
        if not MIN_AUDIO_S <= duration_s <= self.settings.max_duration_s:
            raise Skipped("too short" if duration_s < MIN_AUDIO_S else "too long", f"{duration_s:.2f} s at this speed")
        pipeline = self.pipeline
        inputs = pipeline.feature_extractor(speaker_audio=(waveform, sampling_rate))
        features = pipeline.encode_features(inputs["speaker_input_features"], inputs["speaker_attention_mask"])
        semantic_ids = pipeline.semantic_codec.encode(features[None]).semantic_ids[0]
        speaker_embeds = pipeline.speaker_encoder(inputs["speaker_fbank"].to(self.device)).speaker_embeds[0]
        if len(semantic_ids) > self.t2s.max_semantic_tokens:
            raise Skipped(
                "too many semantic tokens",
                f"{len(semantic_ids)}, but the model has positions for {self.t2s.max_semantic_tokens}",
            )
        arrays = {
            "semantic_features": features.half().cpu().numpy(),
            "mel": inputs["prompt_mel"][0].half().numpy(),
            "speaker_embeds": speaker_embeds.cpu().numpy(),
        }
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                raise Skipped("not finite", f"`{name}` has values beyond half precision")
        return {
            "clip": clip.clip,
            "speed": speed,
            "speaker": clip.speaker,
            "emotion": clip.emotion,
            "language": clip.language,
            "text": clip.text,
            "duration_s": duration_s,
            "num_semantic_tokens": len(semantic_ids),
            "input_ids": input_ids,
            "semantic_ids": semantic_ids.cpu().numpy(),
            **arrays,
        }


def report_line(clip: Clip, split: str, skipped: Skipped, speed: float | None = None) -> dict[str, Any]:
    """A line of the report; `speed` where the clip was left out at that speed alone."""
    reason, detail = skipped.args
    return {"clip": clip.clip, "split": split, "speed": speed, "reason": reason, "detail": detail}


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make the file, which is there afterwards as a whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    write(temporary)
    os.replace(temporary, path)


# --- many clips ------------------------------------------------------------------------------------------------------------


def work(settings: Settings, shards: list[Shard], results: Connection) -> None:
    """A worker process: sends `"clip"` for each clip that is done, at last `"end"` or the error that ended it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    quiet()
    torch.set_num_threads(1)

    def end_with_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    # A main process that is killed cannot end its workers, who would go on for hours.
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        preparer = Preparer(settings)
        for shard in shards:
            for _ in preparer.prepare_shard(shard):
                results.send("clip")
        results.send("end")
    except (ValueError, OSError, ImportError) as error:
        results.send(ValueError(str(error)))
    except Exception:
        results.send(RuntimeError(traceback.format_exc()))


def prepare_in_workers(settings: Settings, shards: list[Shard], num_workers: int) -> Iterator[None]:
    """Has processes prepare the shards; yields for each clip that is done."""
    context = multiprocessing.get_context("forkserver")
    # Imported once for all of them.
    context.set_forkserver_preload(["datasets", "indextts2_hf.modeling_indextts2", "indextts2_hf.pipeline_s2m"])
    workers = {}
    for number in range(num_workers):
        results, sender = context.Pipe(duplex=False)
        workers[results] = context.Process(
            target=work, args=(settings, shards[number::num_workers], sender), daemon=True
        )
        workers[results].start()
        sender.close()
    running = set(workers)
    try:
        while running:
            for results in wait(running):
                try:
                    result = results.recv()
                except EOFError:
                    raise OSError(
                        "A worker was killed, perhaps for want of memory. The shards that are there are whole: call again, perhaps "
                        "with fewer --num_workers or --clips_per_shard."
                    ) from None
                if isinstance(result, Exception):
                    raise result
                if result == "end":
                    workers[results].join()
                    running.remove(results)
                else:
                    yield
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()


def prepare_here(settings: Settings, shards: list[Shard]) -> Iterator[None]:
    preparer = Preparer(settings)
    for shard in shards:
        yield from preparer.prepare_shard(shard)


def quiet() -> None:
    """One progress bar is enough."""
    tqdm.set_lock(threading.RLock())  # its own is shared by processes, and left behind by those that are killed
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


# --- the whole -------------------------------------------------------------------------------------------------------------


def open_output(output: Path, settings: dict[str, Any]) -> None:
    """Makes the folder, or makes sure that it was begun with the same settings."""
    path = output / SETTINGS
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        changed = [
            f"{name} {begun.get(name)} (now {settings.get(name)})"
            for name in sorted(begun.keys() | settings.keys())
            if begun.get(name) != settings.get(name)
        ]
        if changed:
            raise ValueError(
                f"{output} was begun with {', '.join(changed)}. Continue with the same, or name another --output."
            )
    elif output.is_dir() and any(output.iterdir()):
        raise ValueError(f"--output {output} holds other files already. Name another folder, or empty this one.")
    try:
        for split in SPLITS:
            (output / split).mkdir(parents=True, exist_ok=True)
            for leftover in (output / split).glob(".*.tmp"):
                shutil.rmtree(leftover)
        write_whole(path, lambda file: file.write_text(json.dumps(settings, indent=2), encoding="utf-8"))
    except OSError as error:
        raise OSError(f"--output {output} cannot be written: {error}. Name another folder.") from error


def sum_up(shards: list[Shard], report: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of what the shards hold, by split; speakers whose one clip has no other as a prompt are added to the report."""
    counts = {name: dict.fromkeys(SPLITS, 0) for name in ("clips", "rows", "seconds", "speakers")}
    # Clips to learn from are prompts of held-out ones too.
    known = set()
    for split in SPLITS:
        clips_of_speaker = defaultdict(set)
        for shard in shards:
            if shard.split == split:
                table = datasets.load_from_disk(str(shard.folder))
                for row in table.select_columns(["clip", "speaker", "duration_s"]):
                    clips_of_speaker[row["speaker"]].add(row["clip"])
                    counts["seconds"][split] += row["duration_s"]
                counts["rows"][split] += len(table)
        counts["clips"][split] = sum(map(len, clips_of_speaker.values()))
        counts["speakers"][split] = len(clips_of_speaker)
        lone = sorted(
            speaker for speaker, clips in clips_of_speaker.items() if len(clips) == 1 and speaker not in known
        )
        report += [{"speaker": speaker, "split": split, "reason": "one clip of the speaker"} for speaker in lone]
        known |= clips_of_speaker.keys()
    return counts


def count_reasons(report: list[dict[str, Any]]) -> Counter:
    """How often each reason to leave a clip out was met; a changed speed is named."""
    return Counter(
        line["reason"] + (f" at speed {line['speed']:g}" if line["speed"] not in (None, 1.0) else "")
        for line in report
        if "clip" in line
    )


def say_summary(counts: dict[str, Any], report: list[dict[str, Any]], output: Path) -> None:
    for split in SPLITS:
        lone = [line["speaker"] for line in report if "speaker" in line and line["split"] == split]
        say(
            f"{split}: {counts['clips'][split]} clips ({counts['rows'][split]} rows, {counts['seconds'][split] / 3600:.2f} h) of "
            f"{counts['speakers'][split]} speakers"
        )
        if lone:
            names = ", ".join(lone[:5]) + (" …" if len(lone) > 5 else "")
            say(f"  {len(lone)} speakers have one clip only and so no prompt for train_t2s.py: {names}")
        if counts["clips"][split] and len(lone) == counts["speakers"][split]:
            say(
                "  no clip has a prompt: train_t2s.py cannot use this split. More clips, or another --validation_fraction, help."
            )
    for reason, count in count_reasons(report).most_common():
        say(f"left out: {count} x {reason}")
    if report:
        say(f"Each of them is in {output / REPORT}.")


def main() -> None:
    arguments = parse()
    quiet()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    checkpoint = find_checkpoint(arguments.model)
    check_settings_files(str(checkpoint))
    longest = IndexTTS2FeatureExtractor.from_pretrained(checkpoint / "feature_extractor").max_audio_s
    max_duration_s = arguments.max_duration_s or min(DEFAULT_MAX_DURATION_S, longest)
    if not MIN_AUDIO_S <= max_duration_s <= longest:
        raise ValueError(
            f"--max_duration_s is {max_duration_s:g}, but it must be between {MIN_AUDIO_S} and {longest:g}: the checkpoint hears no "
            "more of a clip (`max_audio_s` of its feature extractor), and a target must not be cut. Cut long recordings first."
        )

    report, unique = [], {}
    for clip in read_manifest(arguments.source, arguments.columns):
        if clip.clip in unique:
            report.append(report_line(clip, clip.split or "train", Skipped("listed twice", "the first line counts")))
        else:
            unique[clip.clip] = clip
    splits = choose_splits(list(unique.values()), arguments.validation_fraction)
    shards = plan_shards(splits, arguments.output, arguments.clips_per_shard)
    settings = Settings(str(checkpoint), sorted(set(arguments.speeds)), max_duration_s, arguments.device)
    listed = [
        (split, clip.clip, clip.speaker, clip.text, clip.emotion, clip.language)
        for split in SPLITS
        for clip in splits[split]
    ]
    made = made_with(checkpoint)
    begun = {
        "clips": len(unique),
        "manifest": hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16],
        "speeds": settings.speeds,
        "max_duration_s": max_duration_s,
        "clips_per_shard": arguments.clips_per_shard,
        **made,
    }
    open_output(arguments.output, begun)
    missing = [shard for shard in shards if not shard.folder.is_dir()]
    if len(missing) < len(shards):
        say(f"{arguments.output}: {len(shards) - len(missing)} of {len(shards)} shards are there already.")
    if missing:
        if arguments.num_workers > 0:
            done = prepare_in_workers(settings, missing, min(arguments.num_workers, len(missing)))
        else:
            done = prepare_here(settings, missing)
        num_there = len(unique) - sum(len(shard.clips) for shard in missing)
        try:
            with tqdm(total=len(unique), initial=num_there, unit="clip", dynamic_ncols=True) as progress:
                for _ in done:
                    progress.update()
        except KeyboardInterrupt:
            raise ValueError(
                "interrupted. The shards that are there are whole: the same call makes the others."
            ) from None

    for shard in shards:
        report += [json.loads(line) for line in (shard.folder / REPORT).read_text(encoding="utf-8").splitlines()]
    counts = sum_up(shards, report)
    write_whole(arguments.output / REPORT, lambda file: write_lines(file, report))
    if not sum(counts["rows"].values()):
        reasons = ", ".join(f"{count} x {reason}" for reason, count in count_reasons(report).most_common())
        raise ValueError(
            f"None of the {len(unique)} clips can be used: {reasons}. See {arguments.output / REPORT}, mend the recordings, and name "
            "another --output."
        )
    features = {**made, "speeds": settings.speeds, "max_duration_s": max_duration_s, **counts}
    write_whole(arguments.output / FEATURES, lambda file: file.write_text(json.dumps(features, indent=2)))
    say_summary(counts, report, arguments.output)


if __name__ == "__main__":
    run_program(main)
