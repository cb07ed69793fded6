"""A run: the start and the end of a script, its directory and its log.

    run      start and end of a script; bad input is one line and exit code 2
    RunLog   args.json, metrics.jsonl, samples.jsonl, the progress bar

torch is imported where it is used: plots.py and the experiments start through here and need none of it.
"""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import time
import traceback
from importlib.util import find_spec

from tqdm import tqdm

from plumbing.checkpoints import Stopped, complete_checkpoints, stop_on_signals
from plumbing.cli import check_flags
from plumbing.files import (
    InputError,
    fingerprint,
    read_json,
    read_jsonl,
    reason,
    remove,
    schema_error,
    write_json,
    write_jsonl,
    writing,
)

# ------------------------------------------------------------------------------ start and end of a script


def run(main, args) -> None:
    """Call main(args), for a script with models in torchrun's process group. Bad input ends in one line on
    stderr and exit code 2.

    SIGTERM, others of its kind (`stop_on_signals`) and the first Ctrl-C let a training step finish and save,
    exit code 143; a second Ctrl-C, or the first where nothing is trained, stops at once, exit code 130. A
    rank that fails says so and leaves at once; the others, cut off from it, leave in silence, or on GPUs
    torchrun ends them after 30 s. (It then exits with 1 itself, whatever its ranks exit with.)"""
    if isinstance(sys.stdout, io.TextIOWrapper):  # stderr does so by itself
        sys.stdout.reconfigure(errors="replace")  # a terminal or a log that has not every letter
    first_to_fail, grouped = (lambda: True), False
    try:
        if hasattr(args, "fsdp"):  # a script with models; the others need no torch
            from plumbing import distributed

            grouped = distributed.start_processes(args.cudnn_attention)
            first_to_fail = distributed.first_to_fail
            if args.fsdp and not grouped:
                line = f"torchrun --nproc-per-node 1 {' '.join(sys.argv)}"
                raise InputError(f"--fsdp needs torchrun, also for one process: {line}")
            check_flags(args, distributed.world_size())
            if hasattr(args, "resume") and distributed.rank() == 0:
                claim_folder(args)
        main(args)
        if not grouped:
            return
        distributed.end_processes()
        message, code = "", 0
    except InputError as error:
        message, code = f"{os.path.basename(sys.argv[0])}: error: {error}", 2
    except Stopped as stopped:
        message = f"stopped after step {stopped}; the same command with --resume goes on from there"
        code = 143
    except KeyboardInterrupt:
        message, code = "interrupted", 130
        if hasattr(args, "resume"):
            message += "; --resume goes on from the last checkpoint, if there is one"
    except Exception:
        if not grouped:
            raise
        message, code = traceback.format_exc(), 1
    RunLog.close()  # else the bar would be drawn once more, below the message
    if code and first_to_fail():
        print(message, file=sys.stderr)
    if grouped:
        sys.stdout.flush()
        sys.stderr.flush()
        for held in _locks.values():  # a lock that is a file outlives its process
            held.release()
        os._exit(code)  # at once: an orderly end would wait for ranks that sit in a collective
    raise SystemExit(code)


NO_FLOCK = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}  # of file systems that lock no file
_locks: dict = {}  # held until the process ends


def lock(folder: str) -> None:
    """Take an --output-dir for this process, until it ends; where the file system knows no locks, by a file
    that is there as long. Raises InputError if another process works there."""
    import filelock

    path = os.path.join(folder, ".lock")
    held = _locks.setdefault(folder, filelock.FileLock(path))
    try:
        os.makedirs(folder, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except OSError as error:
            if error.errno not in NO_FLOCK:
                raise
            held = _locks[folder] = filelock.SoftFileLock(f"{path}.file")
            held.acquire(timeout=0)
    except filelock.Timeout:
        problem = "another process, here or on another machine, writes there. End it first; if there is none"
        problem += f" (a machine that died can leave its lock), delete {held.lock_file}"
        raise InputError(f"--output-dir {folder} is locked: {problem}") from None
    except OSError as error:
        raise InputError(f"cannot write to --output-dir {folder} ({reason(error)})") from None


def claim_folder(args) -> None:
    """Lock --output-dir for this process, and refuse to mix its run with another one: a used folder needs
    --resume or --overwrite, and a resumed run the flags and the rows that it had. Raises InputError."""
    if args.tensorboard and not find_spec("tensorboard"):
        raise InputError("--tensorboard needs its package: pip install tensorboard")
    out = args.output_dir
    lock(out)
    if args.overwrite and (args.resume or args.resume_anyway):
        raise InputError("--overwrite starts afresh and --resume goes on: give one of them")
    replaced = [os.path.realpath(os.path.join(out, name)) for name in ("model", "adapter")]
    for name, value in vars(args).items():
        if isinstance(value, str) and os.path.realpath(value) in replaced:
            flag = f"--{name.replace('_', '-')}"
            raise InputError(f"{flag} {value} is what this run replaces: give another --output-dir")
    # for args.json; the same name may stand for other rows or weights when the run is resumed
    kinds = ("dataset", "model", "critic", "adapter")
    given = {name: value for name, value in vars(args).items() if name.endswith(kinds) and value}
    vars(args).update({f"{name}_content": fingerprint(path) for name, path in given.items()})
    args_file = os.path.join(out, "args.json")
    if not os.path.exists(args_file) or args.overwrite:
        return
    if not (args.resume or args.resume_anyway):
        raise InputError(
            f"{out} holds a run: --resume it, lose it by --overwrite, or give another --output-dir"
        )
    was, now = read_json(args_file), json.loads(json.dumps(vars(args)))
    if schema_error(was, {"seed": int, "steps": int}):
        raise InputError(f"{args_file}: holds no flags")
    unknown = dict.fromkeys(was | now, "unknown")  # a flag of another version: what it did then, or would do
    was, now = unknown | was, unknown | now
    changed = [name for name in now if name not in MAY_CHANGE and was[name] != now[name]]
    if changed and not args.resume_anyway:
        told = []
        for name in changed:
            flag = f"--{name.removesuffix('_content').replace('_', '-')}"
            other = f"{flag} holds something else" if name.endswith("_content") else ""
            told.append(other or f"{flag} {was[name]} -> {now[name]}")
        problem = f"{out} was another run: {', '.join(told)}"
        raise InputError(f"{problem}. Give its flags, or go on by --resume-anyway")
    if not complete_checkpoints(out) and os.path.exists(os.path.join(out, "model")):
        problem = "a finished run without a checkpoint (--save-every), from which nothing can go on"
        raise InputError(f"{out} holds {problem}: lose it by --overwrite, or give another --output-dir")


# what a resumed run may do otherwise: where and on what it runs, how much it logs, how long it is
MAY_CHANGE = frozenset(
    "output_dir resume resume_anyway overwrite save_every keep sample_every steps epochs fsdp cpu_offload "
    "offload_frozen cudnn_attention activation_checkpointing micro_batch_size tensorboard".split()
)


# ------------------------------------------------------------------------------ the run's directory


class Lines:
    """What a progress bar writes to where stderr is no terminal: plain lines."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress(*args, **options) -> tqdm:
    """tqdm's bar; in a log file or under a scheduler a line a minute."""
    if not sys.stderr.isatty():
        options |= {"file": Lines(), "mininterval": 60, "maxinterval": 60, "ncols": 100}
    return tqdm(*args, **{"dynamic_ncols": True, "smoothing": 0.05} | options)


class Laps:
    """Where a step's time goes: lap("rollout") notes the seconds since the last lap as seconds_rollout."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        from plumbing.distributed import wait_for_device

        wait_for_device()
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"], self.last = now - self.last, now


class RunLog:
    """args.json, metrics.jsonl and samples.jsonl of a run, written by rank 0, and its progress bar."""

    open_bar = None

    def __init__(self, args, name: str, shown: tuple[str, ...], first_step: int = 0):
        from plumbing.distributed import rank

        self.args, self.folder, self.shown = args, args.output_dir, shown
        self.main, self.first_step, self.begun = rank() == 0, first_step, False
        self.bar = progress(total=args.steps, initial=first_step, desc=name, disable=not self.main)
        RunLog.open_bar = self.bar
        stop_on_signals()

    def _begin(self, name: str, rows: list[dict]) -> None:
        """Write the first lines, to the file `name`: a run that dies earlier has touched nothing, and what it
        replaces goes only when they and args.json are on the disk.

        What a resumed run computes again, it logs again; a fresh run replaces all of an older one."""
        self.begun = True
        kept = {}
        for file in ("metrics.jsonl", "samples.jsonl"):
            path = os.path.join(self.folder, file)
            resumed = self.first_step and os.path.exists(path) and os.path.getsize(path)
            old = read_jsonl(path, {"step": int}) if resumed else []
            kept[path] = [row for row in old if row["step"] < self.first_step]
        first = os.path.join(self.folder, name)
        with writing(os.path.join(self.folder, "args.json")) as new_args, writing(first) as new_lines:
            write_json(new_args, vars(self.args))
            write_jsonl(new_lines, kept.pop(first) + rows)
            for path, lines in kept.items():
                write_jsonl(path, lines) if lines else remove(path)
            for folder in () if self.first_step else ("checkpoints", "model", "adapter", "tensorboard"):
                remove(os.path.join(self.folder, folder))
        if self.args.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # steps that are computed again replace those of before
            self.board = SummaryWriter(os.path.join(self.folder, "tensorboard"), purge_step=self.first_step)

    def metrics(self, step: int, values: dict) -> None:
        """This rank's means; logged is the mean over the ranks."""
        from plumbing.distributed import mean_over_ranks, peak_memory

        values = mean_over_ranks(values) | peak_memory()
        if self.main:
            self._append("metrics.jsonl", [{"step": step} | values])
            self.bar.set_postfix({k: f"{values[k]:.3g}" for k in self.shown if k in values}, refresh=False)
            self.bar.update()
            if self.args.tensorboard:
                for name, value in values.items():
                    self.board.add_scalar(name, value, step)
                self.board.flush()

    def samples(self, step: int, rollout: dict) -> None:
        """Up to eight responses of a rollout."""
        if self.main:
            names = ("prompt", "response", "reward", "cost", "kl")
            scores = [rollout[name][:8].tolist() for name in names[2:]]
            rows = [dict(zip(names, row)) for row in zip(rollout["prompts"], rollout["responses"], *scores)]
            self._append("samples.jsonl", [{"step": step} | row for row in rows])
            row = rows[0]
            numbers = "  ".join(f"{k} {v:+.2f}" for k, v in row.items() if isinstance(v, float))
            self.say(f"[{self.bar.desc} step {step}] {row['prompt']}\n    {row['response']}\n    {numbers}")

    def say(self, text: str) -> None:
        """Once over all ranks, above the bar."""
        if self.main:
            self.bar.write(text, file=sys.stderr)

    def _append(self, name: str, rows: list[dict]) -> None:
        if not self.begun:
            return self._begin(name, rows)
        try:
            with open(os.path.join(self.folder, name), "a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
        except OSError as error:
            raise InputError(f"cannot write {name} in {self.folder} ({reason(error)})") from None

    @staticmethod
    def close() -> None:
        if RunLog.open_bar is not None:
            RunLog.open_bar.close()
