"""Multiply-accumulates of a LLaMA, counted from its shape: no weights, no machine.

A pass over n new tokens behind s that are cached costs, in each of L layers,

    n (D (H + 2 K) hd + H hd D + 3 D F)     the seven linear maps
    2 H hd n (s + n)                        scores, and the sum of values that they weigh

and D V for each place whose logits are wanted. A MAC is two FLOPs. The n^2 scores of new tokens
are counted whole, masked ones too, as PyTorch's FlopCounterMode and its like do; rms, rope, softmax
and silu are not counted, as they do not either.

An adapter of rank R that is not merged adds R (inputs + outputs) to each linear map.

Letters: D width, F width of the MLP, H heads, K key/value heads, hd head width, L layers,
V vocabulary, R rank. Source: GenPI section 6 (MACs, FLOPs).
"""

from dataclasses import dataclass

from model import Config


def pass_macs(config: Config, new: int, cached: int, logits: int = 1, rank: int = 0) -> int:
    """Multiply-accumulates of one pass over `new` tokens behind `cached` ones."""
    shapes = linear_maps(config)
    linear = sum(inputs * outputs + rank * (inputs + outputs) for inputs, outputs in shapes)
    pairs = 2 * config.num_attention_heads * config.head_dim * (cached + new)
    head = config.hidden_size * config.vocab_size
    return new * config.num_hidden_layers * (linear + pairs) + logits * head


def linear_maps(config: Config) -> list[tuple[int, int]]:
    """(inputs, outputs) of q, k, v, o, gate, up and down."""
    D = config.hidden_size
    F = config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    return [(D, q), (D, kv), (D, kv), (q, D), (D, F), (D, F), (F, D)]


@dataclass(frozen=True)
class Talk:
    """A conversation of so many turns, in each of which `read` tokens arrive and `written` leave.

    cached_prompt: p lies in a cache already, filled for all conversations. cached_history: keys and
    values of earlier turns are kept, else all but a cached prompt is read again in every turn.
    """

    prompt: int  # tokens of p
    read: int
    written: int
    turns: int = 5
    cached_prompt: bool = False
    cached_history: bool = True

    def passes(self, turn: int) -> tuple[int, int]:
        """(new, cached) tokens of the pass that reads, in turn 0, 1, ..."""
        before = turn * (self.read + self.written)
        whole = self.prompt + before + self.read
        held = self.prompt if self.cached_prompt else 0
        if self.cached_history and turn:
            held = self.prompt + before
        return whole - held, held


def turn_macs(config: Config, talk: Talk, turn: int, rank: int = 0) -> int:
    """MACs of a turn: one pass that reads, then one for each token that is written.

    The last of these, the end of the turn, is fed too: the next turn needs its keys.
    """
    new, cached = talk.passes(turn)
    reading = pass_macs(config, new, cached, rank=rank)
    return reading + sum(
        pass_macs(config, 1, new + cached + i, rank=rank) for i in range(talk.written)
    )


def talk_macs(config: Config, talk: Talk, rank: int = 0) -> int:
    return sum(turn_macs(config, talk, turn, rank) for turn in range(talk.turns))
