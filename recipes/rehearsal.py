"""Tiny stand-ins for a rehearsal: Llama-shaped policy, reward and cost model, random weights, and toy data.

python recipes/rehearsal.py FOLDER
"""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig  # noqa: E402

import toy_world  # noqa: E402
from plumbing.files import write_jsonl  # noqa: E402
from plumbing.loading import load_score_model, save_score_model  # noqa: E402


def write_models(folder: str, config) -> None:
    """policy, reward and cost in `folder`, with the toy's tokenizer and a chat template."""
    tokenizer = toy_world.build_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    AutoModelForCausalLM.from_config(config).save_pretrained(f"{folder}/policy")
    tokenizer.save_pretrained(f"{folder}/policy")
    for kind in ("reward", "cost"):
        model = load_score_model(f"{folder}/policy", kind, new_head=True)
        save_score_model(model, model.state_dict(), f"{folder}/{kind}")
        tokenizer.save_pretrained(f"{folder}/{kind}")


def write_data(folder: str, every: int) -> None:
    """sft.jsonl and pairs.jsonl in `folder`, on every so many-th training prompt."""
    rng, prompts = random.Random(0), toy_world.split_prompts()[0][::every]
    demonstrations = [{"prompt": p, "response": toy_world.demonstrate(p, rng)} for p in prompts]
    write_jsonl(f"{folder}/sft.jsonl", demonstrations)
    pairs = [(p, toy_world.demonstrate(p, rng), toy_world.random_words(rng)) for p in prompts]
    write_jsonl(f"{folder}/pairs.jsonl", [toy_world.label_pair(*pair, rng) for pair in pairs])


if __name__ == "__main__":
    torch.manual_seed(0)
    sizes = {"vocab_size": len(toy_world.vocabulary()), "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    special = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    write_models(sys.argv[1], LlamaConfig(**sizes, **special, max_position_embeddings=512))
    write_data(sys.argv[1], 20)
