"""A generator behind a server: any that speaks OpenAI's chat completions over HTTP.

It speaks as a Voice does (sampler.py), with `concurrency` requests in flight. What may pass (a busy
server, a lost connection, an empty answer) is tried again for about a minute; anything else is one
ValueError. The key goes into a header and nowhere else: not on the screen, not into a file, and, as
no redirect is followed, to no other host. Unlike a Voice, a server that batches need not say the
same again with the same seed.

Left out: streaming, Retry-After, other interfaces than chat completions, more secrets than a key.
"""

import http.client
import json
import queue
import random
import re
import threading
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from sampler import Sampling

TRIES = 7  # of one request; the waits between them add up to about a minute
SECRET = 8  # characters that a key has at least
FIRST_WAIT = 1.0  # seconds before the second try, doubled before each further one
TRY_AGAIN = {408, 409, 425, 429, *range(500, 600)}  # HTTP statuses that may pass
TOO_LONG = re.compile(r"context[ _](length|limit|size|window)", re.IGNORECASE)  # how servers say it
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, RecursionError)
CURES = {
    401: "set OPENAI_API_KEY to a key that this server knows",
    403: "OPENAI_API_KEY may not use this model; take another key or --generator-model",
    404: "check that --generator ends as the server's URL does (/v1), and --generator-model",
}


class TooLong(ValueError):
    """A question does not fit the context of the server's model."""


class Untouched(urllib.request.HTTPErrorProcessor):
    """Hands over every answer as it came: no redirect is followed, so none carries the key on."""

    def http_response(self, request, response):
        return response

    https_response = http_response


@dataclass(frozen=True)
class Server:
    """A model behind a server. url: up to /v1; timeout: seconds that an answer may take."""

    url: str
    model: str = ""
    concurrency: int = 16
    timeout: float = 300.0
    key: str = field(default="", repr=False)

    def fits(self, messages: list[dict], max_new_tokens: int) -> bool:
        """True: only the server knows its context, and says so when asked; see speak."""
        return True

    def speak(
        self, conversations: list[list[dict]], sampling: Sampling, seeds: list[int]
    ) -> Iterator[tuple[int, str | None, bool]]:
        """Yield (conversation, its reply, whether it ended by itself) as answers come.

        A reply is None if the question is too long for the server's context. Raises: ValueError at
        the first failure.
        """
        gate = threading.Semaphore(self.concurrency)
        stop = threading.Event()
        answers = queue.SimpleQueue()

        def work(number: int) -> None:
            body = {"model": self.model, "messages": conversations[number], "seed": seeds[number]}
            body |= {"max_tokens": sampling.max_new_tokens}
            body |= {"temperature": sampling.temperature, "top_p": sampling.top_p}
            with gate:
                try:
                    text, ended = self.ask("chat/completions", completion, body, stop=stop)
                    answers.put((number, self.without_key(text), ended))
                except TooLong:
                    answers.put((number, None, False))
                except Exception as error:  # whatever it is, the main thread raises it
                    answers.put(error)

        for number in range(len(conversations)):
            # a daemon: neither Ctrl-C nor the end of the program waits for what is in flight
            threading.Thread(target=work, args=(number,), daemon=True).start()
        try:
            for _ in conversations:
                answer = answers.get()
                if isinstance(answer, Exception):
                    raise answer
                yield answer
        finally:
            stop.set()

    def ask(self, path: str, read, body: dict | None = None, tries: int = TRIES, stop=None):
        """read() of the answer to one request, which is tried again where that may help.

        stop: an event that ends the waiting. Raises: TooLong, or ValueError with the cure.
        """
        stop = stop or threading.Event()
        why = "stopped"  # said to nobody: who set the event is gone
        wait = 0.0
        for number in range(tries):
            if stop.wait(wait):
                break
            wait = FIRST_WAIT * 2**number * random.uniform(0.5, 1)  # rows must not come in step
            # another try is another draw: the same one might be as empty again
            sent = body and body | {"seed": (body["seed"] + number) % 2**31}
            try:
                status, content = self.exchange(path, sent)
            except (OSError, http.client.HTTPException) as error:
                why = f"no answer: {self.printable(repr(getattr(error, 'reason', error)))}"
                if "timed out" in why:
                    why = f"no answer within --timeout {self.timeout:g} s"
                continue
            why = f"HTTP {status} {self.printable(content.decode(errors='replace'))}"
            if status == 200:
                try:
                    return read(content)
                except UNREADABLE:
                    why += ", without a text (a model that thinks must be served not to)"
            elif status not in TRY_AGAIN:
                raise self.refusal(path, status, why)
        told = f"{self.url}/{path}: {why} ({tries} tries)"
        raise ValueError(f"{told}; see to the server, and the same command goes on from here")

    def exchange(self, path: str, body: dict | None) -> tuple[int, bytes]:
        """One request -> status and bytes of the answer, all of it within the time limit."""
        answer = queue.SimpleQueue()

        def work() -> None:
            try:
                answer.put(self.transfer(path, body))
            except Exception as error:  # raised below
                answer.put(error)

        # a socket's own limit begins anew with every byte; who sends one now and then is left alone
        threading.Thread(target=work, daemon=True).start()
        try:
            found = answer.get(timeout=self.timeout)
        except queue.Empty:
            raise TimeoutError("timed out") from None
        if isinstance(found, Exception):
            raise found
        return found

    def transfer(self, path: str, body: dict | None) -> tuple[int, bytes]:
        """One request, whatever time its headers take -> status and bytes of the answer."""
        headers = {"Content-Type": "application/json", "User-Agent": "genpi"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = body and json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        opener = urllib.request.build_opener(Untouched)
        content = b""
        deadline = time.monotonic() + self.timeout
        with opener.open(request, timeout=self.timeout) as response:
            while piece := response.read1(2**16):
                content += piece
                if time.monotonic() > deadline:
                    raise TimeoutError("timed out")
            return response.status, content

    def refusal(self, path: str, status: int, told: str) -> ValueError:
        """The error for an answer that another try would not change."""
        cure = CURES.get(status, "the server does not take what genpi.py sends; see its log")
        if 300 <= status < 400:
            cure = "no redirect is followed; give the URL that it leads to as --generator"
        error = TooLong if TOO_LONG.search(told) else ValueError
        return error(f"{self.url}/{path}: {told}; {cure}")

    def without_key(self, text: str) -> str:
        """A server's words without the key, which it may echo. "EMPTY" and such are no secrets."""
        return text.replace(self.key, "[key]") if len(self.key) >= SECRET else text

    def printable(self, text: str) -> str:
        """A server's words on one short line, without the key."""
        text = self.without_key(text)
        return " ".join("".join(c if c.isprintable() else " " for c in text[:300]).split())


def completion(content: bytes) -> tuple[str, bool]:
    """(text, whether it ended by itself) of a chat completion; ValueError if there is no text.

    What a model thinks first is not its text, be it in a field of its own or before </think>.
    """
    choice = json.loads(content)["choices"][0]
    text = (choice["message"]["content"] or "").rpartition("</think>")[2].strip()
    if not text or text.startswith("<think>"):
        raise ValueError(text)
    # half a surrogate pair cannot be written down
    return text.encode(errors="replace").decode(), choice.get("finish_reason") == "stop"


def connect(server: Server) -> Server:
    """The server with a model: the one that it was given, or else the first that it lists.

    Raises: ValueError if it does not answer, or the key fits no HTTP header.
    """
    if not (server.key.isascii() and server.key.isprintable()):
        raise ValueError("OPENAI_API_KEY holds what no HTTP header can; set it to the key alone")
    if server.model:
        return server
    try:
        model = server.ask("models", lambda content: json.loads(content)["data"][0]["id"], tries=3)
    except ValueError as error:
        raise ValueError(f"{error}; or name the model with --generator-model") from None
    return replace(server, model=server.without_key(str(model)))
