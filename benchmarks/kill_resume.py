"""End a PPO run at random moments, also while it saves, resume it each time, and compare its end with that of
a run that was never interrupted: weights bit for bit, metrics line by line.

    make demo && .venv/bin/python benchmarks/kill_resume.py --kills 100
    .venv/bin/python benchmarks/kill_resume.py --kills 30 --ranks 2          # two FSDP ranks; one, or both
    .venv/bin/python benchmarks/kill_resume.py --kills 30 --ranks 2 --signal TERM

A run saves after every step, so that about half of its time is spent saving. After a run is done the next
starts with another seed, until the kills are used up. SIGTERM must end in a checkpoint of the very step and
exit code 143 on every rank, whichever rank it reaches.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from plumbing import cli  # noqa: E402
from plumbing.files import read_jsonl  # noqa: E402

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def start(folder: str, seed: int, args, *flags: str) -> list[subprocess.Popen]:
    """The run's processes: one, or --ranks of them as torchrun would start them."""
    small = ["--batch-size", "8", "--minibatch-size", "8", "--save-every", "1", "--sample-every", "10"]
    command = [sys.executable, "repo_ppo.py", "--steps", str(args.steps), "--seed", str(seed), *small]
    command += ["--output-dir", folder, *flags]
    environments = [ENVIRONMENT]
    if args.ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        world["WORLD_SIZE"] = str(args.ranks)
        ranks = [{"RANK": str(r), "LOCAL_RANK": str(r)} for r in range(args.ranks)]
        environments = [ENVIRONMENT | world | rank for rank in ranks]
        command.append("--fsdp")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return [subprocess.Popen(command, cwd=ROOT, env=env, **quiet) for env in environments]


def saved_steps(folder: str) -> int:
    """The newest complete checkpoint's step, 0 without one."""
    checkpoints = Path(folder) / "checkpoints"
    return max([int(p.name.removeprefix("step-")) for p in checkpoints.glob("step-*")], default=0)


def interrupted_run(folder: str, seed: int, args, kills: int, rng: random.Random) -> tuple[int, int]:
    """Resume and interrupt until the run ends by itself or `kills` are used up: those, and how many of them
    came within a save."""
    used = saving = 0
    wanted = signal.SIGTERM if args.signal == "TERM" else signal.SIGKILL
    while True:
        before = saved_steps(folder)
        processes = start(folder, seed, args, "--resume")
        while all(p.poll() is None for p in processes) and saved_steps(folder) == before < args.steps:
            time.sleep(0.005)  # a kill during imports would test nothing
        sent = False
        if used < kills and before < args.steps:
            time.sleep(rng.uniform(0, 0.4))
            targets = processes if rng.random() < 0.5 else [rng.choice(processes)]
            sent = all(p.poll() is None for p in processes)
            if sent:
                used += 1
                saving += (Path(folder) / "checkpoints/unfinished").exists()
                for process in targets:
                    process.send_signal(wanted)
        codes = [process.wait(timeout=120) for process in processes]
        if not any(codes):
            return used, saving
        if not sent or (wanted == signal.SIGTERM and set(codes) != {143}):
            raise SystemExit(f"a resumed run ended with exit codes {codes}")


def same(a: str, b: str) -> bool:
    """Whether the runs in two folders ended with the same weights and have logged the same but for times."""

    def timeless(folder):
        rows = read_jsonl(f"{folder}/metrics.jsonl")
        return [{key: value for key, value in row.items() if "second" not in key} for row in rows]

    first, second = (load_file(Path(folder) / "model/model.safetensors") for folder in (a, b))
    return timeless(a) == timeless(b) and all(torch.equal(first[k], second[k]) for k in first)


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    flag = parser.add_argument
    flag("--kills", type=cli.count, default=100, help="how many interruptions in all")
    flag("--steps", type=cli.count, default=60, help="steps of a run")
    flag("--ranks", type=cli.count, default=1, help="processes; more than one are FSDP ranks (gloo)")
    flag("--signal", choices=("KILL", "TERM"), default="KILL", help="what is sent")
    args = parser.parse_args()
    rng, total, saving, seed = random.Random(0), 0, 0, 0
    while total < args.kills:
        with tempfile.TemporaryDirectory() as straight, tempfile.TemporaryDirectory() as killed:
            if any(process.wait() for process in start(straight, seed, args)):
                raise SystemExit("the run that nothing interrupts failed")
            used, while_saving = interrupted_run(killed, seed, args, args.kills - total, rng)
            total, saving = total + used, saving + while_saving
            kills = f"seed {seed}: {used} kills ({while_saving} within a save)"
            if not same(straight, killed):
                raise SystemExit(f"{kills}, then weights or metrics DIFFER")
            print(f"{kills}, then weights and metrics identical", flush=True)
        seed += 1
    print(f"{total} kills by SIG{args.signal}, {saving} within a save, {args.ranks} ranks: nothing lost")
