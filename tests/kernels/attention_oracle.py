"""Attention and its gradients, one query at a time, in float64 numpy, as the design says."""

import numpy as np


def attend(q, k, v, do, dlse, *, scale, causal, window, soft_cap, slopes, segments, positions):
    """Returns out, lse, dq, dk, dv. Segments and positions are (queries', keys') pairs or None."""
    q, k, v, do, dlse = (np.asarray(x, np.float64) for x in (q, k, v, do, dlse))
    (B, T, N, _), (_, S, K, _) = q.shape, k.shape
    if positions is None:
        offset = S - T if S > T else 0
        positions = np.tile(np.arange(T) + offset, (B, 1)), np.tile(np.arange(S), (B, 1))
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    lse = np.full((B, T, N), -np.inf)
    for b in range(B):
        for t in range(T):
            ahead = positions[1][b] - positions[0][b, t]
            keep = np.ones(S, bool)
            if causal:
                keep &= ahead <= 0
            if window > 0:
                keep &= -ahead < window
            if segments is not None:
                keep &= (segments[1][b] == segments[0][b, t]) & (segments[1][b] != 0)
            js = np.flatnonzero(keep)
            if len(js) == 0:
                continue
            for n in range(N):
                h = n // (N // K)
                score = scale * k[b, js, h] @ q[b, t, n]
                bend = np.ones(len(js))
                if soft_cap > 0:
                    bend = 1 - np.tanh(score / soft_cap) ** 2
                    score = soft_cap * np.tanh(score / soft_cap)
                if slopes is not None:
                    score = score + slopes[n] * ahead[js]
                lse[b, t, n] = score.max() + np.log(np.exp(score - score.max()).sum())
                share = np.exp(score - lse[b, t, n])
                out[b, t, n] = share @ v[b, js, h]
                dshare = v[b, js, h] @ do[b, t, n]
                draw = share * (dshare - share @ dshare + dlse[b, t, n]) * bend * scale
                dq[b, t, n] = draw @ k[b, js, h]
                dk[b, js, h] += np.outer(draw, q[b, t, n])
                dv[b, js, h] += np.outer(share, do[b, t, n])
    return out, lse, dq, dk, dv
