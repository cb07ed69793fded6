"""Datasets: what is accepted, what is refused and how it is said, padding, order, other tokenizers."""

import gzip
import json
from types import SimpleNamespace

import pytest
import torch

import lm
import toy_world
from plumbing import data
from plumbing.files import InputError

GOOD = {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0}
GOOD |= {"is_response_0_safe": True, "is_response_1_safe": False}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"prompt": None}, "field 'prompt' should be str, got NoneType"),
        ({"is_response_0_safe": "yes"}, "field 'is_response_0_safe' should be bool, got str"),
        ({"better_response_id": True}, "field 'better_response_id' should be int, got bool"),
        ({"safer_response_id": 2}, "should be 0 or 1, got 2"),
        ({"safer_response_id": 1}, "labels contradict: response 1 is called safer"),
    ],
)
def test_a_bad_row_is_named_or_skipped(tmp_path, change, reason, capsys):
    path = write(tmp_path / "pairs.jsonl", [GOOD, GOOD | change, GOOD])
    with pytest.raises(InputError, match=f"pairs.jsonl row 2: .*{reason}.*--skip-bad-rows"):
        data.load_preferences(path, "better_response_id")
    kept = data.load_preferences(path, "better_response_id", skip_bad_rows=True)
    assert kept == [("p", "b", "a", False, True)] * 2  # the winner comes first, with its label
    assert f"skipped 1 of 3 rows of {path}; the first: {path} row 2: " in capsys.readouterr().err


ROW = json.dumps(GOOD).encode()
DAMAGED = [  # what comes after a good row
    (ROW.replace(b'"p"', b'"caf\xe9"'), "not UTF-8"),
    (ROW.decode().encode("utf-16"), "not UTF-8"),
    (gzip.compress(ROW), "not UTF-8"),
    (bytes(range(128, 256)), "not UTF-8"),
    (b'{"prompt": ' + b"[" * 100_000, "not valid JSON .(maximum recursion depth|Stack overflow)"),
    (ROW.replace(b'_id": 1', b'_id": ' + b"9" * 5000), "not valid JSON .Exceeds the limit"),
    (ROW.replace(b'"p"', b'"\\ud800"'), "'prompt' holds half a surrogate pair"),
    (b"null", "expected an object with fields, got NoneType"),
    (b"7 8", "not valid JSON .Extra data"),
    (ROW[:-9], "not valid JSON"),
]


@pytest.mark.parametrize("line, message", DAMAGED)
def test_a_damaged_line_is_one_clear_line_and_can_be_skipped(tmp_path, line, message, capsys):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + ROW + b"\r\n\n" + line + b"\n"
    )  # a mark and line ends as Windows writes
    with pytest.raises(InputError, match=f"pairs.jsonl row 3: .*{message}.*--skip-bad-rows") as error:
        data.load_preferences(str(path), "better_response_id")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert len(data.load_preferences(str(path), "better_response_id", skip_bad_rows=True)) == 1
    assert "pairs.jsonl row 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", b'{"prompt": "x"}', "a.json: expected a JSON list of rows"),
        ("a.json", b'["caf\xe9"]', "a.json: cannot be read .'utf-8' codec can't decode byte 0xe9"),
        ("a.parquet", b"PAR1 and no more", "a.parquet: cannot be read"),
        ("a.csv", b"prompt", "a.csv: not a .jsonl, .json or .parquet file"),
        ("a.jsonl", b"\n", "a.jsonl: no usable row"),
    ],
)
def test_a_file_that_cannot_serve_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        data.load_prompts(str(tmp_path / name))


def test_json_jsonl_parquet_and_folders_give_the_same_rows(tmp_path):
    import datasets

    rows = [GOOD | {"prompt": f"p{i}"} for i in range(3)]
    jsonl = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "folder").mkdir()
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "folder" / "a.parquet"))
    for dataset in (jsonl, *(str(tmp_path / name) for name in ("a.json", "folder", "folder/a.parquet"))):
        assert [row for _, row in data.read_rows(dataset)] == rows


def test_parts_of_a_data_set_are_not_read_as_one(tmp_path):
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        write(tmp_path / name, [GOOD])
    assert len(data.load_preferences(str(tmp_path), "better_response_id")) == 2
    write(tmp_path / "Test.jsonl", [GOOD])
    with pytest.raises(InputError, match="files of test and train would be read as one. Name a file, or a"):
        data.load_preferences(str(tmp_path), "better_response_id")


def test_supervised_rows_may_be_alpacas(tmp_path):
    rows = [{"prompt": "p", "response": "r"}, {"instruction": "do", "input": "this", "output": "done"}]
    assert data.load_supervised(write(tmp_path / "a.jsonl", rows)) == [("p", "r"), ("do this", "done")]


def test_the_template_ends_without_a_space():
    assert data.prompt_text("hi") == "BEGINNING OF CONVERSATION: USER: hi ASSISTANT:"


def test_frame_puts_all_responses_in_the_same_columns():
    sequences, mask, width = lm.frame([([1, 2, 3, 9], 3), ([4, 8, 8, 9], 1)], 0)
    assert width == 3
    assert sequences.tolist() == [[1, 2, 3, 9, 0, 0], [0, 0, 4, 8, 8, 9]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]]


ARGS = SimpleNamespace(max_length=12, chat_template=False, skip_bad_rows=False)
SKIP = SimpleNamespace(max_length=12, chat_template=False, skip_bad_rows=True)


def test_encode_cuts_responses_and_long_prompts_are_refused(toy_tokenizer, capsys):
    pairs = [("open a lock", "oil springs . turn keys ."), ("open a lock " * 3, "oil springs .")]
    with pytest.raises(InputError, match="x: a prompt of 14 tokens .* in --max-length 12: 'open a lock open"):
        data.keep_fitting("x", pairs, toy_tokenizer, 11, ARGS)
    pairs = data.keep_fitting("x", pairs, toy_tokenizer, 11, SKIP)
    assert "skipped 1 of 2 rows of x" in capsys.readouterr().err
    rows = data.encode(toy_tokenizer, pairs, 12)
    # 5 words of template, 3 of prompt, 4 of 7 of response
    assert [(len(ids), length) for ids, length in rows] == [(12, 8)]
    ids, _ = data.encode(toy_tokenizer, pairs, 48)[0]
    assert ids[-1] == toy_tokenizer.eos_token_id
    with pytest.raises(InputError, match="no prompt leaves room in --max-length 12 less --max-new-tokens 5"):
        data.keep_fitting("x", ["open a lock"], toy_tokenizer, 7, SKIP)


def test_a_pair_with_a_long_prompt_is_dropped_as_a_pair(toy_tokenizer, capsys):
    rows = [("open a lock " * 3, "oil", "turn", True, False), ("open a lock", "oil", "turn keys", True, True)]
    pairs = data.keep_fitting("x", rows, toy_tokenizer, 11, SKIP)
    assert pairs == rows[1:]
    winner, loser, *safe = data.encode_pairs(toy_tokenizer, pairs, SKIP)[0]
    assert toy_tokenizer.decode(winner[8:]) == "oil </s>"
    assert toy_tokenizer.decode(loser[8:]) == "turn keys </s>"
    assert safe == [True, True]


def test_one_line_tells_what_the_rows_are_like(toy_tokenizer, capsys, monkeypatch):
    rows = [("open a lock", "oil springs . turn keys ."), ("open a lock", "oil")] * 1000
    data.keep_fitting("x", rows, toy_tokenizer, 11, ARGS)
    line = capsys.readouterr().err
    assert line.startswith("x: 2,000 rows, ") and "longest 14 tokens (of 1,000 looked at)" in line
    assert 45 < float(line.partition("looked at), ")[2].partition("% cut by --max-length")[0]) < 55
    data.keep_fitting("x", rows[:3], toy_tokenizer, 11, ARGS)
    line = "x: 3 rows, median 14, longest 14 tokens, 66.7% cut by --max-length, 0.0% unknown"
    assert capsys.readouterr().err.strip() == line
    data.keep_fitting("x", ["open a zebra", "open a lock"], toy_tokenizer, 11, ARGS)
    line = "x: 2 rows, median 8, longest 8 tokens, 0.0% cut by --max-length, 6.2% unknown. Warning: "
    assert line in capsys.readouterr().err
    # two responses of which --max-length leaves the same four words, and two of which one ends there
    pairs = [("open a lock", "oil springs . turn keys .", "oil springs . turn oil .", True, True)]
    pairs += [("open a lock", "oil springs . turn", "oil springs .", True, True)]
    data.keep_fitting("x", pairs, toy_tokenizer, 11, ARGS)
    assert ", 0.0% unknown, 50.0% of the pairs alike after the cut" in capsys.readouterr().err
    winner, loser, *_ = data.encode_pairs(toy_tokenizer, pairs, ARGS)[0]
    assert winner == loser
    # with one id for BOS and for unknown words nobody can tell them apart
    other = toy_world.build_tokenizer()
    other.bos_token = other.unk_token
    data.keep_fitting("x", ["open a zebra"], other, 11, ARGS)
    assert "0.0% unknown" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    data.keep_fitting("x", rows[:3], toy_tokenizer, 11, ARGS)
    assert capsys.readouterr().err == ""


def test_an_epoch_is_a_permutation_and_the_order_depends_on_the_seed_only():
    steps = [data.batch_indices(10, 4, step, seed=3) for step in range(5)]
    flat = [i for step in steps for i in step]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert data.batch_indices(10, 4, 3, seed=3) == steps[3]  # without the steps before it
    assert data.batch_indices(10, 4, 3, seed=4) != steps[3]
    # a batch of two half batches: how a rollout divides does not change which prompts it holds
    assert data.batch_indices(10, 8, 1, 3) == steps[2] + steps[3]


def test_a_micro_batch_is_as_wide_as_its_own_longest_row_and_rejoins_in_the_old_order():
    prompts, responses = [1, 4, 2, 4, 3], [2, 1, 7, 6, 0]  # 0: an empty one
    attention_mask = torch.tensor(
        [[0] * (5 - p) + [1] * (p + r) + [0] * (8 - r) for p, r in zip(prompts, responses)]
    )
    batch = {"attention_mask": attention_mask, "mask": attention_mask[:, 5:], "names": list("abcde")}
    batch["sequences"] = torch.arange(5 * 13).view(5, 13) * attention_mask  # each number once
    batch["values"], batch["reward"] = batch["sequences"][:, 5:] / 2, torch.arange(5.0)
    batch["reward_ids"] = torch.tensor([[9] * n + [0] * (6 - n) for n in (1, 2, 6, 3, 5)])
    batch["reward_attention_mask"] = (batch["reward_ids"] > 0).long()
    pieces = lm.micro_batches(batch, 2)
    assert [part["rows"] for part in pieces] == [[3, 2], [1, 0], [4]]  # 10, 9, 5, 3 and 3 tokens
    shapes = [(part["prompt_width"], part["mask"].shape[1], part["reward_ids"].shape[1]) for part in pieces]
    assert shapes == [(4, 7, 6), (4, 2, 2), (3, 1, 5)]
    assert [part["share"] for part in pieces] == [2 / 5, 2 / 5, 1 / 5]
    for part in pieces:
        rows, width = part["rows"], part["prompt_width"]
        assert part["names"] == [batch["names"][row] for row in rows]
        assert torch.equal(part["sequences"].sum(1), batch["sequences"][rows].sum(1))  # nothing is cut away
        assert torch.equal(part["sequences"][:, width:], (part["values"] * 2).long())
    for name in ("values", "reward"):
        parts = [part[name] for part in pieces]
        assert torch.equal(lm.rejoin(parts, pieces, batch["mask"]), batch[name])
    (part,) = lm.micro_batches(batch, 5)
    assert part["rows"] == [0, 1, 2, 3, 4] and part["prompt_width"] == 4 and part["mask"].shape == (5, 7)


def test_retokenize_speaks_the_other_models_language(toy_tokenizer):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    import toy_world

    words = list(reversed(toy_world.vocabulary()))
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = toy_tokenizer.backend_tokenizer.pre_tokenizer
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    other = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    assert not data.same_tokenizer(toy_tokenizer, other) and data.same_tokenizer(other, other)
    responses = [toy_tokenizer("oil springs .").input_ids, toy_tokenizer("turn").input_ids]
    prompts = ["open a lock", "fix a lock"]
    texts = data.decode_responses(toy_tokenizer, data.encode_prompts(toy_tokenizer, prompts), responses)
    ids, mask = data.retokenize(prompts, texts, [True, False], other)
    ended, cut_off = (other.decode(row[real.bool()]) for row, real in zip(ids, mask))
    assert ended == "BEGINNING OF CONVERSATION: USER: open a lock ASSISTANT: oil springs . </s>"
    assert cut_off == "BEGINNING OF CONVERSATION: USER: fix a lock ASSISTANT: turn"
    assert torch.equal(mask.sum(1), torch.tensor([12, 9]))


def test_an_answer_is_no_new_prompt(tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": p} for p in "abaa"]
    for more, want in (({}, "abaa"), ({"response": "r"}, "ab"), ({"response_0": "r"}, "ab")):
        path.write_text("".join(json.dumps(row | more) + "\n" for row in rows))
        assert data.load_prompts(str(path)) == list(want)
    assert capsys.readouterr().err.count("2 of 4 rows repeat a prompt; each is asked once") == 2
