"""
Compares this package with numbers of the reference implementation: `python tests/parity.py FOLDER [--case NAME] [--verbose]`.

FOLDER is a parity set: a configuration and weights under the original's names, inputs and outputs of cases, a tolerance for
each tensor (`tests/assets/parity/README.md` has the layout). The weights are laid out as the original checkpoint, converted,
loaded with `from_pretrained`, and every output (`out.`) and most inner values (`mid.`) are computed again. Nothing here knows
the sizes, inputs or settings of a set: they are what its files say. Exits with 1 if a number is off, or an output of the set
was not compared.
"""

import argparse
import json
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessor, LogitsProcessorList

from indextts2_hf import (
    EMOTIONS,
    IndexTTS2ForTextToWaveform,
    IndexTTS2SemanticToMelPipeline,
    IndexTTS2SemanticToMelTransformer,
    IndexTTS2Tokenizer,
    VoicePrompt,
    balance_emotion_weights,
)
from indextts2_hf.convert_original_checkpoint import convert_original_checkpoint
from indextts2_hf.emotion import read_emotion_answer, scale_emotion_weights
from indextts2_hf.feature_extraction_indextts2 import kaldi_fbank, load_audio, log_mel, resample_sinc, resample_soxr
from indextts2_hf.modeling_s2m import mel_lengths_for
from indextts2_hf.modeling_vocoder import upsample_twice
from indextts2_hf.text_normalization import TextNormalizer, uses_chinese_rules
from indextts2_hf.tokenization_indextts2 import split_pieces


def write_original_checkpoint(parity_folder: Path, folder: Path) -> None:
    """The set's weights in the files, nesting and names of the original release, models from elsewhere included."""

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(parity_folder / "weights" / f"{name}.safetensors")

    def path(*names: str) -> Path:
        folder.joinpath(*names).parent.mkdir(parents=True, exist_ok=True)
        return folder.joinpath(*names)

    config = json.loads((parity_folder / "config.json").read_text())
    elsewhere = {name: config.pop(name) for name in ("w2v", "bigvgan", "feature_extractor")}
    config["dataset"] = {"bpe_model": "bpe.model"}
    path("config.yaml").write_text(yaml.safe_dump(config))
    path("bpe.model").write_bytes((parity_folder / "text" / "bpe.model").read_bytes())

    torch.save(weights("gpt"), path("gpt.pth"))
    net: dict[str, dict[str, torch.Tensor]] = {"cfm": {}, "length_regulator": {}, "gpt_layer": {}}
    for key, tensor in weights("s2mel").items():
        group, key = key.split(".", 1)
        net[group][key] = tensor
    torch.save({"net": net}, path("s2mel.pth"))
    emotion = weights("emotion")
    torch.save(emotion["feat1_speaker_matrix"], path("feat1.pt"))
    torch.save(emotion["feat2_emotion_matrix"], path("feat2.pt"))
    torch.save(weights("w2v_stats"), path("wav2vec2bert_stats.pt"))

    path("w2v-bert-2.0", "config.json").write_text(json.dumps(elsewhere["w2v"]))
    path("w2v-bert-2.0", "preprocessor_config.json").write_text(json.dumps(elsewhere["feature_extractor"]))
    save_file(weights("w2v_bert"), path("w2v-bert-2.0", "model.safetensors"))
    save_file(weights("semantic_codec"), path("MaskGCT", "semantic_codec", "model.safetensors"))
    torch.save(weights("campplus"), path("campplus", "campplus_cn_common.bin"))
    vocoder = "bigvgan_v2_22khz_80band_256x"
    path(vocoder, "config.json").write_text(json.dumps(elsewhere["bigvgan"]))
    torch.save({"generator": weights("bigvgan")}, path(vocoder, "bigvgan_generator.pt"))


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """`(batch, time, channels)` to the original's `(batch, channels, time)`, or back."""
    return tensor.transpose(-1, -2)


@contextmanager
def captured(modules: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """`(inputs, output)` of every call of each module while the context lasts; of keyword arguments the first counts."""
    calls: dict[str, list[tuple[Any, Any]]] = {name: [] for name in modules}

    def hook(name: str) -> Callable[..., None]:
        def keep(module: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            calls[name].append(((*args, *kwargs.values())[0], output))

        return keep

    handles = [module.register_forward_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Row:
    """One line of the table."""

    case: str
    tensor: str
    difference: str
    tolerance: str
    is_ok: bool
    ratio: float = 0.0


@dataclass
class Report:
    """Everything that was compared."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def check(self, case: str, name: str, is_ok: bool, detail: str = "") -> None:
        """A comparison that is right or wrong."""
        self.rows.append(Row(case, name, "equal" if is_ok else detail or "different", "equal", bool(is_ok)))


class Case:
    """A case's tensors and settings, and which of its tensors were compared."""

    def __init__(self, name: str, folder: Path, report: Report, settings: dict[str, Any], table: dict[str, Any]):
        self.name, self.folder, self.report, self.settings, self.table = name, folder, report, settings, table
        self.tensors = load_file(folder / "cases" / f"{name}.safetensors")
        self.compared: set[str] = set()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def get(self, *names: str) -> torch.Tensor:
        """The first of these tensors that is there."""
        return self.tensors[next(name for name in names if name in self.tensors)]

    def matches(self, pattern: str) -> list[re.Match]:
        """Matches of a regular expression with whole names."""
        return [match for name in sorted(self.tensors) if (match := re.fullmatch(pattern, name))]

    def compare(self, name: str, ours: torch.Tensor, region: torch.Tensor | None = None, label: str = "") -> None:
        """Ours against the tensor `name`, if there is one; with a boolean `region` of the same shape only there."""
        if name not in self.tensors:
            return
        expected = self.tensors[name]
        self.compared.add(name)
        tolerance = self.table.get(name, {}).get("suggested_atol")
        is_exact = tolerance is None
        shown = f"{tolerance:.2g}" if not is_exact else "equal"
        label = f"{name} {label}".strip()
        if ours.shape != expected.shape:
            difference = f"shape {tuple(ours.shape)}, not {tuple(expected.shape)}"
            self.report.rows.append(Row(self.name, label, difference, shown, False))
            return
        if region is not None:
            ours, expected = ours[region], expected[region]
        self._add(label, ours, expected, 0.0 if is_exact else tolerance, shown)

    def compare_alone(self, name: str, in_batch: torch.Tensor, alone: torch.Tensor, label: str) -> None:
        """A row of a batch of ours against the same row alone, where the original's own batch cannot be compared."""
        tolerance = self.table[name]["suggested_atol"]
        self._add(f"{name} {label}", in_batch, alone, tolerance, f"{tolerance:.2g}")

    def _add(self, label: str, ours: torch.Tensor, expected: torch.Tensor, tolerance: float, shown: str) -> None:
        # Entries that a processor removed are minus infinity: at the same places, or wrong.
        ours, expected = ours.detach().double(), expected.double()
        is_finite = expected.isfinite()
        is_same_elsewhere = torch.equal(ours[~is_finite], expected[~is_finite]) and bool(
            ours[is_finite].isfinite().all()
        )
        difference = (ours - expected)[is_finite].abs().max().item() if is_finite.any() else 0.0
        is_ok = is_same_elsewhere and difference <= tolerance
        ratio = difference / tolerance if tolerance else float(not is_ok)
        text = f"{difference:.2g}" if is_same_elsewhere else "other places removed"
        self.report.rows.append(Row(self.name, label, text, shown, is_ok, ratio))

    def compare_calls(self, prefix: str, calls: Mapping[str, list], layout: Callable = lambda tensor: tensor) -> None:
        """Outputs of captured modules against `prefix` + their names."""
        for name, found in calls.items():
            if found:
                self.compare(f"{prefix}{name}", layout(found[0][1]))


# ---------------------------------------------------------------------------------------------------------------------
# Recordings
# ---------------------------------------------------------------------------------------------------------------------


def check_audio(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    for clip in [match[1] for match in case.matches(r"in\.(\w+)\.pcm16")]:
        pcm, rate = case[f"in.{clip}.pcm16"], case.settings[f"{clip}_sr"]
        waveform, found_rate = load_audio((pcm.numpy(), rate))
        path = case.folder / "audio" / f"{clip}.wav"
        if path.is_file():
            from_file, found_rate = load_audio(path)
            is_same = len(from_file) == len(waveform) and bool((from_file == waveform).all())
            case.report.check(case.name, f"{path.name} = in.{clip}.pcm16", is_same and found_rate == rate)
        for match in case.matches(rf"out\.{clip}\.wav_(\d+)_file_loader"):
            case.compare(match[0], torch.tensor(resample_soxr(waveform, rate, int(match[1]))))
        # The signal at the model's rate; in a check of the kernel its rate is said to be another.
        base = torch.tensor(resample_soxr(waveform, rate, model.config.sampling_rate))
        for match in case.matches(rf"out\.{clip}\.wav_(\d+)_from_(\d+)(_kernel_check)?"):
            case.compare(match[0], resample_sinc(base, int(match[2]), int(match[1])))


def check_mel(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    extractor = model.feature_extractor
    names = ("num_mel_bins", "n_fft", "win_length", "hop_length", "mel_fmin", "mel_fmax")
    for match in case.matches(r"in\.(\w*?)wav_(\d+)"):
        settings = {name: getattr(extractor, name) for name in names}
        mel = log_mel(case[match[0]][None], sampling_rate=int(match[2]), **settings)
        case.compare(f"out.{match[1]}log_mel", transposed(mel))


def check_fbank(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    for match in case.matches(r"in\.(\w*?)wav_(\d+)"):
        fbank = kaldi_fbank(case[match[0]], int(match[2]))
        case.compare(f"out.{match[1]}fbank", fbank)
        case.compare(f"out.{match[1]}fbank_mean_removed", fbank - fbank.mean(dim=0))


def check_w2v_features(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    for match in case.matches(r"in\.(\w+)\.wav_(\d+)"):
        features = model.feature_extractor(emotion_audio=(case[match[0]].numpy(), int(match[2])))
        mask = features["emotion_attention_mask"]
        case.compare(f"out.{match[1]}.input_features", features["emotion_input_features"])
        case.compare(f"out.{match[1]}.attention_mask", mask)
        settings = case.settings.get(match[1], {})
        found = {"samples": len(case[match[0]]), "frames": mask.shape[1], "valid": int(mask.sum())}
        case.report.check(case.name, f"settings {match[1]}", settings == {key: found[key] for key in settings})


# ---------------------------------------------------------------------------------------------------------------------
# Semantic features, codec, speaker encoder
# ---------------------------------------------------------------------------------------------------------------------


def check_w2v_bert(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    encoder = model.semantic_encoder
    modules = {"feature_projection": encoder.feature_projection}
    for index, layer in enumerate(encoder.encoder.layers):
        modules |= {f"layer{index}.{name}": getattr(layer, name) for name in ("ffn1", "self_attn", "conv_module")}
    for clip in [match[1] for match in case.matches(r"in\.(\w+)\.input_features")]:
        with captured(modules) as calls:
            output = encoder(
                case[f"in.{clip}.input_features"],
                attention_mask=case[f"in.{clip}.attention_mask"],
                output_hidden_states=True,
            )
        for index, hidden_states in enumerate(output.hidden_states):
            for kind in ("mid", "out"):
                case.compare(f"{kind}.{clip}.hidden_{index}", hidden_states)
        case.compare(f"out.{clip}.semantic_features", model.semantic_codec.normalize(output.last_hidden_state))
        case.compare_calls(f"mid.{clip}.", calls)


def check_semantic_codec(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    codec = model.semantic_codec
    encoder = codec.encoder
    for match in case.matches(r"in\.((?:\w+\.)?)features"):
        convolutions = {"encoder.embed": encoder.conv_in}
        blocks = {f"encoder.convnext{index}": block for index, block in enumerate(encoder.blocks)}
        stacked = {"encoder.backbone": encoder.norm_out, "encoder.linear": encoder.linear_out}
        with captured({**convolutions, **blocks, **stacked, "in_project": codec.quantizer.project_in}) as calls:
            output = codec.encode(case[match[0]])
        prefix = f"mid.{match[1]}"
        case.compare_calls(prefix, {name: calls[name] for name in (*convolutions, *stacked)})
        case.compare_calls(prefix, {name: calls[name] for name in (*blocks, "in_project")}, transposed)
        case.compare(f"out.{match[1]}codes", output.semantic_ids)
        case.compare(f"out.{match[1]}quantized", output.semantic_embeds)
        directions = F.normalize(calls["in_project"][0][1][0], dim=-1)
        distances = torch.cdist(directions, F.normalize(codec.quantizer.codebook.weight, dim=-1)).square()
        nearest = distances.topk(2, largest=False).values
        case.compare(f"{prefix}gap_to_second_nearest", nearest[:, 1] - nearest[:, 0])
    for match in case.matches(r"in\.((?:\w+\.)?vq2emb)_codes"):
        case.compare(f"out.{match[1]}", transposed(codec.embed(case[match[0]])))


def check_campplus(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    encoder = model.speaker_encoder
    modules = {
        "head": encoder.head,
        "norm_in": encoder.norm_in,
        "norm_out": encoder.norm_out,
        "stats": encoder.projection,
    }
    for index, block in enumerate(encoder.blocks, start=1):
        modules |= {f"block{index}": block.norm, f"transit{index}": block}
        modules |= {f"block{index}.tdnnd{number}": layer.masking for number, layer in enumerate(block.layers, start=1)}
    for clip in [match[1] for match in case.matches(r"in\.(\w+)\.fbank")]:
        with captured(modules) as calls:
            case.compare(f"out.{clip}.embedding", encoder(case[f"in.{clip}.fbank"]).speaker_embeds)
        case.compare(f"mid.{clip}.tdnn", F.relu(calls.pop("norm_in")[0][1]))
        case.compare(f"mid.{clip}.out_nonlinear", F.relu(calls.pop("norm_out")[0][1]))
        # What stands before a layer is what the original calls the end of the block.
        for name in ("stats", *(f"block{index + 1}" for index in range(len(encoder.blocks)))):
            case.compare(f"mid.{clip}.{name}", calls.pop(name)[0][0])
        case.compare_calls(f"mid.{clip}.", calls)


# ---------------------------------------------------------------------------------------------------------------------
# Text to semantic tokens
# ---------------------------------------------------------------------------------------------------------------------


def check_conditioning(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    t2s = model.t2s

    def capture(kind: str, encode: Callable, features: torch.Tensor, prefix: str) -> torch.Tensor:
        conformer, perceiver = getattr(t2s, f"{kind}_conformer"), getattr(t2s, f"{kind}_perceiver")
        modules = {
            "embed.conv": conformer.subsampling.conv,
            "embed.linear": conformer.subsampling.linear,
            "after_norm": conformer.norm,
            "perceiver.proj_context": perceiver.context_proj,
            **{f"block{index}": layer for index, layer in enumerate(conformer.layers)},
        }
        for index, layer in enumerate(perceiver.layers):
            modules |= {f"perceiver.attn{index}": layer.out_proj, f"perceiver.ff{index}": layer.down_proj}
        with captured(modules) as calls:
            encoded = encode(features)
        case.compare(f"{prefix}embed.conv", F.relu(calls.pop("embed.conv")[0][1]))
        case.compare_calls(prefix, calls)
        return encoded

    features = {match[1]: case[match[0]] for match in case.matches(r"in\.(\w+)_features")}
    if "spk" in features:
        case.compare("out.spk.latents", capture("speaker", t2s.encode_speaker, features["spk"], "mid.spk."))
    if "emo" in features:
        with captured({"vector_raw": t2s.emotion_perceiver, "after_emovec_layer": t2s.emotion_in_proj}) as calls:
            capture("emotion", t2s.encode_emotion, features["emo"], "mid.emo.")
        case.compare("mid.emo.vector_raw", calls.pop("vector_raw")[0][1][:, 0])
        case.compare_calls("mid.emo.", calls)
    emotions = {name: t2s.encode_emotion(value) for name, value in features.items()}
    for name, emotion in emotions.items():
        case.compare(f"out.emo.emovec_of_{name}", emotion)
    for match in case.matches(r"out\.emo\.merged_alpha_([\d.]+)"):
        case.compare(match[0], t2s.mix_emotion(emotions["spk"], emotions["emo"], float(match[1])))

    if "in.batch.features" in case:
        batch, lengths = case["in.batch.features"], case["in.batch.lengths"]

        def emotion_vector(features: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
            return t2s.emotion_perceiver(*t2s.emotion_conformer(features, lengths))[:, 0]

        for name, encode in (("spk_latents", t2s.encode_speaker), ("emo_vector_raw", emotion_vector)):
            name, rows = f"out.batch.{name}", encode(batch, lengths)
            if name in case:
                compare_longest_rows(case, name, rows, lengths)
                for index, length in enumerate(lengths.tolist()):
                    alone = encode(batch[index : index + 1, :length])[0]
                    case.compare_alone(name, rows[index], alone, f"row {index} = alone")


def compare_longest_rows(case: Case, name: str, ours: torch.Tensor, lengths: torch.Tensor) -> None:
    """Only the longest rows of the original's batches are what they are alone: padding leaks into the others."""
    is_longest = (lengths == lengths.max()).view(-1, *[1] * (ours.ndim - 1))
    case.compare(name, ours, is_longest.expand_as(ours), label="longest rows")


class Recorder(LogitsProcessor):
    """Keeps the ids that logits processors see at the first step."""

    def __init__(self) -> None:
        self.input_ids: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.input_ids is None:
            self.input_ids = input_ids.clone()
        return scores


def check_t2s_prefix(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    t2s = model.t2s
    for match in case.matches(r"in\.((?:\w+\.)?)text_ids"):
        prefix, text_ids = match[1], case[match[0]]
        speaker = case.get(f"in.{prefix}spk_latents", "in.spk_latents").expand(len(text_ids), -1, -1)
        emotion = case.get(f"in.{prefix}emovec", "in.emovec").expand(len(text_ids), -1)
        inputs_embeds, attention_mask = t2s.prepare_prefix(text_ids, None, speaker, emotion)
        # Ours ends with the start token, which the original embeds later.
        case.compare(f"out.{prefix}prefix_embeddings", inputs_embeds[:, :-1])
        case.compare(f"out.{prefix}attention_mask", attention_mask)
        case.compare(f"mid.{prefix}condition_rows", inputs_embeds[:, : t2s.config.num_prefix_slots])
        recorder = Recorder()
        t2s.generate(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            logits_processor=LogitsProcessorList([recorder]),
            max_new_tokens=1,
            **deterministic(1),
        )
        case.compare(f"out.{prefix}placeholder_ids", recorder.input_ids)


def deterministic(num_beams: int) -> dict[str, Any]:
    """
    Generation settings of a search without chance, as the original's: it does not forbid the start token, and what only
    sampling uses is neutral.
    """
    return {
        "do_sample": False,
        "num_beams": num_beams,
        "temperature": 1.0,
        "top_k": 50,
        "top_p": 1.0,
        "suppress_tokens": [],
        **({"length_penalty": 1.0} if num_beams == 1 else {}),
    }


def check_t2s_forward(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    t2s = model.t2s
    text_ids, codes = case["in.text_ids"], case["in.codes"]
    condition = {"speaker_latents": case["in.spk_latents"], "emotion_embeds": case["in.emovec"]}
    stop = codes.new_full((len(codes), 1), t2s.config.semantic_stop_token_id)
    modules = {"input_embeddings": t2s.model.dropout, "ln_f": t2s.model.norm, "final_norm": t2s.model.final_norm}
    modules |= {f"block{index}": layer for index, layer in enumerate(t2s.model.layers)}
    with captured(modules) as calls:
        output = t2s(input_ids=text_ids, semantic_ids=torch.cat([codes, stop], dim=1), **condition)
    case.compare("mid.final_norm", calls.pop("final_norm")[0][1][:, t2s.config.num_prefix_slots :])
    case.compare_calls("mid.", calls)
    case.compare("mid.latent_with_two_extra", output.last_hidden_state)
    case.compare("out.latent", output.last_hidden_state[:, :-2])
    case.compare("out.code_logits", output.logits)
    case.compare("out.text_logits", t2s(input_ids=text_ids, labels=codes, **condition).text_logits)


def check_t2s_generate(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    t2s = model.t2s
    speaker_latents = t2s.encode_speaker(case["in.spk_features"])
    for name, settings in case.settings.items():
        known = {"repetition_penalty", "length_penalty"}
        others = settings.keys() - known - {"num_beams", "max_generate_length", "do_sample"}
        others -= {"n_generated", "ended_with_stop"}
        if others or settings.get("do_sample"):
            case.report.check(case.name, f"settings {name}", False, f"{sorted(others)} unknown, or sampled")
            continue
        output = t2s.generate(
            case["in.text_ids"],
            speaker_latents=speaker_latents,
            emotion_embeds=case["in.emovec"],
            max_new_tokens=settings["max_generate_length"],
            return_dict_in_generate=True,
            output_logits=True,
            output_scores=True,
            **{**deterministic(settings["num_beams"]), **{key: settings[key] for key in known & settings.keys()}},
        )
        case.compare(f"out.{name}.codes", output.sequences)
        has_ended = bool((output.sequences == t2s.config.semantic_stop_token_id).any())
        found = {"n_generated": output.sequences.shape[1], "ended_with_stop": has_ended}
        is_right = all(settings.get(key, value) == value for key, value in found.items())
        case.report.check(case.name, f"settings {name}", is_right, f"{found}")
        if settings["num_beams"] > 1:
            case.compare(f"out.{name}.sequence_score", output.sequences_scores)
        else:
            best = torch.cat(output.scores).topk(2).values
            case.compare(f"mid.{name}.step_logits", torch.cat(output.logits))
            case.compare(f"mid.{name}.step_margin", best[:, 0] - best[:, 1])


def check_t2s_processors(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    """The processors that stock `generate` makes of the checkpoint's own settings, in its order."""
    stages = {
        "RepetitionPenaltyLogitsProcessor": "after_repetition_penalty",
        "TemperatureLogitsWarper": "after_temperature",
        "TopKLogitsWarper": "after_top_k",
        "TopPLogitsWarper": "after_top_p",
    }
    for chain, num_beams in (("sample", 1), ("beam_sample", model.generation_config.num_beams)):
        settings = {"do_sample": True, "num_beams": num_beams, "suppress_tokens": [], "length_penalty": 1.0}
        settings |= {key: value for key, value in case.settings.items() if not isinstance(value, dict)}
        settings |= case.settings.get(chain, {})
        config, _ = model.t2s._prepare_generation_config(model.generation_config, **settings)
        model.t2s._prepare_special_tokens(config)
        history, scores = case["in.history_ids"], case["in.logits"]
        processors = model.t2s._get_logits_processor(config, history.shape[1], history)
        if num_beams > 1:
            scores = F.log_softmax(scores, dim=-1)
            case.compare(f"mid.{chain}.log_softmax", scores)
        for processor in processors:
            scores = processor(history, scores)
            for kind in ("mid", "out"):
                case.compare(f"{kind}.{chain}.{stages.get(type(processor).__name__)}", scores)
        case.compare(f"out.{chain}.probabilities", scores.softmax(dim=-1))


# ---------------------------------------------------------------------------------------------------------------------
# Semantic tokens to sound
# ---------------------------------------------------------------------------------------------------------------------


def check_length_regulator(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    regulator = model.s2m.length_regulator
    modules = {"content_in_proj": regulator.input_projection, "model12": regulator.output_projection}
    for index, (conv, norm) in enumerate(zip(regulator.convs, regulator.norms, strict=True)):
        modules |= {f"model{3 * index}": conv, f"model{3 * index + 1}": norm}
    for name in [match[1] for match in case.matches(r"in\.(\w+)\.x")]:
        semantic_embeds, lengths = case[f"in.{name}.x"], case[f"in.{name}.target_length"]
        with captured(modules) as calls:
            content = model.s2m.regulate_length(semantic_embeds, None, lengths)
        case.compare(f"mid.{name}.model12", transposed(calls.pop("model12")[0][1]))
        for norm in range(1, 12, 3):
            case.compare(f"mid.{name}.model{norm + 1}", F.mish(calls[f"model{norm}"][0][1]))
        case.compare_calls(f"mid.{name}.", calls)
        compare_longest_rows(case, f"out.{name}.y", content, lengths)
        for index, length in enumerate(lengths.tolist() if len(lengths) > 1 else []):
            row = slice(index, index + 1)
            alone = model.s2m.regulate_length(semantic_embeds[row], None, lengths[row])[0]
            case.compare_alone(f"out.{name}.y", content[index, :length], alone, f"row {index} = alone")


def check_gpt_layer(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    for name in [match[1] for match in case.matches(r"in\.(\w+)\.x")]:
        hidden_states = case[f"in.{name}.x"]
        s2m = model.s2m
        if hidden_states.shape[-1] != s2m.config.t2s_hidden_size:
            weights = load_file(case.folder / "weights" / "gpt_layer_official_size.safetensors")
            sizes = [len(weights[f"{index}.bias"]) for index in range(len(weights) // 2)]
            s2m = IndexTTS2SemanticToMelTransformer(
                t2s_hidden_size=weights["0.weight"].shape[1],
                t2s_projection_sizes=sizes[:-1],
                semantic_size=sizes[-1],
                num_layers=1,
            )
            s2m.t2s_projection.load_state_dict(weights)
        zeros = hidden_states.new_zeros((*hidden_states.shape[:2], s2m.config.semantic_size))
        case.compare(f"out.{name}.y", s2m.add_hidden_states(zeros, hidden_states))


def check_dit(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    s2m = model.s2m
    modules = {
        "t_embedder": s2m.time_embedding,
        "cond_projection": s2m.content_projection,
        "cond_x_merge_linear": s2m.input_projection,
        "transformer_norm": s2m.norm,
        "skip_linear": s2m.skip_projection,
        "conv1": s2m.wavenet_input_projection,
        "t_embedder2": s2m.wavenet_time_embedding,
        "res_projection": s2m.residual_projection,
        "final_layer": s2m.final_layer,
        "wavenet": s2m.wavenet,
        "wavenet.cond_layer": s2m.wavenet.time_projection,
    }
    modules |= {f"wavenet.in_layer{index}": conv for index, conv in enumerate(s2m.wavenet.gate_convs)}
    for index, block in enumerate(s2m.blocks):
        modules[f"layer{index}"] = block
        modules |= {
            f"layer{index}.{name}": getattr(block, name) for name in ("attention_norm", "attention", "feed_forward")
        }
    for name in [match[1] for match in case.matches(r"in\.(\w+)\.x_lens")]:
        sample, timestep, prompt_mel, content, speaker = (
            case.get(f"in.{name}.{key}", f"in.{key}") for key in ("x", "t", "prompt_x", "cond", "style")
        )
        sample, prompt_mel = transposed(sample), transposed(prompt_mel)
        lengths = case[f"in.{name}.x_lens"].expand(len(sample))
        inputs = (sample, timestep, prompt_mel, content, speaker)
        is_padded = bool((lengths < sample.shape[1]).any())
        with captured(modules) as calls:
            velocity = s2m(*inputs, mel_lengths=lengths if is_padded else None).velocity
        case.compare(f"mid.{name}.wavenet", transposed(calls.pop("wavenet")[0][1]))
        case.compare(f"mid.{name}.wavenet.cond_layer", calls.pop("wavenet.cond_layer")[0][1][..., None])
        case.compare_calls(f"mid.{name}.", calls)
        # The original reflects at the batch's end, so the last frames of a shorter row are not those of the row alone.
        reach = s2m.config.wavenet_num_layers * (s2m.config.wavenet_kernel_size // 2)
        valid = torch.where(lengths < sample.shape[1], lengths - reach, lengths)
        region = torch.arange(sample.shape[1]) < valid[:, None]
        velocity_name = f"out.{name}.velocity"
        case.compare(velocity_name, transposed(velocity), region[:, None].expand_as(transposed(velocity)))
        for index, length in enumerate(lengths.tolist() if is_padded else []):
            row = [
                value[index : index + 1, :length] if value.ndim == 3 else value[index : index + 1] for value in inputs
            ]
            alone = s2m(*row).velocity[0]
            case.compare_alone(velocity_name, velocity[index, :length], alone, f"row {index} = alone")


class GivenContentPipeline(IndexTTS2SemanticToMelPipeline):
    """The pipeline with the content embeddings themselves in the place of semantic ids."""

    content: torch.Tensor

    def encode_content(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.content


def check_cfm(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    prompt_mel, content = transposed(case["in.prompt_mel"])[0], case["in.mu"]
    num_prompt, num_frames = len(prompt_mel), content.shape[1]
    settings = {"prompt_frames": num_prompt, "total_frames": num_frames, **case.settings}
    case.report.check(
        case.name, "settings", [num_prompt, num_frames] == [settings["prompt_frames"], settings["total_frames"]]
    )
    pipeline = GivenContentPipeline(**model.semantic_to_mel.components)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.content = content[:, num_prompt:]
    features = content.new_zeros((3, model.t2s.config.feature_size))
    voice = VoicePrompt(
        speaker_features=features,
        emotion_features=features,
        speaker_embeds=case["in.style"][0],
        prompt_mel=prompt_mel,
        content_embeds=content[0, :num_prompt],
        checkpoint=pipeline.fingerprint,
    )
    for match in case.matches(r"out\.(steps(\d+))_cfg([\d.]+)"):
        with captured({"s2m": model.s2m}) as calls:
            output = pipeline(
                torch.zeros((1, 1), dtype=torch.long),
                voice,
                mel_lengths=torch.tensor([num_frames - num_prompt]),
                num_inference_steps=int(match[2]),
                guidance_scale=1.0 + float(match[3]),
                latents=transposed(case["in.noise"]),
                output_type="mel",
            )
        case.compare(match[0], transposed(F.pad(output.mels[0], (0, 0, num_prompt, 0)))[None])
        if float(match[3]) > 0:
            for step, (sample, velocity) in enumerate(calls["s2m"]):
                name = f"mid.{match[1]}.step{step}"
                case.compare(f"{name}.x", transposed(sample[:1]))
                case.compare(f"{name}.velocity_cond_uncond", transposed(velocity.velocity))


def check_bigvgan(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    vocoder = model.vocoder
    modules = {"conv_pre": vocoder.conv_in, "activation_post": vocoder.activation_out, "conv_post": vocoder.conv_out}
    for index, stage in enumerate(vocoder.stages):
        modules[f"up{index}"] = stage.upsample
        for number, block in enumerate(stage.blocks, start=index * len(stage.blocks)):
            modules[f"resblock{number}"] = block
            for place, layer in enumerate(block.layers):
                modules[f"resblock{number}.act{2 * place}"] = layer.activation_1
                modules[f"resblock{number}.act{2 * place + 1}"] = layer.activation_2
    for match in case.matches(r"in\.((?:\w+\.)?)mel"):
        with captured(modules) as calls:
            waveform = vocoder(transposed(case[match[0]])).waveform
        case.compare(f"out.{match[1]}wav", waveform[:, None])
        case.compare_calls(f"mid.{match[1]}", calls)
        for name, found in calls.items():
            if f"mid.{match[1]}{name}.upsample" in case:
                case.compare(f"mid.{match[1]}{name}.upsample", upsample_twice(found[0][0], vocoder.filter_taps))


# ---------------------------------------------------------------------------------------------------------------------
# Emotion and text
# ---------------------------------------------------------------------------------------------------------------------


def check_emotion(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    prototypes = model.t2s.emotion_prototypes
    style, weights = case["in.style"], case["in.emo_vector"].view(1, -1)
    nearest = prototypes.nearest(style)
    starts = torch.tensor([0, *prototypes.counts[:-1]]).cumsum(0)
    case.compare("mid.cosine_all_rows", F.cosine_similarity(style, prototypes.speaker_embeds))
    case.compare("out.nearest_row_per_emotion", (nearest - starts)[0])
    case.compare("mid.chosen_rows", prototypes.emotion_embeds[nearest[0]])
    case.compare("mid.weighted_sum", prototypes(weights, style))
    case.compare("out.emovec", model.t2s.weigh_emotion(weights, style, case["in.emovec_from_audio"]))

    case.report.check(case.name, "settings order", tuple(case.settings.get("order", EMOTIONS)) == EMOTIONS)
    for index, row in enumerate(case.settings.get("normalise", [])):
        for use_bias, name in ((True, "with_bias"), (False, "without_bias")):
            ours = balance_emotion_weights(row["inp"], use_bias=use_bias)
            is_close = torch.allclose(torch.tensor(ours), torch.tensor(row[name]).float(), rtol=0.0, atol=1e-12)
            case.report.check(case.name, f"settings normalise {index} {name}", is_close, f"{ours}, not {row[name]}")
    for index, row in enumerate(case.settings.get("scaled", [])):
        ours = scale_emotion_weights(row["inp"], row["emo_alpha"])
        case.report.check(case.name, f"settings scaled {index}", ours == row["out"], f"{ours}, not {row['out']}")


def check_text(folder: Path, report: Report) -> None:
    """Normalisation, pieces, ids and segments: all equal."""
    vocabulary, texts = folder / "text" / "bpe.model", json.loads((folder / "text" / "text_cases.json").read_text())
    tokenizer = IndexTTS2Tokenizer(str(vocabulary))
    normalize = TextNormalizer()
    for case in texts["cases"]:
        text = case["text"]
        pieces = tokenizer.tokenize(text)
        ids = tokenizer.convert_tokens_to_ids(pieces)
        ours = {
            "uses_chinese_rules": uses_chinese_rules(text),
            "normalized": normalize(text),
            "pieces": pieces,
            "ids": ids,
            "unk": ids.count(tokenizer.unk_token_id),
            "segments": {limit: split_pieces(pieces, int(limit)) for limit in case.get("segments", {})},
        }
        if case["ids"].count(tokenizer.unk_token_id) != case.get("unk"):
            report.notes.append(f"text {text[:24]!r}: `unk` is not compared, the set's own `ids` have another number")
            case.pop("unk")
        for key, expected in case.items():
            if match := re.fullmatch(r"segments_quick_(\d+)_max_(\d+)", key):
                ours[key] = split_pieces(pieces, int(match[2]), quick_streaming_tokens=int(match[1]))
            if key != "text":
                found = ours.get(key, "not compared")
                report.check("text", f"{key} of {text[:24]!r}", found == expected, f"{found!r}, not {expected!r}")
    for case in texts.get("glossary_cases", []):
        found = TextNormalizer(texts["glossary"])(case["text"])
        report.check(
            "text",
            f"glossary: {case['text'][:24]!r}",
            found == case["normalized"],
            f"{found!r}, not {case['normalized']!r}",
        )


def check_emotion_answers(folder: Path, report: Report) -> None:
    answers = json.loads((folder / "text" / "emotion_answers.json").read_text())
    report.check("emotion_text", "order", tuple(answers["order"]) == EMOTIONS)
    for case in answers["cases"]:
        name = f"{case['text'][:12]!r}: {case['answer'][:30]!r}"
        found = read_emotion_answer(case["text"], case["answer"])
        if "error" in case:
            report.notes.append(f"emotion_text {name}: the original fails ({case['error']}), ours gives {found}")
        else:
            report.check("emotion_text", name, found == case["weights"], f"{found}, not {case['weights']}")


# ---------------------------------------------------------------------------------------------------------------------
# From recording and text ids to sound
# ---------------------------------------------------------------------------------------------------------------------

GENERATION_NAMES = {"num_beams": "num_beams", "max_mel_tokens": "max_new_tokens"}
GENERATION_NAMES |= {name: name for name in ("repetition_penalty", "length_penalty")}


def check_end_to_end(case: Case, model: IndexTTS2ForTextToWaveform) -> None:
    t2s, s2m, pipeline = model.t2s, model.s2m, model.semantic_to_mel
    settings = dict(case.settings["settings"])
    emotion_weights, strength = settings.pop("emo_vector", None), settings.pop("emo_alpha", 1.0)
    silence_s = max(0, settings.pop("interval_silence", 200)) / 1000
    unknown = settings.keys() - GENERATION_NAMES.keys()
    if unknown or case.settings.get("do_sample"):
        case.report.check(case.name, "settings", False, f"{sorted(unknown)} unknown, or sampled")
        return
    generation = deterministic(settings.get("num_beams", model.generation_config.num_beams))
    generation |= {GENERATION_NAMES[name]: value for name, value in settings.items()}

    voice = model.encode_voice(case.folder / "audio" / "spk.wav")
    has_reference = case.settings.get("emo_audio", "spk") != "spk"
    emotion_features = voice.emotion_features
    if has_reference:
        emotion_features = model.encode_emotion(case.folder / "audio" / f"{case.settings['emo_audio']}.wav")
    case.compare("mid.spk_semantic_features", voice.speaker_features[None])
    case.compare("mid.emo_semantic_features", emotion_features[None])
    case.compare("mid.style", voice.speaker_embeds[None])
    case.compare("mid.ref_mel", transposed(voice.prompt_mel)[None])
    case.compare("mid.prompt_condition", voice.content_embeds[None])

    speaker_latents = t2s.encode_speaker(voice.speaker_features[None])
    emotion_embeds = t2s.encode_emotion(emotion_features[None])
    if has_reference:
        emotion_embeds = t2s.mix_emotion(t2s.encode_emotion(voice.speaker_features[None]), emotion_embeds, strength)
    if emotion_weights is not None:
        emotion_weights = torch.tensor([scale_emotion_weights(emotion_weights, strength)])
        emotion_embeds = t2s.weigh_emotion(emotion_weights, voice.speaker_embeds[None], emotion_embeds)

    segments = [match[1] for match in case.matches(r"in\.segment(\d+)\.text_ids")]
    waveforms, text_ids, noises = [], [], []
    for segment in sorted(segments, key=int):
        text_ids.append(case[f"in.segment{segment}.text_ids"])
        noises.append(transposed(case[f"in.segment{segment}.noise"])[0])
        prefix, condition = (
            t2s.prepare_prefix(text_ids[-1], None, speaker_latents, emotion_embeds),
            f"segment{segment}",
        )
        codes_raw = t2s.generate(inputs_embeds=prefix[0], attention_mask=prefix[1], **generation)
        case.compare(f"out.{condition}.codes_raw", codes_raw)
        codes = codes_raw[codes_raw != t2s.config.semantic_stop_token_id][None]
        hidden_states = t2s(inputs_embeds=prefix[0], attention_mask=prefix[1], semantic_ids=codes).last_hidden_state
        hidden_states = hidden_states[:, :-1]
        case.compare(f"mid.{condition}.spk_latents", speaker_latents)
        case.compare(f"mid.{condition}.emovec", emotion_embeds)
        case.compare(f"mid.{condition}.latent", hidden_states)
        case.compare(f"mid.{condition}.latent_projected", s2m.t2s_projection(hidden_states))
        semantic_embeds = s2m.add_hidden_states(pipeline.semantic_codec.embed(codes), hidden_states)
        case.compare(f"mid.{condition}.s_infer", semantic_embeds)
        lengths = torch.tensor([codes.shape[1]])
        mel_lengths = mel_lengths_for(lengths, s2m.config.mel_frames_per_token)
        case.compare(f"mid.{condition}.target_length", mel_lengths)
        content = pipeline.encode_content(codes, lengths, mel_lengths, hidden_states)
        case.compare(f"mid.{condition}.cond", content)
        case.compare(f"mid.{condition}.cfm_mu", torch.cat([voice.content_embeds[None], content], dim=1))
        output = pipeline(codes, voice, t2s_hidden_states=hidden_states, latents=noises[-1][None], output_type="pt")
        case.compare(f"mid.{condition}.mel", transposed(output.mels[0])[None])
        with_prompt = F.pad(output.mels[0], (0, 0, len(voice.prompt_mel), 0))
        case.compare(f"mid.{condition}.cfm_out_with_prompt", transposed(with_prompt)[None])
        case.compare(f"out.{condition}.wav", output.audios[0][None, None])
        waveforms += [output.audios[0], torch.zeros(int(model.config.sampling_rate * silence_s))]
    case.compare("out.wav_int16", to_int16(torch.cat(waveforms[:-1])))

    # Once more by the model's own call, all segments as one text; only the noise has to be handed in from outside.
    separator = t2s.config.text_stop_token_id
    if any(torch.isin(ids, torch.tensor([separator, t2s.config.text_start_token_id])).any() for ids in text_ids):
        case.report.notes.append(f"{case.name}: `generate` was not called, a text has the ids that separate segments")
        return
    row = torch.cat([F.pad(ids[0], (0, 1), value=separator) for ids in text_ids])[:-1]
    with mock.patch.object(
        IndexTTS2SemanticToMelPipeline, "prepare_sample", lambda *args: pad_sequence(noises, batch_first=True)
    ):
        output = model.generate(
            row[None],
            voice=voice,
            emotion_features=emotion_features if has_reference else None,
            emotion_weights=emotion_weights,
            emotion_strength=strength if has_reference else 1.0,
            segment_silence_s=silence_s,
            segment_batch_size=len(noises),
            **generation,
        )
    case.compare("out.wav_int16", to_int16(output.audio[0]), label="by `generate`")


def to_int16(waveform: torch.Tensor) -> torch.Tensor:
    return (waveform * 32767).clamp(-32767, 32767).to(torch.int16)


CHECKS: dict[str, Callable[[Case, IndexTTS2ForTextToWaveform], None]] = {
    "audio": check_audio,
    "mel": check_mel,
    "fbank": check_fbank,
    "w2v_features": check_w2v_features,
    "w2v_bert": check_w2v_bert,
    "semantic_codec": check_semantic_codec,
    "campplus": check_campplus,
    "conditioning": check_conditioning,
    "t2s_prefix": check_t2s_prefix,
    "t2s_forward": check_t2s_forward,
    "t2s_generate": check_t2s_generate,
    "t2s_processors": check_t2s_processors,
    "length_regulator": check_length_regulator,
    "gpt_layer": check_gpt_layer,
    "dit": check_dit,
    "cfm": check_cfm,
    "bigvgan": check_bigvgan,
    "emotion": check_emotion,
}
TEXT_CHECKS = {"text": check_text, "emotion_text": check_emotion_answers}


@torch.no_grad()
def run(folder: Path, only: str | None = None) -> Report:
    """Converts the set's weights and compares its cases, or only one of them."""
    report = Report()
    settings = json.loads((folder / "case_settings.json").read_text())
    tables = json.loads((folder / "tensors.json").read_text())
    names = {**tables, **settings, **{path.stem: None for path in sorted((folder / "cases").glob("*.safetensors"))}}
    names = [name for name in names if only in (None, name)]
    if only is not None and only not in names and only not in TEXT_CHECKS:
        report.check(only, "", False, "the set has no such case")
    for name, check_texts in TEXT_CHECKS.items():
        if only in (None, name):
            check_texts(folder, report)
    if not names:
        return report

    with tempfile.TemporaryDirectory() as temporary:
        original, converted = Path(temporary, "original"), Path(temporary, "converted")
        write_original_checkpoint(folder, original)
        convert_original_checkpoint(original, converted)
        model = IndexTTS2ForTextToWaveform.from_pretrained(converted)
        for name in names:
            check = CHECKS.get(name, check_end_to_end if name.startswith("e2e") else None)
            expected = {tensor for tensor in tables.get(name, {}) if tensor.startswith("out.")}
            compared: set[str] = set()
            if not (folder / "cases" / f"{name}.safetensors").is_file():
                report.check(name, "", False, "its file is missing")
            elif check is None:
                report.check(name, "", False, "no check for this case")
            else:
                case = Case(name, folder, report, settings.get(name, {}), tables.get(name, {}))
                expected |= {tensor for tensor in case.tensors if tensor.startswith("out.")}
                try:
                    check(case, model)
                except Exception as error:  # the other cases still count
                    report.check(name, "", False, f"{type(error).__name__}: {error}")
                    report.notes.append(traceback.format_exc())
                compared = case.compared
                left = [tensor for tensor in case.tensors if tensor.startswith("mid.") and tensor not in compared]
                if left:
                    report.notes.append(f"{name}: inner values that were not compared: {', '.join(sorted(left))}")
            for tensor in sorted(expected - compared):
                report.check(name, tensor, False, "not compared")
    return report


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare this package with numbers of the reference implementation.")
    parser.add_argument("folder", type=Path, help="the parity set")
    parser.add_argument("--case", help="only this case, or `text`, or `emotion_text`")
    parser.add_argument("--verbose", action="store_true", help="inner values and equal settings too")
    args = parser.parse_args(arguments)
    report = run(args.folder, args.case)

    width = max((len(row.tensor) for row in report.rows), default=0)
    print(f"{'case':20} {'tensor':{min(width, 60)}} {'largest difference':>20} {'tolerance':>10}")
    for row in report.rows:
        if args.verbose or not row.is_ok or row.tensor.startswith("out."):
            sign = "" if row.is_ok else "  WRONG"
            print(f"{row.case:20} {row.tensor:{min(width, 60)}} {row.difference:>20} {row.tolerance:>10}{sign}")
    for note in report.notes:
        print(note)
    print(f"\n{'case':20} {'compared':>8} {'wrong':>6} {'largest difference / tolerance':>32}")
    for name in dict.fromkeys(row.case for row in report.rows):
        rows = [row for row in report.rows if row.case == name]
        wrong = sum(not row.is_ok for row in rows)
        print(f"{name:20} {len(rows):8} {wrong:6} {max(row.ratio for row in rows):32.3f}")
    wrong = sum(not row.is_ok for row in report.rows)
    print(f"\n{len(report.rows)} comparisons, {wrong} wrong: {'FAILED' if wrong or not report.rows else 'passed'}")
    return int(bool(wrong) or not report.rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
