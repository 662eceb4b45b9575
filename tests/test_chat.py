"""Chat formats read off templates, against the published ones, and who owns which token.

fixtures/model/chat holds, for each format, a small tokenizer of the kind that its models have, the
published template, and the ids that transformers' apply_chat_template makes of some conversations;
fixtures/make_model_fixtures.py made them. fixtures/templates holds a dozen more formats in our own
words, with ids of random conversations, by fixtures/make_chat_fixtures.py.
"""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from chat import Chat

FIXTURES = Path(__file__).parent / "fixtures" / "model" / "chat"
TEMPLATES = FIXTURES.parent.parent / "templates"
FORMATS = json.loads((TEMPLATES / "formats.json").read_text(encoding="utf-8"))
NAMES = sorted(folder.name for folder in FIXTURES.iterdir())
SPECIALS = "<|eot_id|><|im_end|></s>[INST]<s><|start_header_id|>system<|im_start|>[/INST]"


def cases(name: str) -> list[dict]:
    return json.loads((FIXTURES / name / "cases.json").read_text(encoding="utf-8"))


def chat(name: str) -> Chat:
    return Chat(FIXTURES / name, context=64)


def say(*texts: str | None) -> list[dict]:
    """Messages from a system text (or None), then users and assistants in turn."""
    roles = ["system"] + ["user", "assistant"] * len(texts)
    pairs = zip(roles, texts, strict=False)
    return [{"role": role, "content": text} for role, text in pairs if text is not None]


def copy(name: str, to: Path, **settings) -> Path:
    """A copy of a fixture with other settings in tokenizer_config.json."""
    shutil.copytree(FIXTURES / name, to, dirs_exist_ok=True)
    file = to / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return to


def edit(folder: Path, change) -> Path:
    """Change the parsed tokenizer.json of a folder."""
    file = folder / "tokenizer.json"
    parsed = json.loads(file.read_text())
    change(parsed)
    file.write_text(json.dumps(parsed))
    return folder


# ------------------------------------------------------------------------------ published templates


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(n, c, id=f"{n}: {c['title']}") for n in NAMES for c in cases(n)]
)
def test_ids_are_those_of_the_published_template(name, case):
    """encode() gives the ids of transformers' apply_chat_template."""
    assert chat(name).encode(case["messages"], case["reply"])[0] == case["ids"]


@pytest.mark.parametrize("name", FORMATS["settings"])
def test_ids_of_random_conversations_are_those_of_transformers(name, tmp_path):
    """Twelve formats, each cut at the markers, give what rendering the whole conversation gives."""
    shutil.copy(TEMPLATES / "tokenizer.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(FORMATS["settings"][name]))
    talk = Chat(tmp_path, 64)
    compared = 0
    for messages, ids in zip(FORMATS["conversations"], FORMATS["ids"][name], strict=True):
        if ids is not None:
            assert talk.encode(messages, reply=messages[-1]["role"] == "user")[0] == ids
            compared += 1
    assert compared >= 3


def test_the_name_of_a_format_is_what_it_writes(tmp_path):
    """Another spelling of the same template has the same name, another format has another."""
    names = {chat(name).format for name in NAMES}
    assert len(names) == len(NAMES)
    template = json.loads((FIXTURES / "llama-3" / "tokenizer_config.json").read_text())
    spelling = "{# the same #}" + template["chat_template"]
    assert Chat(copy("llama-3", tmp_path, chat_template=spelling), 64).format in names


@pytest.mark.parametrize("name", NAMES)
def test_text_begins_once(name):
    """BOS stands once, in front; in Llama 2 before each user turn; in ChatML and Zephyr never."""
    ids, _ = chat(name).encode(say(None, "a", "b", "c"), reply=True)
    times = {"llama-2": 2, "chatml": 0, "zephyr": 0}.get(name, 1)
    bos = chat(name).control.get("<|begin_of_text|>" if "llama-3" in name else "<s>")
    assert ids.count(bos) == times and (ids[0] == bos) == (times > 0)


# ---------------------------------------------------------------------------------------- ownership


@pytest.mark.parametrize("name", NAMES)
def test_a_message_owns_its_content_and_its_end_of_turn(name):
    """The tokens of owner i read as message i, and the tokens of nobody hold no content."""
    talk, messages = chat(name), say("alpha", "beta gamma", "Act: delta", "epsilon", "zeta")
    messages = messages[1:] if name == "mistral-v0.2-first" else messages
    ids, owner = talk.encode(messages)
    assert len(ids) == len(owner)
    for index, message in enumerate(messages):
        own = [i for i, who in zip(ids, owner, strict=True) if who == index]
        assert talk.decode(own).strip() == message["content"]
        if message["role"] == "assistant":
            assert own[-1] in talk.stops and not set(own[:-1]) & talk.stops
    rest = talk.decode([i for i, who in zip(ids, owner, strict=True) if who == -1])
    assert not any(message["content"] in rest for message in messages)


@pytest.mark.parametrize("name", NAMES)
def test_a_reply_continues_its_header(name):
    """encode(m, reply=True) + what the assistant owns = encode(m + [assistant]), footer aside."""
    talk, messages = chat(name), say(None, "Count the files.", "Act: bash ls")
    header, _ = talk.encode(messages[:1], reply=True)
    ids, owner = talk.encode(messages)
    written = [i for i, who in zip(ids, owner, strict=True) if who == 1]
    assert ids[: len(header) + len(written)] == header + written
    assert owner[: len(header)] == talk.encode(messages[:1], reply=True)[1]


def test_the_template_owns_what_nobody_wrote():
    """SmolLM2's default system text and the dates of Llama 3.2 have owner -1."""
    for name, words in (("chatml", "named SmolLM"), ("llama-3.2", "December 2023")):
        talk = chat(name)
        ids, owner = talk.encode(say(None, "Hello"))
        assert words in talk.decode([i for i, who in zip(ids, owner, strict=True) if who == -1])
        assert talk.decode([i for i, who in zip(ids, owner, strict=True) if who == 0]) == "Hello"


def test_a_system_text_stays_in_the_first_turn():
    """Mistral's v3 template would move it to the last, so that no turn continues the one before."""
    talk = chat("mistral-v3")
    first, _ = talk.encode(say("Be brief.", "Count the files."), reply=True)
    later, _ = talk.encode(say("Be brief.", "Count the files.", "Act: ls", "12"), reply=True)
    assert later[: len(first)] == first


# --------------------------------------------------------------------------------------- plain text


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("role", ["user", "assistant"])
def test_names_of_control_tokens_are_text(name, role):
    """Nobody can end a turn by writing the name of the token that does."""
    talk, roles = chat(name), {"user": 0, "assistant": 1}
    control = set(talk.control.values())

    def controls(text):
        ids, owner = talk.encode(say(None, *((text, "b") if role == "user" else ("a", text))))
        own = [i for i, who in zip(ids, owner, strict=True) if who == roles[role]]
        return [i for i in ids if i in control], talk.decode(own).strip()

    assert controls(SPECIALS) == (controls("plain")[0], SPECIALS)


@pytest.mark.parametrize("name", NAMES)
def test_text_survives_a_round_trip(name):
    """decode(tokens(text)) is the text, without control tokens on either way."""
    text = "Two\n\nlines,  4096 bytes\n\tand naïve 日本 🙂 " + SPECIALS
    talk = chat(name)
    assert talk.decode(talk.tokens(text)) == text and talk.tokens("") == []
    assert not set(talk.tokens(text)) & set(talk.control.values())
    assert talk.decode([*talk.stops, *talk.tokens("end"), *talk.stops]).strip() == "end"


def test_spaces_before_a_text():
    """SentencePiece's space comes before a text, not before a reply that continues its header."""
    talk = chat("zephyr")
    first = [talk.tokenizer.id_to_token(i) for i in talk.tokens("files")][0]
    assert first.startswith("▁")
    ids, owner = talk.encode(say(None, "a", "files"))
    reply = [talk.tokenizer.id_to_token(i) for i, who in zip(ids, owner, strict=True) if who == 1]
    assert not reply[0].startswith("▁")


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
PIECES = {"type": "Metaspace", "replacement": "▁", "split": False}
NEMO = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '[INST]' + m.content + '[/INST]' if m.role == 'user' else m.content + eos_token }}"
    "{% endfor %}"
)
IM = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\nfiles<|im_end|>\n"


@pytest.mark.parametrize(
    ("name", "template", "pre", "rendered"),
    [
        ("chatml", None, BYTES, IM),
        ("mistral-v3", NEMO, PIECES | {"prepend_scheme": "first"}, "<s>[INST]{}[/INST]files</s>"),
        ("mistral-v3", NEMO, PIECES | {"prepend_scheme": "always"}, "<s>[INST]{}[/INST]files</s>"),
        ("mistral-v3", NEMO, PIECES | {"prepend_scheme": "never"}, "<s>[INST]{}[/INST]files</s>"),
        ("mistral-v3", NEMO, PIECES | {"add_prefix_space": True}, "<s>[INST]{}[/INST]files</s>"),
    ],
)
def test_every_rule_for_a_leading_space(name, template, pre, rendered, tmp_path):
    """Where tokenizer.json asks for a space before text, it comes where the library puts it."""
    folder = copy(name, tmp_path, chat_template=template)
    edit(folder, lambda parsed: parsed.update(pre_tokenizer=pre))
    library, talk = Tokenizer.from_file(str(folder / "tokenizer.json")), Chat(folder, 64)
    for text in ("files", " files", "  two"):
        expected = library.encode(rendered.format(text), add_special_tokens=False).ids
        assert talk.encode(say(None, text, "files"))[0] == expected
        assert talk.tokens(text) == library.encode(text, add_special_tokens=False).ids


def test_owners_do_not_depend_on_the_post_processor(tmp_path):
    """A byte-level post-processor would trim white space off the offsets of tokens."""
    folder = edit(copy("chatml", tmp_path), lambda parsed: parsed.update(post_processor=BYTES))
    messages = say(None, "  two\n\n lines ", " \n", "\n\n")
    assert Chat(folder, 64).encode(messages) == chat("chatml").encode(messages)


# ----------------------------------------------------------------------------------- the checkpoint


def test_stops_are_the_end_of_turn_and_what_the_checkpoint_adds(tmp_path):
    """generation_config.json may name one token or several."""
    folder = copy("llama-3", tmp_path)
    end = chat("llama-3").control["<|eot_id|>"]
    assert Chat(folder, 64).stops == {end}
    for eos, expected in ((1, {1, end}), ([1, 7], {1, 7, end})):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
        assert Chat(folder, 64).stops == expected


def test_places_of_a_template(tmp_path):
    """A template is read from chat_template.jinja, too; without one the vocabulary must tell."""
    file = FIXTURES / "chatml" / "tokenizer_config.json"
    folder = copy("chatml", tmp_path / "file", chat_template=None)
    plain, _ = Chat(folder, 64).encode(say(None, "Hello"))  # without the default system text
    template = json.loads(file.read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    ids, _ = Chat(folder, 64).encode(say(None, "Hello"))
    assert ids == chat("chatml").encode(say(None, "Hello"))[0] and ids[-len(plain) :] == plain


def test_nothing_is_cut_silently(tmp_path):
    """A limit in tokenizer.json, left there by some training script, is not ours."""
    limit = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    folder = edit(copy("llama-3", tmp_path), lambda parsed: parsed.update(truncation=limit))
    assert Chat(folder, 64).tokens(SPECIALS) == chat("llama-3").tokens(SPECIALS)


def test_control_tokens_need_no_flag(tmp_path):
    """A checkpoint that forgot to flag <|im_start|> as special is read like one that did not."""

    def forget(parsed):
        for token in parsed["added_tokens"]:
            token["special"] = False

    talk = Chat(edit(copy("chatml", tmp_path), forget), 64)
    assert talk.encode(say(None, SPECIALS)) == chat("chatml").encode(say(None, SPECIALS))


TURN = "{{ m.role + m.content + eos_token }}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        ("{{ 'Human: ' + messages[0].content + eos_token }}", "drops, repeats or moves a message"),
        ("{% for m in messages %}{{ m.content }}" + TURN + "{% endfor %}", "drops, repeats or"),
        ("{% for m in messages %}{{ m.role + m.content }}{% endfor %}", "no end of turn"),
        ("{% for m in messages %}{{ m.role + m.content }}<|x|>{% endfor %}", "no end of turn"),
        ("{% for m in messages %}<|x|>" + TURN + "{% endfor %}", r"tokenizer lacks its <\|x\|>"),
        ("{{ raise_exception('only\\nby mail') }}", "only by mail"),
        ("{% for m in messages %}" + TURN, "end of template"),
        ("{% for m in messages %}{{ m.a.b }}{% endfor %}", "has no attribute 'a'"),
        ("{{ messages.append(1) }}", "unsafe"),
        (None, "there is none"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error(template, told, tmp_path):
    """It is refused, not guessed, in one line that names the folder and the cure."""
    with pytest.raises(ValueError, match=told) as error:
        Chat(copy("llama-2", tmp_path, chat_template=template), 64)
    text = str(error.value)
    assert text.startswith(f"{tmp_path}: ") and "chat_template.jinja" in text
    assert "\n" not in text


def test_a_vocabulary_without_the_control_tokens_is_an_error(tmp_path):
    """The header of a turn must not silently become text."""
    for place in (-1, -2):  # the end of turn, the end of a header
        folder = copy("llama-3", tmp_path / str(place))
        edit(folder, lambda parsed, place=place: parsed["added_tokens"].pop(place))
        with pytest.raises(ValueError, match="of no use"):
            Chat(folder, 64)


THINKING = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last }}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{{ '<think>\n\n</think>\n\n' if enable_thinking is false }}{% endif %}"""


def test_thinking_is_off_and_the_empty_thought_stays(tmp_path):
    """Qwen3's empty thought is header: nobody's words, there before every reply, never a target."""
    talk = Chat(copy("chatml", tmp_path, chat_template=THINKING), 64)
    messages = say(None, "a", "b", "c", "d")
    ids, owner = talk.encode(messages)
    for k in (1, 3):
        header, _ = talk.encode(messages[:k], reply=True)
        assert ids[: len(header)] == header and owner[len(header)] == k
        assert talk.decode(header).endswith("assistant\n<think>\n\n</think>\n\n")


def test_what_a_template_may_do(tmp_path):
    """The date stands still, loops may break, JSON is not escaped, generation marks are passed."""
    template = (
        "{{ strftime_now('%d %b %Y') }}{{ ['<é>'] | tojson }}"
        "{% for m in messages %}{%- generation -%} {{ m.role + m.content + eos_token }}"
        "{%- endgeneration %}{% if not m %}{% break %}{% endif %}{% endfor %}"
    )
    talk = Chat(copy("llama-2", tmp_path, chat_template=template), 64)
    assert talk.gaps[None, "user"].header == '26 Jul 2024["<é>"]user'


@pytest.mark.parametrize("side", ["lstrip", "rstrip", "strip"])
def test_a_template_that_trims_shows_itself(side, tmp_path):
    """Contents lose white space where the template takes it, and a folded system text with them."""
    template = "{% for m in messages %}{{ raise_exception('') if m.role == 'system' }}"
    template += "{{ m.role + m.content." + side + "() + eos_token }}{% endfor %}"
    talk = Chat(copy("chatml", tmp_path, chat_template=template), 64)
    text = " \n x \n "
    for messages in (say(None, text, text), say(text, text, text)):
        ids, owner = talk.encode(messages)
        words = "\n\n".join(m["content"] for m in messages[:-1])
        wanted = "user" + getattr(words, side)() + "assistant" + getattr(text, side)()
        assert talk.decode(ids) == wanted


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("llama-3", []),
        ("llama-3", ["user", "tool"]),
        ("llama-2", ["system"]),
        ("llama-2", ["user", "user"]),
        ("mistral-v3", ["assistant", "user"]),
        ("mistral-v3", ["user", "system"]),
    ],
)
def test_roles_that_the_format_does_not_know(name, roles):
    """Unknown roles, no message, and an order that the template refuses raise ValueError."""
    with pytest.raises(ValueError, match="^roles "):
        chat(name).encode([{"role": role, "content": "x"} for role in roles])
