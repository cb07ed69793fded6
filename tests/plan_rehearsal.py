"""The memory plan (tools/plan.py) against a rehearsal: the functions of repo_ppo.py and plumbing/ppo.py,
on a 7B configuration and 8 GPUs' worth of ranks, with fake tensors, a fake process group and torch's tracker.

    .venv/bin/python tests/plan_rehearsal.py [--layers 32] [--world 8] [flags of repo_ppo.py]

Prints predicted and tracked peak per phase and their ratio. Nothing is allocated: it runs on a laptop.
"""

import argparse
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.fsdp._fully_shard._fully_shard as fully_shard_module  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.distributed._tools.mem_tracker import MemTracker  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig  # noqa: E402

import lm  # noqa: E402
import repo_ppo  # noqa: E402
from lm import ScoreModel, generate  # noqa: E402
from plumbing import cli, distributed, optim, ppo  # noqa: E402
from tools import plan  # noqa: E402

RECIPE = "--fsdp --dtype bf16 --activation-checkpointing --max-length 512 --max-new-tokens 384".split()
RECIPE += "--batch-size 128 --minibatch-size 128 --micro-batch-size 4".split()
RECIPE += "--dataset none --ptx-dataset some --output-dir none".split()  # none of them is opened

NO_HOOKS = (SimpleNamespace(remove=lambda: None),) * 2


class Tracker(MemTracker):
    """Lets a model be called more than once: only the peak of all is of interest, not every module's."""

    def _pre_fw_hook(self, module, inputs):
        if not self._mod_tracker.is_bw:
            self.memory_tracking.pop(module, None)
        super()._pre_fw_hook(module, inputs)

    def _track_module_params_and_buffers(self, module, install_grad_hooks=True):
        for parameter in module.parameters():
            if not parameter.requires_grad:  # takes no hook: as if it had its two
                self._param_to_grad_hook_handles[parameter] = NO_HOOKS
        return super()._track_module_params_and_buffers(module, install_grad_hooks)


@contextmanager
def fake_run(world: int):
    """Fake tensors on `world` ranks; numbers that a fake tensor cannot give are 1."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = init_device_mesh("cpu", (world,))  # its ranks are numbers: before the fake mode

    def clip(model, norm: float) -> float:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
        return 0.0

    patch = mock.patch.object
    with (
        patch(fully_shard_module, "_init_default_mesh", lambda *args, **kwargs: mesh),
        patch(torch.Tensor, "item", lambda self: 1.0),
        patch(lm, "spans", lambda mask: [(0, mask.shape[1])] * len(mask)),  # every row is as long as can be
        patch(torch.nn.Module, "to", lambda self, *args, **kwargs: self),  # it is on its device
        patch(repo_ppo, "clip_gradients", clip),
        FakeTensorMode(),
    ):
        try:
            yield
        finally:
            dist.destroy_process_group()


def six_models(config, args) -> tuple:
    """plumbing/ppo.py's own six, of this configuration, with random weights."""

    def language_model(path: str, dtype, on_meta: bool):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)

    def score_model(path: str, kind: str, new_head: bool = False, *, dtype, on_meta: bool):
        return ScoreModel(AutoModel.from_config(config, dtype=dtype), kind)

    with mock.patch.multiple(ppo, load_causal_lm=language_model, load_score_model=score_model):
        policy, reference = ppo.policy_and_reference(args)
        critics, score_models = zip(*(ppo.critic_and_score_model(kind, args) for kind in ("reward", "cost")))
    return policy, reference, *score_models, *critics


def tracked(config, args, world: int) -> dict[str, float]:
    """Phase -> peak bytes of rank 0 by the memory tracker."""
    rows, response, small = args.batch_size // world, args.max_new_tokens, args.micro_batch_size
    width = args.max_length - response
    with fake_run(world):
        models = six_models(config, args)
        policy, _, _, _, *critics = models
        trained = dict(zip(("policy", "reward_critic", "cost_critic"), (policy, *critics)))
        optimizers = {name: optim.adamw(model, 1e-5, 0.01) for name, model in trained.items()}
        sequences = torch.zeros(rows, args.max_length, dtype=torch.long)
        mask, per_token = torch.ones_like(sequences), torch.zeros(rows, response)
        common = {"sequences": sequences, "attention_mask": mask, "mask": mask[:, width:]}
        rollout, batch = common | {"log_probs": per_token}, common | {"log_probs": per_token}
        for kind in ("reward", "cost"):
            rollout |= {f"{kind}_ids": sequences, f"{kind}_attention_mask": mask}
            batch |= {f"{kind}_values": per_token, f"{kind}_returns": per_token}
        batch["advantages"] = per_token
        starts = range(0, args.minibatch_size // world, small)
        ptx = [(sequences[i : i + small], mask[i : i + small], 1) for i in starts]

        @torch.no_grad()
        def sample():
            # the last two of all tokens: the cache at its largest
            with distributed.gathered(policy) as sampler:
                generate(sampler, sequences[:, :-2], mask[:, :-2], 2, uniforms=torch.zeros(rows, 2))

        def score():
            lm.in_pieces(lm.response_log_probs, models[1], rollout, small, args.temperature)
            for kind, score_model, critic in zip(("reward", "cost"), models[2:4], critics):
                lm.in_pieces(lm.response_scores, score_model, rollout, small, kind)
                lm.in_pieces(lm.state_values, critic, rollout, small)

        def update():
            pieces, weights = lm.micro_batches(batch, small), (1.0, args.clip, args.ptx_coeff, args.grad_clip)
            repo_ppo.update_policy(policy, optimizers["policy"], pieces, ptx, *weights)
            for kind, critic in zip(("reward", "cost"), critics):
                optimizer = optimizers[f"{kind}_critic"]
                repo_ppo.update_critic(critic, optimizer, pieces, kind, args.value_clip, args.grad_clip)

        update()  # once untracked: Adam's states come to be, and FSDP's lazy initialization is done
        peaks = {}
        for name, function in (("rollout", sample), ("scoring", score), ("update", update)):
            tracker = Tracker()
            held = (model for model in models if isinstance(model, torch.nn.Module))  # not a view of another
            tracker.track_external(*held, *optimizers.values())
            with tracker:
                function()
            peaks[name] = sum(snapshot["Total"] for snapshot in tracker.get_tracker_snapshot("peak").values())
        return peaks


def compare(config, flags: list[str], world: int) -> list[tuple[str, float, float]]:
    """[(phase, predicted, tracked)] in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        models = ["--model", folder, "--reward-model", folder, "--cost-model", folder]
        args = repo_ppo.parse_args([*models, *flags])
        predicted: dict[str, float] = {}
        for name, components in plan.phases(args, world)[0]:
            predicted[name.split()[0]] = max(predicted.get(name.split()[0], 0), sum(components.values()))
        short = argparse.Namespace(**vars(args) | {"max_new_tokens": 2})  # as `sample` does it
        predicted["rollout"] = sum(dict(plan.phases(short, world)[0])["rollout"].values())
    measured = tracked(config, args, world)
    return [(name, predicted[name], measured[name]) for name in measured]


def llama_7b(layers: int = 32) -> LlamaConfig:
    sizes = {"num_hidden_layers": layers, "vocab_size": 32001, "max_position_embeddings": 2048}
    return LlamaConfig(**sizes, architectures=["LlamaForCausalLM"])


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument("--layers", type=cli.count, default=32, help="transformer blocks")
    parser.add_argument("--world", type=cli.count, default=8, help="ranks")
    own, flags = parser.parse_known_args()
    for name, predicted, measured in compare(llama_7b(own.layers), RECIPE + flags, own.world):
        sizes = f"predicted {predicted / plan.GIB:6.2f} GiB   tracked {measured / plan.GIB:6.2f} GiB"
        print(f"{name:<10} {sizes}   ratio {predicted / measured:.3f}")
