"""Checkpoints and tokenizers in llama2.c's formats with random contents, and its forward pass written out in NumPy."""

import struct
from pathlib import Path

import numpy as np

# dim 24, hidden 14, 2 layers, 6 query heads of width 4 over 2 key/value heads, 271 tokens, 19 positions
SIZES = (24, 14, 2, 6, 2, 271, 19)
LETTERS = ("a", "b", "c", " ", "n", "\n")
MERGES = (" a", "ab", "abc", "bc", " abc", "an")


def arrays(sizes: tuple[int, ...] = SIZES, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights in the order of the file; gains about 1. A negative vocabulary is one with an output table."""
    D, F, L, H, G, C, T = sizes
    K = D // H
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding": (abs(C), D),
        "attention_norm": (L, D),
        "wq": (L, D, D),
        "wk": (L, G * K, D),
        "wv": (L, G * K, D),
    }
    shapes |= {"wo": (L, D, D), "feed_forward_norm": (L, D), "w1": (L, F, D), "w2": (L, D, F), "w3": (L, F, D)}
    shapes |= {"final_norm": (D,)} | ({} if C > 0 else {"output": (-C, D)})
    drawn = {name: rng.normal(1.0 if "norm" in name else 0.0, 0.3, shape) for name, shape in shapes.items()}
    angles = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(0, K, 2) / K)[None, :]
    drawn |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    drawn |= {"output": drawn.pop("output")} if C < 0 else {}
    return {name: array.astype("<f4") for name, array in drawn.items()}


def checkpoint(path: Path, sizes: tuple[int, ...] = SIZES, seed: int = 0) -> Path:
    path.write_bytes(struct.pack("<7i", *sizes) + b"".join(a.tobytes() for a in arrays(sizes, seed).values()))
    return path


def tokenizer(path: Path, merges: tuple[str, ...] = MERGES) -> Path:
    """271 pieces: 3 names, 256 bytes, 6 letters, and as many merges, the first with the best score."""
    pieces = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % byte for byte in range(256))]
    pieces += [text.encode() for text in (*LETTERS, *merges)]
    scores = [0.0] * (259 + len(LETTERS)) + [-float(rank) for rank in range(len(merges))]
    lines = [struct.pack("<fi", score, len(piece)) + piece for score, piece in zip(scores, pieces, strict=True)]
    path.write_bytes(struct.pack("<i", max(map(len, pieces))) + b"".join(lines))
    return path


def forward(sizes: tuple[int, ...], w: dict[str, np.ndarray], tokens_T: np.ndarray) -> np.ndarray:
    """Logits [T, C] in float64 as llama2.c's run.c computes them: one query head and one position after the other."""
    D, _, L, H, G, _, _ = sizes
    K = D // H
    w = {name: array.astype(np.float64) for name, array in w.items()}

    def rms(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-5) * gain

    def turned(x: np.ndarray, position: int) -> np.ndarray:
        y = x.copy()
        for i in range(0, len(x), 2):
            angle = position / 10_000.0 ** ((i % K) / K)
            y[i] = x[i] * np.cos(angle) - x[i + 1] * np.sin(angle)
            y[i + 1] = x[i] * np.sin(angle) + x[i + 1] * np.cos(angle)
        return y

    x_TD = w["embedding"][tokens_T]
    for layer in range(L):
        y_TD = rms(x_TD, w["attention_norm"][layer])
        q = np.stack([turned(w["wq"][layer] @ y, t) for t, y in enumerate(y_TD)])
        k = np.stack([turned(w["wk"][layer] @ y, t) for t, y in enumerate(y_TD)])
        v = y_TD @ w["wv"][layer].T
        heads_TD = np.zeros_like(x_TD)
        for h in range(H):
            g = h // (H // G)
            for t in range(len(tokens_T)):
                scores = k[: t + 1, g * K : (g + 1) * K] @ q[t, h * K : (h + 1) * K] / np.sqrt(K)
                weights = np.exp(scores - scores.max())
                heads_TD[t, h * K : (h + 1) * K] = weights / weights.sum() @ v[: t + 1, g * K : (g + 1) * K]
        x_TD = x_TD + heads_TD @ w["wo"][layer].T
        y_TD = rms(x_TD, w["feed_forward_norm"][layer])
        inside = y_TD @ w["w1"][layer].T
        x_TD = x_TD + (inside / (1 + np.exp(-inside)) * (y_TD @ w["w3"][layer].T)) @ w["w2"][layer].T
    return rms(x_TD, w["final_norm"]) @ w.get("output", w["embedding"]).T
