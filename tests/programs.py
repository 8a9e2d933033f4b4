"""
Starts the training programs as processes of their own, quickly: they are forked from a server that has loaded the libraries,
so that a test does not wait ten seconds for imports. What runs is the program's file, as the main program.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path


ROOT = Path(__file__).parent.parent
TRAINING = ROOT / "training"
LIBRARIES = [
    "accelerate",
    "datasets",
    "diffusers",
    "indextts2_hf.pipeline_s2m",
    "peft",
    "transformers.models.wav2vec2_bert",
]
LIBRARIES += ["indextts2_hf.modeling_indextts2", "transformers.pipelines", "soundfile", "torch.distributed"]

server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(LIBRARIES)


def run_file(path: str, arguments: list[str], environment: dict[str, str], output: str, folder: str | None) -> None:
    """
    In the new process: `path` as the main program in a group of its own and in `folder`, standard output and error in the file
    `output`.
    """
    os.setpgrp()
    if folder is not None:
        os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    import torch

    torch.set_num_threads(1)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(TRAINING))
    code = 0
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except BaseException:
        code = 1
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Program:
    """A running program: `pid`, `output` (what it said so far), `wait()` for its exit code, `kill(signal)`."""

    def __init__(self, name: str, arguments: list[str], environment: dict[str, str], folder: str | None = None):
        descriptor, self._output = tempfile.mkstemp(suffix=".txt")
        os.close(descriptor)
        path = str(TRAINING / f"{name}.py")
        self._process = server.Process(target=run_file, args=(path, arguments, environment, self._output, folder))
        self._process.start()
        self.pid = self._process.pid

    @property
    def output(self) -> str:
        return Path(self._output).read_text(encoding="utf-8", errors="replace")

    def wait(self, timeout: float = 240.0) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
            raise TimeoutError(f"still running after {timeout} s:\n{self.output}")
        return self._process.exitcode

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def kill_group(self, number: int) -> None:
        """As launchers do it: the program and what it started."""
        os.killpg(self.pid, number)

    def wait_for(self, path: Path, timeout: float = 240.0) -> None:
        """Until the file or folder is there; the program must be alive until then."""
        start = time.monotonic()
        while not path.exists():
            assert self._process.exitcode is None, (
                f"ended with {self._process.exitcode} before {path} was there:\n{self.output}"
            )
            assert time.monotonic() - start < timeout, f"no {path} after {timeout} s:\n{self.output}"
            time.sleep(0.005)


def start(
    name: str, *arguments: object, environment: dict[str, str] | None = None, folder: Path | None = None
) -> Program:
    """Starts `training/NAME.py ARGUMENTS`, in `folder` if one is given."""
    return Program(name, [str(argument) for argument in arguments], environment or {}, folder and str(folder))


def run_program(
    name: str, *arguments: object, environment: dict[str, str] | None = None, folder: Path | None = None
) -> str:
    """Runs it to its end, which must be a good one; gives what it said."""
    program = start(name, *arguments, environment=environment, folder=folder)
    code = program.wait()
    assert code == 0, program.output
    return program.output


def run_to_error(name: str, *arguments: object, environment: dict[str, str] | None = None) -> str:
    """Runs it to an error; gives what it said, which must not be a traceback."""
    program = start(name, *arguments, environment=environment)
    code = program.wait()
    assert code in (1, 2), f"exit code {code}:\n{program.output}"
    assert "Traceback" not in program.output, program.output
    return program.output


def run_ranks(name: str, count: int, *arguments: object) -> str:
    """Runs it as `count` processes that work together over gloo; gives what the first one said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    programs = [
        start(name, *arguments, "--cpu", environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    codes = [program.wait() for program in programs]
    assert codes == [0] * count, "\n".join(program.output for program in programs)
    return programs[0].output


def run_killed(name: str, *arguments: object, after: Path) -> None:
    """Starts it and kills it with SIGKILL as soon as `after` is there."""
    program = start(name, *arguments)
    program.wait_for(after)
    program.kill()
    assert program.wait() == -signal.SIGKILL


def read_log(folder: Path, prefix: str = "") -> list[dict[str, float]]:
    """The lines of a run's `log.jsonl`, with the figures whose names begin with `prefix`."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if key == "step" or key.startswith(prefix)} for row in rows]
    return [row for row in rows if len(row) > 1]
