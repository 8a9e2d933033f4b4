"""
Time and memory of each stage of one call, printed as a table.

    python evaluation/benchmark.py --random                    # the released model's sizes, random weights
    python evaluation/benchmark.py --model FOLDER --device cuda --dtype bfloat16

The real front path is run (a recording becomes a voice, text ids become speech); the stages are told apart by hooks on the
networks. Times are those of one machine at one moment: compare ratios within a run.
"""

import argparse
import json
import platform
import resource
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

from indextts2_hf import (
    IndexTTS2Config,
    IndexTTS2FeatureExtractor,
    IndexTTS2FlowMatchScheduler,
    IndexTTS2ForTextToWaveform,
    IndexTTS2GenerationConfig,
    IndexTTS2SemanticCodec,
    IndexTTS2SemanticToMelTransformer,
    IndexTTS2SpeakerEncoder,
    IndexTTS2T2SConfig,
    IndexTTS2T2SForConditionalGeneration,
    IndexTTS2Vocoder,
    set_num_threads,
)
from indextts2_hf.configuration_indextts2 import EMBEDDED_NAME


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        default=EMBEDDED_NAME,
        help="folder, Hub repository, or tiny, the checkpoint of the package (default: %(default)s)",
    )
    model.add_argument("--random", action="store_true", help="the released model's sizes with random weights")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument(
        "--dtype", default="float32", help="dtype of the text-to-semantic transformer (default: float32)"
    )
    parser.add_argument("--threads", type=int, default=None, help="CPU threads (default: what suits the model)")
    parser.add_argument("--prompt-s", type=float, default=5.0, help="length of the reference recording, seconds")
    parser.add_argument("--text-tokens", type=int, default=30, help="text tokens of each row")
    parser.add_argument("--speech-s", type=float, default=3.0, help="speech to make for each row, seconds")
    parser.add_argument("--batch-size", type=int, default=1, help="rows in one call")
    parser.add_argument("--num-beams", type=int, default=3, help="beams (default: 3, as released)")
    parser.add_argument("--num-inference-steps", type=int, default=25, help="flow-matching steps (default: 25)")
    parser.add_argument("--guidance-scale", type=float, default=1.7, help="guidance (default: 1.7)")
    parser.add_argument("--repeat", type=int, default=1, help="timed calls; the median is shown (default: 1)")
    parser.add_argument("--warm-up", type=int, default=0, help="calls before them that are not timed (default: 0)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args()


def random_full_size_model(dtype: torch.dtype) -> IndexTTS2ForTextToWaveform:
    """The sizes of the released checkpoint, which are the defaults of all classes."""
    t2s = IndexTTS2T2SForConditionalGeneration(IndexTTS2T2SConfig()).to(dtype)
    t2s.generation_config = IndexTTS2GenerationConfig(
        do_sample=True, temperature=0.8, top_k=30, top_p=0.8, num_beams=3, repetition_penalty=10.0, length_penalty=0.0
    )
    return IndexTTS2ForTextToWaveform(
        IndexTTS2Config(),
        t2s=t2s,
        s2m=IndexTTS2SemanticToMelTransformer(),
        scheduler=IndexTTS2FlowMatchScheduler(),
        semantic_encoder=Wav2Vec2BertModel(Wav2Vec2BertConfig(num_hidden_layers=17, hidden_act="swish")),
        semantic_codec=IndexTTS2SemanticCodec(),
        speaker_encoder=IndexTTS2SpeakerEncoder(),
        vocoder=IndexTTS2Vocoder(),
        feature_extractor=IndexTTS2FeatureExtractor(),
    ).eval()


class Stopwatch:
    """Adds up the time between the beginning and the end of each call of a module, by stage."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.started: list[float] = []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def watch(self, module: torch.nn.Module, stage) -> None:
        def begin(module, args, kwargs):
            self.started.append(self.now())

        def end(module, args, kwargs, output):
            name = stage(kwargs) if callable(stage) else stage
            self.seconds[name] += self.now() - self.started.pop()
            self.calls[name] += 1

        module.register_forward_pre_hook(begin, with_kwargs=True)
        module.register_forward_hook(end, with_kwargs=True, always_call=True)


def trunk_stage(kwargs: dict) -> str:
    """Which pass of the trunk a call is: the prefix, one token, or the last pass over all codes."""
    if kwargs.get("cache") is None:
        return "t2s: hidden states of all codes"
    return "t2s: decoding" if kwargs["inputs_embeds"].shape[1] == 1 else "t2s: prefix"


class PeakMemory:
    """Highest memory in use since it was made, in GiB: of the device, or of this process (Linux; else since its start)."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def read(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**30
        try:
            status = Path("/proc/self/status").read_text().splitlines()
            return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 2**20
        except (OSError, StopIteration):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    arguments = parse_arguments()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    torch.manual_seed(0)

    memory, start = PeakMemory(torch.device("cpu")), time.perf_counter()
    if arguments.random:
        model = random_full_size_model(dtype)
    else:
        model = IndexTTS2ForTextToWaveform.from_pretrained(arguments.model, dtype=dtype)
    set_num_threads(model, arguments.threads)
    model.to(device)
    loading = {"seconds": time.perf_counter() - start, "peak_gib": memory.read()}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}

    stopwatch = Stopwatch(device)
    for module, stage in (
        (model.semantic_encoder, "voice: semantic encoder"),
        (model.semantic_codec.encoder, "voice: semantic codec"),
        (model.speaker_encoder, "voice: speaker encoder"),
        (model.t2s.speaker_conformer, "t2s: speaker and emotion encoders"),
        (model.t2s.speaker_perceiver, "t2s: speaker and emotion encoders"),
        (model.t2s.emotion_conformer, "t2s: speaker and emotion encoders"),
        (model.t2s.emotion_perceiver, "t2s: speaker and emotion encoders"),
        (model.t2s.model, trunk_stage),
        (model.s2m.length_regulator, "s2m: length regulator"),
        (model.s2m, "s2m: flow matching"),
        (model.vocoder, "vocoder"),
    ):
        stopwatch.watch(module, stage)

    noise = np.random.default_rng(0).standard_normal(round(arguments.prompt_s * 22050)).astype(np.float32)
    recording = (0.1 * noise, 22050)
    input_ids = torch.randint(3, model.t2s.config.text_vocab_size - 1, (arguments.batch_size, arguments.text_tokens))
    audio_s = arguments.batch_size * arguments.speech_s

    runs = []
    for index in range(arguments.warm_up + arguments.repeat):
        stopwatch.seconds.clear()
        stopwatch.calls.clear()
        memory, start = PeakMemory(device), stopwatch.now()
        voice = model.encode_voice(recording)
        voice_s = stopwatch.now() - start
        model.generate(
            input_ids.to(device),
            voice=voice,
            duration_s=arguments.speech_s,
            num_beams=arguments.num_beams,
            num_inference_steps=arguments.num_inference_steps,
            guidance_scale=arguments.guidance_scale,
            seed=index,
        )
        total_s = stopwatch.now() - start
        stages = dict(stopwatch.seconds)
        stages["everything else"] = total_s - sum(stages.values())
        run = {
            "total_s": total_s,
            "voice_s": voice_s,
            "stages": stages,
            "calls": dict(stopwatch.calls),
            "peak_gib": memory.read(),
        }
        if index >= arguments.warm_up:
            runs.append(run)
    run = sorted(runs, key=lambda run: run["total_s"])[len(runs) // 2]

    threads = torch.get_num_threads()
    where = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()}, {threads} thread(s)"
    )
    print(
        f"{sum(parameters.values()) / 1e6:.0f} M parameters on {where}, torch {torch.__version__}, T2S in {arguments.dtype}"
    )
    print(
        f"{arguments.batch_size} x {arguments.speech_s} s of speech from a {arguments.prompt_s} s recording and "
        f"{arguments.text_tokens} text tokens; {arguments.num_beams} beam(s), {arguments.num_inference_steps} steps, "
        f"guidance {arguments.guidance_scale}; median of {len(runs)} call(s)\n"
    )
    print("| stage | calls | seconds | share | per second of speech |")
    print("|---|---|---|---|---|")
    for stage, seconds in sorted(run["stages"].items(), key=lambda item: -item[1]):
        print(
            f"| {stage} | {run['calls'].get(stage, '')} | {seconds:.2f} | {seconds / run['total_s']:.0%} | {seconds / audio_s:.2f} |"
        )
    print(f"| **all** | | {run['total_s']:.2f} | 100% | {run['total_s'] / audio_s:.2f} |")
    speaking_s = run["total_s"] - run["voice_s"]
    print(
        f"\nReal-time factor with the voice made before: {speaking_s / audio_s:.2f}; making the voice: {run['voice_s']:.2f} s."
    )
    print(
        f"Peak memory: {run['peak_gib']:.2f} GiB in the call; loading took {loading['seconds']:.1f} s and {loading['peak_gib']:.2f} GiB."
    )
    if arguments.json:
        report = {
            "arguments": {k: str(v) for k, v in vars(arguments).items()},
            "parameters": parameters,
            "loading": loading,
            "run": run,
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
