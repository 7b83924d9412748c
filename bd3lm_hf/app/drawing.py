"""Frames as HTML: each revealed token coloured by when it was revealed and how probable it was then."""

import math
from collections.abc import Sequence
from html import escape
from typing import Any

import torch

from .frames import Frame
from .likelihood import Likelihood


# Hues of the first and the last forward of a block, in degrees.
FIRST_HUE, LAST_HUE = 265, 30
# Where the strength of colours begins.
LEAST_PROBABILITY = 1e-3
# A legend with more chips than this shows some of the forwards.
MOST_CHIPS = 8

STYLE = """
.bd3lm { --l: 0.82; --c: 0.13; color: var(--body-text-color); }
.dark .bd3lm { --l: 0.5; --c: 0.12; }
.bd3lm-bare .html-container { padding: 0 !important; }
.bd3lm-bare h1 { font-size: 24px; font-weight: 700; margin: 4px 0; }
.bd3lm-text {
  font-family: var(--font-mono); font-size: 15px; line-height: 1.9; white-space: pre-wrap; overflow-wrap: anywhere;
  min-height: 18em; padding: 14px 18px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-primary);
}
.bd3lm-text .given { color: var(--body-text-color-subdued); }
.bd3lm-text .block { border-bottom: 2px solid var(--body-text-color-subdued); padding-bottom: 3px; margin-right: 5px; }
.bd3lm .token { border-radius: 3px; padding: 2px 0; background: oklch(var(--l) var(--c) var(--h) / var(--a)); }
.bd3lm-text .now { box-shadow: 0 0 0 2px oklch(0.6 0.17 var(--h)); }
.bd3lm .masked {
  display: inline-block; width: 1.3em; height: 1.1em; margin: 0 1px; border-radius: 4px; vertical-align: text-bottom;
  background: repeating-linear-gradient(45deg, var(--border-color-primary) 0 2px, transparent 2px 5px);
  border: 1px solid var(--border-color-primary); box-sizing: border-box;
}
.bd3lm-text .newline::before { content: "\\21B5"; opacity: 0.45; }
.bd3lm-text .hint { color: var(--body-text-color-subdued); font-family: var(--font); }
.bd3lm-error {
  padding: 12px 16px; border-radius: 8px; border: 1px solid #dc2626; border-left-width: 6px;
  background: color-mix(in srgb, #dc2626 10%, transparent); overflow-wrap: anywhere;
}
.bd3lm-legend { display: flex; flex-wrap: wrap; gap: 6px 22px; font-size: 13px; }
.bd3lm-legend .chip { padding: 2px 7px; margin-left: 4px; }
.bd3lm-legend .block { border-bottom: 2px solid var(--body-text-color-subdued); padding-bottom: 2px; }
.bd3lm-figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(98px, 1fr)); gap: 8px; }
.bd3lm-figures > div {
  padding: 8px 10px; border: 1px solid var(--border-color-primary); border-radius: 8px;
  background: var(--background-fill-primary);
}
.bd3lm-figures .value { font-size: 18px; font-weight: 600; font-variant-numeric: tabular-nums; }
.bd3lm-figures .name, .bd3lm-note { font-size: 12px; color: var(--body-text-color-subdued); }
.bd3lm-note { margin-top: 8px; }
"""


def pieces_of(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """
    The text of each token behind those before it, which together are the text of all.

    A token that ends within a character has the empty text, and the one that completes the character has it whole.
    """
    pieces, start, read = [], 0, 0
    for index in range(len(tokens)):
        before, now = (_decode(tokens[start:end], tokenizer) for end in (read, index + 1))
        if now.endswith("\N{REPLACEMENT CHARACTER}") and index + 1 < len(tokens):
            pieces.append("")
            continue
        pieces.append(now[len(before) :])
        start, read = read, index + 1
    return pieces


def _decode(tokens: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def draw_text(
    frame: Frame, tokenizer: Any, *, mask_token_id: int, block_size: int, forwards_per_block: int, num_hidden: int = 0
) -> str:
    """
    A frame as HTML, in which nothing of the text is markup.

    Args:
        forwards_per_block: the number of forwards at which the scale of hues ends.
        num_hidden: tokens at the beginning that are not shown (BOS).
    """
    tokens, given, steps = frame.tokens.tolist(), frame.is_given.tolist(), frame.reveal_steps.tolist()
    probabilities = frame.probabilities.tolist()
    texts: dict[int, str] = {}
    for run in _runs([token != mask_token_id for token in tokens]):
        texts.update(zip(run, pieces_of([tokens[index] for index in run], tokenizer), strict=True))
    blocks, forwards = [], 0
    for start in range(0, len(tokens), block_size):
        parts, forwards_before = [], forwards
        for index in range(start, min(start + block_size, len(tokens))):
            forwards = max(forwards, steps[index])
            if index < num_hidden:
                continue
            if index not in texts:
                parts.append('<span class="masked"></span>')
            elif given[index]:
                parts.append(f'<span class="given">{_shown(texts[index])}</span>')
            else:
                forward, probability = steps[index] - forwards_before, probabilities[index]
                is_now = steps[index] == frame.num_forwards and not frame.is_last
                title = (
                    f"{texts[index]!r}: forward {forward} of its block, {steps[index]} of the text, "
                    f"probability {probability:.3g}"
                )
                parts.append(
                    f'<span class="token{" now" if is_now else ""}" title="{escape(title)}" '
                    f'style="{_colour(forward, forwards_per_block, probability)}">{_shown(texts[index])}</span>'
                )
        is_written = not all(given[start : start + block_size])
        blocks.append(f'<span class="block">{"".join(parts)}</span>' if is_written else "".join(parts))
    return f'<div class="bd3lm"><div class="bd3lm-text">{"".join(blocks)}</div></div>'


def draw_plain(parts: Sequence[tuple[str, bool]], mask_token: str) -> str:
    """Texts and whether each is given, as HTML: a server tells the text alone, and what of it is masked."""
    masked = '<span class="masked"></span>'
    drawn = []
    for text, is_given in parts:
        pieces = masked.join(_shown(piece) if piece else "" for piece in text.split(mask_token))
        drawn.append(f'<span class="{"given" if is_given else "block"}">{pieces}</span>' if pieces else "")
    return f'<div class="bd3lm"><div class="bd3lm-text">{"".join(drawn)}</div></div>'


def draw_cards(figures: dict[str, Any], note: str = "") -> str:
    """Figures by their names, as cards, and a note of HTML below."""
    cards = "".join(
        f'<div><div class="value">{value if value != "" else "&nbsp;"}</div><div class="name">{name}</div></div>'
        for name, value in figures.items()
    )
    return f'<div class="bd3lm"><div class="bd3lm-figures">{cards}</div>{note}</div>'


def _runs(flags: Sequence[bool]) -> list[list[int]]:
    """The indices of True, in runs of neighbours."""
    runs: list[list[int]] = []
    for index, flag in enumerate(flags):
        if flag:
            if index and flags[index - 1]:
                runs[-1].append(index)
            else:
                runs.append([index])
    return runs


def _shown(text: str) -> str:
    """A token's text as HTML, with its line ends to be seen; what has no text of its own is a dot."""
    return escape(text or "\N{MIDDLE DOT}").replace("\n", '<span class="newline"></span>\n')


def _colour(forward: int, forwards_per_block: int, probability: float) -> str:
    share = min((forward - 1) / max(forwards_per_block - 1, 1), 1)
    strength = 1 + math.log10(max(probability, LEAST_PROBABILITY)) / -math.log10(LEAST_PROBABILITY)
    return f"--h:{FIRST_HUE + share * (LAST_HUE - FIRST_HUE):.0f};--a:{0.15 + 0.85 * strength:.2f}"


def draw_legend(forwards_per_block: int) -> str:
    """What the colours say."""
    if forwards_per_block <= MOST_CHIPS:
        forwards = range(1, forwards_per_block + 1)
    else:
        forwards = torch.linspace(1, forwards_per_block, MOST_CHIPS).round().int().tolist()
    hues = "".join(_chip(str(forward), _colour(forward, forwards_per_block, 1)) for forward in forwards)
    strengths = "".join(_chip(f"{p:g}", _colour(1, 1, p)) for p in (LEAST_PROBABILITY, 0.01, 0.1, 1.0))
    return (
        '<div class="bd3lm bd3lm-legend">'
        f"<span>hue: revealed by the block's forward{hues}</span>"
        f"<span>strength: its probability then{strengths}</span>"
        '<span><span class="masked"></span> masked</span>'
        '<span><span class="block">&nbsp;&nbsp;&nbsp;</span> a block</span></div>'
    )


def _chip(text: str, style: str) -> str:
    return f'<span class="token chip" style="{style}">{text}</span>'


def draw_error(message: str) -> str:
    """A message in place of the text."""
    return f'<div class="bd3lm"><div class="bd3lm-error" role="alert">{escape(message)}</div></div>'


def draw_figures(frame: Frame, likelihood: Likelihood | None = None, *, mask_token_id: int, seed: int) -> str:
    """
    What a text cost so far, and how likely the model finds it.

    Args:
        likelihood: None as long as it is not known.
    """
    num_new = int((~frame.is_given & (frame.tokens != mask_token_id)).sum())
    figures = {
        "new tokens": num_new,
        "forwards": frame.num_forwards,
        "tokens/forward": f"{num_new / frame.num_forwards:.2f}" if frame.num_forwards else "",
        "tokens/s": f"{num_new / frame.seconds:.0f}" if frame.is_last else "",
        "perplexity": "" if likelihood is None else _perplexity(likelihood),
        "seed": seed,
    }
    note = ""
    if likelihood is not None:
        kind = "an upper bound, the NELBO of " if likelihood.is_bound else ""
        how = "over all masks of each block"
        if not likelihood.is_exact:
            how = f"± {likelihood.standard_error:.3f} over drawn masks"
        note = (
            '<div class="bd3lm-note">Perplexity of the new tokens under the model itself, given the others: '
            f"{kind}{likelihood.nelbo:.3f} nats per token, {how}.</div>"
        )
    return draw_cards(figures, note)


def _perplexity(likelihood: Likelihood) -> str:
    perplexity = f"{likelihood.perplexity:.1f}"
    if likelihood.is_exact:
        return perplexity
    return f"{perplexity} ± {likelihood.perplexity * likelihood.standard_error:.1f}"
