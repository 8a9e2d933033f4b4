"""The README's Python runs as it stands there, on the embedded checkpoint; its commands name options that exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import SAMPLING_RATE, make_speech
from test_train_emotion_text import build_emotion_text

import indextts2_cli
import indextts2_hf
from indextts2_hf import IndexTTS2Config, embedded_checkpoint


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
# What stands before a block, and the block.
PYTHON = re.findall(r"(?:<!-- (.*?) -->\n)?```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("   #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    for line in block.splitlines()
    if line.startswith(("indextts2 ", "./run speak"))
]


def test_every_python_block_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, pitch in (("reference.wav", 120.0), ("happy.wav", 200.0)):
        soundfile.write(name, make_speech(1.5, pitch_hz=pitch), SAMPLING_RATE)
    assert len(PYTHON) >= 5
    namespace = {}
    for remark, code in PYTHON:
        compiled = compile(code, "README.md", "exec")
        # A remark before a block says what it needs that the embedded checkpoint does not have.
        if remark == "the embedded checkpoint has no emotion language model":
            namespace["pipe"].emotion_text_model = build_emotion_text()
        else:
            assert not remark
        exec(compiled, namespace)
    info = soundfile.info("out.wav")
    assert info.samplerate == IndexTTS2Config.from_pretrained(embedded_checkpoint()).sampling_rate
    assert info.frames == round(3.2 * info.samplerate)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("reference.wav", "IndexTTS-2/config.yaml", "indextts2-converted/config.json", "report/results.json"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(b"")
    words = shlex.split(command.removeprefix("./run").removeprefix("indextts2"))
    assert indextts2_cli.build_parser().parse_args(words).command == words[0]


def test_the_python_is_typed(tmp_path):
    """For a type checker: no error in any block, and what it knows of the results. `.ci/run` lets it follow all libraries."""
    probes = {
        'pipe("Hello.")["audio"]': "numpy.ndarray",
        'pipe("Hello.")["sampling_rate"]': "int",
        'pipe(["Hello."], duration_s=[None])[0]': "indextts2_hf.pipeline_text_to_audio.Speech",
        'next(pipe(text for text in ["Hello."]))': "indextts2_hf.pipeline_text_to_audio.Speech",
        "voice": "indextts2_hf.pipeline_s2m.VoicePrompt",
        'next(pipe.stream("Hello."))': "indextts2_hf.modeling_indextts2.IndexTTS2Segment",
        'next(pipe.stream("Hello.")).is_last': "bool",
        "type(pipe).from_pretrained()": "indextts2_hf.pipeline_text_to_audio.IndexTTS2TextToAudioPipeline",
    }
    code = [block for _, block in PYTHON] + [f"reveal_type({probe})\n" for probe in probes]
    wrong = 'pipe("Hello.", duration_s="3")\n'
    (tmp_path / "readme.py").write_text("".join([*code, wrong]), encoding="utf-8")
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--follow-imports", "silent", "--hide-error-context"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *settings, "--cache-dir", str(tmp_path / "cache"), "readme.py"],
        cwd=tmp_path,
        env=os.environ | {"MYPYPATH": str(Path(indextts2_hf.__file__).parent.parent)},
        capture_output=True,
        text=True,
    )
    lines = [line.partition(": ")[2] for line in result.stdout.splitlines()]
    revealed = [line for line in lines if line.startswith("note: Revealed")]
    for line, expected in zip(revealed, probes.values(), strict=True):
        assert expected in line
    errors = [line for line in result.stdout.splitlines() if ": error: " in line]
    last = len((tmp_path / "readme.py").read_text().splitlines())
    assert len(errors) == 1 and errors[0].startswith(f"readme.py:{last}: error: No overload variant"), result.stdout
