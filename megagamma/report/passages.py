"""Real passages with every token coloured by what one model gains on another, numbers on hover."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np

from megagamma.dynamics.token_gains import Row
from megagamma.dynamics.token_losses import TokenLosses

_SPACE = "\u2581"
_STYLE = """
:root { --ink: #1b1f24; --ground: #fff; --line: #d0d7de; --ahead: 0, 114, 178; --behind: 213, 94, 0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --ground: #0d1117; --line: #30363d;
  --ahead: 86, 180, 233; --behind: 230, 130, 60; } }
body { font: 16px/1.7 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 900px; margin: 0 auto;
  padding: 1rem; overflow-wrap: anywhere; }
.passage { border-top: 1px solid var(--line); padding: .8rem 0; white-space: pre-wrap; }
.passage span { border-radius: 3px; } .wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; }
td, th { padding: .2rem .7rem; border-bottom: 1px solid var(--line); text-align: left; }
"""
_FULL = 2.0  # nats at which a colour is full


def _token(piece: str, gain: float, first: float, second: float) -> str:
    text = html.escape(piece.replace(_SPACE, " ").replace("<0x0A>", "\n"))
    if not np.isfinite(gain):
        return f"<span>{text}</span>"
    colour, strength = ("--ahead", gain) if gain > 0 else ("--behind", -gain)
    title = f"gain {gain:+.2f} nats: {first:.2f} to {second:.2f}"
    return f'<span title="{title}" style="background: rgba(var({colour}), {min(strength / _FULL, 1) * 0.6:.2f})">{text}</span>'


def page(
    baseline: TokenLosses,
    other: TokenLosses,
    names: tuple[str, str],
    pieces: Sequence[str],
    rows: Sequence[Row],
    passages: int = 8,
) -> str:
    """The page: the table of gains, and the passages in which most is gained or lost."""
    delta = baseline.full - other.full
    most = np.argsort(-np.nan_to_num(np.abs(delta)).sum(1))[:passages]
    texts = []
    for row in sorted(most.tolist()):
        tokens = "".join(
            _token(pieces[label], float(gain), float(first), float(second))
            for label, gain, first, second in zip(
                baseline.labels[row], delta[row], baseline.full[row], other.full[row], strict=True
            )
        )
        texts.append(f"<div class='passage'>{tokens}</div>")
    table = "".join(
        f"<tr><td>{html.escape(one.split)}</td><td>{html.escape(one.kind)}</td><td>{one.tokens:,}</td><td>{one.baseline:.3f}</td>"
        f"<td>{one.gain:+.4f}</td><td>{one.low:+.4f} to {one.high:+.4f}</td></tr>"
        for one in rows
    )
    first, second = map(html.escape, names)
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' content='width=device-width, "
        f"initial-scale=1'><title>{second} against {first}</title><style>{_STYLE}</style></head><body>"
        f"<h1>Which tokens {second} predicts better than {first}</h1>"
        f"<p>Blue: lower loss in {second}; orange: higher. A full colour is {_FULL:g} nats; numbers on hover. Intervals in the "
        "table are over sequences of this text, for these two models: another seed of training is not in them.</p>"
        f"<div class='wide'><table><tr><th>split</th><th>tokens that are</th><th>number</th><th>loss of {first}</th>"
        f"<th>gain, nats</th><th>95 % interval</th></tr>{table}</table></div>{''.join(texts)}</body></html>"
    )
