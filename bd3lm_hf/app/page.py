"""The page, made with gradio: where things stand on it, and which of them are asked for when a button is pressed."""

from html import escape
from typing import Any

from .drawing import STYLE, draw_legend
from .uploads import NoUploads
from .writing import GAP, LIMITS, MOST_TOKENS, SAMPLERS, TAKEN_BY, Writer


try:
    import gradio as gr
    from starlette.middleware import Middleware

    from .patience import waiting_for_reader
except ImportError as error:
    raise ImportError("The app needs gradio: pip install 'bd3lm-hf[app]'") from error


# Visitors who wait; others are told so, and come back.
MOST_WAITING = 64

HINT = '<div class="bd3lm"><div class="bd3lm-text"><span class="hint">Here the text will appear.</span></div></div>'

# Of a network that declares no context.
UNDECLARED_CONTEXT = 1024


def make_page(pipeline: Any, name: str) -> gr.Blocks:
    """
    A page on which a model writes, for one visitor at a time; others wait. `launch` it with `launch_options()`.

    Args:
        pipeline: a "text-infilling" pipeline, with the model and its tokenizer.
        name: of the model.
    """
    writer, config = Writer(pipeline), pipeline.model.config
    context = config.max_position_embeddings or UNDECLARED_CONTEXT
    num_parameters = sum(parameter.numel() for parameter in pipeline.model.parameters())
    with gr.Blocks(title=f"{name}: block diffusion", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f"<h1>{escape(name)}</h1>A block diffusion language model: {num_parameters / 1e6:.1f} million "
            f"parameters, block size {config.block_size}, context {context}. It writes block "
            "by block, and reveals the masked tokens of a block in any order.",
            elem_classes="bd3lm-bare",
        )
        with gr.Row():
            with gr.Column(scale=2, min_width=340):
                with gr.Tabs():
                    with gr.Tab("Continue"):
                        prompt = gr.Textbox(label="Prompt", info=LIMITS, lines=3, max_lines=12, elem_id="prompt")
                        longest = min(max(context, 2), MOST_TOKENS // 2)
                        max_new_tokens = gr.Slider(
                            1, longest, min(64, longest), step=1, label="New tokens", elem_id="max_new_tokens"
                        )
                        write, stop_writing = buttons("write", "Write")
                    with gr.Tab("Fill gaps"):
                        gapped, gap_length = gap_inputs()
                        fill, stop_filling = buttons("fill", "Fill")
                choices = choices_of(config.block_size)
            with gr.Column(scale=3, min_width=400):
                text = gr.HTML(HINT, elem_id="text", elem_classes="bd3lm-bare")
                legend = gr.HTML(draw_legend(config.block_size), elem_id="legend", elem_classes="bd3lm-bare")
                figures = gr.HTML(elem_id="figures", elem_classes="bd3lm-bare")
        # `generate` is not made for two threads on one model.
        run = {
            "outputs": [text, legend, figures],
            "show_progress": "hidden",
            "concurrency_limit": 1,
            "concurrency_id": "model",
        }
        runs = [
            button.click(waiting_for_reader(page, steps), [*inputs, *choices], api_name=steps.__name__, **run)
            for button, steps, inputs in (
                (write, writer.write, [prompt, max_new_tokens]),
                (fill, writer.fill, [gapped, gap_length]),
            )
        ]
        for stop in (stop_writing, stop_filling):
            stop.click(None, cancels=runs)
    return page.queue(max_size=MOST_WAITING)


def gap_inputs() -> tuple[gr.Textbox, gr.Slider]:
    """A text with gaps, and their length."""
    gapped = gr.Textbox(
        label="Text with gaps",
        info=f"Three underscores are a gap, or a mask token for each token of one. {LIMITS}",
        placeholder=f"def {GAP}(path):",
        lines=3,
        max_lines=12,
        elem_id="gapped",
    )
    return gapped, gr.Slider(1, 32, 4, step=1, label="Tokens per gap", elem_id="gap_length")


def buttons(elem_id: str, label: str) -> tuple[gr.Button, gr.Button]:
    """One that starts, and one that stops."""
    with gr.Row():
        start = gr.Button(label, variant="primary", scale=3, min_width=120, elem_id=elem_id)
        stop = gr.Button("Stop", scale=1, min_width=80, elem_id=f"stop_{elem_id}")
    return start, stop


def choices_of(block_size: int) -> list[Any]:
    """What `Writer` takes as choices, in its order; an argument is shown with the samplers that take it."""
    sampler = gr.Radio(
        list(SAMPLERS), value="first_hitting", label="Sampler", info=SAMPLERS["first_hitting"], elem_id="sampler"
    )
    narrow = {"min_width": 140}
    with gr.Row(visible=False) as taken:
        steps = gr.Textbox(
            label="Denoising steps",
            placeholder=f"{block_size}: one for each token of a block",
            visible=False,
            elem_id="denoising_steps",
            **narrow,
        )
        remask_cap = gr.Slider(
            0, 1, 0, step=0.05, label="Remasking, at most", visible=False, elem_id="remask_cap", **narrow
        )
        threshold = gr.Textbox(
            label="Confidence threshold",
            placeholder="none: steps decide",
            visible=False,
            elem_id="confidence_threshold",
            **narrow,
        )
        bound = gr.Slider(
            0, 20, 1, step=0.1, label="Entropy bound, nats", visible=False, elem_id="entropy_bound", **narrow
        )
    with gr.Row():
        temperature = gr.Slider(
            0, 2, 1, step=0.05, label="Temperature", info="0: the likeliest", elem_id="temperature", **narrow
        )
        top_p = gr.Slider(0.05, 1, 0.9, step=0.05, label="Top-p", info="1: every token", elem_id="top_p", **narrow)
    with gr.Row():
        seed = gr.Textbox(label="Seed", placeholder="another each time", elem_id="seed", **narrow)
        pause = gr.Slider(0, 1, 0.05, step=0.01, label="Delay, s", elem_id="pause", **narrow)
    arguments = dict(zip(TAKEN_BY, (steps, remask_cap, threshold, bound), strict=True))

    def choose(chosen: str) -> list[Any]:
        updates = [gr.update(visible=chosen in TAKEN_BY[name]) for name in arguments]
        return [gr.update(info=SAMPLERS[chosen]), gr.update(visible=chosen != "first_hitting"), *updates]

    outputs = [sampler, taken, *arguments.values()]
    sampler.change(choose, sampler, outputs, show_progress="hidden", api_visibility="private")
    return [sampler, *arguments.values(), temperature, top_p, seed, pause]


def launch_options() -> dict[str, Any]:
    """What `gr.Blocks.launch` is told: a look that needs no other machine, errors that the page shows, no uploads."""
    theme = gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        font=["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"],
        font_mono=["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
    )
    look = {"theme": theme, "css": STYLE, "footer_links": []}
    return {**look, "show_error": True, "ssr_mode": False, "app_kwargs": {"middleware": [Middleware(NoUploads)]}}
