"""Models and datasets by hub name, from a stand-in for the hub: what comes, what does not, how it is said."""

import shutil

import pytest
import torch
from conftest import Started, finish, places
from hub import Hub
from pyarrow import Table, parquet
from safetensors.torch import load_file

import toy_world
from plumbing.files import read_jsonl, write_jsonl
from recipes.rehearsal import write_data, write_models

FEW = "--model toy/policy --dataset toy/pairs@v0 --steps 1 --batch-size 8".split()
PPO = [
    *FEW,
    *"--reward-model toy/reward --cost-model toy/cost --ptx-dataset toy/sft --minibatch-size 8".split(),
]
PAIRS = [*FEW, "--eval-dataset", "toy/pairs@v0:test"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    write_models(str(root), toy_world.build_config())
    write_data(str(root), 40)
    for name in ("policy", "reward", "cost"):
        shutil.copytree(root / name, root / "models/toy" / name / "main")
    policy, pickled = (root / "models/toy" / name / "main" for name in ("policy", "pickled"))
    (policy / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    (policy / "training_args.bin").write_bytes(b"a pickle that nobody asked for")
    (policy / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    shutil.copytree(policy, pickled, ignore=lambda *_: ["model.safetensors"])
    torch.save(load_file(policy / "model.safetensors"), pickled / "pytorch_model.bin")
    for name in ("gated", "broken"):
        shutil.copytree(policy, root / "models/toy" / name / "main")

    pairs, v0 = read_jsonl(f"{root}/pairs.jsonl"), root / "datasets/toy/pairs/v0"
    write_jsonl(f"{root}/datasets/toy/pairs/main/train.jsonl", pairs[:3])
    v0.mkdir()
    for split, part in (("train", pairs), ("test", pairs[:5])):
        parquet.write_table(Table.from_pylist(part), v0 / f"{split}.parquet")
    write_jsonl(f"{root}/datasets/toy/sft/main/train.jsonl", read_jsonl(f"{root}/sft.jsonl"))
    shutil.copytree(v0, root / "datasets/toy/gated/main")
    with Hub(root) as hub:
        yield hub


def test_two_ranks_at_once_from_an_empty_cache_and_then_offline(hub, tmp_path):
    """Policy, score models and datasets by name, revision and split, in Parquet and JSONL."""
    flags, home = (*PPO, "--output-dir", "ppo"), hub.point_to(tmp_path / "home")
    hub.asked.clear()
    ranks = [Started(tmp_path, "repo_ppo.py", *flags, environment=p, prepare=home) for p in places(2)]
    finish(*ranks)
    assert len(read_jsonl(f"{tmp_path}/ppo/metrics.jsonl")) == 1
    assert hub.asked.count("model.safetensors") == 3  # one of two ranks waited for the other's download
    assert "chat_template.jinja" in hub.asked and not any(name.endswith(".bin") for name in hub.asked)

    flags = (*PAIRS, "--output-dir")
    online = Started(tmp_path, "reward_model.py", *flags, "reward", prepare=home)
    assert "% of 5\n" in finish(online)[0]  # the test split
    rows = len(toy_world.split_prompts()[0][::40])
    assert f"toy/pairs@v0: {rows} rows, " in online.communicate()[1]
    sent = len(hub.asked)
    offline = hub.point_to(tmp_path / "home", offline=True)
    finish(Started(tmp_path, "cost_model.py", *flags, "cost", prepare=offline))
    assert len(hub.asked) == sent


FAILURES = [
    (("--model", "toy/none"), "toy/none: neither a local folder nor to be had from the hub (Repository"),
    (
        ("--model", "toy/policy@v9"),
        "toy/policy@v9: neither a local folder nor to be had from the hub (Revision",
    ),
    (("--model", "toy/gated"), "toy/gated: neither a local folder nor to be had from the hub (Gated"),
    (("--model", "toy/broken"), "toy/broken: neither a local folder nor to be had from the hub ("),
    (("--dataset", "toy/none"), "'toy/none' doesn't exist"),
    (("--dataset", "toy/gated"), "'toy/gated' is a gated dataset"),
    (("--dataset", "toy/sft:tset"), "toy/sft:tset: no such file or folder, nor to be had from the hub ("),
    (("--dataset", "toy/sft@v9"), "'v9' doesn't exist"),
]


def test_what_cannot_be_had_is_one_line_and_exit_code_2(hub, tmp_path):
    common = ("--model", "toy/policy", "--dataset", "toy/sft", "--output-dir")
    cases = [((*common, str(i), *flags), message, False) for i, (flags, message) in enumerate(FAILURES)]
    cases.append(((*common, "cold"), "neither a local folder nor to be had from the hub (LocalEntry", True))
    for start in range(0, len(cases), 3):
        chosen = cases[start : start + 3]
        started = [
            Started(tmp_path, "sft.py", *flags, prepare=hub.point_to(tmp_path / flags[5], offline))
            for flags, _, offline in chosen
        ]
        for process, (flags, message, _) in zip(started, chosen):
            out, err = process.communicate()
            last = (err or out).strip().splitlines()[-1]
            assert process.returncode == 2 and last.startswith("sft.py: error: ") and message in last, (
                flags,
                err,
            )
            assert "Traceback" not in err


def test_pickled_weights_are_fetched_where_there_are_no_others(hub, tmp_path):
    flags = ("--model", "toy/pickled", "--dataset", "toy/sft", "--output-dir", "sft", "--steps", "1")
    hub.asked.clear()
    finish(Started(tmp_path, "sft.py", *flags, prepare=hub.point_to(tmp_path / "home")))
    assert "pytorch_model.bin" in hub.asked and "training_args.bin" not in hub.asked
