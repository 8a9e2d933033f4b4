"""
What the commands of `indextts2` do. Their options are in `indextts2_cli`, beside the package; output files are written here,
and nothing else in the package writes to standard output.
"""

import argparse
import json
import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from logging import ERROR, Handler, LogRecord, getLogger
from pathlib import Path
from typing import Any, Self

import numpy as np
import soundfile
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError, safe_open
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .cards import read_card, write_voice_card
from .configuration_indextts2 import IndexTTS2T2SConfig, resolve_checkpoint
from .emotion import check_emotion_weights
from .pipeline_text_to_audio import IndexTTS2TextToAudioPipeline, set_num_threads
from .processing_indextts2 import cut_as_spoken


logger = logging.get_logger(__name__)

LIBRARIES = ("transformers", "diffusers", "huggingface_hub", "torch")

# Seconds of expected work from which a run without a progress bar says how long it will take.
LONG_WORK_S = 60.0


def run(args: argparse.Namespace) -> None:
    """
    Runs one command with the options that `indextts2_cli` parsed.

    Raises:
        ValueError, OSError, ImportError: an input cannot be used; the message says which, and what to do. No output is left.
    """
    commands = {"speak": speak, "voice": make_voice, "convert": convert, "info": info, "push": push}
    with messages(is_verbose=args.verbose, is_quiet=args.quiet):
        commands[args.command](args)


def speak(args: argparse.Namespace) -> None:
    text = read_text(args)
    if args.emotion_weights is not None:
        check_emotion_weights(args.emotion_weights)
    seed = secrets.randbits(32) if args.seed is None else args.seed
    stages = Stages(args.started)
    with replaced_at_end(args.output) as output:
        stages.end("import")
        pipe = load_pipeline(args)
        if args.adapter is not None:
            pipe.model.t2s.load_adapter(str(args.adapter), "asked")
        stages.end("load")
        inputs = pipe.preprocess(
            text,
            emotion_weights=args.emotion_weights,
            emotion_text=args.emotion_text,
            emotion_strength=args.emotion_strength,
            max_text_tokens=args.max_text_tokens,
        ).to(pipe.device)
        texts = spoken_segments(pipe.tokenizer, inputs["input_ids"][0].tolist())
        written = cut_as_spoken(text, texts)
        stages.end("text")
        voice = pipe.model.get_voice() if args.voice is None else pipe.load_voice(args.voice)
        emotion_features = None
        if args.emotion_audio is not None:
            emotion_features = pipe.model.encode_emotion(args.emotion_audio)
        stages.end("voice")

        sampling_rate = pipe.model.config.sampling_rate
        pause = np.zeros(pipe.model.pause_samples(args.segment_silence_s), dtype=np.int16)
        segments = []
        with (
            Progress(len(texts), stages, is_quiet=args.quiet) as progress,
            soundfile.SoundFile(output, "w", sampling_rate, channels=1, subtype="PCM_16") as file,
        ):
            for segment in pipe.model.stream(
                **inputs,
                voice=voice,
                emotion_features=emotion_features,
                emotion_strength=args.emotion_strength,
                duration_s=args.duration_s,
                num_semantic_tokens=args.num_semantic_tokens,
                segment_silence_s=args.segment_silence_s,
                segment_batch_size=args.segment_batch_size,
                num_inference_steps=args.num_inference_steps,
                guidance_scale=args.guidance_scale,
                seed=seed,
                progress_callback=progress.report,
                **search_settings(args),
            ):
                if segment.segment_index == 0 and is_untrained(read_card(Path(pipe.model.config.name_or_path))):
                    logger.warning(f"the {args.model} model is untrained: it makes noise")
                samples = to_pcm(segment.audio)
                file.write(samples)
                if not segment.is_last:
                    file.write(pause)
                segments.append(
                    {
                        "text": written[segment.segment_index],
                        "spoken": texts[segment.segment_index],
                        "num_semantic_tokens": len(segment.semantic_ids),
                        "num_samples": len(samples),
                        "duration": None if segment.duration is None else asdict(segment.duration),
                    }
                )
                progress.end_segment()

    num_samples = sum(segment["num_samples"] for segment in segments) + len(pause) * (len(segments) - 1)
    duration_s = num_samples / sampling_rate
    synthesis_s = sum(stages.seconds.get(name, 0.0) for name in ("text_to_semantic", "semantic_to_mel", "vocoder"))
    result = {
        "output": str(args.output),
        "sampling_rate": sampling_rate,
        "num_samples": num_samples,
        "duration_s": duration_s,
        "num_semantic_tokens": sum(segment["num_semantic_tokens"] for segment in segments),
        "segments": segments,
        "seed": seed,
        "seconds": {**stages.seconds, "total": sum(stages.seconds.values())},
        "real_time_factor": synthesis_s / duration_s,
        "model": args.model,
    }
    if args.json:
        write_json(result)
    elif not args.quiet:
        write_line(
            f"{args.output}: {duration_s:.2f} s of speech in {result['seconds']['total']:.1f} s "
            f"(real-time factor {result['real_time_factor']:.2f}), {result['num_semantic_tokens']} semantic tokens, "
            f"{len(segments)} segment{'s'[: len(segments) != 1]}, seed {seed}"
        )


def make_voice(args: argparse.Namespace) -> None:
    is_pack = args.output.suffix != ".safetensors"
    weights = None if args.emotion_weights is None else tuple(check_emotion_weights(args.emotion_weights))
    with nullcontext(args.output) if is_pack else replaced_at_end(args.output) as output:
        pipe = load_pipeline(args)
        voice = pipe.load_voice(args.recording)
        given = {"emotion_weights": weights, "license": args.license, "consent": args.consent}
        if args.emotion_audio is not None:
            given["emotion_features"] = pipe.model.encode_emotion(args.emotion_audio)
        if args.adapter is not None:
            # Loading it shows that it fits.
            pipe.model.t2s.load_adapter(str(args.adapter), "voice")
            given["adapter"] = str(args.adapter)
        voice = replace(voice, **{name: value for name, value in given.items() if value is not None})
        pipe.model.semantic_to_mel.check_voice(voice)
        voice.save(output)
    if is_pack:
        write_voice_card(args.output, name=args.output.name)
    if not args.quiet:
        extractor = pipe.model.feature_extractor
        seconds = len(voice.prompt_mel) * extractor.hop_length / extractor.sampling_rate
        what = "a voice pack" if is_pack else "a voice"
        write_line(f"{args.output}: {what} from {seconds:.1f} s of '{args.recording}', for {voice.checkpoint}")


def push(args: argparse.Namespace) -> None:
    from .hub import push_to_hub

    result = push_to_hub(
        args.folder,
        args.repo_id,
        private=args.private,
        token=args.token,
        is_dry_run=args.dry_run or None,
        output=args.output,
        evaluation=args.evaluation,
        license=args.license,
        base_model=args.base_model,
        languages=args.language,
        datasets=args.dataset,
        is_new_card=args.new_card,
    )
    if args.json:
        write_json(
            {
                "kind": result.kind,
                "repo_id": args.repo_id,
                "files": result.files,
                "folder": str(result.folder) if result.folder else None,
                "url": result.url,
            }
        )
        return
    if args.quiet:
        return
    for name, num_bytes in result.files.items():
        write_line(f"  {num_bytes:>13,}  {name}")
    write_line(
        f"  {sum(result.files.values()):>13,}  bytes in {len(result.files)} files: {result.kind} for {args.repo_id}"
    )
    if result.url is not None:
        write_line(f"uploaded: {result.url}")
    else:
        why = "as asked" if args.dry_run else "there is no token: `hf auth login`, or --token"
        write_line(f"{result.folder}: written; nothing was uploaded ({why})")


def convert(args: argparse.Namespace) -> None:
    from .convert_original_checkpoint import convert_original_checkpoint

    convert_original_checkpoint(
        args.original_folder,
        args.output_folder,
        w2v_bert=args.w2v_bert,
        semantic_codec=args.semantic_codec,
        speaker_encoder=args.speaker_encoder,
        vocoder=args.vocoder,
    )
    if not args.quiet:
        write_line(f'{args.output_folder}: converted. Try: indextts2 speak "Hello." --model {args.output_folder}')


def info(args: argparse.Namespace) -> None:
    description = describe_checkpoint(args.model)
    if args.json:
        write_json(description)
        return
    rates, limits, voices = description["rates"], description["limits"], description["voices"]
    write_line(description["folder"])
    for name, part in {**description["parts"], "total": description["total"]}.items():
        size = f"{part['num_parameters']:>13,} {part['num_bytes'] / 1e6:>9.2f} MB  " if part["num_bytes"] else " " * 28
        write_line(f"  {name:<18}{size}{'/'.join(part['dtypes']):<8} {part['class']}".rstrip())
    write_line(
        f"  rates: {rates['sampling_rate']} Hz, {rates['semantic_token_rate']:g} semantic tokens per second, "
        f"{rates['mel_frames_per_token']:g} mel frames per token"
    )
    write_line(
        f"  limits: {limits['segment_s']:.1f} s ({limits['segment_semantic_tokens']} semantic tokens) and "
        f"{limits['segment_text_tokens']} text tokens per segment, {limits['recording_s']:g} s of a recording"
    )
    shipped = [
        f"{name} ({voice['duration_s']:.1f} s{', default' if voice['is_default'] else ''})"
        for name, voice in voices.items()
    ]
    write_line(f"  voices: {', '.join(shipped) or 'none'}")
    write_line(f"  languages: {', '.join(description['languages']) or 'not told'}")
    write_line(f"  licence: {description['licence'] or 'not told'}")
    if description["is_untrained"]:
        write_line("  untrained: it makes noise")


def read_text(args: argparse.Namespace) -> str:
    """The text from where the options say: an argument, a file, or standard input."""
    if args.text_file is not None:
        source, data = f"The file '{args.text_file}'", args.text_file.read_bytes()
    elif args.text in (None, "-"):
        source, data = "Standard input", sys.stdin.buffer.read()
    else:
        source, data = "The text", args.text.encode("utf-8", "surrogateescape")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not text in UTF-8 ({error}). Convert it, for example with iconv.") from error
    if not text.strip():
        raise ValueError(f"{source} is {'blank' if text else 'empty'}: there is nothing to speak.")
    return text


def search_settings(args: argparse.Namespace) -> dict[str, Any]:
    """The generation settings that were given."""
    names = ("num_beams", "temperature", "top_p", "top_k", "text_guidance_scale", "num_candidates")
    given = {name: getattr(args, name) for name in names}
    settings = {name: value for name, value in given.items() if value is not None}
    return {**settings, "do_sample": False} if args.greedy else settings


def spoken_segments(tokenizer: PreTrainedTokenizerBase, input_ids: list[int]) -> list[str]:
    """The text of each segment as it is spoken, normalised; the end-of-sequence id separates them."""
    segments: list[list[int]] = [[]]
    for token_id in input_ids:
        if token_id == tokenizer.eos_token_id:
            segments.append([])
        else:
            segments[-1].append(token_id)
    return [tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) for ids in segments]


def find_checkpoint(model: str) -> Path:
    """The folder of a checkpoint or an adapter: the embedded one for its name, a folder itself, else downloaded from the Hub."""
    folder = Path(resolve_checkpoint(model))
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(model))
        except Exception as error:
            raise ValueError(
                f"There is no folder '{model}', and no such repository could be had from the Hub ({first_line(error)})."
            ) from error
    if is_adapter(folder):
        return folder
    for name in ("config.json", "model_index.json"):
        if not (folder / name).is_file():
            raise ValueError(
                f"'{folder}' is no IndexTTS2 checkpoint: it has no {name}. "
                "An original checkpoint becomes one with `indextts2 convert`."
            )
    model_type = read_json(folder / "config.json").get("model_type")
    if model_type != "indextts2":
        raise ValueError(f"'{folder}' is no IndexTTS2 checkpoint: its model type is {model_type!r}.")
    return folder


def is_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()


def load_pipeline(args: argparse.Namespace) -> IndexTTS2TextToAudioPipeline:
    """The pipeline of the asked checkpoint, or of an adapter on its base, on the asked device and with as many threads as suit it."""
    device = choose_device(args.device)
    folder = find_checkpoint(args.model)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    try:
        pipe = IndexTTS2TextToAudioPipeline.from_pretrained(folder, device=device, dtype=dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        problem = "adapter '{}' cannot be used" if is_adapter(folder) else "checkpoint '{}' is damaged or incomplete"
        raise ValueError(f"The {problem.format(folder)}: {first_line(error)}") from error
    set_num_threads(pipe.model, args.threads)
    return pipe


def choose_device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"The device {name!r} cannot be used ({first_line(error)}). Leave --device out, or use cpu."
        ) from error
    return device


def describe_checkpoint(model: str) -> dict[str, Any]:
    """What a checkpoint folder holds, from its settings and the headers of its weight files."""
    folder = find_checkpoint(model)
    if is_adapter(folder):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        raise ValueError(f"'{folder}' is an adapter of '{base}': ask about that.")
    config, index = read_json(folder / "config.json"), read_json(folder / "model_index.json")
    card = read_card(folder)
    t2s = IndexTTS2T2SConfig.from_pretrained(folder, subfolder="t2s")
    extractor = read_json(folder / "feature_extractor" / "preprocessor_config.json")
    classes = {"t2s": (t2s.architectures or ["?"])[0]}
    classes |= {name: entry[1] for name, entry in index.items() if isinstance(entry, list)}
    if (folder / "emotion_text").is_dir():
        classes["emotion_text"] = (read_json(folder / "emotion_text" / "config.json").get("architectures") or ["?"])[0]
    parts = {name: {"class": class_name, **measure_weights(folder / name)} for name, class_name in classes.items()}
    voices = {}
    for path in sorted((folder / "voices").glob("*.safetensors")):
        num_frames = read_header(path)["prompt_mel"][0][0]
        voices[path.stem] = {
            "duration_s": num_frames * extractor["hop_length"] / extractor["sampling_rate"],
            "is_default": path.stem == config.get("default_voice"),
        }
    languages = card.get("language") or []
    return {
        "folder": str(folder),
        "parts": parts,
        "total": {
            "class": (config.get("architectures") or ["?"])[0],
            "num_parameters": sum(part["num_parameters"] for part in parts.values()),
            "num_bytes": sum(part["num_bytes"] for part in parts.values()),
            "dtypes": sorted({dtype for part in parts.values() for dtype in part["dtypes"]}),
        },
        "rates": {
            "sampling_rate": config["sampling_rate"],
            "semantic_token_rate": t2s.semantic_token_rate,
            "mel_frames_per_token": read_json(folder / "s2m" / "config.json")["mel_frames_per_token"],
        },
        "limits": {
            "segment_s": t2s.max_semantic_tokens / t2s.semantic_token_rate,
            "segment_semantic_tokens": t2s.max_semantic_tokens,
            "segment_text_tokens": t2s.max_text_tokens,
            "recording_s": extractor["max_audio_s"],
        },
        "voices": voices,
        "languages": [languages] if isinstance(languages, str) else languages,
        "licence": card.get("license"),
        "is_untrained": is_untrained(card),
    }


def measure_weights(folder: Path) -> dict[str, Any]:
    """Number of values (buffers included), bytes and dtypes of the safetensors files of one part."""
    paths = sorted(folder.glob("*.safetensors"))
    tensors = [tensor for path in paths for tensor in read_header(path).values()]
    return {
        "num_parameters": sum(int(np.prod(shape, dtype=np.int64)) for shape, _ in tensors),
        "num_bytes": sum(path.stat().st_size for path in paths),
        "dtypes": sorted({dtype for _, dtype in tensors}),
    }


def read_header(path: Path) -> dict[str, tuple[list[int], str]]:
    """Shape and dtype of each tensor of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}
            return {name: (piece.get_shape(), piece.get_dtype()) for name, piece in slices.items()}
    except SafetensorError as error:
        raise ValueError(f"'{path}' is not a readable safetensors file: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"'{path}' is not readable JSON: {error}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"'{path}' holds a {type(settings).__name__} instead of settings.")
    return settings


def is_untrained(card: dict[str, Any]) -> bool:
    return "untrained" in (card.get("tags") or [])


def to_pcm(waveform: torch.Tensor) -> np.ndarray:
    """Samples in [-1, 1] as 16-bit integers of the same shape."""
    # Parity: scaled by 32767, clamped and truncated, not rounded.
    return (waveform.float() * 32767).clamp(-32767, 32767).to(torch.int16).cpu().numpy()


@contextmanager
def replaced_at_end(path: Path) -> Iterator[Path]:
    """
    A new file beside `path`, which takes its place if all goes well and disappears if not. Entering it shows whether
    `path` can be written, before the work.
    """
    path = path.resolve()
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        temporary.touch()
    except OSError as error:
        raise ValueError(f"'{path}' cannot be written: {error.strerror}. Name another file with -o.") from error
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class Stages:
    """
    Seconds of each stage of a run.

    Args:
        started (`float`): when the first stage began, by `time.perf_counter`.
    """

    def __init__(self, started: float):
        self.seconds: dict[str, float] = {}
        self.ended = started

    def end(self, name: str) -> None:
        """Adds what passed since the last call to stage `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self.ended
        self.ended = now


class Progress:
    """
    Shows on standard error how far the segments are, if it is a terminal; elsewhere one line tells of a long run. Measures
    the stages on the way.

    Args:
        num_segments (`int`): segments to come.
        stages ([`Stages`]): where their times are kept.
        is_quiet (`bool`): whether nothing is to be shown.
    """

    def __init__(self, num_segments: int, stages: Stages, is_quiet: bool):
        self.num_segments = num_segments
        self.stages = stages
        self.is_quiet = is_quiet
        self.started = time.perf_counter()
        is_hidden = is_quiet or not sys.stderr.isatty()
        self.bar = tqdm(
            total=num_segments, unit="segment", miniters=0, disable=is_hidden, leave=False, file=sys.stderr
        )
        self.num_done = 0

    def report(self, stage: str, done: int, total: int | None) -> None:
        """The `progress_callback` of the model."""
        self.stages.end({"tokens": "text_to_semantic", "mel": "semantic_to_mel"}[stage])
        self.bar.set_postfix_str(f"{stage} {done}" + (f"/{total}" if total else ""), refresh=False)
        self.bar.update(0)

    def end_segment(self) -> None:
        self.stages.end("vocoder")
        self.bar.update()
        self.num_done += 1
        remaining_s = (time.perf_counter() - self.started) * (self.num_segments - 1)
        if self.num_done == 1 and remaining_s > LONG_WORK_S and self.bar.disable and not self.is_quiet:
            sys.stderr.write(f"indextts2: {self.num_segments - 1} more segments, about {remaining_s / 60:.0f} min\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()


class OneLineHandler(Handler):
    """Writes each warning of ours as one line on standard error, above a progress bar, and no line twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: set[str] = set()

    def emit(self, record: LogRecord) -> None:
        line = f"indextts2: {record.levelname.lower()}: {' '.join(record.getMessage().split())}"
        if line not in self.lines:
            self.lines.add(line)
            tqdm.write(line, file=sys.stderr)


@contextmanager
def messages(is_verbose: bool, is_quiet: bool) -> Iterator[None]:
    """Our warnings as lines, the libraries' own silenced unless asked for; as it was before, afterwards."""
    from diffusers.utils import logging as diffusers_logging

    ours = getLogger(__package__)
    levels = {log: log.level for log in [ours, *map(getLogger, LIBRARIES)]}
    bars = {
        logging: logging.is_progress_bar_enabled(),
        diffusers_logging: diffusers_logging.is_progress_bar_enabled(),
    }
    had_hub_bars = not are_progress_bars_disabled()
    handler = OneLineHandler()
    ours.addHandler(handler)
    try:
        if is_quiet:
            ours.setLevel(ERROR)
        if is_quiet or not sys.stderr.isatty():
            disable_progress_bars()
        if not is_verbose:
            for name in LIBRARIES:
                getLogger(name).setLevel(ERROR)
            for library in bars:
                library.disable_progress_bar()
        yield
    finally:
        ours.removeHandler(handler)
        for log, level in levels.items():
            log.setLevel(level)
        for library, was_enabled in bars.items():
            if was_enabled:
                library.enable_progress_bar()
        if had_hub_bars:
            enable_progress_bars()


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def write_line(line: str) -> None:
    sys.stdout.write(f"{line}\n")


def write_json(value: dict[str, Any]) -> None:
    write_line(json.dumps(value))
