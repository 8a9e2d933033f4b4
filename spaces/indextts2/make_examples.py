"""
Speaks the examples of the page and a line in each voice, with the small checkpoint and the seed 0, into `examples/`.

    python spaces/indextts2/make_examples.py

To be run again when the small checkpoint changes.
"""

import soundfile

from indextts2_hf import IndexTTS2TextToAudioPipeline
from showing import EXAMPLES, VOICE_LINE, example_path
from speaking import make_speak


def main() -> None:
    pipe = IndexTTS2TextToAudioPipeline.from_pretrained()
    speak = make_speak(pipe)
    lines = EXAMPLES | {f"voice-{name}": {"text": VOICE_LINE, "voice": name} for name in pipe.model.voices}
    for name, given in lines.items():
        *_, ((rate, samples), *_) = speak(**given, seed="0")
        path = example_path(name)
        path.parent.mkdir(exist_ok=True)
        soundfile.write(path, samples, rate)
        print(f"{path.name}: {len(samples) / rate:.2f} s, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
