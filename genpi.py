"""Generative Prompt Internalization: move a long prompt p into a small LoRA adapter.

    python genpi.py --prompt os.txt

does all of it, on a base model quantised to NF4:

    x        = pseudo inputs that a generator invents for p                        synth.py
    yT, env  = role-play: the model with p, and the model as the environment
    yS       = what the model says to x without p
    r        = the generator's reason why p turns yS into yT
    adapter  = argmin  lam * nll(yT | x, env) + (1 - lam) * nll(p, r | x, yS, yT)  loss.py, train.py
    report   = how much was internalised, and does it pay?                         evaluate.py

or the adapter descends what the paper compares this with (--objective, --pg-target: objectives.py).
This file is the command: the run, --show, --dry-run, --chat; its flags are in arguments.py.

Departures from the paper, each with its reason:
  * each term of the loss is a mean over all target tokens of the batch, not over micro-batches, so
    that the gradient does not depend on how the batch is cut up;
  * a target is never cut: the authors' code stops L_PG at 512 tokens, which loses most of a long p
    and all of r. A record that does not fit the context is left out and counted, and a text that
    reached its limit of tokens is taught without an end of turn;
  * the demonstrations are ours (demos/), or --demos (the paper takes five of the validation set); a
    prompt that has none is shown the inputs found so far (Self-Instruct);
  * inputs and reasons are written by the model itself, unless --generator names a larger one (the
    paper takes one of 70B): one command must run with one model;
  * the conversations that SFT trains on have a system message ("You are a helpful assistant."),
    the authors' have none: the model is asked as it will be served;
  * x is the bare problem also where the open turn of p frames it, since that is what arrives once p
    is gone; the authors' student still reads the frame of the OS prompt;
  * the worked examples that the environment reads are closed by [END], to show it when that is due;
    of a prompt that has none it reads the text;
  * --pg-share below 1 computes L_PG on a random part of each batch only, the same on average for
    less; the default is all of it, as in the paper, save for the embedded model;
  * the gradient is clipped at norm 1 everywhere, in the authors' code at 0.5 for the web tasks;
  * a conversation that ends with a final action ends even if the environment forgets to say [END];
  * every step seeds its own dropout, so that an interrupted run ends with the same bits as an
    uninterrupted one;
  * the environment is opened by a user turn ("Start a new conversation."), since most chat formats
    cannot begin with the assistant.

Left out: configuration files, sweeps; one command is one adapter. Source: arXiv 2411.15927.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from copy import copy
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import safetensors
import torch

import forecast
import full
import lora
import runs
from arguments import parse_flags
from chat import Chat
from checkpoint import find_folder, fingerprint
from cover import cover_rules
from edit import begin_with
from evaluate import report
from files import UNSEEN, read_json, read_text
from flags import exit_code
from loss import joint_loss as joint_loss  # public names, for notebooks
from loss import token_nll as token_nll
from model import Llama, load_model, read_shape
from prompt import TASKS, Prompt, Task, parse_demos, parse_prompt
from runs import HERE
from sampler import Voice
from server import Server, connect
from show import show
from synth import Plan, distinct, print_quality, quality, synthesise
from talk import talk
from train import (
    Recipe,
    join_team,
    leave_team,
    team,
    train,
    training_sequences,
    wait_for_team,
)

# ---------------------------------------------------------------------------------------- the run


def internalise(args, finish: Callable | None = None) -> None:
    """Synthesise, train, save and report; what is in the run folder is not done again.

    finish: what is done at the end in place of the report (experiments/cells.py).
    """
    join_team(args.device)
    prompt = read_prompt(args)
    model, chat = open_base(args, base_folder(args))
    fit_turn(args, chat, prompt)
    check_rank(args, model)
    first = team()[0] == 0
    with made_records(args, prompt, model, chat) if first else nullcontext():
        wait_for_team()
        last = full.CONFIG if args.full else lora.CONFIG  # the last file that save writes
        if not (args.out / last).exists():
            train_adapter(args, prompt, model, chat)
            if first:
                save(args, model)
        leave_team()
        if first:
            (finish or report)(args.out, (model, chat), before=args.earlier)


def read_prompt(args) -> Prompt:
    return parse_prompt(read_text(args.prompt, "prompt"), str(args.prompt))


def base_folder(args) -> Path:
    """The folder of --model. It is noted in args.model_path, from which the run is opened later;
    the embedded model by its name, since the clone may move.
    """
    if args.model_path is None:
        folder = find_folder(args.model).resolve()
        args.model_path = "tiny" if folder == HERE / "tiny" else str(folder)
    return HERE / args.model_path


def open_base(args, model: str | Path) -> tuple[Llama, Chat]:
    return load_model(model, args.device, getattr(torch, args.dtype), args.bits)


@contextmanager
def made_records(args, prompt: Prompt, model: Llama, chat: Chat) -> Iterator[None]:
    """Make everything up to the last record of data.jsonl; the folder is held for the block."""
    task = open_task(args)
    given = read_inputs(args)
    voice = Voice(model, chat, args.slots)
    generator = open_generator(args, voice)
    known = known_of(args, prompt, chat)
    if args.earlier:
        runs.check_earlier(args.earlier, vars(args) | known)
    # all that can be wrong with the flags is known by now
    with runs.open_run(args, prompt, known):
        announce(args, chat, prompt)
        wanted = args.samples + args.held_out
        limits = args.max_new_tokens, args.max_reason_tokens
        kept = begin_with(args.earlier, args.out, voice, prompt) if args.earlier else frozenset()
        plan = Plan(prompt, task, wanted, *limits, args.seed, kept, given)
        records = synthesise(voice, generator, plan, args.out)
        print_quality(quality(records, task))
        if args.cover:
            both = runs.split_records(records, args.samples, args.held_out)
            cover_rules(voice, generator, plan, *both, args.cover, args.out)
        yield


def open_task(args) -> Task:
    """What is known of the prompt's kind, where no flag says otherwise."""
    demos = read_demos(args)
    said = {"environment": args.environment, "max_turns": args.max_turns, "demos": demos}
    return replace(TASKS[args.task], **said)


def read_demos(args) -> tuple[str, ...]:
    """The demonstrations of --demos, or those that come with the task (`any` has none)."""
    if args.task == "any" and not args.demos:
        return ()
    path = args.demos or HERE / "demos" / f"{args.task}.txt"
    return parse_demos(read_text(path, "demos"))


def read_inputs(args) -> tuple[str, ...]:
    """The distinct first messages of --inputs, none without it. Raises: ValueError for fewer than
    two.
    """
    if not args.inputs:
        return ()
    inputs = distinct(parse_demos(read_text(args.inputs, "inputs")))
    if len(inputs) < 2:
        told = f"{args.inputs}: {len(inputs)} distinct first message, but at least 2 are needed"
        raise ValueError(f"{told}, one to train on and one to hold out; add some to the file")
    return inputs


def known_of(args, prompt: Prompt, chat: Chat) -> dict:
    """What tells this run from another better than the names in its flags."""
    known = {
        "prompt_sha256": runs.text_hash(prompt.text),
        "model_sha256": fingerprint(base_folder(args)),
        "chat_format": chat.format,
        "demos_sha256": runs.text_hash(json.dumps(open_task(args).demos)),
        "inputs_sha256": args.inputs and runs.text_hash(json.dumps(read_inputs(args))),
    }
    if args.generator and "://" not in args.generator:
        known["generator_sha256"] = fingerprint(find_folder(args.generator))
    return known


def open_generator(args, voice: Voice) -> Voice | Server:
    """Who writes inputs and reasons: the model itself, another one, or a server.

    A server's model is args.generator_model, which is set here if no flag did: to what the run
    began with, so that it goes on with that, or else to the first that is served.
    """
    if not args.generator:
        return voice
    if "://" not in args.generator:
        return Voice(*open_base(args, args.generator), args.slots)
    path = args.out / "args.json"
    if args.generator_model is None and path.exists():
        args.generator_model = read_json(path, runs.ELSEWHERE).get("generator_model")
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    url = args.generator.rstrip("/")
    server = Server(url, args.generator_model or "", args.concurrency, args.timeout, key)
    server = connect(server)
    args.generator_model = server.model
    return server


def announce(args, chat: Chat, prompt: Prompt) -> None:
    """Say what is done with what, and what to expect of the embedded model."""
    tokens = len(chat.tokens(prompt.text))
    print(f"{args.prompt}: {tokens} tokens, task {args.task}; model {args.model}; run {args.out}")
    if args.inputs:
        print(f"{len(read_inputs(args))} distinct first messages of {args.inputs} are x")
    if args.generator:
        writer = f"{args.generator_model} at " if args.generator_model else ""
        what = "reasons" if args.inputs else "pseudo inputs and reasons"
        told = f"{what} are written by {writer}{args.generator}"
        print(told.translate(UNSEEN))  # a server says what its model is called
    if args.model_path == "tiny":
        alone = "" if args.task == "os" else " and nothing else: expect no sense of this prompt"
        print(
            "The embedded model is a stand-in of 3.0M parameters that obeys rules at a Linux shell"
            f"{alone}. For a real one give --model."
        )


def train_adapter(args, prompt: Prompt, model: Llama, chat: Chat) -> None:
    """Put an adapter on the model and train it on the records of the run folder."""
    records = runs.read_records(args.out / "data.jsonl")
    if not records:
        raise ValueError(f"{args.out}: no records; every process must see this folder")
    samples, _ = runs.split_records(records, args.samples, args.held_out)
    samples += runs.covering_records(args.out)
    sft, pg = training_sequences(chat, prompt, samples, args.lam, args.objective, args.pg_target)
    add_adapter(args, model)
    train(model, sft, pg, open_recipe(args), args.out)


def save(args, model: Llama) -> None:
    """Write the adapter into the run folder, or with --full the whole model."""
    base = base_folder(args)
    if args.full:
        lora.save_dense(model, args.out, base)
    else:
        embedded = args.model_path == "tiny"
        lora.save_adapter(model, args.out, base_model=str(base) if embedded else args.model)


def add_adapter(args, model: Llama) -> None:
    """Put a fresh adapter on the model, or the one that --from goes on with; or free all weights
    with --full.
    """
    model.checkpointing = args.checkpointing
    if args.full:
        return full.free_weights(model)
    torch.manual_seed(args.seed)  # A of every LoRA layer
    lora.add_lora(model, args.rank, args.alpha, args.dropout)
    if args.earlier:
        lora.load_adapter(model, args.earlier)


def check_rank(args, model: Llama) -> None:
    if not args.full:
        lora.check_rank(model, args.rank)


def open_recipe(args) -> Recipe:
    return Recipe(**{field.name: getattr(args, field.name) for field in fields(Recipe)})


def fit_turn(args, chat: Chat, prompt: Prompt) -> None:
    """Set the limit of a turn, if no flag does. Raises: ValueError if p leaves no room for it."""
    args.max_new_tokens = args.max_new_tokens or min(2048, chat.context // 4)
    tokens = len(chat.encode(prompt.teacher(""), reply=True)[0])
    room = chat.context - args.max_new_tokens
    limit = f"--max-new-tokens {args.max_new_tokens}"
    if room < 1:
        raise ValueError(f"{limit} fills the context of {chat.context}; lower it")
    if tokens >= room:
        raise ValueError(
            f"the prompt has {tokens} tokens, but the context of {chat.context} less {limit} "
            f"leaves {room}; shorten it or take a model with a longer context"
        )


# ----------------------------------------------------------------------------------------- --show


def show_record(args) -> None:
    """Print a record of the run that is named, or of the run that these flags go on with.

    If that has none yet, two are made in a folder of their own, which is then deleted.
    """
    if isinstance(args.show, Path):
        return show(args.show, args.record, args.model)
    prompt = read_prompt(args)
    _, chat = read_shape(base_folder(args))
    fit_turn(args, chat, prompt)
    if runs.has_records(args, known_of(args, prompt, chat)):
        return show(args.out, args.record)
    loaded = open_base(args, base_folder(args))
    with two_records(args, prompt, *loaded) as folder:
        show(folder, args.record)


@contextmanager
def two_records(args, prompt: Prompt, model: Llama, chat: Chat) -> Iterator[Path]:
    """Two records, the fewest that a run can have, in a run folder that is deleted again."""
    with TemporaryDirectory() as scratch:
        few = copy(args)
        few.out = Path(scratch) / args.out.resolve().name
        few.samples = 1
        few.held_out = 1
        few.cover = few.earlier = None
        # what is asked for is alone on stdout
        with redirect_stdout(sys.stderr), made_records(few, prompt, model, chat):
            pass  # they are made as the block begins
        yield few.out


def dry_run(args) -> None:
    """Print what the run would take; nothing of it is begun."""
    prompt = read_prompt(args)
    model, chat = open_base(args, base_folder(args))
    fit_turn(args, chat, prompt)
    check_rank(args, model)
    with two_records(args, prompt, model, chat) as folder:
        records = runs.read_records(folder / "data.jsonl")
    whole = [r for r in records if not (r.overlong or r.no_reason)]
    pairs = training_sequences(chat, prompt, whole, args.lam, args.objective, args.pg_target)
    voice = Voice(model, chat, args.slots)
    generator = open_generator(args, voice)
    add_adapter(args, model)
    wanted = args.samples + args.held_out
    given = range(min(wanted, len(read_inputs(args)) or wanted))
    counts = tuple(map(len, runs.split_records(given, args.samples, args.held_out)))
    print(forecast.dry_run(voice, generator, prompt, whole, pairs, open_recipe(args), counts))


# ------------------------------------------------------------------------------------- the command


def command(argv: list[str] | None) -> None:
    """Talk to a run, show a record of one, or make one and report on it."""
    args = parse_flags(argv)
    if args.chat:
        return talk(args.chat, args.device, args.model, args.dtype)
    try:
        if args.show:
            show_record(args)
        elif args.dry_run:
            dry_run(args)
        else:
            internalise(args)
    except BrokenPipeError:
        raise  # nobody reads on: no fault of the folder
    except (OSError, safetensors.SafetensorError) as error:
        told = f"{args.out}: {error}; free some space or choose another --out"
        raise ValueError(told) from None


def main(argv: list[str] | None = None) -> int:
    return exit_code(command, argv)


if __name__ == "__main__":
    sys.exit(main())
