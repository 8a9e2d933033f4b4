"""
Measures what a checkpoint or an adapter says: words, voice, length, emotion, sound.

    python evaluation/evaluate.py --model CHECKPOINT --list meta.lst --output REPORT
    python evaluation/evaluate.py --model CHECKPOINT --list meta.lst --output REPORT --conditions free length-0.8 emotion-happy

A list has lines `name|text of the prompt|prompt|text` or `name|text of the prompt|prompt|text|recording` as in Seed-TTS-eval; a
prompt is an audio file beside the list or the name of a voice of the checkpoint. `--data` takes an audio folder instead: each
clip is a recording, and another clip of its speaker the prompt.

Each condition is another way to say the list:

- `recording`: the true recordings, if there are any; always first.
- `free`: the model chooses the length.
- `length-F`: F times the tokens of the recording, or of the free speech where there is none.
- `told-F`: the same, but the model is only told: it ends where it will, and the token error says how well it counts.
- `emotion-NAME`: with that emotion weight at 1, to be compared with `free`.
- `no-hidden-states`, `no-emotion`: without the T2S states in S2M, without the emotion vector in T2S (the paper's ablations). Nothing
  in the models is switched: the input is not passed.

`REPORT` gets `audio/CONDITION/NAME.wav`, `scores.jsonl` and `scores.csv` with a line for each utterance, `results.json` and
`results.md`. What is there already is not made again: delete the folder to begin anew.
"""

import argparse
import csv
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tqdm import tqdm

import metrics
from indextts2_hf import IndexTTS2TextToAudioPipeline, VoicePrompt, set_num_threads
from indextts2_hf.cards import figures_table
from indextts2_hf.configuration_indextts2 import EMBEDDED_NAME
from indextts2_hf.emotion import EMOTIONS
from indextts2_hf.feature_extraction_indextts2 import load_audio


MEASURES = ("words", "voice", "sound", "prosody")
# What an emotion does to pitch, its range, the time that speech takes, level and tilt: +1 more, -1 less, against neutral speech of
# the same text and voice. Directions of acted speech as reviewed by Scherer (2003), written down before anything was measured.
DIRECTIONS = {
    "happy": {"pitch_semitones": 1, "pitch_range_semitones": 1, "speech_s": -1, "level_db": 1},
    "angry": {"pitch_semitones": 1, "pitch_range_semitones": 1, "speech_s": -1, "level_db": 1, "tilt_db": 1},
    "sad": {"pitch_semitones": -1, "pitch_range_semitones": -1, "speech_s": 1, "level_db": -1, "tilt_db": -1},
    "afraid": {"pitch_semitones": 1, "speech_s": -1},
    "disgusted": {"pitch_semitones": -1, "speech_s": 1},
    "melancholic": {"pitch_semitones": -1, "pitch_range_semitones": -1, "speech_s": 1, "level_db": -1},
    "surprised": {"pitch_semitones": 1, "pitch_range_semitones": 1},
    "calm": {"pitch_range_semitones": -1, "speech_s": 1, "level_db": -1},
}


# What is not passed (the paper's ablations).
ABLATIONS = ("no-hidden-states", "no-emotion")


@dataclass(frozen=True)
class Utterance:
    """
    A line of the list: `prompt` is a file or a voice of the checkpoint, `recording` the file of the true speech. Prompts of one
    `speaker` are not told apart.
    """

    name: str
    text: str
    prompt: str
    speaker: str
    recording: str | None = None


@dataclass(frozen=True)
class Speech:
    """What was said: `waveform`, its `num_tokens`, and whether it ended by itself or as was asked."""

    waveform: np.ndarray
    num_tokens: int
    has_ended: bool


# --- what is to be said --------------------------------------------------------------------------------------------------


def read_list(path: Path, voices: set[str]) -> list[Utterance]:
    """
    Raises:
        ValueError: a line has another form.
        FileNotFoundError: a file that it names is missing.
    """
    utterances = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        fields = line.split("|")
        if len(fields) not in (4, 5):
            raise ValueError(
                f"{path} line {number} has {len(fields)} fields, but `name|text of the prompt|prompt|text` or the same with "
                "`|recording` is expected."
            )
        name, _, prompt, text, *recording = (field.strip() for field in fields)
        files = [prompt] * (prompt not in voices) + recording
        for file in files:
            if not (path.parent / file).is_file():
                raise FileNotFoundError(f"{path} line {number} names {file}, which is not there.")
        utterances.append(
            Utterance(
                name,
                text,
                prompt if prompt in voices else str(path.parent / prompt),
                prompt,
                str(path.parent / recording[0]) if recording else None,
            )
        )
    return utterances


def read_folder(folder: Path) -> list[Utterance]:
    """Clips of an audio folder with a `metadata.csv`, each with the next clip of its speaker as the prompt."""
    tables = sorted(folder.rglob("metadata.csv"))
    if not tables:
        raise FileNotFoundError(f"{folder} has no metadata.csv. Give an audio folder, or a --list.")
    rows = []
    for table in tables:
        with open(table, encoding="utf-8-sig", newline="") as file:
            rows += [(table.parent / row["file_name"], row) for row in csv.DictReader(file)]
    of_speaker = defaultdict(list)
    for path, row in rows:
        if not path.is_file():
            raise FileNotFoundError(f"{table} names {path}, which is not there.")
        of_speaker[row["speaker"]].append(path)
    utterances = []
    for path, row in rows:
        clips = of_speaker[row["speaker"]]
        if len(clips) > 1:
            prompt = clips[(clips.index(path) + 1) % len(clips)]
            utterances.append(Utterance(path.stem, row["text"], str(prompt), row["speaker"], str(path)))
    return utterances


# --- saying it -----------------------------------------------------------------------------------------------------------


def check_condition(name: str) -> str:
    kind, _, value = name.partition("-")
    known = name in ("free", *ABLATIONS)
    known |= kind == "emotion" and value in EMOTIONS
    try:
        known |= kind in ("length", "told") and 0.1 <= float(value) <= 10
    except ValueError:
        pass
    if not known:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no condition: free, length-0.8, told-0.8, emotion-{EMOTIONS[0]}, no-hidden-states, no-emotion"
        )
    return name


class Speaker:
    r"""
    A checkpoint that says utterances under a condition.

    Args:
        pipe (`IndexTTS2TextToAudioPipeline`): the checkpoint or adapter.
        seed (`int`): of the first utterance; each one has its own, the same in every condition.
        settings (`dict`): generation settings and arguments of the pipeline.
        max_text_tokens (`int`, *optional*): most text tokens in a segment; by default the checkpoint's own.
    """

    def __init__(
        self,
        pipe: IndexTTS2TextToAudioPipeline,
        seed: int,
        settings: dict[str, Any],
        max_text_tokens: int | None = None,
    ):
        self.pipe = pipe
        self.max_text_tokens = max_text_tokens
        self.model = pipe.model
        self.seed = seed
        self.settings = settings
        self.voices: dict[str, VoicePrompt] = {}

    def voice(self, prompt: str) -> VoicePrompt:
        if prompt not in self.voices:
            self.voices[prompt] = self.model.get_voice(self.pipe.load_voice(prompt))
        return self.voices[prompt]

    def count_tokens(self, recording: str) -> int:
        """Semantic tokens of a recording, as long as the checkpoint hears."""
        return len(self.model.encode_voice(recording).speaker_features)

    @torch.no_grad()
    def say(
        self, utterances: list[Utterance], indices: list[int], condition: str, counts: list[int | None]
    ) -> list[Speech]:
        """A batch of utterances; `counts` asks for their tokens."""
        texts = [utterance.text for utterance in utterances]
        voices = [self.voice(utterance.prompt) for utterance in utterances]
        seeds = [self.seed + index for index in indices]
        if condition in ABLATIONS or condition.startswith("told-"):
            rows = zip(texts, voices, seeds, counts, strict=True)
            return [self.say_by_parts(condition, *row) for row in rows]
        emotion = condition.removeprefix("emotion-")
        inputs = self.pipe.processor(
            text=texts,
            emotion_weights={emotion: 1.0} if emotion != condition else None,
            max_text_tokens=self.max_text_tokens,
        )
        output = self.model.generate(
            **inputs.to(self.model.device),
            voice=voices,
            num_semantic_tokens=counts if any(counts) else None,
            seed=seeds,
            **self.settings,
        )
        return [
            Speech(audio.float().cpu().numpy(), sum(map(len, segments)), count is not None or self.has_ended(segments))
            for audio, segments, count in zip(output.audio, output.semantic_ids, counts, strict=True)
        ]

    def say_by_parts(self, condition: str, text: str, voice: VoicePrompt, seed: int, count: int | None) -> Speech:
        """
        A text of one segment by the parts of the model, of which one is not given what the condition leaves out; a count is told to
        T2S, but the rule that ends speech there is not.
        """
        t2s, semantic_to_mel = self.model.t2s, self.model.semantic_to_mel
        input_ids = self.pipe.processor(text=text)["input_ids"].to(t2s.device)
        emotion_embeds = None if condition == "no-emotion" else t2s.encode_emotion(voice.emotion_features[None])
        inputs_embeds, attention_mask = t2s.prepare_prefix(
            input_ids,
            speaker_latents=t2s.encode_speaker(voice.speaker_features[None]),
            emotion_embeds=emotion_embeds,
            num_semantic_tokens=count,
        )
        torch.manual_seed(seed)
        semantic_ids = t2s.generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **self.settings)
        has_ended = self.has_ended(semantic_ids)
        semantic_ids = semantic_ids[:, : int((semantic_ids != t2s.config.semantic_stop_token_id).cumprod(1).sum())]
        states = None
        if condition != "no-hidden-states":
            output = t2s(inputs_embeds=inputs_embeds, attention_mask=attention_mask, semantic_ids=semantic_ids)
            states = output.last_hidden_state[:, :-1]
        generator = torch.Generator(t2s.device).manual_seed(seed)
        output = semantic_to_mel(semantic_ids, voice, states, generator=generator, output_type="pt")
        return Speech(output.audios[0].float().cpu().numpy(), semantic_ids.shape[1], has_ended)

    def has_ended(self, segments: Any) -> bool:
        """Whether no segment was cut off at the largest number of tokens."""
        longest = max(len(ids) for ids in segments)
        return longest < (self.model.t2s.generation_config.max_new_tokens or math.inf)


# --- measuring it ----------------------------------------------------------------------------------------------------------


class Measures:
    r"""
    The measures that were asked for, loaded once.

    Args:
        names (`list[str]`): some of `MEASURES`.
        asr, speaker_model (`str`, *optional*): folders of a Whisper and of a WavLM x-vector model; the packaged ones otherwise.
        device (`str`): where the former run.
    """

    def __init__(self, names: list[str], asr: str | None, speaker_model: str | None, device: str):
        self.names = names
        self.tools = {}
        if "words" in names:
            asr_model = metrics.TransformersWhisper(asr, device) if asr else metrics.PackagedWhisper()
            self.recognize = self.tools["words"] = asr_model
        if "voice" in names:
            encoder = (
                metrics.WavLMSimilarity(speaker_model, device) if speaker_model else metrics.ResemblyzerSimilarity()
            )
            self.embed = self.tools["voice"] = encoder
        if "sound" in names:
            self.distill_mos, self.dnsmos = metrics.DistillMOS(), metrics.DNSMOS()
            self.tools |= {"sound": self.distill_mos, "sound (noise)": self.dnsmos}
        self.embeddings: dict[str, np.ndarray] = {}

    def score(self, waveform: np.ndarray, sampling_rate: int, text: str, language: str) -> dict[str, Any]:
        """Figures of one waveform that need no other."""
        waveform = metrics.resample(waveform, sampling_rate)
        figures: dict[str, Any] = metrics.edges(waveform)
        if "words" in self.names:
            heard = self.recognize(waveform, language)
            figures["heard"] = heard
            figures["word_errors"], figures["words"] = metrics.word_errors(text, heard, language)
            if language == "en":
                alike = [metrics.spell_alike(spoken) for spoken in (text, heard)]
                figures["word_errors_spelt_alike"], figures["words_spelt_alike"] = metrics.word_errors(
                    *alike, language
                )
        if "sound" in self.names:
            figures["distill_mos"], figures["dnsmos"] = self.distill_mos(waveform), self.dnsmos(waveform)
        if "prosody" in self.names:
            figures |= metrics.prosody(waveform)
        return figures

    def embed_file(self, path: str) -> np.ndarray:
        if path not in self.embeddings:
            self.embeddings[path] = self.embed(metrics.resample(*load_audio(path)))
        return self.embeddings[path]

    def compare_voices(
        self, waveforms: dict[str, str], utterances: list[Utterance], references: dict[str, str]
    ) -> dict[str, dict[str, Any]]:
        """For the file of each utterance: cosine to its own prompt, mean to those of others, whether its own is the nearest."""
        prompts = {utterance.prompt: utterance.speaker for utterance in utterances}
        vectors = {prompt: self.embed_file(references[prompt]) for prompt in prompts}
        figures = {}
        for utterance in utterances:
            if utterance.name not in waveforms:
                continue
            vector = self.embed_file(waveforms[utterance.name])
            cosines = {prompt: float(vector @ other) for prompt, other in vectors.items()}
            others = [value for prompt, value in cosines.items() if prompts[prompt] != utterance.speaker]
            own = cosines[utterance.prompt]
            figures[utterance.name] = {"similarity": own}
            if others:
                figures[utterance.name] |= {
                    "similarity_to_others": float(np.mean(others)),
                    "is_nearest": prompts[max(cosines, key=cosines.get)] == utterance.speaker,
                }
        return figures


# --- the report ----------------------------------------------------------------------------------------------------------


def mean(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> float:
    values = [value(row) for row in rows]
    values = [number for number in values if math.isfinite(number)]
    return float(np.mean(values)) if values else float("nan")


def summarize(rows: list[dict[str, Any]], neutral: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Figures of a condition. `neutral` holds the free utterances by name, with which emotions are compared."""
    figures: dict[str, float] = {"utterances": len(rows)}
    if "words" in rows[0]:
        figures["WER, mean over utterances, %"] = 100 * mean(rows, lambda row: row["word_errors"] / row["words"])
        errors, words = sum(row["word_errors"] for row in rows), sum(row["words"] for row in rows)
        figures["WER, all words, %"] = 100 * errors / words
        if "words_spelt_alike" in rows[0]:
            errors = sum(row["word_errors_spelt_alike"] for row in rows)
            figures["WER, spelt alike, %"] = 100 * errors / max(sum(row["words_spelt_alike"] for row in rows), 1)
    if "similarity" in rows[0]:
        figures["similarity to the prompt"] = mean(rows, lambda row: row["similarity"])
    if "similarity_to_others" in rows[0]:
        figures["the same, less that to other prompts"] = mean(
            rows, lambda row: row["similarity"] - row["similarity_to_others"]
        )
        figures["own prompt is the nearest, %"] = 100 * mean(rows, lambda row: float(row["is_nearest"]))
    if "distill_mos" in rows[0]:
        figures["DistillMOS"] = mean(rows, lambda row: row["distill_mos"])
        figures["DNSMOS"] = mean(rows, lambda row: row["dnsmos"])
    if "num_tokens" in rows[0]:
        figures["not ended, %"] = 100 * mean(rows, lambda row: float(not row["has_ended"]))
    if "is_cut_off" in rows[0]:
        figures["cut off at the end, %"] = 100 * mean(rows, lambda row: float(row["is_cut_off"]))
        figures["silence before speech, s"] = mean(rows, lambda row: row["silence_before_s"])
    if "asked_tokens" in rows[0]:
        figures["token error, %"] = 100 * mean(
            rows, lambda row: abs(row["num_tokens"] - row["asked_tokens"]) / row["asked_tokens"]
        )
        figures["length error, s"] = mean(rows, lambda row: abs(row["seconds"] - row["asked_s"]))
        figures["length within 10 %, %"] = 100 * mean(
            rows, lambda row: float(abs(row["seconds"] / row["asked_s"] - 1) <= 0.1)
        )
    directions = DIRECTIONS.get(rows[0]["condition"].removeprefix("emotion-"))
    if directions and "pitch_semitones" in rows[0] and neutral:
        pairs = []
        for name, direction in directions.items():
            changes = [row[name] - neutral[row["name"]][name] for row in rows if row["name"] in neutral]
            changes = [change for change in changes if math.isfinite(change)]
            if not changes:
                continue
            agree = [change * direction > 0 for change in changes]
            figures[f"change of {name}"] = float(np.mean(changes))
            figures[f"{name} {'up' if direction > 0 else 'down'} as expected, %"] = 100 * float(np.mean(agree))
            pairs += agree
        figures["changes as expected, %"] = 100 * float(np.mean(pairs)) if pairs else float("nan")
    return figures


def write_report(folder: Path, rows: list[dict[str, Any]], conditions: list[str], about: dict[str, Any]) -> None:
    """`results.json`, `results.md` and `scores.csv`."""
    of_condition = {name: [row for row in rows if row["condition"] == name] for name in conditions}
    neutral = {row["name"]: row for row in of_condition.get("free", [])}
    results = {name: summarize(found, neutral) for name, found in of_condition.items() if found}
    # What could not be measured, as the pitch of a whisper, is left out.
    results = {
        condition: {name: value for name, value in figures.items() if math.isfinite(value)}
        for condition, figures in results.items()
    }
    (folder / "results.json").write_text(
        json.dumps({"about": about, "results": results}, indent=2, ensure_ascii=False)
    )
    table = figures_table(results, about["measured by"])
    (folder / "results.md").write_text(f"{table}\n", encoding="utf-8")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "scores.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        help="checkpoint or adapter: folder, repository, or that of the package (default: %(default)s)",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--list", type=Path, help="what to say, as Seed-TTS-eval writes it")
    source.add_argument("--data", type=Path, help="audio folder")
    parser.add_argument("--output", required=True, type=Path, metavar="REPORT")
    parser.add_argument(
        "--conditions", nargs="+", type=check_condition, default=["free"], help="(default: %(default)s)"
    )
    parser.add_argument(
        "--measures", nargs="+", choices=MEASURES, default=["words", "voice", "sound"], help="(default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, help="only so many utterances")
    parser.add_argument("--language", default="en", help="of the texts (default: %(default)s)")
    parser.add_argument(
        "--references", type=Path, help="folder with NAME.wav or NAME.flac for each voice of the checkpoint"
    )
    parser.add_argument(
        "--asr", metavar="FOLDER", help="Whisper model of transformers (default: a packaged Whisper base)"
    )
    parser.add_argument("--speaker_model", metavar="FOLDER", help="WavLM x-vector model (default: Resemblyzer)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=8, help="utterances said at once (default: %(default)s)")
    parser.add_argument(
        "--max_text_tokens",
        type=int,
        metavar="N",
        help="most text tokens in a segment (default: the checkpoint's own)",
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained(arguments.model, device=arguments.device)
    speaker = Speaker(pipe, arguments.seed, {}, arguments.max_text_tokens)
    if arguments.list is not None:
        utterances = read_list(arguments.list, set(pipe.model.voices))
    else:
        utterances = read_folder(arguments.data)
    utterances = utterances[: arguments.limit]
    if not utterances:
        raise ValueError(f"{arguments.list or arguments.data} names nothing to say.")
    references = {}
    for prompt in {utterance.prompt for utterance in utterances}:
        references[prompt] = prompt
        if prompt in pipe.model.voices and "voice" in arguments.measures:
            found = [
                path for path in (arguments.references or Path()).glob(f"{prompt}.*") if path.suffix != ".safetensors"
            ]
            if not found:
                raise FileNotFoundError(
                    f"There is no recording of the voice {prompt!r} to compare with. Name the folder that holds {prompt}.wav with "
                    "--references, or leave `voice` out of the --measures."
                )
            references[prompt] = str(found[0])

    measures = Measures(arguments.measures, arguments.asr, arguments.speaker_model, arguments.device)
    # Whisper keeps the threads that torch had when it was loaded.
    set_num_threads(pipe.model)
    conditions = ["recording"] * all(utterance.recording for utterance in utterances) + list(
        dict.fromkeys(["free", *arguments.conditions])
    )
    about = {
        "model": arguments.model,
        "data": Path(arguments.list or arguments.data).name,
        "seed": arguments.seed,
        "max_text_tokens": arguments.max_text_tokens or pipe.processor.max_text_tokens,
        "measured by": {name: tool.name for name, tool in measures.tools.items()},
        "utterances": [asdict(utterance) for utterance in utterances],
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    log = arguments.output / "scores.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    done = {(row["condition"], row["name"]) for row in rows}
    free_tokens = {row["name"]: row["num_tokens"] for row in rows if row["condition"] == "free"}
    progress = tqdm(total=len(conditions) * len(utterances), unit="utterance")
    for condition in conditions:
        folder = arguments.output / "audio" / condition
        folder.mkdir(parents=True, exist_ok=True)
        progress.set_description(condition)
        left = [(index, item) for index, item in enumerate(utterances) if (condition, item.name) not in done]
        progress.update(len(utterances) - len(left))
        for start in range(0, len(left), arguments.batch_size):
            batch = left[start : start + arguments.batch_size]
            found = say_batch(speaker, condition, batch, free_tokens)
            files = {}
            for (_, utterance), (waveform, sampling_rate, _) in zip(batch, found, strict=True):
                files[utterance.name] = str(folder / f"{utterance.name}.wav")
                soundfile.write(files[utterance.name], waveform, sampling_rate, subtype="FLOAT")
            compared = {}
            if "voice" in arguments.measures:
                compared = measures.compare_voices(files, utterances, references)
            for (_, utterance), (waveform, sampling_rate, figures) in zip(batch, found, strict=True):
                row = {
                    "condition": condition,
                    "name": utterance.name,
                    "text": utterance.text,
                    "prompt": utterance.prompt,
                }
                row |= {"seconds": len(waveform) / sampling_rate} | figures | compared.get(utterance.name, {})
                row |= measures.score(waveform, sampling_rate, utterance.text, arguments.language)
                with open(log, "a", encoding="utf-8") as file:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                rows.append(row)
                progress.update()
                if condition == "free":
                    free_tokens[utterance.name] = row["num_tokens"]
    progress.close()
    write_report(arguments.output, rows, conditions, about)
    sys.stdout.write((arguments.output / "results.md").read_text())


def say_batch(
    speaker: Speaker, condition: str, batch: list[tuple[int, Utterance]], free_tokens: dict[str, int]
) -> list[tuple[np.ndarray, int, dict[str, Any]]]:
    """Waveform, sampling rate and figures of each utterance of a batch."""
    if condition == "recording":
        return [(*load_audio(utterance.recording), {}) for _, utterance in batch]
    counts: list[int | None] = [None] * len(batch)
    if condition.startswith(("length-", "told-")):
        factor = float(condition.partition("-")[2])
        counts = [
            max(
                1, round(factor * (speaker.count_tokens(item.recording) if item.recording else free_tokens[item.name]))
            )
            for _, item in batch
        ]
    rate = speaker.model.config.sampling_rate
    said = speaker.say([item for _, item in batch], [index for index, _ in batch], condition, counts)
    found = []
    for speech, count in zip(said, counts, strict=True):
        figures = {"num_tokens": speech.num_tokens, "has_ended": speech.has_ended}
        if count is not None:
            figures |= {"asked_tokens": count, "asked_s": count / speaker.model.t2s.config.semantic_token_rate}
        found.append((speech.waveform, rate, figures))
    return found


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate: error: {error}")
