"""What several test files need: to run a script, in this process or its own, and to read what it wrote."""

import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite is the CPU's, also where there is a GPU
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(autouse=True)
def one_thread():
    """The suite's tensors are tiny: more threads would only wait for each other."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_tokenizer():
    import toy_world

    return toy_world.build_tokenizer()


# A process imports torch and transformers once and is forked for every script that the tests start: importing
# them takes longer than all that tiny models have to do.
FORKS = multiprocessing.get_context("forkserver")
FAMILIES = [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama", "qwen2")]
TORCH = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"]
FORKS.set_forkserver_preload(["pytest", "filelock", *TORCH, *FAMILIES])


def as_script(script: str, flags: list[str], folder: str, environment: dict, output: str, prepare) -> None:
    """In the forked process: what `python script flags` would do."""
    os.chdir(folder)
    os.environ |= environment
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(output, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    if prepare:
        prepare()
    sys.argv = [script, *flags]
    runpy.run_path(str(ROOT / script), run_name="__main__")


class Started:
    """A script in a process of its own, in `folder`; `prepare` is called there before it. As a Popen."""

    def __init__(self, folder: Path, script: str, *flags: str, environment=None, prepare=None):
        self.args, self.output = [script, *flags], tempfile.mkdtemp(dir=folder)
        arguments = (script, flags, str(folder), environment or {}, self.output, prepare)
        self.process = FORKS.Process(target=as_script, args=arguments)
        with mock.patch.dict(os.environ, ENVIRONMENT):  # for the process that is forked, at the first start
            self.process.start()
        self.kill, self.terminate = self.process.kill, self.process.terminate

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        """(stdout, stderr) after its end; then `returncode` is known."""
        self.process.join(timeout)
        self.returncode = self.process.exitcode
        if self.returncode is None:
            self.process.kill()
            raise TimeoutError(self.args)
        paths = (Path(self.output, name) for name in ("out", "err"))
        return tuple(path.read_text() if path.exists() else "" for path in paths)


def places(ranks: int) -> list[dict[str, str]]:
    """The environments that torchrun gives to as many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def finish(*processes: Started | subprocess.Popen) -> list[str]:
    """Wait for processes that should succeed; their stdouts."""
    outputs = []
    for process in processes:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, f"{process.args}: {(err or out)[-3000:]}"
        outputs.append(out)
    return outputs


@pytest.fixture
def run_in(monkeypatch, capsys):
    """run_in(folder, script, *flags) runs a script as __main__ in this process, which spares its imports.
    Returns the exit code and the last line of stderr."""

    def run(folder: Path, script: str, *flags) -> tuple[int, str]:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        error = capsys.readouterr().err
        assert "Traceback" not in error
        return code, (error.strip().splitlines() or [""])[-1]

    return run


def metrics(folder: Path, run: str) -> list[dict]:
    """The lines that the demo's run of this name has logged."""
    from plumbing.files import read_jsonl

    return read_jsonl(str(folder / "runs/demo" / run / "metrics.jsonl"))


def timeless(rows: list[dict]) -> list[dict]:
    """Logged lines without what a clock said."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]
