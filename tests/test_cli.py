"""
The command line: a few real processes, otherwise `main` in this one, over the embedded checkpoint, or over the tiny random one where
a test needs Chinese or known figures.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLING_RATE, make_speech

import indextts2_cli
from indextts2_hf import (
    IndexTTS2Config,
    IndexTTS2FeatureExtractor,
    IndexTTS2GenerationConfig,
    IndexTTS2T2SConfig,
    VoicePrompt,
    cli,
    embedded_checkpoint,
)
from indextts2_hf.configuration_indextts2 import EMBEDDED_NAME


HELLO = "Hello, world."

# What speaks where no other checkpoint is named.
EMBEDDED = IndexTTS2Config.from_pretrained(embedded_checkpoint())
EMBEDDED_T2S = IndexTTS2T2SConfig.from_pretrained(embedded_checkpoint(), subfolder="t2s")
EMBEDDED_VOICES = sorted(path.stem for path in (embedded_checkpoint() / "voices").iterdir())
MOST_TOKENS = EMBEDDED_T2S.max_semantic_tokens
MOST_SECONDS = MOST_TOKENS / EMBEDDED_T2S.semantic_token_rate


def run_process(*arguments: str, **kwargs) -> subprocess.CompletedProcess:
    source = Path(indextts2_cli.__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{source}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(
        [sys.executable, "-m", "indextts2_cli", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=300,
        **kwargs,
    )


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """`run(*arguments, stdin="...")` in an empty folder: exit code, standard output, lines of standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments, stdin: str | None = None) -> SimpleNamespace:
        if stdin is not None:
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode("utf-8"))))
        capsys.readouterr()
        try:
            code = indextts2_cli.main([str(argument) for argument in arguments])
        except SystemExit as error:
            code = error.code
        output, errors = capsys.readouterr()
        return SimpleNamespace(code=code, output=output, errors=errors.splitlines())

    return run


@pytest.fixture(scope="module")
def recordings(tmp_path_factory) -> Path:
    """Good and bad recordings."""
    folder = tmp_path_factory.mktemp("recordings")
    good = make_speech(1.0)
    soundfile.write(folder / "good.wav", good, SAMPLING_RATE)
    soundfile.write(folder / "stereo.flac", np.stack([good, 0.5 * good], axis=1), SAMPLING_RATE)
    soundfile.write(folder / "8khz.wav", make_speech(1.0, 8000), 8000)
    soundfile.write(folder / "96khz.wav", make_speech(1.0, 96000), 96000)
    soundfile.write(folder / "10min.wav", np.tile(make_speech(10.0, 8000), 60), 8000)
    soundfile.write(folder / "silent.wav", np.zeros(SAMPLING_RATE), SAMPLING_RATE)
    soundfile.write(folder / "short.wav", good[:1000], SAMPLING_RATE)
    soundfile.write(folder / "nan.wav", np.where(good > 0.1, np.nan, good), SAMPLING_RATE, subtype="FLOAT")
    (folder / "empty.wav").touch()
    (folder / "header.wav").write_bytes((folder / "good.wav").read_bytes()[:30])
    (folder / "half.wav").write_bytes((folder / "good.wav").read_bytes()[:20000])
    (folder / "text.wav").write_text("This is no audio file. " * 100)
    return folder


def warnings_of(result: SimpleNamespace) -> list[str]:
    """The lines of standard error, without the one that an untrained checkpoint is told by."""
    return [line for line in result.errors if "untrained" not in line]


def assert_refused(result: SimpleNamespace, match: str, left: list[str] | None = None) -> None:
    assert result.code == 2, result.errors
    assert result.output == ""
    assert len(result.errors) == 1, result.errors
    assert result.errors[0].startswith("indextts2: error: ")
    assert match in result.errors[0]
    assert sorted(os.listdir()) == sorted(left or [])


class TestProcess:
    def test_help_is_quick(self):
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            result = run_process("--help")
            seconds.append(time.perf_counter() - started)
            assert result.returncode == 0
        assert min(seconds) < 1.0
        assert all(command in result.stdout for command in ("speak", "voice", "convert", "info", "push"))

    def test_speak_from_standard_input(self, tmp_path, tiny_checkpoint):
        options = ["--json", "--duration-s", "1", "--model", tiny_checkpoint]
        result = run_process("speak", "-", *options, input="你好，世界。", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        described = json.loads(result.stdout)
        assert described["num_samples"] == SAMPLING_RATE == len(soundfile.read(tmp_path / "out.wav")[0])
        assert [(segment["text"], segment["spoken"]) for segment in described["segments"]] == [
            ("你好，世界。", "你好,世界.")
        ]
        assert result.stderr == ""

    def test_bad_input(self, tmp_path):
        (tmp_path / "text.wav").write_text("This is no audio file. " * 100)
        result = run_process("speak", HELLO, "--voice", "text.wav", cwd=tmp_path)
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(
            "indextts2: error: The audio file 'text.wav' is empty, damaged or in an unknown"
        )
        assert os.listdir(tmp_path) == ["text.wav"]

    def test_the_package_is_a_program(self, tmp_path):
        """`python -m indextts2_hf` is the command, and like it connects to nothing for the embedded model."""
        source = Path(indextts2_cli.__file__).parent
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        options = ["speak", HELLO, "--duration-s", "1", "--seed", "1", "--json"]
        with socket.create_server(("127.0.0.1", 0)) as hub:
            hub.settimeout(0.1)
            environment |= {"PYTHONPATH": str(source), "HF_ENDPOINT": f"http://127.0.0.1:{hub.getsockname()[1]}"}
            result = subprocess.run(
                [sys.executable, "-m", "indextts2_hf", *options],
                capture_output=True,
                text=True,
                env=environment,
                cwd=tmp_path,
                timeout=300,
            )
            assert result.returncode == 0, result.stderr
            with pytest.raises(TimeoutError):
                hub.accept()
        assert json.loads(result.stdout)["model"] == "tiny"
        assert result.stderr == ""
        assert soundfile.info(tmp_path / "out.wav").frames == EMBEDDED.sampling_rate


class TestParser:
    @pytest.mark.parametrize("command", ["speak", "voice", "convert", "info", "push"])
    def test_help(self, run, command):
        result = run(command, "--help")
        assert result.code == 0
        assert f"usage: indextts2 {command}" in result.output

    def test_version(self, run):
        result = run("--version")
        assert result.code == 0
        assert result.output.startswith("indextts2 ")
        assert torch.__version__ in result.output

    @pytest.mark.parametrize(
        "arguments, match",
        [
            ([], "the following arguments are required: COMMAND"),
            (["sing"], "invalid choice: 'sing'"),
            (["speak", "a", "b"], "unrecognized arguments: b"),
            (["speak", "a", "--duration", "1"], "unrecognized arguments: --duration 1, did you mean --duration-s?"),
            (["speak", "a", "--durations-s=1"], "unrecognized arguments: --durations-s=1, did you mean --duration-s?"),
            (["speak", "a", "--xyz"], "unrecognized arguments: --xyz (see"),
            (
                ["voice", __file__, "-o", "a", "--consents", "b"],
                "did you mean --consent? (see `indextts2 voice --help`)",
            ),
            (["speak", "a", "--threads", "0"], "'0' is not a whole number of at least 1"),
            (["speak", "a", "--duration-s", "0"], "'0' is not a number above 0"),
            (["speak", "a", "--duration-s", "-1"], "'-1' is not a number above 0"),
            (["speak", "a", "--duration-s", "nan"], "'nan' is not a number above 0"),
            (["speak", "a", "--duration-s", "inf"], "'inf' is not a number above 0"),
            (["speak", "a", "--num-semantic-tokens", "0"], "'0' is not a whole number of at least 1"),
            (["speak", "a", "--num-semantic-tokens", "1.5"], "'1.5' is not a whole number"),
            (["speak", "a", "--duration-s", "1", "--num-semantic-tokens", "50"], "not allowed with argument"),
            (["speak", "a", "--emotion-weights", "sad=1", "--emotion-text"], "not allowed with argument"),
            (["speak", "a", "--emotion-weights", "sad"], "neither eight numbers"),
            (["speak", "a", "--emotion-weights", "sad=0.1,sad=0.2"], "names an emotion twice"),
            (["speak", "a", "--emotion-audio", "missing.wav"], "there is no file 'missing.wav'"),
            (["speak", "a", "--emotion-strength", "2"], "'2' is not a number of at least 0 and at most 1"),
            (["speak", "a", "--top-p", "1.5"], "'1.5' is not a number above 0 and at most 1"),
            (["speak", "a", "--greedy", "--top-k", "3"], "--greedy does not sample"),
            (["speak", "a", "--greedy", "--num-candidates", "3"], "--greedy does not sample"),
            (["speak", "a", "--seed", "one"], "'one' is not a whole number"),
            (["speak", "--text-file", "missing.txt"], "there is no file 'missing.txt'"),
            (["speak", "a", "--text-file", "."], "'.' is a folder, name a file in it"),
            (["speak", "a", "-o", "missing/out.wav"], "there is no folder 'missing'"),
            (["speak", "a", "-o", "."], "'.' is a folder, name a file in it"),
            (["speak", "a", "-o", "out.mp3"], "'out.mp3' must end in .wav or .flac"),
            (["speak", "a", "--model", "./missing"], "there is no folder './missing'"),
            (["voice", "missing.wav", "-o", "a.safetensors"], "there is no file 'missing.wav'"),
            (["voice", __file__, "-o", "a.pt"], "'a.pt' must end in .safetensors"),
            (["convert", "missing", "out"], "there is no folder 'missing'"),
            (["info", "missing"], "there is no folder 'missing'"),
        ],
    )
    def test_wrong_usage(self, run, arguments, match):
        assert_refused(run(*arguments), match)

    def test_no_text(self, run, monkeypatch):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        assert_refused(run("speak"), "there is no text: give it as an argument, with --text-file or on standard input")

    def test_output_is_an_input(self, run, recordings):
        shutil.copy(recordings / "good.wav", "me.wav")
        assert_refused(run("speak", HELLO, "--voice", "me.wav", "-o", "./me.wav"), "would be lost", left=["me.wav"])

    def test_model_is_a_file(self, run):
        assert_refused(run("speak", HELLO, "--model", __file__), "is a file, name a checkpoint folder")

    def test_help_says_nothing_that_depends_on_the_model(self, run):
        said = " ".join(run("speak", "--help").output.split())
        assert "most text tokens in a segment (default: the model's own)" in said
        assert "flow-matching steps --guidance-scale" in said
        # As it is in the checkpoints that are named.
        released, tiny = (
            extractor.max_audio_s
            for extractor in (
                IndexTTS2FeatureExtractor(),
                IndexTTS2FeatureExtractor.from_pretrained(embedded_checkpoint()),
            )
        )
        assert f"the first {tiny:g} s are used by tiny, {released:g} s by the released model" in said
        said = " ".join(run("voice", "--help").output.split())
        assert f"tiny uses the first {tiny:g} s and the released model {released:g} s" in said

    def test_the_embedded_model_has_one_name(self, run):
        assert indextts2_cli.EMBEDDED_NAME == EMBEDDED_NAME
        for arguments in (["speak", HELLO], ["voice", __file__, "-o", "a"], ["info"]):
            parser = indextts2_cli.build_parser()
            args = parser.parse_args(arguments)
            assert args.model == "tiny" and not indextts2_cli.needs_network(args)
            # A folder of that name changes nothing of what the name means.
            os.makedirs("tiny", exist_ok=True)
            assert parser.parse_args([*arguments, *(["--model"] * (arguments[0] != "info")), "tiny"]).model == "tiny"
            assert (
                parser.parse_args([*arguments, *(["--model"] * (arguments[0] != "info")), "./tiny"]).model == "./tiny"
            )
            os.rmdir("tiny")


class TestSpeak:
    def test_the_name_goes_before_a_folder(self, run, tiny_checkpoint):
        options = ["--duration-s", "1", "--seed", "1", "--json"]
        assert run("speak", HELLO, *options, "-o", "default.wav").errors == []
        shutil.copytree(tiny_checkpoint, "tiny")
        named = run("speak", HELLO, *options, "--model", "tiny", "-o", "named.wav")
        assert (named.code, json.loads(named.output)["model"]) == (0, "tiny")
        assert named.errors == [
            "indextts2: warning: 'tiny' is the checkpoint of the package; the folder of that name is './tiny'."
        ]
        assert Path("named.wav").read_bytes() == Path("default.wav").read_bytes()
        folder = run("speak", HELLO, *options, "--model", "./tiny", "-o", "folder.wav")
        assert (folder.code, json.loads(folder.output)["model"], folder.errors) == (0, "./tiny", [])
        assert soundfile.info("folder.wav").samplerate == SAMPLING_RATE
        assert json.loads(run("info", "tiny", "--json").output)["folder"] == str(embedded_checkpoint())
        assert json.loads(run("info", "./tiny", "--json").output)["folder"] == "tiny"

    def test_threads_suit_the_model(self, run, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(os, "getloadavg", lambda: (99.0, 99.0, 99.0))
        before = torch.get_num_threads()
        try:
            for arguments, expected in ((["--threads", "2"], 2), ([], 1)):
                torch.set_num_threads(3)
                assert run("speak", HELLO, "-q", "--num-semantic-tokens", "9", *arguments).code == 0
                assert torch.get_num_threads() == expected
        finally:
            torch.set_num_threads(before)

    def test_summary(self, run):
        result = run("speak", HELLO, "--duration-s", "1.2345", "--seed", "5")
        assert result.code == 0, result.errors
        assert result.output.startswith("out.wav: 1.23 s of speech in ")
        assert "62 semantic tokens, 1 segment, seed 5" in result.output
        assert warnings_of(result) == []
        assert os.listdir() == ["out.wav"]
        file = soundfile.info("out.wav")
        rate = EMBEDDED.sampling_rate
        assert (file.frames, file.samplerate, file.channels) == (round(1.2345 * rate), rate, 1)
        assert (file.format, file.subtype) == ("WAV", "PCM_16")

    @pytest.mark.parametrize("is_untrained", [True, False])
    def test_untrained_is_told(self, run, tiny_checkpoint, is_untrained):
        shutil.copytree(tiny_checkpoint, "model")
        Path("model/README.md").write_text(f"---\ntags:\n- {'untrained' if is_untrained else 'tiny'}\n---\n")
        result = run("speak", HELLO, "--model", "model", "--num-semantic-tokens", "9")
        assert result.code == 0
        assert result.errors == ["indextts2: warning: the model model is untrained: it makes noise"] * is_untrained

    def test_quiet(self, run):
        result = run("speak", HELLO, "--duration-s", "1", "--quiet", "-o", "quiet.flac")
        assert (result.code, result.output, result.errors) == (0, "", [])
        assert soundfile.info("quiet.flac").format == "FLAC"

    def test_json(self, run):
        text = "One sentence is here. Another one is there."
        result = run("speak", text, "--json", "--max-text-tokens", "10", "--num-semantic-tokens", "70", "--seed", "3")
        described = json.loads(result.output)
        assert set(described) == {
            "output",
            "sampling_rate",
            "num_samples",
            "duration_s",
            "num_semantic_tokens",
            "segments",
            "seed",
            "seconds",
            "real_time_factor",
            "model",
        }
        assert described["output"] == "out.wav" and described["model"] == "tiny" and described["seed"] == 3
        samples, sampling_rate = soundfile.read("out.wav", dtype="int16")
        assert sampling_rate == described["sampling_rate"] == EMBEDDED.sampling_rate
        assert len(samples) == described["num_samples"]
        assert described["duration_s"] == pytest.approx(len(samples) / sampling_rate)
        segments = described["segments"]
        assert len(segments) > 1
        assert " ".join(segment["text"] for segment in segments).split() == text.split()
        assert " ".join(segment["spoken"] for segment in segments).split() == text.upper().split()
        assert sum(segment["num_semantic_tokens"] for segment in segments) == described["num_semantic_tokens"] == 70
        pause = int(0.2 * sampling_rate)
        assert sum(segment["num_samples"] for segment in segments) + pause * (len(segments) - 1) == len(samples)
        assert all(segment["duration"] is None for segment in segments)
        first = segments[0]["num_samples"]
        assert not samples[first : first + pause].any()
        seconds = described["seconds"]
        stages = {"import", "load", "text", "voice", "text_to_semantic", "semantic_to_mel", "vocoder"}
        assert set(seconds) == stages | {"total"}
        assert seconds["total"] == pytest.approx(sum(seconds[stage] for stage in stages))
        assert described["real_time_factor"] > 0

    def test_same_seed_same_bytes(self, run):
        for name, seed in (("a", 1), ("b", 1), ("c", 2)):
            assert run("speak", HELLO, "-q", "--duration-s", "1", "--seed", seed, "-o", f"{name}.wav").code == 0
        a, b, c = (Path(f"{name}.wav").read_bytes() for name in "abc")
        assert a == b != c

    def test_segments_together_sound_as_one_by_one(self, run, tiny_checkpoint):
        text = "One sentence is here. Another one is there. A third one ends it."
        waveforms = []
        for size in (1, 3):
            options = [
                "-q",
                "--model",
                tiny_checkpoint,
                "--max-text-tokens",
                "8",
                "--duration-s",
                "3",
                "--seed",
                "1",
                "--segment-batch-size",
                size,
            ]
            assert run("speak", text, *options, "-o", f"{size}.wav").code == 0
            waveforms.append(soundfile.read(f"{size}.wav")[0])
        assert waveforms[0] == pytest.approx(waveforms[1], abs=1e-4)

    def test_random_seed_is_told(self, run):
        seeds = {
            json.loads(run("speak", HELLO, "--json", "--num-semantic-tokens", "9").output)["seed"] for _ in range(2)
        }
        assert len(seeds) == 2

    def test_free_length(self, run):
        result = run("speak", HELLO, "--json", "--seed", "1", "--num-inference-steps", "4")
        described = json.loads(result.output)
        limit = IndexTTS2GenerationConfig.from_pretrained(embedded_checkpoint()).max_new_tokens
        assert 1 < described["num_semantic_tokens"] <= limit
        length_s = described["num_semantic_tokens"] / EMBEDDED_T2S.semantic_token_rate
        assert described["duration_s"] == pytest.approx(length_s, abs=0.05)
        assert np.abs(soundfile.read("out.wav")[0]).max() > 0.01

    @pytest.mark.parametrize("text", ["Hello there, it's 5 km.", "今天天气很好。", "Hello, 世界！"])
    def test_text_from_file_and_stdin(self, run, tiny_checkpoint, text):
        Path("text.txt").write_text(f"\ufeff{text}\n", encoding="utf-8")
        options = ["-q", "--seed", "1", "--num-semantic-tokens", "30", "--model", tiny_checkpoint]
        assert run("speak", text, *options, "-o", "argument.wav").code == 0
        assert run("speak", "--text-file", "text.txt", *options, "-o", "file.wav").code == 0
        assert run("speak", "-", *options, "-o", "dash.wav", stdin=text).code == 0
        assert run("speak", *options, "-o", "stdin.wav", stdin=text).code == 0
        assert len({Path(f"{name}.wav").read_bytes() for name in ("argument", "file", "dash", "stdin")}) == 1

    def test_controls_change_the_audio(self, run, recordings):
        variants = [
            [],
            ["--emotion-weights", "happy=0.6, sad=0.2"],
            ["--emotion-weights", "0.6,0,0.2,0,0,0,0,0", "--emotion-strength", "0.5"],
            ["--emotion-audio", recordings / "8khz.wav"],
            ["--voice", recordings / "good.wav"],
            ["--greedy"],
            ["--num-beams", "2"],
            ["--temperature", "1.5", "--top-k", "100", "--top-p", "1"],
            ["--num-inference-steps", "3"],
            ["--guidance-scale", "1"],
            ["--text-guidance-scale", "4"],
            ["--num-candidates", "3"],
            ["--dtype", "bfloat16"],
        ]
        # Of so many tokens: of half as many, two beams can find what greedy search finds.
        audio = set()
        for variant in variants:
            result = run(
                "speak", HELLO, "-q", "--seed", "1", "--num-semantic-tokens", "50", "--device", "cpu", *variant
            )
            assert (result.code, result.errors) == (0, []), variant
            audio.add(Path("out.wav").read_bytes())
        assert len(audio) == len(variants)

    def test_weights_by_name_and_number_are_the_same(self, run):
        options = ["-q", "--seed", "1", "--num-semantic-tokens", "25"]
        run("speak", HELLO, *options, "--emotion-weights", "sad=0.2,happy=0.6", "-o", "names.wav")
        run("speak", HELLO, *options, "--emotion-weights", "0.6,0,0.2,0,0,0,0,0", "-o", "numbers.wav")
        assert Path("names.wav").read_bytes() == Path("numbers.wav").read_bytes()

    @pytest.mark.parametrize("name", ["stereo.flac", "8khz.wav", "96khz.wav", "10min.wav", "half.wav"])
    def test_kinds_of_recordings(self, run, recordings, name):
        result = run("speak", HELLO, "--voice", recordings / name, "--num-semantic-tokens", "25")
        assert result.code == 0, result.errors
        # Only a recording of which not all is used is worth a word.
        warned = warnings_of(result)
        assert len(warned) == (name == "10min.wav"), warned
        most_s = IndexTTS2FeatureExtractor.from_pretrained(embedded_checkpoint()).max_audio_s
        assert all(f"is 600.0 s long: the first {most_s:g} s are used" in line for line in warned)

    def test_voice_by_name(self, run):
        for name, voice in (("default", []), ("named", ["--voice", EMBEDDED.default_voice])):
            run("speak", HELLO, "-q", "--seed", "1", "--num-semantic-tokens", "25", "-o", f"{name}.wav", *voice)
        assert Path("default.wav").read_bytes() == Path("named.wav").read_bytes()

    def test_existing_output_is_replaced(self, run):
        Path("out.wav").write_text("old")
        run("speak", HELLO, "-q", "--duration-s", "1")
        assert soundfile.info("out.wav").duration == 1.0
        assert os.listdir() == ["out.wav"]

    def test_output_through_a_link(self, run, tmp_path):
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "real.wav").touch()
        (tmp_path / "out.wav").symlink_to(tmp_path / "folder" / "real.wav")
        run("speak", HELLO, "-q", "--duration-s", "1")
        assert (tmp_path / "out.wav").is_symlink()
        assert soundfile.info(tmp_path / "folder" / "real.wav").duration == 1.0

    def test_progress_on_a_terminal(self, run, monkeypatch):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        result = run("speak", HELLO, "--num-semantic-tokens", "25", "--num-inference-steps", "2")
        shown = "\n".join(result.errors)
        assert "0/1" in shown and "segment" in shown
        result = run("speak", HELLO, "--num-semantic-tokens", "25", "--quiet")
        assert result.errors == []

    def test_long_run_without_terminal_is_announced(self, run, monkeypatch):
        monkeypatch.setattr(cli, "LONG_WORK_S", 0.0)
        text = "We have time. " * 3
        result = run("speak", text, "--max-text-tokens", "5", "--num-semantic-tokens", "30")
        assert result.code == 0
        announced = [line for line in result.errors if "more segments" in line]
        assert announced == ["indextts2: 2 more segments, about 0 min"], result.errors

    @pytest.mark.parametrize(
        "arguments, match",
        [
            ([""], "The text is empty: there is nothing to speak"),
            ([" \n\t "], "The text is blank: there is nothing to speak"),
            ([HELLO, "--voice", "nobody"], f"no voice named 'nobody', but {EMBEDDED_VOICES}"),
            ([HELLO, "--voice", "missing.wav"], "There is no audio file 'missing.wav'"),
            ([HELLO, "--voice", "missing.safetensors"], "There is no voice file 'missing.safetensors'"),
            ([HELLO, "--voice", "."], "is no voice pack: it has no voice.safetensors"),
            ([HELLO, "--emotion-weights", "0,0,0,0,0,0,1"], "has 7 values but there are eight emotions"),
            ([HELLO, "--emotion-weights", "0,0,0,0,0,0,0,0,1"], "has 9 values but there are eight emotions"),
            ([HELLO, "--emotion-weights", "nan,0,0,0,0,0,0,0"], "is nan but must be finite"),
            ([HELLO, "--emotion-weights", "sad=2.0"], "is 2.0 but must be finite and from 0 to 1.2"),
            ([HELLO, "--emotion-weights", "bored=0.2"], "names 'bored', which is none of the eight emotions"),
            ([HELLO, "--emotion-text", "so happy"], "There is no emotion language model"),
            (
                [HELLO, "--duration-s", "3000"],
                "`duration_s` is 3000.0 but this text of 7 tokens in 1 segment(s) can be spoken in at most 1.9 s",
            ),
            ([HELLO, "--duration-s", "0.01"], "needs at least"),
            ([HELLO, "--num-semantic-tokens", MOST_TOKENS + 1], f"positions for at most {MOST_TOKENS}"),
            (
                ["a " * 300, "--max-text-tokens", "400"],
                f"tokens but this checkpoint has positions for {EMBEDDED_T2S.max_text_tokens}",
            ),
            ([HELLO, "--device", "toaster"], "The device 'toaster' cannot be used"),
            ([HELLO, "--model", "nobody/nothing"], "no such repository could be had from the Hub"),
            ([HELLO, "--model", "."], "is no IndexTTS2 checkpoint: it has no config.json"),
        ],
    )
    def test_bad_input(self, run, arguments, match):
        assert_refused(run("speak", *arguments), match)

    @pytest.mark.parametrize("text", ["😀", "😀 😀 😀"])
    def test_unknown_characters(self, run, text):
        result = run("speak", text)
        assert result.code == 2
        assert "only characters that the vocabulary lacks" in result.errors[-1]
        assert all(line.startswith("indextts2: warning: ") for line in result.errors[:-1])
        assert os.listdir() == []

    @pytest.mark.parametrize("option", ["--voice", "--emotion-audio"])
    @pytest.mark.parametrize(
        "name, match",
        [
            ("empty.wav", "is empty, damaged or in an unknown format"),
            ("header.wav", "empty"),
            ("text.wav", "is empty, damaged or in an unknown format"),
            ("silent.wav", "silent"),
            ("short.wav", "0.25 s"),
            ("nan.wav", "NaN or infinite"),
        ],
    )
    def test_bad_recordings(self, run, recordings, option, name, match):
        assert_refused(run("speak", HELLO, option, recordings / name), match)

    def test_text_file_in_another_encoding(self, run):
        Path("text.txt").write_bytes("你好，世界".encode("gb18030"))
        assert_refused(run("speak", "--text-file", "text.txt"), "is not text in UTF-8", left=["text.txt"])

    def test_voice_of_another_checkpoint(self, run, tiny_voice):
        tiny_voice.save("other.safetensors")
        result = run("speak", HELLO, "--voice", "other.safetensors")
        assert_refused(result, "This voice was made with the checkpoint", left=["other.safetensors"])

    def test_damaged_voice(self, run):
        shutil.copy(embedded_checkpoint() / "voices" / f"{EMBEDDED.default_voice}.safetensors", "cut.safetensors")
        os.truncate("cut.safetensors", 5000)
        result = run("speak", HELLO, "--voice", "cut.safetensors")
        assert_refused(result, "is not a readable safetensors file", left=["cut.safetensors"])

    @pytest.mark.parametrize("part", ["t2s/model", "s2m/diffusion_pytorch_model", "semantic_encoder/model"])
    def test_damaged_checkpoint(self, run, part):
        shutil.copytree(embedded_checkpoint(), "model")
        os.truncate(f"model/{part}.safetensors", 5000)
        assert_refused(run("speak", HELLO, "--model", "model"), "'model' is damaged or incomplete", left=["model"])
        assert_refused(run("info", "model"), "is not a readable safetensors file", left=["model"])

    def test_checkpoint_of_another_kind(self, run):
        shutil.copytree(embedded_checkpoint(), "model")
        Path("model/config.json").write_text('{"model_type": "vits"}')
        assert_refused(run("speak", HELLO, "--model", "model"), "its model type is 'vits'", left=["model"])
        Path("model/config.json").write_text("{")
        assert_refused(run("speak", HELLO, "--model", "model"), "is not readable JSON", left=["model"])

    @pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder where nobody can write")
    def test_output_cannot_be_written(self, run):
        assert_refused(run("speak", HELLO, "-o", "/proc/out.wav"), "'/proc/out.wav' cannot be written")

    def test_interrupted(self, run, monkeypatch):
        def interrupt(waveform):
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "to_pcm", interrupt)
        result = run("speak", HELLO, "--duration-s", "1", "-o", "half.wav")
        assert result.code == 130
        assert result.errors[-1] == "indextts2: interrupted"
        assert os.listdir() == []

    def test_unexpected_failure(self, run, monkeypatch):
        def fail(waveform):
            raise RuntimeError("two\nlines")

        monkeypatch.setattr(cli, "to_pcm", fail)
        result = run("speak", HELLO, "--duration-s", "1")
        assert result.code == 1
        assert result.errors[-1] == "indextts2: error: unexpected RuntimeError: two lines (--debug shows where)"
        assert "Traceback" not in "\n".join(result.errors)
        result = run("speak", HELLO, "--duration-s", "1", "--debug")
        assert result.code == 1
        assert "Traceback (most recent call last):" in result.errors
        assert os.listdir() == []


class TestVoice:
    def test_makes_a_voice(self, run, recordings):
        result = run("voice", recordings / "good.wav", "-o", "me.safetensors")
        assert (result.code, result.errors) == (0, [])
        assert result.output.startswith("me.safetensors: a voice from 1.0 s of ")
        assert "for tiny@" in result.output
        assert os.listdir() == ["me.safetensors"]
        options = ["-q", "--seed", "1", "--num-semantic-tokens", "25"]
        assert run("speak", HELLO, *options, "--voice", "me.safetensors", "-o", "a.wav").code == 0
        assert run("speak", HELLO, *options, "--voice", recordings / "good.wav", "-o", "b.wav").code == 0
        assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()

    def test_bad_recording(self, run, recordings):
        assert_refused(run("voice", recordings / "silent.wav", "-o", "me.safetensors"), "silent")

    def test_makes_a_voice_pack(self, run, recordings):
        given = ["--license", "cc0-1.0", "--consent", "A buzz has nobody to ask.", "--emotion-weights", "happy=0.5"]
        result = run("voice", recordings / "good.wav", "-o", "me", *given)
        assert (result.code, result.errors) == (0, [])
        assert result.output.startswith("me: a voice pack from 1.0 s of ")
        assert sorted(os.listdir("me")) == ["README.md", "voice.safetensors"]
        voice = VoicePrompt.load("me")
        assert (voice.license, voice.consent) == ("cc0-1.0", "A buzz has nobody to ask.")
        assert voice.emotion_weights == (0.5, 0, 0, 0, 0, 0, 0, 0)
        options = ["-q", "--seed", "1", "--num-semantic-tokens", "25"]
        assert run("speak", HELLO, *options, "--voice", "me", "-o", "a.wav").code == 0
        same = ["--voice", recordings / "good.wav", "--emotion-weights", "happy=0.5"]
        assert run("speak", HELLO, *options, *same, "-o", "b.wav").code == 0
        assert Path("a.wav").read_bytes() == Path("b.wav").read_bytes()
        # A voice that was made before becomes another; what is not given stays.
        assert run("voice", "me/voice.safetensors", "-o", "mine.safetensors", "--license", "mit").code == 0
        other = VoicePrompt.load("mine.safetensors")
        assert (other.license, other.consent, other.emotion_weights) == ("mit", voice.consent, voice.emotion_weights)
        # Its card names the checkpoint as everybody can load it.
        card = Path("me/README.md").read_text()
        assert 'from_pretrained("tiny")' in card and "for the checkpoint | `tiny`" in card
        # Its emotion may be that of another recording.
        sad = ["--emotion-audio", recordings / "8khz.wav"]
        assert run("voice", "me/voice.safetensors", "-o", "sad.safetensors", *sad).code == 0
        assert not torch.equal(VoicePrompt.load("sad.safetensors").emotion_features, voice.emotion_features)
        assert_refused(
            run("voice", recordings / "good.wav", "-o", "me"),
            "'me' exists, name a new folder or a .safetensors file",
            left=["a.wav", "b.wav", "me", "mine.safetensors", "sad.safetensors"],
        )

    def test_a_voice_pack_with_an_adapter(self, run, tiny_checkpoint, tiny_adapter, recordings):
        model = ["--model", tiny_checkpoint]
        pack = ["--adapter", tiny_adapter, "--license", "cc0-1.0", "--consent", "Nobody to ask."]
        result = run("voice", recordings / "good.wav", "-o", "styled", *model, *pack)
        assert (result.code, result.errors) == (0, [])
        expected = ["README.md", "adapter_config.json", "adapter_model.safetensors", "voice.safetensors"]
        assert sorted(os.listdir("styled")) == expected
        options = ["-q", "--seed", "1", "--num-semantic-tokens", "25", *model]
        assert run("speak", HELLO, *options, "--voice", "styled", "-o", "a.wav").code == 0
        options[-1] = tiny_adapter
        assert run("speak", HELLO, *options, "--voice", recordings / "good.wav", "-o", "b.wav").code == 0
        a, b = (soundfile.read(f"{name}.wav")[0] for name in "ab")
        assert a == pytest.approx(b, abs=1e-4)
        # On another checkpoint neither the voice nor the adapter speaks.
        left = ["a.wav", "b.wav", "styled"]
        assert_refused(run("speak", HELLO, "-q", "--voice", "styled"), "This voice was made with", left=left)
        arguments = ["voice", recordings / "good.wav", "-o", "other", "--adapter", tiny_adapter]
        assert_refused(run(*arguments), "was made for", left=left)
        arguments[3] = "other.safetensors"
        assert_refused(run(*arguments), "a file cannot hold the --adapter", left=left)

    def test_an_adapter_beside_versions_that_do_not_work_together(
        self, run, tiny_checkpoint, tmp_path_factory, monkeypatch
    ):
        monkeypatch.setattr("indextts2_hf.modeling_t2s.MIN_PEFT_VERSION", "99.0")
        folder = tmp_path_factory.mktemp("style")
        settings = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_checkpoint)}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        (folder / "adapter_model.safetensors").touch()
        assert_refused(run("speak", HELLO, "-q", "--model", folder), "asks for PEFT 99.0 or newer, but PEFT")

    def test_a_voice_that_is_nowhere(self, run):
        message = "There is no voice 'someone/nobody': it is no file or folder here, no voice of this checkpoint"
        assert_refused(run("speak", HELLO, "--voice", "someone/nobody"), message)


class TestPush:
    def test_a_dry_run(self, run, tiny_checkpoint):
        result = run("push", tiny_checkpoint, "--repo-id", "someone/tiny", "--dry-run", "--json")
        assert (result.code, result.errors) == (0, [])
        described = json.loads(result.output)
        assert described["folder"] == "tiny-hub" and described["url"] is None and described["kind"] == "checkpoint"
        assert sum(described["files"].values()) == sum(
            path.stat().st_size for path in Path("tiny-hub").rglob("*") if path.is_file()
        )
        result = run("push", tiny_checkpoint, "--repo-id", "someone/tiny", "--dry-run")
        assert_refused(result, "'tiny-hub' exists. Name a new folder", left=["tiny-hub"])

    def test_what_cannot_be_published(self, run, recordings, tiny_adapter):
        assert run("voice", recordings / "good.wav", "-o", "me").code == 0
        push = ["--repo-id", "someone/it", "--dry-run"]
        assert_refused(run("push", "me", *push), "says nothing of license and consent", left=["me"])
        assert_refused(run("push", tiny_adapter, *push), "Publish that first, and name its repository", left=["me"])
        assert_refused(run("push", recordings, *push), "is no checkpoint of IndexTTS2", left=["me"])
        assert_refused(run("push", "me", "--repo-id", "it"), "'it' is no Hub repository id", left=["me"])


class TestInfo:
    def test_text(self, run, tiny_checkpoint):
        shutil.copytree(tiny_checkpoint, "model")
        card = "---\nlicense: apache-2.0\nlanguage:\n- en\n- zh\ntags:\n- untrained\n---\n"
        Path("model/README.md").write_text(card)
        result = run("info", "model")
        assert (result.code, result.errors) == (0, [])
        for expected in (
            "IndexTTS2T2SForConditionalGeneration",
            "22050 Hz",
            "4.0 s (200 semantic tokens)",
            "buzz (1.2 s, default)",
            "en, zh",
            "apache-2.0",
            "untrained",
        ):
            assert expected in result.output

    def test_of_the_embedded_checkpoint(self, run):
        described = json.loads(run("info", "--json").output)
        assert described["rates"]["sampling_rate"] == EMBEDDED.sampling_rate
        assert described["limits"]["segment_s"] == MOST_SECONDS
        assert list(described["voices"]) == EMBEDDED_VOICES
        assert [name for name, voice in described["voices"].items() if voice["is_default"]] == [EMBEDDED.default_voice]
        assert described["licence"] == "apache-2.0" and "en" in described["languages"]

    def test_json_counts_what_is_loaded(self, run, tiny_checkpoint, tiny_model):
        described = json.loads(run("info", tiny_checkpoint, "--json").output)
        for name in ("t2s", "s2m", "semantic_encoder", "semantic_codec", "speaker_encoder", "vocoder"):
            part = getattr(tiny_model, name)
            assert described["parts"][name]["class"] == type(part).__name__
            assert described["parts"][name]["num_parameters"] == sum(x.numel() for x in part.state_dict().values())
        assert described["total"]["class"] == "IndexTTS2ForTextToWaveform"
        assert described["rates"]["semantic_token_rate"] == 50.0
        assert described["limits"]["segment_s"] == tiny_model.t2s.config.max_semantic_tokens / 50
        assert list(described["voices"]) == ["buzz"]


class TestConvert:
    def test_arguments_are_handed_over(self, run, monkeypatch, tmp_path):
        # The converter has its own tests; here only the way to it.
        calls = []
        module = SimpleNamespace(convert_original_checkpoint=lambda *args, **kwargs: calls.append((args, kwargs)))
        monkeypatch.setitem(sys.modules, "indextts2_hf.convert_original_checkpoint", module)
        (tmp_path / "original").mkdir()
        result = run("convert", "original", "out", "--vocoder", "original")
        assert result.code == 0, result.errors
        parts = {"w2v_bert": None, "semantic_codec": None, "speaker_encoder": None, "vocoder": Path("original")}
        assert calls == [((Path("original"), Path("out")), parts)]

    def test_not_a_checkpoint(self, run, tmp_path):
        (tmp_path / "original").mkdir()
        result = run("convert", "original", "out")
        assert result.code == 2
        assert len(result.errors) == 1
        assert os.listdir() == ["original"]


def test_pcm_is_clamped_and_truncated():
    waveform = torch.tensor([0.0, 1.0, -1.0, 2.0, -2.0, 1.9 / 32767, -1.9 / 32767])
    assert cli.to_pcm(waveform).tolist() == [0, 32767, -32767, 32767, -32767, 1, -1]
