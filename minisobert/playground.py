"""Try models: `python -m minisobert.playground RUN` opens a page to paste a post into (extra [page]), and
`python -m minisobert.playground RUN "for i in [MASK](10):"` prints a model's guesses.

The page is served to this machine alone unless --host says otherwise. It loads nothing from other servers and reports
nothing to them.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from pathlib import Path

from minisobert.cli import Parser, command, printable, reason
from minisobert.finetuning.apply import read
from minisobert.inference import load
from minisobert.page import Mask, Page

EXAMPLES = """\
python -m minisobert.playground runs/base "How do I [MASK] a list in Python?"
python -m minisobert.playground runs/base results/team --page
"""
EXAMPLE = "How do I [MASK] a list in Python?\n\nfor i in range(10):\n    numbers.append(i)\n"

# With this the browser refuses content from elsewhere. gradio's own scripts are inline, and it evaluates CLICKS.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"

CLICKS = """
const mask = (token) => {
    const [model, start, stop] = token.dataset.mask.split(' ').map(Number);
    trigger('mask', {model, start, stop});
};
element.addEventListener('click', (event) => {
    const token = event.target.closest('[data-mask]');
    if (token) mask(token);
});
element.addEventListener('keydown', (event) => {
    const token = event.target.closest('[data-mask]');
    if (!token || (event.key !== 'Enter' && event.key !== ' ')) return;
    event.preventDefault();
    mask(token);
});
"""


@command("minisobert.playground")
def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "minisobert.playground",
        "It prints guesses if you give it a TEXT, and opens the page otherwise. The page needs the extra [page].",
        EXAMPLES,
        usages=["RUN TEXT … [options]", "RUN … --page [options]"],
    )
    parser.add_argument(
        "run", metavar="RUN", help="folder of a train.py run, of a finetune.py result, or of a Hugging Face model"
    )
    parser.add_argument(
        "text", nargs="*", metavar="TEXT", help="text with [MASK] in one or more places; with --page, further RUNs"
    )
    parser.add_argument("--best", type=int, default=5, metavar="N", help="number of guesses to show for each [MASK]")
    group = parser.add_argument_group("the page")
    group.add_argument("--page", action="store_true", help="open the page, with all RUNs beside each other")
    group.add_argument(
        "--texts", metavar="FILE", help="texts among which the page finds the nearest: .jsonl, or .txt with one a line"
    )
    group.add_argument("--host", default="127.0.0.1", help="address to serve on; 0.0.0.0 lets other machines in")
    group.add_argument("--port", type=int, metavar="N", help="port to serve on (default: the first free one from 7860)")
    options = parser.parse_args(argv)
    if options.page or not options.text:
        serve([options.run, *options.text], options.texts, options.best, options.host, options.port)
        return
    if options.texts or options.port:
        raise ValueError("--texts and --port are for the page; add --page, and give RUNs without a TEXT")
    model = load(options.run)
    for text in options.text:
        if "[MASK]" not in text and Path(text).is_dir():
            raise ValueError(f"{text} is a folder, not a text with [MASK]; to open several models, add --page")
        print(printable(text))
        for guesses in model.fill_mask(text, options.best):
            print("   ", "   ".join(f"{piece!r} {p:.1%}" for piece, p in guesses))


def serve(runs: list[str], texts: str | None, best: int, host: str, port: int | None) -> None:
    """Serves the page until Ctrl-C. Raises ValueError if a model cannot be loaded, gradio is missing, or the address is
    not free."""
    gradio = _gradio()
    if port is not None and not 1 <= port <= 65_535:
        raise ValueError(f"--port is {port:,}; it must be from 1 to 65,535")
    if best < 1:
        raise ValueError(f"--best is {best:,}; it must be at least 1")
    try:  # gradio would try a hundred ports, five seconds each
        socket.create_server((host, port or 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"the page cannot be served at --host {host}, port {port or 'any'}: {reason(error)}") from None
    # gradio asks its own address whether the page is up, and would send that request through a proxy
    os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "localhost", "127.0.0.1", host]))
    page = Page([(run, load(run)) for run in runs], read(texts) if texts else (), best)
    blocks, look = build(gradio, page)
    _, url, _ = blocks.launch(
        server_name=host, server_port=port, share=False, quiet=True, ssr_mode=False, prevent_thread_lock=True, **look
    )
    try:
        print(f"{url} (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)


def _gradio():
    # gradio reads these when it is imported. Without a named backend the first click would import matplotlib.pyplot
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", MPLBACKEND="agg")
    try:
        import gradio
    except ImportError:
        raise ValueError("the page needs gradio: pip install 'minisobert[page]'") from None
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return gradio


def build(gradio, page: Page):
    """The page as gradio's Blocks, and arguments of `launch` for how it looks."""
    from starlette.middleware import Middleware

    with gradio.Blocks(title="minisobert", analytics_enabled=False, fill_width=True) as blocks:
        masked = gradio.State([])
        with gradio.Row(elem_id="head"):
            gradio.HTML("<h1>minisobert <small>playground</small></h1>")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=320, elem_id="asked"):
                post = gradio.Textbox(EXAMPLE, label="Post", lines=12, max_lines=24, elem_id="post",
                                      info="Text or code. The models guess what stands for [MASK].")  # fmt: skip
                clear = gradio.Button("Clear", size="sm")
                lines = gradio.Textbox(label="Nearest texts", lines=4, max_lines=12, elem_id="lines",
                                       info="One text a line: which of them is nearest to the post?")  # fmt: skip
            with gradio.Column(scale=3, min_width=320):
                answer = gradio.HTML(page(EXAMPLE), js_on_load=CLICKS, elem_id="answer", apply_default_css=False)

        def click(event: gradio.EventData, post: str, lines: str, masked: list[Mask]):
            mask = Mask(int(event.model), int(event.start), int(event.stop))
            masked = [each for each in masked if each != mask] if mask in masked else [*masked, mask]
            return page(post, lines, masked), masked

        click.__annotations__["event"] = gradio.EventData  # gradio would look the name up in this module

        def changed(post: str, lines: str):  # the masks were for the text before the change
            return page(post, lines), []

        one = {
            "concurrency_limit": 1,
            "concurrency_id": "models",
            "show_progress": "hidden",
            "api_visibility": "private",
        }
        answer.mask(click, [post, lines, masked], [answer, masked], trigger_mode="multiple", **one)
        post.change(changed, [post, lines], [answer, masked], trigger_mode="always_last", **one)
        clear.click(lambda: "", None, post, **one)
        lines.change(page, [post, lines, masked], answer, trigger_mode="always_last", **one)
    look = {
        "theme": gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        "css_paths": Path(__file__).with_name("page.css"),
        "footer_links": [],
        "run_history": False,
        "app_kwargs": {"middleware": [Middleware(_Policy)]},
    }
    return blocks, look


class _Policy:
    """Adds POLICY to the answers of a web application."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def with_policy(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)


if __name__ == "__main__":
    main()
