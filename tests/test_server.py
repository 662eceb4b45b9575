"""A server as --generator: real HTTP on this machine, with a scripted server at the other end."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import genpi
from sampler import Sampling
from server import TRIES, Server

KEY = "sk-TheKeyThatNobodyMayRead"
LIST = "Sure:\n1. Count to 3.\n2. Name a tree.\n3. Spell cat.\n4. Say no.\n5. Cut sho"
FLAGS = """--samples 3 --held-out 1 --epochs 1 --batch 2 --max-new-tokens 8 --max-reason-tokens 8
--rank 2 --save-every 1"""
SAMPLING = Sampling(7, temperature=0.5, top_p=0.9)


def said(text, finish="stop", **more):
    """The bytes of a chat completion."""
    message = {"role": "assistant", "content": text, **more}
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()


def writer(body, nth):
    """A list of pseudo inputs, cut short, or a reason."""
    if "numbered list" in body["messages"][1]["content"]:
        return said(LIST, "length")
    return said("Because it does.")


class Handler(BaseHTTPRequestHandler):
    """Notes what arrives and answers with script(body, number of the request), or not at all."""

    def do_GET(self):
        self.server.listed.append(dict(self.headers))
        self.give(json.dumps({"data": [{"id": "big"}, {"id": "other"}]}).encode())

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, dict(self.headers), body))
            nth = len(server.asked)
            server.busy += 1
            server.most = max(server.most, server.busy)
        answer = server.script(body, nth)
        with server.lock:
            server.busy -= 1
        self.give(*answer) if isinstance(answer, tuple) else self.give(answer)

    def give(self, content, status=200, headers=()):
        if content is None:
            return  # the connection is dropped
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


class Scripted(ThreadingHTTPServer):
    """What it was asked, and how many requests there were at a time at most."""

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.script = script
        self.lock = threading.Lock()
        self.listed = []  # headers of each request for the list of models
        self.asked = []  # (path, headers, body) of each other one
        self.busy = 0
        self.most = 0

    def handle_error(self, *args):
        """Nothing: some tests hang up first."""


@contextmanager
def serving(script):
    server = Scripted(script)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Short waits, no proxy, no key of the user's."""
    monkeypatch.setattr("server.FIRST_WAIT", 0.01)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def run(checkpoint, tmp_path, capsys, monkeypatch):
    """Run genpi.py without its report -> (exit code, stdout, stderr)."""
    monkeypatch.setattr(genpi, "report", lambda *_, before: None)
    (tmp_path / "prompt.txt").write_text("Answer in one word.\n")

    def call(url, *flags):
        return genpi.main(command(checkpoint, tmp_path, url, *flags)), *capsys.readouterr()

    return call


def command(checkpoint, folder, url, *flags):
    paths = ["--model", checkpoint, "--prompt", folder / "prompt.txt", "--out", folder / "run"]
    return [*FLAGS.split(), *map(str, paths), "--generator", url, *flags]


def complaint(ended, *words):
    """The only line on stderr beside progress bars; it is an error, with these words."""
    code, _, stderr = ended
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and "%|" not in line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (code, stderr)
    assert [word for word in words if str(word) not in lines[0]] == [], lines[0]
    return lines[0]


def speak(url, n=1, **how):
    """Yield the server's answers to n questions as they come."""
    asked = [[{"role": "user", "content": str(i)}] for i in range(n)]
    seeds = [2**40 + i for i in range(n)]
    return Server(url, "big", **how).speak(asked, SAMPLING, seeds)


def records(folder):
    return [json.loads(line) for line in (folder / "run" / "data.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------------------------- requests


def test_what_arrives():
    """A request holds the model, messages, sampling and a seed that any server takes."""
    with serving(lambda body, nth: said(" Hi. \n")) as server:
        assert list(speak(server.url)) == [(0, "Hi.", True)]
    path, headers, body = server.asked[0]
    assert path == "/v1/chat/completions" and "Authorization" not in headers
    sampling = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "seed": 2**40 % 2**31}
    assert body == {"model": "big", "messages": [{"role": "user", "content": "0"}], **sampling}


def test_concurrency():
    """Three requests are in flight at once, and never four."""
    three = threading.Barrier(3, timeout=9)

    def script(body, nth):
        three.wait()
        time.sleep(0.1)  # a fourth would be seen
        return said("ok")

    with serving(script) as server:
        assert len(list(speak(server.url, 9, concurrency=3))) == 9
    assert server.most == 3


def test_answers_come_as_they_finish():
    """A slow answer does not hold up the others."""
    held = threading.Event()

    def script(body, nth):
        return said("ok") if body["messages"][0]["content"] != "0" else held.wait(9) and said("ok")

    with serving(script) as server:
        answers = speak(server.url, 3)
        assert {next(answers)[0], next(answers)[0]} == {1, 2}
        held.set()
        assert next(answers)[0] == 0


ANSWERS = {
    "cut": (said("Yes.", "length"), [("Yes.", False)]),
    "thinks first": (said("<think>\nHm.\n</think>\n\nYes."), [("Yes.", True)]),
    "thinks apart": (said("Yes.", reasoning_content="Hm."), [("Yes.", True)]),
    "half a pair": (said("\ud83d"), [("?", True)]),
    "only thinks": (said("<think> Hm.", "length"), []),
    "only thinks apart": (said(None, "length", reasoning_content="Hm."), []),
    "no choice": (b'{"choices": []}', []),
    "not a text": (said([{"type": "text", "text": "Yes."}]), []),
    "too deep": (b"[" * 100_000, []),
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_answers(answer):
    """Thinking is no part of a text; what holds no text is no answer, and another is asked for."""
    content, found = ANSWERS[answer]
    with serving(lambda body, nth: content if nth == 1 else said("other")) as server:
        assert list(speak(server.url)) == [(0, *(found or [("other", True)])[0])]
    assert [body["seed"] for *_, body in server.asked] == [0, 1][: 2 - len(found)]


# ----------------------------------------------------------------------------------------- trouble

TROUBLE = {
    "busy": (b"", 500), "too many": (b"", 429), "late": (b"", 503), "dropped": None,
    "cut short": b'{"choi', "empty": said(""),
}  # fmt: skip


@pytest.mark.parametrize("trouble", TROUBLE)
def test_trouble_that_passes(trouble):
    """After two failures the third try succeeds."""
    with serving(lambda body, nth: TROUBLE[trouble] if nth < 3 else said("ok")) as server:
        assert list(speak(server.url)) == [(0, "ok", True)]
    assert len(server.asked) == 3


def test_giving_up(run, tmp_path):
    """After TRIES tries one line says what happened and what to do."""
    with serving(lambda body, nth: (b"over\nloaded", 503)) as server:
        ended = run(server.url)
    complaint(ended, server.url, "HTTP 503 over loaded", f"{TRIES} tries", "same command")
    assert len(server.asked) == TRIES


def test_a_failure_ends_the_asking():
    """After a refusal the questions that were waiting for their turn are not asked any more."""

    def script(body, nth):
        time.sleep(0.05)
        return b"", 400

    with serving(script) as server:
        with pytest.raises(ValueError, match="HTTP 400"):
            list(speak(server.url, 9, concurrency=1))
        time.sleep(0.3)
        assert len(server.asked) <= 2


def test_a_server_that_is_not_there(run, tmp_path):
    """A refused connection names the URL, and nothing is made."""
    with serving(writer) as server:
        pass
    complaint(run(server.url), server.url, "refused", "--generator-model")
    assert not (tmp_path / "run").exists()


OK = b"HTTP/1.0 200 OK\r\n"


@pytest.mark.parametrize(("head", "drip"), [(b"", b""), (OK, b"X"), (OK + b"\r\n", b" ")])
def test_the_time_limit(monkeypatch, head, drip):
    """A server that is silent, or sends a byte of a header or of its answer now and then, is given
    up after --timeout.
    """

    def give(self, content):
        self.wfile.write(head)
        for _ in range(5):
            time.sleep(0.1)
            self.wfile.write(drip)

    monkeypatch.setattr(Handler, "give", give)
    with serving(lambda body, nth: b"") as server:
        with pytest.raises(ValueError, match="no answer within --timeout 0.2 s .7 tries"):
            list(speak(server.url, timeout=0.2))


@pytest.mark.parametrize(("key", "kept"), [(KEY, "It is [key]."), ("EMPTY", "It is EMPTY.")])
def test_a_key_that_is_echoed(key, kept):
    """A server that says the key does not get it into a record; what is no secret is a word."""
    with serving(lambda body, nth: said(f"It is {key}.")) as server:
        assert list(speak(server.url, key=key)) == [(0, kept, True)]


REFUSED = {401: "OPENAI_API_KEY", 403: "another key", 404: "/v1", 400: "its log", 422: "its log"}


@pytest.mark.parametrize("status", REFUSED)
def test_a_refusal(run, monkeypatch, status):
    """A refusal is one line at once, with the server's words but without the key that they hold."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    told = f"No\n\x1b[2J {KEY}!{'x' * 999}".encode()
    with serving(lambda body, nth: (told, status)) as server:
        ended = run(server.url)
    line = complaint(ended, server.url, f"HTTP {status} No [2J [key]!", REFUSED[status])
    assert len(server.asked) == 1 and len(line) < 600


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(run, monkeypatch, status):
    """The new place is neither asked, nor named with its secrets, and never sees the key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(writer) as other:
        place = other.url.replace("//", "//me:secret@") + "?token=secret"
        with serving(lambda body, nth: (b"", status, {"Location": place})) as server:
            line = complaint(run(server.url), server.url, f"HTTP {status}", "--generator")
    assert other.asked == other.listed == [] and len(server.asked) == 1
    assert "secret" not in line and KEY not in line


# ------------------------------------------------------------------------------------- the command


def test_a_run_with_a_server(run, tmp_path, monkeypatch):
    """Inputs and reasons are the server's; the key is kept nowhere; a second run asks nothing."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(writer) as server:
        code, stdout, stderr = run(server.url + "/")
        assert code == 0 and f"written by big at {server.url}" in stdout, stderr
        asked = len(server.asked)
    assert asked == 5 and all(h["Authorization"] == f"Bearer {KEY}" for _, h, _ in server.asked)
    assert {body["model"] for *_, body in server.asked} == {"big"}
    assert sorted(r["pseudo_input"] for r in records(tmp_path)) == sorted(
        ["Count to 3.", "Name a tree.", "Spell cat.", "Say no."]
    )  # not the item that was cut short
    assert {r["reason"] for r in records(tmp_path)} == {"Because it does."}
    kept = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(KEY.encode() in text for text in [stdout.encode(), stderr.encode(), *kept])
    assert (tmp_path / "run" / "adapter_model.safetensors").exists()
    (tmp_path / "run" / "adapter_config.json").unlink()
    assert run(server.url, "--concurrency", "2", "--timeout", "9")[0] == 0  # it is down by now


def test_a_failure_keeps_what_is_finished(run, tmp_path):
    """Records before a failure stay; later another address of the same model makes the rest."""
    gone = (b'{"detail": "gone"}', 404)
    with serving(lambda body, nth: writer(body, nth) if nth < 4 else gone) as server:
        complaint(run(server.url, "--concurrency", "1"), "HTTP 404", "gone")
    before = records(tmp_path)
    assert len(before) == 2
    with serving(writer) as server:
        assert run(server.url)[0] == 0
        complaint(run(server.url, "--generator-model", "x"), "generator_model big (now x)")
    assert records(tmp_path)[:2] == before and len(records(tmp_path)) == 4


def test_a_reason_too_long_for_the_server(run, tmp_path):
    """A question that the server has no context for costs one record, not the run."""
    told = b'{"message": "This model\'s maximum context length is 4096 tokens."}'

    def script(body, nth):
        return (told, 400) if "Spell cat." in body["messages"][1]["content"] else writer(body, nth)

    with serving(script) as server:
        code, stdout, _ = run(server.url)
    assert code == 0 and "left out: 1 of 3" in stdout
    assert [r["pseudo_input"] for r in records(tmp_path) if r["no_reason"]] == ["Spell cat."]


BAD = ["http://h:x/v1", "http://h:0/v1", "http://h:70000/v1", "http:///v1", "http://h:8000", "ftp://h/v1",
       "http://h/v 1", "http://a..b/v1", "http://[::1/v1"]  # fmt: skip
SECRET = ["http://me:secret@h/v1", "http://me:secret@h:x/v1", "http://h/v1?key=secret"]


@pytest.mark.parametrize("url", BAD + SECRET)
def test_urls_that_are_not_taken(run, tmp_path, url):
    """A URL that is wrong is shown with a right one; one that tells a secret is not shown."""
    line = complaint(run(url), "--generator", *([] if url in SECRET else [url, "not the URL"]))
    assert "secret" not in line and not (tmp_path / "run").exists()


FLAG = {
    "--concurrency 0": "0 is out of range; it must be 1 to 1000000000; see --help",
    "--timeout 0": "0 is out of range; it must be 0.1 to",
    "--timeout nan": "nan is out of range; it must be 0.1 to",
}


@pytest.mark.parametrize("flag", FLAG)
def test_flags_out_of_range(run, tmp_path, flag):
    """The error names flag and limit, before the server is asked anything."""
    ended = run("http://127.0.0.1:9/v1", *flag.split())
    complaint(ended, f"{flag.split()[0]}: {FLAG[flag]}")
    assert not (tmp_path / "run").exists()


def test_a_name_without_a_server(run, tmp_path):
    """--generator-model is of use only with a URL; a key must fit a header."""
    complaint(run("folder", "--generator-model", "x"), "--generator-model x", "URL")


def test_a_key_that_is_none(run, monkeypatch):
    """A key that cannot stand in a header is refused without being shown."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a\nsk-b")
    assert "sk-" not in complaint(run("http://127.0.0.1:9/v1"), "OPENAI_API_KEY")


def test_ctrl_c_with_requests_in_flight(checkpoint, tmp_path):
    """An interrupt ends at once, with one line, though the server has not answered."""
    (tmp_path / "prompt.txt").write_text("Answer in one word.\n")
    held = threading.Event()
    with serving(lambda body, nth: held.wait(60) and None) as server:
        argv = [sys.executable, "genpi.py", *command(checkpoint, tmp_path, server.url)]
        root, pipe = Path(genpi.__file__).parent, subprocess.PIPE
        program = subprocess.Popen(argv, cwd=root, stderr=pipe, text=True, env=dict(os.environ))
        while not server.asked and program.poll() is None:
            time.sleep(0.05)
        clock = time.monotonic()
        program.send_signal(signal.SIGINT)
        _, stderr = program.communicate(timeout=30)
        held.set()
    assert time.monotonic() - clock < 3 and program.returncode == 130, stderr
    assert "interrupted; the same command" in stderr and "Traceback" not in stderr
