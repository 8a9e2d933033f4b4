"""
The README's main command on a paragraph in two languages: English by the embedded checkpoint, which need not know another, Chinese by
the tiny random one. With `INDEXTTS2_DATA` naming a folder of recordings the voice is a real one, the first recording found there of
each file type; otherwise a synthetic one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
from conftest import SAMPLING_RATE, make_speech

from indextts2_hf import IndexTTS2Config, embedded_checkpoint


PARAGRAPHS = {
    "en": "The ship left harbour at 7:30. Nobody on board had slept, and $40 was all they had. Would they ever come back?",
    "zh": "船在七点半离开了港口。船上没有人睡过觉，他们一共只有40块钱。他们还会回来吗？",
}


@pytest.fixture(scope="module")
def recording(tmp_path_factory) -> Path:
    folder = os.environ.get("INDEXTTS2_DATA")
    if folder:
        return sorted(path for path in Path(folder).rglob("*") if path.suffix in (".flac", ".wav", ".ogg", ".mp3"))[0]
    path = tmp_path_factory.mktemp("recording") / "reference.wav"
    soundfile.write(path, make_speech(2.0), SAMPLING_RATE)
    return path


@pytest.mark.parametrize("language", PARAGRAPHS)
def test_a_paragraph_of_three_sentences(language, recording, tiny_checkpoint, tmp_path):
    output = tmp_path / "out.wav"
    checkpoint, duration_s = (embedded_checkpoint(), 9.6) if language == "en" else (tiny_checkpoint, 5.4)
    command = [sys.executable, "-m", "indextts2_cli", "speak", PARAGRAPHS[language], "--voice", str(recording)]
    command += ["--duration-s", str(duration_s), "--max-text-tokens", "25", "--seed", "1", "--json", "-o", str(output)]
    command += ["--model", str(checkpoint)] if language == "zh" else []
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report, info = json.loads(done.stdout), soundfile.info(output)
    rate = IndexTTS2Config.from_pretrained(checkpoint).sampling_rate
    assert (info.samplerate, info.frames, info.channels, info.subtype) == (rate, round(duration_s * rate), 1, "PCM_16")
    assert len(report["segments"]) >= 2
    assert report["num_samples"] == info.frames
