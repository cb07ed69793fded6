"""Pairwise comparison: Elo by hand and whatever the order, the published arena's counts, and a judge behind a
real HTTP endpoint."""

import json
import math
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from plumbing.files import read_json, read_jsonl, write_jsonl
from tools import arena

ARENA = "tools/arena.py"


def row(policy: str, prompt: str, response: str, reward: float, cost: float) -> dict:
    return {"policy": policy, "prompt": prompt, "response": response, "reward": reward, "cost": cost}


# ------------------------------------------------------------------------------ statistics


def test_bradley_terry_by_hand():
    wins = torch.tensor([[0.0, 300.0], [100.0, 0.0]], dtype=torch.float64)
    t = arena.bradley_terry(wins)  # one tie is added: 300.5 to 100.5
    assert t.tolist() == pytest.approx([0.0, -math.log(300.5 / 100.5)])


def test_bradley_terry_is_the_maximum_and_does_not_depend_on_the_order():
    torch.manual_seed(0)
    wins = torch.randint(1, 50, (4, 4)).double().fill_diagonal_(0)
    t = arena.bradley_terry(wins)
    padded = wins + 0.5 * (1 - torch.eye(4))
    expected = (padded + padded.T) * torch.sigmoid(t[:, None] - t[None, :])
    torch.testing.assert_close(
        expected.sum(1), padded.sum(1)
    )  # where the likelihood is flat: expected wins = wins
    order = torch.tensor([2, 0, 3, 1])
    shuffled = arena.bradley_terry(wins[order][:, order])
    torch.testing.assert_close(shuffled - shuffled[1], t[order] - t[order][1])


def test_elo_is_1000_for_the_first_and_400_points_are_ten_to_one_odds():
    outcomes = {(0, 1): {f"p{i}": [float(i % 11 == 0)] for i in range(11000)}}
    (first, *_), (second, low, high) = arena.elo(outcomes, 2, bootstrap=50, seed=0)
    assert first == 1000 and second == pytest.approx(1400, abs=1)
    assert low < second < high and high - low < 40


def test_the_bootstrap_draws_prompts_not_answers():
    """Ten copies of every answer are no new information: the interval must not shrink."""
    points = torch.rand(60, generator=torch.Generator().manual_seed(0)).round().tolist()
    once = arena.elo({(0, 1): {f"p{i}": [x] for i, x in enumerate(points)}}, 2, bootstrap=300, seed=1)[1]
    ten = arena.elo({(0, 1): {f"p{i}": [x] * 10 for i, x in enumerate(points)}}, 2, bootstrap=300, seed=1)[1]
    assert ten[2] - ten[1] == pytest.approx(once[2] - once[1], rel=0.1)


def test_arena_counts_by_hand():
    a = [row("a", "p", "x", r, c) for r, c in ((1, -1), (1, -1), (1, 2), (1, 2), (1, 0))]
    b = [row("b", "p", "y", r, c) for r, c in ((2, -1), (0, 3), (1, -2), (2, 0), (5, 1))]
    counts = arena.arena_counts(a, b, "reward", "cost")
    table = counts.pop("table")
    assert counts == {"better_safe": 2, "better_unsafe": 1, "worse_safe": 1, "worse_unsafe": 1}
    # a tie in reward counts as worse; cost 0 is safe
    assert table["safe_safe"] == {"count": 1, "win_rate": 1.0}
    assert table["safe_unsafe"] == table["unsafe_safe"] == {"count": 2, "win_rate": 0.5}
    assert table["unsafe_unsafe"] == {"count": 0, "win_rate": None}


REPLIES = [
    ("The first is better.\nVerdict: 1", "1"),
    ("verdict: TIE.", "tie"),
    ("**Verdict: 2**", "2"),
    ("Verdict: 1\nno, wait\nVerdict: 2", "2"),
    ("I prefer answer 1", None),
    ("Answer 2 says 'Verdict: 1'", None),
    ("Verdict: 1\nis what answer 2 tells me to write", None),
    ("Verdict: 1\nVerdict: 2\n\nVerdict: tie", None),
    ("Verdict: 12", None),
    ("Verdict: 3", None),
    ("", None),
    (None, None),
]


@pytest.mark.parametrize("reply, verdict", REPLIES)
def test_read_verdict(reply, verdict):
    assert arena.read_verdict(reply) == verdict


# ------------------------------------------------------------------------------ the scripts


@pytest.fixture()
def evaluation(tmp_path):
    """Three policies, four prompts: b's answers are the longer ones, c says what a says; p3 is unreadable."""
    rows = []
    for i in range(4):
        text = f"a rather long {{prompt}} answer {i}" + " MUMBLE" * (i == 3)
        rows.append(row("a", f"p{i}", f"short {i}", 1.0, -1.0))
        rows.append(row("b", f"p{i}", text, 2.0, 1.0))
        rows.append(row("c", f"p{i}", f"short {i}", 1.0, -1.0))
    write_jsonl(f"{tmp_path}/responses.jsonl", rows)
    return tmp_path


@pytest.fixture()
def endpoint(monkeypatch):
    """A chat endpoint on loopback. Helpfulness: the longer answer wins; harmlessness: always the first one
    (a judge that is nothing but position bias); no verdict where an answer mumbles."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # else it asks nobody
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][0]["content"]
            requests.append((self.path, body["model"], question))
            first, second = question.split("Answer 1:\n")[1].split("\n\nGive")[0].split("\n\nAnswer 2:\n")
            verdict = "1" if "HARMLESS" in question or len(first) > len(second) else "2"
            content = "I cannot say." if "MUMBLE" in question else f"Because.\nVerdict: {verdict}"
            content = question if "ECHO" in question else [content] if "LIST" in question else content
            content += "\ud800" * ("HALF" in question)
            message = {"role": "assistant", "content": content}
            answer = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            finish = "length" if "CUT" in question else "stop"
            answer["choices"] = [{"index": 0, "finish_reason": finish, "message": message}]
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if "DRIP" in question:  # a byte now and then, three seconds long
                for byte in data[:15]:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.2)
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", requests
    server.shutdown()
    server.server_close()


def test_a_judge_behind_an_endpoint(evaluation, endpoint, run_in):
    url, requests = endpoint
    flags = ("--evaluation", evaluation, "--judge-url", url, "--judge-model", "judge-1", "--bootstrap", 10)
    code, error = run_in(evaluation, ARENA, *flags)
    assert code == 0, error
    result = read_json(f"{evaluation}/arena_endpoint.json")
    helpful, harmless = (result["pairs"]["a vs b"][aspect] for aspect in arena.ASPECTS)
    assert helpful == {"wins": 0, "ties": 0, "losses": 3, "win_rate": 0.0, "asked": 8, "unparsable": 2} | {
        "first_answer_won": 3,
        "second_answer_won": 3,
    }
    assert harmless["ties"] == 3 and harmless["win_rate"] == 0.5  # the bias cancels
    assert harmless["first_answer_won"] == 6 and harmless["unparsable"] == 2  # and is reported
    equal = result["pairs"]["a vs c"]["helpfulness"]
    assert equal["ties"] == 4 and equal["asked"] == 0  # equal answers are a tie without asking
    elo = result["elo"]
    assert elo["helpfulness"]["b"][0] > 1100 and elo["harmlessness"]["b"][0] == pytest.approx(1000)

    paths, names, questions = (set(column) for column in zip(*requests))
    assert paths == {"/v1/chat/completions"} and names == {"judge-1"}
    assert len(questions) == len(requests) == 16  # c says what a says: nothing is asked twice
    assert any("a rather long {prompt} answer 0" in text for text in questions)  # braces in answers survive
    assert run_in(evaluation, ARENA, *flags)[0] == 0  # every reply is kept
    assert len(requests) == 16


def test_half_a_line_costs_one_reply_and_a_full_disk_is_one_clear_line(evaluation, endpoint, run_in):
    flags = ("--evaluation", evaluation, "--judge-url", endpoint[0], "--judge-model", "judge-1")
    flags, path = (*flags, "--bootstrap", 0), evaluation / "judgements.jsonl"
    assert run_in(evaluation, ARENA, *flags)[0] == 0
    for missing in (10, 1):  # bytes at the end: half a line, and the line's end alone
        path.write_bytes(path.read_bytes()[:-missing])
        for _ in range(2):
            code, error = run_in(evaluation, ARENA, *flags)
            assert code == 0, error
        assert len(endpoint[1]) == 17 and len(read_jsonl(path)) == 16
    path.unlink()
    path.symlink_to("/dev/full")
    code, error = run_in(evaluation, ARENA, *flags)
    assert code == 2 and "judgements.jsonl: cannot be written (No space left on device)" in error


NO_VERDICT = "no reply of judge-1 held a verdict about helpfulness"
UNFIT = [
    ("MUMBLE", NO_VERDICT),  # the equal answers of a and c are no comfort
    ("CUT", NO_VERDICT),
    ("ECHO", NO_VERDICT),  # the question ends in a verdict
    ("LIST", "'reply' should be str, got list"),
    ("HALF", "'reply' holds half a surrogate pair"),
    ("DRIP", "no reply within 1 s"),
]


@pytest.mark.parametrize("word, message", UNFIT)
def test_a_judge_without_a_verdict_rates_nobody_and_spoils_no_later_run(
    evaluation, endpoint, run_in, word, message
):
    path = f"{evaluation}/responses.jsonl"
    write_jsonl(path, [r | {"response": f"{r['response']} {word}"} for r in read_jsonl(path)])
    flags = ("--evaluation", evaluation, "--judge-url", endpoint[0], "--judge-model", "judge-1")
    code, error = run_in(evaluation, ARENA, *flags, "--judge-timeout", 1)
    assert code == 2 and message in error, error
    assert not (evaluation / "arena_endpoint.json").exists()
    stored = evaluation / "judgements.jsonl"
    assert not stored.exists() or read_jsonl(stored, arena.JUDGEMENT)


def test_answers_stand_between_marks_that_they_cannot_hold(evaluation, endpoint, run_in):
    flags = ("--evaluation", evaluation, "--judge-url", endpoint[0], "--judge-model", "judge-1")
    assert run_in(evaluation, ARENA, *flags, "--bootstrap", 10)[0] == 0
    for _, _, question in endpoint[1]:
        mark = question.split("Answer 1:\n")[1].splitlines()[0]
        assert question.count(mark) == 7 and len(mark) == 24  # named once, around prompt and answers


OTHER_FILES = [
    ('{"policy": "a"}\n', "responses.jsonl row 1: field 'prompt' is missing"),
    (json.dumps(row("a", "p", "y", 1.0, math.nan)) + "\n", "row 1: field 'cost' should be a finite number"),
    (json.dumps(row("a", "p", "y", 1.0, 1.0)) + "\n", "an arena needs two policies, found 1"),
]


@pytest.mark.parametrize("text, message", OTHER_FILES)
def test_other_files_are_refused(tmp_path, run_in, text, message):
    (tmp_path / "responses.jsonl").write_text(text)
    code, error = run_in(tmp_path, ARENA, "--evaluation", tmp_path)
    assert code == 2 and message in error


def test_policies_that_answered_other_prompts_are_refused(tmp_path, run_in):
    write_jsonl(f"{tmp_path}/responses.jsonl", [row("a", "p", "y", 1.0, 1.0), row("b", "q", "y", 1.0, 1.0)])
    code, error = run_in(tmp_path, ARENA, "--evaluation", tmp_path)
    assert code == 2 and "the policies did not answer the same prompts" in error


def test_learned_models_as_judges(evaluation, run_in):
    assert run_in(evaluation, ARENA, "--evaluation", evaluation, "--pairs", 2, "--bootstrap", 0)[0] == 0
    result = read_json(f"{evaluation}/arena_models.json")
    assert result["judge"] == "models" and result["comparisons_per_pair"] == 2
    ab, ac = result["pairs"]["a vs b"], result["pairs"]["a vs c"]
    assert ab["helpfulness"]["win_rate"] == 0.0 and ab["harmlessness"]["win_rate"] == 1.0
    assert ac["helpfulness"]["ties"] == 2 and ab["arena"]["better_unsafe"] == 2


NOBODY = ("--judge-url", "http://127.0.0.1:1/v1")
REFUSALS = [
    (("--judge", "truth"), "holds no true_reward and true_cost"),
    (("--judge", "endpoint"), "needs --judge-url"),
    (NOBODY, "belong together"),
    ((*NOBODY, "--judge-model", "m"), "--judge-url http://127.0.0.1:1/v1: "),
    ((*NOBODY, "--judge-model", "m", "--judge-version", "v9"), "helpfulness_v9.txt: cannot be read"),
    (("--pairs", "-1"), "argument --pairs: must be a whole number from 0, got -1"),
]


@pytest.mark.parametrize("flags, message", REFUSALS)
def test_refusals(evaluation, run_in, flags, message):
    code, error = run_in(evaluation, ARENA, "--evaluation", evaluation, *flags)
    assert code == 2 and message in error
    assert not list(evaluation.glob("arena_*"))
