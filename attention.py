"""Attention: what it is, and ways to compute it that hold less or read less.

    attention(q, k, v) = softmax(q k^T / sqrt(hd) + causal mask) v

    causal_attention    of a text from its start: no (T, T) scores are kept
    prefix_attention    of new tokens behind a prefix that all rows share: stored, and read, once

Letters: B rows, T queries, H heads, K key/value heads, G = H / K, hd head width, S keys in sight,
P tokens of the shared prefix. Source: LLaMA (arXiv 2302.13971), GQA (2305.13245), FlashAttention
(2205.14135), and for the shared prefix Hydragen (2402.05099).
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from linear import onednn, onednn_is_faster

CHUNK = 192  # queries to a key head whose scores are held at a time
LEAST = 1 << 18  # numbers of q from which chunks pay
MANY_QUERIES = 64  # a row; at 32 both ways of prefix_attention take the same time


def attention_by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(hd) + causal mask) v, where the T queries are the last of S tokens.

    q (B, H, T, hd), k and v (B, K, S, hd) -> (B, H, T, hd); each key head serves G query heads.
    """
    H, T, hd = q.shape[1:]
    K, S = k.shape[1:3]
    keys = k.repeat_interleave(H // K, dim=1)  # (B, H, S, hd)
    values = v.repeat_interleave(H // K, dim=1)
    place = torch.arange(S, device=q.device)
    ahead = place > place[S - T :, None]  # (T, S), where a key comes after its query
    scores = (q @ keys.transpose(2, 3) * hd**-0.5).masked_fill(ahead, -torch.inf)
    return scores.softmax(-1) @ values


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Same as attention_by_definition with S = T, without the (T, T) scores.

    By PyTorch's fused kernel, but in chunks on a CPU where oneDNN multiplies float32 faster.
    """
    large = q.numel() >= LEAST and q.dtype != torch.float64
    if large and q.device.type == "cpu" and onednn_is_faster():
        return Chunked.apply(q, k, v)
    grouped = q.size(1) != k.size(1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class Chunked(torch.autograd.Function):
    """Same as attention_by_definition with S = T, some queries at a time and in float32.

    The scores of a chunk stay in the processor's cache. They are not kept, but computed again in
    the backward pass, from p = softmax(q k^T / sqrt(hd)) and y = p v:

        dv = p^T dy        ds = p * (dy v^T - sum_hd(dy * y))        dq = ds k / sqrt(hd)
                                                                     dk = ds^T q / sqrt(hd)

    Two cores with AVX-512 take 0.5 to 0.6 of the fused kernel's time for 3 query heads to a key
    head, and for one query head to each nearly all of it (float32, tests/BENCH.md). A second
    derivative, to which what is kept of q, k, v and y would be constants, is refused. Inside, N =
    B K, and the G heads of one key head are G times as many queries to the same keys.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, K, T, hd = k.shape
        ctx.shape = q.shape
        ctx.dtype = q.dtype
        q = (q.float() * hd**-0.5).reshape(B * K, -1, T, hd)  # (N, G, T, hd)
        k = k.float().reshape(B * K, T, hd)
        v = v.float().reshape(B * K, T, hd)
        y = torch.empty_like(q)
        with onednn():
            for now in chunks(q):
                p = chunk_weights(q, k, now)
                y[:, :, now] = (p @ v[:, : now.stop]).view_as(y[:, :, now])
        ctx.save_for_backward(q, k, v, y)
        return y.view(ctx.shape).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, y = ctx.saved_tensors
        hd = q.size(-1)
        dy = dy.float().reshape(y.shape)
        sums = (dy * y).sum(-1, keepdim=True)  # (N, G, T, 1)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        with onednn():
            for now in chunks(q):
                seen = slice(0, now.stop)
                p = chunk_weights(q, k, now)
                own = dy[:, :, now].flatten(1, 2)  # (N, G c, hd)
                dv[:, seen].baddbmm_(p.transpose(1, 2), own)
                ds = own @ v[:, seen].transpose(1, 2)  # (N, G c, S)
                ds.sub_(sums[:, :, now].flatten(1, 2)).mul_(p)
                dq[:, :, now] = (ds @ k[:, seen]).view_as(dq[:, :, now])
                dk[:, seen].baddbmm_(ds.transpose(1, 2), q[:, :, now].flatten(1, 2))
        dq *= hd**-0.5
        return tuple(d.view(ctx.shape[0], -1, *ctx.shape[2:]).to(ctx.dtype) for d in (dq, dk, dv))


def chunks(q: Tensor) -> list[slice]:
    """Cut the T queries of q (N, G, T, hd) into parts that are CHUNK to each key head."""
    G, T = q.shape[1:3]
    c = max(1, CHUNK // G)
    return [slice(first, first + c) for first in range(0, T, c)]


def chunk_weights(q: Tensor, k: Tensor, now: slice) -> Tensor:
    """softmax(q k^T + causal mask) of a chunk of queries: (N, G, T, hd), (N, T, hd) -> (N, G c, S).

    The S keys in sight are those up to the chunk's last, and only among its own some are ahead.
    """
    queries = q[:, :, now]
    scores = queries.flatten(1, 2) @ k[:, : now.stop].transpose(1, 2)
    c = queries.size(2)
    ahead = torch.full((c, c), -torch.inf).triu_(1)
    scores.unflatten(1, (-1, c))[..., now.start :] += ahead
    return scores.softmax(-1)


def prefix_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, prefix_k: Tensor, prefix_v: Tensor
) -> Tensor:
    """q (B, K, Q, hd) over a shared prefix (K, P, hd) and, under the mask, own k, v (B, K, S, hd).

    Same as attention_by_definition over prefix and own keys, without a copy of the prefix a row.
    The scores on the prefix are ONE product a key head, (B*Q, hd) @ (hd, P), with the batch folded
    into the queries. Row by row it would be B thin products that each read the P keys again, and
    reading keys is what generation waits for. One softmax over both parts makes it plain attention.

    Many queries go to a joined copy of the keys: PyTorch's fused kernel then holds no scores (2.6
    times faster for a row of 370, 3.5 times for 16 of 128; P = 1,285, two CPU cores).
    """
    P = prefix_k.size(1)
    if q.size(2) >= MANY_QUERIES:
        keys = torch.cat((prefix_k.expand(k.size(0), -1, -1, -1), k), 2)
        values = torch.cat((prefix_v.expand(v.size(0), -1, -1, -1), v), 2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=F.pad(mask, (P, 0)))
    q = q * q.size(-1) ** -0.5
    on_prefix = torch.einsum("bkqd,kpd->bkqp", q, prefix_k)
    on_own = q @ k.transpose(2, 3) + mask  # (B, K, Q, S)
    weights = torch.cat((on_prefix, on_own), -1).softmax(-1)
    from_prefix = torch.einsum("bkqp,kpd->bkqd", weights[..., :P], prefix_v)
    return from_prefix + weights[..., P:] @ v
