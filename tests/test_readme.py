"""The README's Python runs as it stands there, on the embedded checkpoint; its commands name options that exist."""

import re
import shlex
from pathlib import Path

import pytest
import soundfile
from conftest import SAMPLING_RATE, make_speech
from test_train_emotion_text import build_emotion_text

import indextts2_cli
from indextts2_hf import IndexTTS2Config, embedded_checkpoint


README = (Path(__file__).parent.parent / "README.md").read_text()
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
