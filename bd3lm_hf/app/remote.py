"""The page before a server: what visitors type is asked of its API, for several of them at once."""

import functools
import json
import time
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import gradio as gr
import httpx

from .drawing import draw_cards, draw_error, draw_plain
from .page import HINT, MOST_WAITING, buttons, choices_of, gap_inputs
from .patience import waiting_for_reader
from .writing import GAP, LIMITS, MOST_CHARACTERS, MOST_GAPS, MOST_TOKENS, Shown, check_at_most, options_of


# Visitors who are written for at once; the server has a queue of its own.
MOST_AT_ONCE = 32
# Seconds to connect, and those between two parts of an answer, of which one may wait for a slot.
CONNECTING, BETWEEN = 10.0, 600.0
# What a server does not tell.
NOTE = (
    '<div class="bd3lm-note">Colours by forward and probability, and perplexity, need the model itself: '
    "<code>bd3lm app MODEL</code>.</div>"
)
# Choices of the page that the API takes among its own fields.
OWN_FIELDS = ("temperature", "top_p", "seed")


class Client:
    """
    Asks a server of OpenAI's API.

    Args:
        url: where it is, with or without the `/v1` at the end.
        api_key: that it asks for.
        model: a name of one of its models; None is its first.

    Raises:
        ValueError: it does not answer, or not as a server of this package does; it has no such model.
    """

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None):
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(BETWEEN, connect=CONNECTING)
        limits = httpx.Limits(max_connections=2 * MOST_AT_ONCE)
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=timeout, limits=limits)
        cards = self._answer("GET", "/v1/models").get("data") or []
        found = [card for card in cards if model in (None, card["id"])]
        if not found:
            names = ", ".join(repr(card["id"]) for card in cards)
            raise ValueError(f"`model` must be one of {names or 'none'} at {self.url}, but got {model!r}.")
        self.card = found[0]
        if "block_size" not in self.card:
            raise ValueError(f"`server` must be one of `bd3lm serve`, but {self.url} is another one.")

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, in one piece; raises a ValueError with what the server says is wrong."""
        return self._answer("POST", path, {"model": self.card["id"], **body})

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The chunks of an answer; raises as [`ask`]. Closing it ends the request."""
        streamed = {"stream": True, "stream_options": {"include_usage": True}, "model": self.card["id"], **body}
        try:
            with self._http.stream("POST", path, json=streamed) as answer:
                if answer.is_error:
                    answer.read()
                    raise ValueError(_message_of(answer))
                for line in answer.iter_lines():
                    data = line.removeprefix("data: ")
                    if not data or data == "[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        raise ValueError(chunk["error"]["message"])
                    yield chunk
        except httpx.HTTPError as error:
            raise ValueError(self._unreachable(error)) from error

    def _answer(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, json=body)
            if answer.is_error:
                raise ValueError(_message_of(answer))
            return answer.json()
        except json.JSONDecodeError as error:
            raise ValueError(f"`server` must be one of OpenAI's API, but {self.url} is none.") from error
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ValueError(self._unreachable(error)) from error

    def _unreachable(self, error: Exception) -> str:
        return f"The server at {self.url} does not answer: {str(error) or type(error).__name__}."


def _message_of(answer: httpx.Response) -> str:
    try:
        return answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return f"The server answers with the status {answer.status_code}."


class RemoteWriter:
    """
    Writes for visitors by asking a server; the methods take and yield what those of `Writer` do.

    Args:
        client: asks the server.
    """

    def __init__(self, client: Client):
        self.client = client
        # A text never holds this character, if the server has no name for a mask.
        self.mask_token = client.card.get("mask_token") or "\0"

    def write(self, prompt: str, max_new_tokens: int, *choices: Any) -> Iterator[Shown]:
        """Continues a prompt."""
        yield from _with_errors(self._write, prompt, max_new_tokens, *choices)

    def _write(self, prompt: str, max_new_tokens: int, *choices: Any) -> Iterator[Shown]:
        check_at_most(MOST_CHARACTERS, "characters", prompt=len(prompt or ""))
        check_at_most(MOST_TOKENS, "tokens", max_new_tokens=int(max_new_tokens))
        *chosen, pause = choices
        body = {"prompt": prompt or "", "max_tokens": int(max_new_tokens), **_body_of(chosen, stream_drafts=True)}
        for text, figures in self._steps("/v1/completions", body, pause):
            yield draw_plain([(prompt or "", True), (text, False)], self.mask_token), "", figures

    def chat(self, question: str, max_new_tokens: int, turns: list[dict[str, Any]], *choices: Any) -> Iterator[tuple]:
        """Answers the next question of a chat, the `turns` so far; yields the turns and the figures."""
        turns = [{"role": turn["role"], "content": _text_of(turn["content"])} for turn in turns or []]
        asked = [*turns, {"role": "user", "content": question or ""}]
        try:
            check_at_most(MOST_CHARACTERS, "characters", chat=sum(len(turn["content"]) for turn in asked))
            check_at_most(MOST_TOKENS, "tokens", max_new_tokens=int(max_new_tokens))
            *chosen, pause = choices
            body = {"messages": asked, "max_tokens": int(max_new_tokens), **_body_of(chosen, stream_drafts=True)}
            for text, figures in self._steps("/v1/chat/completions", body, pause):
                shown = text.replace(self.mask_token, "\N{LIGHT SHADE}")
                yield [*asked, {"role": "assistant", "content": shown}], figures
        except ValueError as error:
            yield turns, draw_error(str(error))

    def fill(self, text: str, gap_length: int, *choices: Any) -> Iterator[Shown]:
        """Fills the gaps of a text, all in one step."""
        yield from _with_errors(self._fill, text, gap_length, *choices)

    def _fill(self, text: str, gap_length: int, *choices: Any) -> Iterator[Shown]:
        text = text or ""
        check_at_most(MOST_CHARACTERS, "characters", text=len(text))
        marks = {} if self.mask_token in text else {"placeholder": GAP, "gap_length": int(gap_length)}
        check_at_most(MOST_GAPS, "gaps", text=text.count(GAP) if marks else text.count(self.mask_token))
        *chosen, _ = choices
        began, body = time.monotonic(), _body_of(chosen)
        answer = self.client.ask("/v1/infill", {"text": text, **marks, **body})
        (choice,) = answer["choices"]
        parts, end = [], 0
        for span in choice["block_diffusion"]["spans"]:
            parts += [
                (choice["text"][end : span["start"]], True),
                (choice["text"][span["start"] : span["end"]], False),
            ]
            end = span["end"]
        parts.append((choice["text"][end:], True))
        yield draw_plain(parts, self.mask_token), "", _figures(answer["usage"], body["seed"], began)

    def _steps(self, path: str, body: dict[str, Any], pause: float) -> Iterator[tuple[str, str]]:
        """The new text after each step, masked tokens included, and the figures."""
        text, draft, usage = "", "", {}
        began = due = time.monotonic()
        for chunk in self.client.stream(path, body):
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
                draft = choice.get("block_diffusion", {}).get("draft", text if choice["finish_reason"] else draft)
            time.sleep(max(due - time.monotonic(), 0))
            due = time.monotonic() + pause
            yield draft or text, _figures(usage, body["seed"], began)


def _with_errors(steps: Callable[..., Iterator[Shown]], *arguments: Any) -> Iterator[Shown]:
    try:
        yield from steps(*arguments)
    except ValueError as error:
        yield draw_error(str(error)), "", ""


def _body_of(chosen: list[Any], **extensions: Any) -> dict[str, Any]:
    """The fields of a request that the page's choices mean."""
    options = options_of(*chosen)
    if options.pop("do_sample", True) is False:
        options["temperature"] = 0
    own = {name: options.pop(name) for name in OWN_FIELDS if name in options}
    named = {name: value for name, value in options.items() if value is not None}
    return {**own, "block_diffusion": {**named, **extensions}}


def _text_of(content: Any) -> str:
    """The text of a turn as gradio gives it back, in parts or in one piece."""
    if isinstance(content, list):
        return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)
    return str(content)


def _figures(usage: dict[str, Any], seed: int, began: float) -> str:
    num_tokens = usage.get("completion_tokens", "")
    seconds = time.monotonic() - began
    figures = {
        "new tokens": num_tokens,
        "forwards": usage.get("forwards", ""),
        "tokens/forward": f"{usage['tokens_per_forward']:.2f}" if usage else "",
        "tokens/s": f"{num_tokens / seconds:.0f}" if usage else "",
        "seed": seed,
    }
    return draw_cards(figures, NOTE if usage else "")


def make_server_page(client: Client) -> gr.Blocks:
    """A page on which the model of a server writes, for many visitors at once. `launch` it with `launch_options()`."""
    writer, card = RemoteWriter(client), client.card
    longest = min(max(card["max_model_len"] - 1, 2), MOST_TOKENS // 2)
    with gr.Blocks(title=f"{card['id']}: block diffusion", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f"<h1>{escape(card['id'])}</h1>A block diffusion language model, block size {card['block_size']}, on the "
            f"server {escape(client.url)}. It writes block by block, and reveals the masked tokens of a block in any "
            "order.",
            elem_classes="bd3lm-bare",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                tabs = _tabs(card, longest)
                choices = choices_of(card["block_size"])
            with gr.Column(scale=3, min_width=400):
                text = gr.HTML(HINT, elem_id="text", elem_classes="bd3lm-bare")
                legend = gr.HTML(elem_id="legend", elem_classes="bd3lm-bare")
                figures = gr.HTML(elem_id="figures", elem_classes="bd3lm-bare")
        run = {"show_progress": "hidden", "concurrency_limit": MOST_AT_ONCE, "concurrency_id": "server"}
        for (start, stop), steps, inputs, outputs in tabs(writer, text, legend, figures):
            shown = waiting_for_reader(page, steps)
            running = start.click(shown, [*inputs, *choices], outputs, api_name=steps.__name__, **run)
            stop.click(None, cancels=[running])
    return page.queue(max_size=MOST_WAITING)


def _tabs(card: dict[str, Any], longest: int) -> Callable[..., list[tuple]]:
    """The tabs, and what says which buttons start which steps of a writer, with which inputs and outputs."""
    slider = functools.partial(gr.Slider, 1, longest, min(64, longest), step=1, label="New tokens")
    with gr.Tabs():
        with gr.Tab("Continue"):
            prompt = gr.Textbox(label="Prompt", info=LIMITS, lines=3, max_lines=12, elem_id="prompt")
            num_new = slider(elem_id="max_new_tokens")
            write = buttons("write", "Write")
        with gr.Tab("Chat", visible=bool(card.get("has_chat_template"))):
            turns = gr.Chatbot(elem_id="turns", height=360)
            question = gr.Textbox(label="Message", lines=2, max_lines=8, elem_id="question")
            num_answer = slider(elem_id="max_answer_tokens")
            chat = buttons("chat", "Send")
        with gr.Tab("Fill gaps"):
            gapped, gap_length = gap_inputs()
            fill = buttons("fill", "Fill")

    def connect(writer: RemoteWriter, text: gr.HTML, legend: gr.HTML, figures: gr.HTML) -> list[tuple]:
        return [
            (write, writer.write, [prompt, num_new], [text, legend, figures]),
            (chat, writer.chat, [question, num_answer, turns], [turns, figures]),
            (fill, writer.fill, [gapped, gap_length], [text, legend, figures]),
        ]

    return connect
