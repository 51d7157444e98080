"""`tinyllama-hf serve`."""

from pathlib import Path
from typing import Annotated

import typer

from .loading import (
    ADAPTER,
    COMPILE,
    DEVICE,
    DTYPE,
    MODEL,
    QUANTIZATION,
    VERBOSE,
    check_model_options,
    import_libraries,
    load_model,
    show_log,
)


def serve_command(
    model: MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 means all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 chooses a free one.")] = 8000,
    template: Annotated[
        str | None,
        typer.Option(help="Chat template in place of the folder's: llama2, zephyr, chatml, llama3, or a .jinja file."),
    ] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    quantization: QUANTIZATION = "none",
    adapter: ADAPTER = None,
    compiled: COMPILE = False,
    verbose: VERBOSE = False,
) -> None:
    """Serve a model through OpenAI's API: chat completions, completions, responses. Ctrl-C stops the server.

    Sampling defaults to that of `generate`, and requests can change it. There is no authentication: any client that
    reaches the address can use the server.

    Example: tinyllama-hf serve chat-v1.0 --quantization nf4
    """
    check_model_options(model, dtype, device, quantization, None, adapter, compiled)
    if verbose or compiled:
        show_log()
    import_libraries()
    from tinyllama_hf.chat.templates import load_template, set_template
    from tinyllama_hf.serving.app import bind, build_app, check_installed, run

    check_installed()
    if template is not None:
        load_template(template)  # so that an unknown one is refused before the model is loaded
    bound = bind(host, port)
    loaded, tokenizer, _ = load_model(model, dtype, device, quantization, None, adapter, compiled)
    if template is not None:
        set_template(tokenizer, template, model)
    name = Path(model).resolve().name if Path(model).exists() else model
    app = build_app(name, loaded, tokenizer)
    bound.listen()  # from now on connections are queued
    shown = f"[{host}]" if ":" in host else host
    print(_greeting(name, f"http://{shown}:{bound.getsockname()[1]}/v1", bool(tokenizer.chat_template)), flush=True)
    try:
        run(app, bound)
    except KeyboardInterrupt:  # uvicorn raises it again after shutdown
        pass


def _greeting(name: str, url: str, is_chat: bool) -> str:
    path, body = ("/completions", '"prompt": "Once upon a time"')
    call = "client.completions.create(model=..., prompt=...)"
    if is_chat:
        path, body = ("/chat/completions", '"messages": [{"role": "user", "content": "Hello"}]')
        call = "client.chat.completions.create(model=..., messages=[...])"
    return (
        f"serving {name} at {url}; Ctrl-C stops the server\n"
        f"  curl {url}{path} -H 'Content-Type: application/json' -d '{{\"model\": \"{name}\", {body}}}'\n"
        f'  client = openai.OpenAI(base_url="{url}", api_key="none"); {call}'
    )
