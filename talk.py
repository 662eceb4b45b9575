"""Talk to a finished run on the terminal: the adapter, the plain model, or the prompted one.

A conversation is kept until /new or a change of who answers. Left out: saving it, editing it.
"""

import re
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import lora
import runs
from files import UNSEEN
from prompt import conversation, student_messages
from sampler import Sampling, Voice
from train import open_model

HELP = """Talk to the internalised model. /base: the plain model; /prompt: the plain model with \
the prompt; /adapter: back; /new: forget the conversation; /quit. A message that starts with a \
slash starts with two; one of several lines stands between two lines of three double quotes."""
QUOTES = '"""'


def talk(folder: Path, device: str | None, model: str | None = None, dtype: str = "auto") -> None:
    """A conversation on the terminal with the adapter, the plain model, or the prompted one.

    model: where the base of the run is now. dtype: to compute in another type than the run did.
    """
    run = runs.load_run(folder, device, model)
    if dtype != "auto":
        run = replace(run, dtype=dtype)
    model, chat = open_model(run)
    print(HELP)
    mode = "adapter"
    turns = []
    while True:
        try:
            said = read_message(f"\n{mode}> ")
        except EOFError:
            return
        if said == "/quit":
            return
        if said in ("/base", "/prompt", "/adapter", "/new"):
            if said != "/new":
                mode = said[1:]
            turns = []  # a mode begins anew
        elif re.fullmatch(r"/\w*", said):  # no path, which may begin a message
            print(HELP)
        elif said:
            said = re.sub("^//", "/", said)
            opening = run.prompt.teacher if mode == "prompt" else student_messages
            first, *later = [*turns, said]
            messages = conversation(opening(first), later)
            try:
                with nullcontext() if mode == "adapter" else lora.adapter_off(model):
                    reply = say_aloud(Voice(model, chat), messages, run.max_new_tokens)
                turns += [said, reply]
            except ValueError as error:
                print(f"{str(error).partition(';')[0]}; begin another with /new")


def read_message(ask: str) -> str:
    """What the user types: a line, or all lines between two of three double quotes."""

    def line(ask: str) -> str:
        return input(ask).encode(errors="replace").decode().rstrip()

    first = line(ask).lstrip()
    if first != QUOTES:
        return first
    lines = iter(partial(line, "... "), QUOTES)  # until a line is that
    return "\n".join(lines).strip()


def say_aloud(voice: Voice, messages: list[dict], limit: int) -> str:
    """Print the reply as it is written, and return it."""
    said = ""
    for _, text, _ in voice.speak([messages], Sampling(limit), partly=True):
        if not text.endswith("\ufffd"):  # half of a character of several bytes: wait for the rest
            print(text[len(said) :].translate(UNSEEN), end="", flush=True)
            said = text
    print()
    return said
