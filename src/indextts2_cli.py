"""
The command line of IndexTTS2: `indextts2 speak`, `voice`, `convert`, `info` and `push`, their options and exit codes.

It lies beside the package because importing the package takes seconds: help, the version and most mistakes are answered with
the standard library alone. What the commands do is in `indextts2_hf.cli`.
"""

import argparse
import difflib
import errno
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn


BAD_INPUT, UNEXPECTED, INTERRUPTED = 2, 1, 130

# What the system says about paths that the user named. Other system errors (a full disk) are not the user's mistake.
PATH_ERRORS = (
    None,
    errno.EACCES,
    errno.EEXIST,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
)

# As `configuration_indextts2` has it, which is slow to import.
EMBEDDED_NAME = "tiny"

REPOSITORY_ID = r"\w[\w.-]*/[\w.-]+"

EPILOG = """\
exit codes: 0 done; 2 wrong usage or input; 1 unexpected failure; 130 interrupted.
The model tiny is inside the package, and nothing is downloaded for it. A folder of that name is ./tiny.
"""


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations, whose errors are one line."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[argparse.Namespace, list[str]]:
        namespace, unknown = super().parse_known_args(*args, **kwargs)
        for word in unknown:
            hints = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
            if word.startswith("--") and hints:
                self.error(f"unrecognized arguments: {' '.join(unknown)}, did you mean {hints[0]}?")
        return namespace, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_INPUT, f"indextts2: error: {message} (see `{self.prog} --help`)\n")


class Version(argparse.Action):
    """Prints the versions that a bug report needs; the installed packages are only looked up when asked."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> NoReturn:
        from importlib import metadata

        versions = {}
        for name in ("indextts2-hf", "torch", "transformers", "diffusers"):
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "(not installed)"
        ours = versions.pop("indextts2-hf")
        others = ", ".join(f"{name} {version}" for name, version in versions.items())
        sys.stdout.write(f"indextts2 {ours} ({others}, Python {sys.version.split()[0]})\n")
        parser.exit()


def number(kind: type, least: float, most: float = math.inf, is_open: bool = False) -> Callable[[str], float]:
    """A type for options: a finite number from `least` (itself excluded if `is_open`) to `most`."""

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        is_enough = value > least if is_open else value >= least
        if not (math.isfinite(value) and is_enough and value <= most):
            what = "a whole number" if kind is int else "a number"
            bounds = f"above {least}" if is_open else f"of at least {least}"
            bounds += "" if most == math.inf else f" and at most {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bounds}")
        return value

    return read


def input_file(text: str) -> Path:
    path = Path(text).expanduser()
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, name a file in it")
    if not path.exists():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def input_folder(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return path


def output_file(*suffixes: str) -> Callable[[str], Path]:
    """A type for options: where a file of one of these kinds can be made."""

    def read(text: str) -> Path:
        path = Path(text).expanduser()
        if path.is_dir():
            raise argparse.ArgumentTypeError(f"{text!r} is a folder, name a file in it")
        if path.suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(f"{text!r} must end in {' or '.join(suffixes)}")
        if not path.parent.is_dir():
            raise argparse.ArgumentTypeError(f"there is no folder '{path.parent}' for {text!r}, make it first")
        return path

    return read


def voice_output(text: str) -> Path:
    """A type for options: a `.safetensors` file, or else a new folder."""
    path = Path(text).expanduser()
    if path.suffix and not path.is_dir():
        return output_file(".safetensors")(text)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise argparse.ArgumentTypeError(f"{text!r} exists, name a new folder or a .safetensors file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder '{path.parent}' for {text!r}, make it first")
    return path


def local_model(text: str) -> str:
    """The name of the embedded checkpoint, or a folder."""
    if text != EMBEDDED_NAME:
        input_folder(text)
    return os.path.expanduser(text)


def repository_id(text: str) -> str:
    if re.fullmatch(REPOSITORY_ID, text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no Hub repository id, which is like 'owner/name'")
    return text


def model_name(text: str) -> str:
    """`tiny`, a folder, or else something that can be the id of a repository on the Hub."""
    if text == EMBEDDED_NAME:
        return text
    folder = Path(text).expanduser()
    if folder.is_dir():
        return os.path.join(os.curdir, folder) if str(folder) == EMBEDDED_NAME else str(folder)
    if folder.exists():
        raise argparse.ArgumentTypeError(f"{text!r} is a file, name a checkpoint folder or a Hub repository id")
    if re.fullmatch(REPOSITORY_ID, text) is None:
        raise argparse.ArgumentTypeError(
            f"there is no folder {text!r}, and a Hub repository id is like 'owner/name'; the model of the package is "
            f"{EMBEDDED_NAME}"
        )
    return text


def emotion_weights(text: str) -> list[float] | dict[str, float]:
    """`0,0,0.5,0,0,0,0,0` or `sad=0.5`; names and ranges are checked with the model's own rules later."""
    items = [item.strip() for item in text.split(",")]
    try:
        if "=" not in text:
            return [float(item) for item in items]
        pairs = [item.split("=") for item in items]
        weights = {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither eight numbers (0,0,0.5,0,0,0,0,0) nor names with numbers (sad=0.5,calm=0.2)"
        ) from None
    if len(weights) < len(pairs):
        raise argparse.ArgumentTypeError(f"{text!r} names an emotion twice")
    return weights


def build_parser() -> Parser:
    parser = Parser(
        prog="indextts2",
        description="Zero-shot text-to-speech with exact duration and emotion.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, help="show the versions and exit")
    common = Parser(add_help=False)
    messages = common.add_argument_group("messages")
    messages.add_argument("-q", "--quiet", action="store_true", help="no progress, no warnings, no summary")
    messages.add_argument("-v", "--verbose", action="store_true", help="also what the libraries below have to say")
    messages.add_argument("--debug", action="store_true", help="show the traceback of an error")

    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    settings: dict[str, Any] = {
        "parents": [common],
        "epilog": EPILOG,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
    }
    add_speak(commands.add_parser("speak", help="text to an audio file", description=SPEAK, **settings))
    add_voice(commands.add_parser("voice", help="recording to a voice file", description=VOICE, **settings))
    add_convert(commands.add_parser("convert", help="original checkpoint to ours", description=CONVERT, **settings))
    add_info(commands.add_parser("info", help="what a checkpoint holds", description=INFO, **settings))
    add_push(commands.add_parser("push", help="a folder to the Hub", description=PUSH, **settings))
    return parser


SPEAK = """\
Speak a text of any length. It is cut into segments that are spoken a few at a time, so memory does not grow with it.

  indextts2 speak "Hello, world." --voice recording.wav -o hello.wav
  indextts2 speak "I can't believe it!" --emotion-weights surprised=0.8 --duration-s 2.5
  indextts2 speak --text-file book.txt -o book.flac --seed 7
"""


def add_speak(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what and where").add_mutually_exclusive_group()
    what.add_argument("text", nargs="?", help="what to say; '-', or nothing, reads standard input")
    what.add_argument("--text-file", type=input_file, metavar="FILE", help="read it from a file, in UTF-8")
    where = parser.add_argument_group("output")
    where.add_argument(
        "-o",
        "--output",
        type=output_file(".wav", ".flac"),
        default="out.wav",
        metavar="FILE",
        help=".wav or .flac, 16 bits, mono; an existing file is replaced at the end (default: %(default)s)",
    )
    where.add_argument("--json", action="store_true", help="print a JSON object about the result instead of a summary")

    who = parser.add_argument_group("voice")
    add_model(who)
    who.add_argument(
        "--voice",
        metavar="VOICE",
        help="a recording (the first 10 s are used by tiny, 15 s by the released model), a file or voice pack of "
        "`indextts2 voice`, the name of a voice of the model, or the Hub repository of a voice pack (default: the model's own)",
    )
    who.add_argument(
        "--adapter",
        type=input_folder,
        metavar="DIR",
        help="an adapter on the model; needed where the adapter as --model does not find its base",
    )

    emotion = parser.add_argument_group("emotion", "one of the first three; otherwise that of the voice")
    kind = emotion.add_mutually_exclusive_group()
    kind.add_argument("--emotion-audio", type=input_file, metavar="FILE", help="as in this recording")
    kind.add_argument(
        "--emotion-weights",
        type=emotion_weights,
        metavar="WEIGHTS",
        help="names with numbers from 0 to 1.2 (1 is full), as in happy=0.6,sad=0.2, or eight numbers in the order happy, "
        "angry, sad, afraid, disgusted, melancholic, surprised, calm",
    )
    kind.add_argument(
        "--emotion-text",
        nargs="?",
        const=True,
        metavar="TEXT",
        help="as described by TEXT, or by the text itself if TEXT is left out; needs a model with a language model for it",
    )
    emotion.add_argument(
        "--emotion-strength",
        type=number(float, 0, 1),
        default=1.0,
        metavar="X",
        help="how much of the emotion is used, 0 to 1 (default: %(default)s)",
    )

    length = parser.add_argument_group("length").add_mutually_exclusive_group()
    length.add_argument(
        "--duration-s",
        type=number(float, 0, is_open=True),
        metavar="S",
        help="exact length in seconds, pauses included (default: free)",
    )
    length.add_argument(
        "--num-semantic-tokens", type=number(int, 1), metavar="N", help="exact number of semantic tokens, 50 a second"
    )
    segments = parser.add_argument_group("segments")
    segments.add_argument(
        "--max-text-tokens",
        type=number(int, 1),
        metavar="N",
        help="most text tokens in a segment (default: the model's own)",
    )
    segments.add_argument(
        "--segment-silence-s",
        type=number(float, 0),
        default=0.2,
        metavar="S",
        help="pause between segments in seconds (default: %(default)s)",
    )
    segments.add_argument(
        "--segment-batch-size",
        type=number(int, 1),
        default=1,
        metavar="N",
        help="segments synthesised together; more is faster on a GPU and takes more memory (default: %(default)s)",
    )

    sampling = parser.add_argument_group("sampling", "the defaults of the first eight are the model's own")
    sampling.add_argument("--num-beams", type=number(int, 1), metavar="N", help="beams of the search")
    sampling.add_argument("--temperature", type=number(float, 0, is_open=True), metavar="X", help="above 0")
    sampling.add_argument("--top-p", type=number(float, 0, 1, is_open=True), metavar="X", help="above 0, at most 1")
    sampling.add_argument("--top-k", type=number(int, 1), metavar="N", help="at least 1")
    sampling.add_argument("--greedy", action="store_true", help="always the likeliest token instead of sampling")
    sampling.add_argument(
        "--text-guidance-scale",
        type=number(float, 1),
        metavar="X",
        help="strength of the text for the tokens; 1 is none and faster",
    )
    sampling.add_argument(
        "--num-candidates",
        type=number(int, 1),
        metavar="N",
        help="token sequences sampled for each segment, of which the best is spoken; without beams",
    )
    sampling.add_argument("--num-inference-steps", type=number(int, 1), metavar="N", help="flow-matching steps")
    sampling.add_argument(
        "--guidance-scale",
        type=number(float, 0),
        default=1.7,
        metavar="X",
        help="strength of voice and text in flow matching; 1 or less is none and faster (default: %(default)s)",
    )
    sampling.add_argument(
        "--seed", type=number(int, 0), metavar="N", help="same seed, same audio (default: random, and told)"
    )
    add_device(parser.add_argument_group("machine"))
    parser.set_defaults(check=partial(check_speak, parser))


def check_speak(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.text is None and args.text_file is None and (sys.stdin is None or sys.stdin.isatty()):
        parser.error("there is no text: give it as an argument, with --text-file or on standard input")
    if args.greedy and (args.temperature, args.top_p, args.top_k, args.num_candidates) != (None, None, None, None):
        parser.error(
            "--greedy does not sample: it does not go with --temperature, --top-p, --top-k or --num-candidates"
        )
    for path in (args.voice, args.emotion_audio, args.text_file):
        if path is not None and args.output.exists() and os.path.exists(path) and args.output.samefile(path):
            parser.error(f"the output '{args.output}' is also an input and would be lost: name another with -o")


VOICE = """\
Make a voice of a recording once, to speak with it faster later and without the recording; or a voice pack, a folder that can be
published, with licence, consent, an emotion and an adapter of its own.

  indextts2 voice recording.wav -o me.safetensors
  indextts2 speak "It's me." --voice me.safetensors
  indextts2 voice recording.wav -o me --license cc-by-4.0 --consent "Recorded and published by myself."
"""


def add_voice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recording",
        type=input_file,
        help="an audio file, of which tiny uses the first 10 s and the released model 15 s; or a voice made before",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=voice_output,
        required=True,
        metavar="OUT",
        help=".safetensors (an existing file is replaced at the end), or else a new folder: a voice pack",
    )
    add_model(parser)
    own = parser.add_argument_group("what it brings along")
    own.add_argument(
        "--emotion-weights",
        type=emotion_weights,
        metavar="WEIGHTS",
        help="how it speaks where no emotion is asked for, as in happy=0.4",
    )
    own.add_argument("--emotion-audio", type=input_file, metavar="FILE", help="the same, as in this recording")
    own.add_argument("--adapter", type=input_folder, metavar="DIR", help="an adapter for its texts; voice packs only")
    own.add_argument("--license", metavar="NAME", help="under which it may be used, as the Hub calls it: cc-by-4.0")
    own.add_argument("--consent", metavar="TEXT", help="how the person agreed, in words")
    add_device(parser)
    parser.set_defaults(check=partial(check_voice, parser))


def check_voice(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.adapter is not None and args.output.suffix == ".safetensors":
        parser.error("a file cannot hold the --adapter: name a folder with -o, a voice pack")


CONVERT = """\
Convert the original checkpoint of IndexTTS2, a folder with config.yaml, gpt.pth and s2mel.pth, to a folder for
transformers and diffusers.
"""


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "original_folder", type=input_folder, metavar="ORIGINAL_FOLDER", help="the original checkpoint"
    )
    parser.add_argument("output_folder", type=Path, metavar="OUT", help="the folder to write")
    parts = parser.add_argument_group("parts from elsewhere", "where they are, if not in the original folder")
    parts.add_argument("--w2v-bert", type=input_folder, metavar="DIR", help="facebook/w2v-bert-2.0")
    parts.add_argument("--semantic-codec", type=input_folder, metavar="DIR", help="the codec of amphion/MaskGCT")
    parts.add_argument("--speaker-encoder", type=input_folder, metavar="DIR", help="funasr/campplus")
    parts.add_argument("--vocoder", type=input_folder, metavar="DIR", help="nvidia/bigvgan_v2_22khz_80band_256x")


INFO = """\
Tell what a checkpoint holds: parts and their sizes, rates, limits, voices. No weights are loaded.
"""


def add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        type=local_model,
        default=EMBEDDED_NAME,
        metavar="MODEL",
        help="a checkpoint folder, or tiny, the one inside the package (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")


PUSH = """\
Publish a checkpoint, an adapter or a voice pack as a repository of the Hub: its files, card, licence notices and, for a checkpoint,
the code, so that transformers loads it where this package is not installed. Without a token, or with --dry-run, the folder is
written and nothing is uploaded.

  indextts2 push CHECKPOINT --repo-id me/my-voice-model --dry-run
  indextts2 push CHECKPOINT --repo-id me/my-voice-model --license apache-2.0 --evaluation report/results.json
"""


def add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a checkpoint, an adapter or a voice (pack)")
    parser.add_argument("--repo-id", type=repository_id, required=True, metavar="NAME", help="owner/name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--token", help="of the Hub (default: that of `hf auth login`)")
    parser.add_argument("--dry-run", action="store_true", help="write the folder, list it, upload nothing")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="DIR", help="a new folder to write (default without upload: NAME-hub)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object instead of a list")
    card = parser.add_argument_group("card", "what it says; by default what the card in FOLDER says")
    card.add_argument("--new-card", action="store_true", help="even if FOLDER has a card of its own")
    card.add_argument(
        "--evaluation", type=input_file, metavar="FILE", help="results.json or results.md of evaluation/evaluate.py"
    )
    card.add_argument("--license", metavar="NAME", help="as the Hub calls it, such as apache-2.0")
    card.add_argument("--base-model", type=repository_id, metavar="NAME", help="repository of what it was made from")
    card.add_argument("--language", action="append", metavar="CODE", help="spoken, such as en; may be repeated")
    card.add_argument("--dataset", action="append", metavar="NAME", help="learnt from; may be repeated")


def add_model(group: Any) -> None:
    group.add_argument(
        "--model",
        type=model_name,
        default=EMBEDDED_NAME,
        metavar="MODEL",
        help="a checkpoint folder, the id of a repository on the Hub, or tiny, the model inside the package (default: %(default)s)",
    )


def add_device(group: Any) -> None:
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: cuda if there is one)")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        default="auto",
        help="of the text-to-semantic transformer; the rest runs in float32 (default: the saved one)",
    )
    group.add_argument(
        "--threads",
        type=number(int, 1),
        metavar="N",
        help="CPU threads (default: INDEXTTS2_THREADS or OMP_NUM_THREADS of the environment, else two for a model as small as tiny, "
        "one where the machine is busy, and torch's choice for others)",
    )


def needs_network(args: argparse.Namespace) -> bool:
    """Whether the Hub is asked for something, or given something."""
    if args.command == "push":
        return not args.dry_run
    model, voice = (getattr(args, name, None) for name in ("model", "voice"))
    is_remote_model = model not in (None, EMBEDDED_NAME) and not os.path.isdir(model)
    is_remote_voice = voice is not None and re.fullmatch(REPOSITORY_ID, voice) and not os.path.exists(voice)
    return is_remote_model or bool(is_remote_voice)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives its exit code; `arguments` are those of the process by default."""
    started = time.perf_counter()
    parser = build_parser()
    args = parser.parse_args(arguments)
    if hasattr(args, "check"):
        args.check(args)
    args.started = started
    if not needs_network(args):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    is_bad_input = False
    try:
        with warnings.catch_warnings():
            if not args.verbose:
                warnings.simplefilter("ignore")
            from indextts2_hf import cli

            try:
                cli.run(args)
                return 0
            except Exception as error:
                is_bad_input = isinstance(error, ValueError | ImportError) or (
                    isinstance(error, OSError) and error.errno in PATH_ERRORS
                )
                raise
    except KeyboardInterrupt:
        sys.stderr.write("indextts2: interrupted\n")
        return INTERRUPTED
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        message = " ".join(str(error).split()) or type(error).__name__
        if not is_bad_input:
            message = f"unexpected {type(error).__name__}: {message} (--debug shows where)"
        sys.stderr.write(f"indextts2: error: {message}\n")
        return BAD_INPUT if is_bad_input else UNEXPECTED


if __name__ == "__main__":
    sys.exit(main())
