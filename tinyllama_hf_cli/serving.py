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
    note,
    show_log,
)


_LIMITS, _ACCESS = "Limits", "Access"


def serve_command(
    model: MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all addresses of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free one.")] = 8000,
    page: Annotated[bool, typer.Option("--page", help="Also serve a web page to chat with the model.")] = False,
    template: Annotated[
        str | None,
        typer.Option(help="Chat template instead of the folder's: llama2, zephyr, chatml, llama3, or a .jinja file."),
    ] = None,
    device: DEVICE = "auto",
    dtype: DTYPE = "auto",
    quantization: QUANTIZATION = "none",
    adapter: ADAPTER = None,
    draft: Annotated[
        str | None, typer.Option(help="Draft that speeds up all replies: a model, lookup, or layers:N.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="tinyllama-hf, or vllm to start vLLM (if installed) on the same folder.")
    ] = "tinyllama-hf",
    rows: Annotated[
        int, typer.Option(min=1, help="Maximum number of replies generated together.", rich_help_panel=_LIMITS)
    ] = 16,
    waiting: Annotated[
        int,
        typer.Option(min=1, help="Maximum number of waiting replies; more get status 429.", rich_help_panel=_LIMITS),
    ] = 64,
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum tokens per reply; default: the context.", rich_help_panel=_LIMITS),
    ] = None,
    max_messages: Annotated[
        int | None,
        typer.Option(
            min=1, help="Maximum messages per conversation; default: the context in tokens.", rich_help_panel=_LIMITS
        ),
    ] = None,
    max_body_bytes: Annotated[
        int,
        typer.Option(min=1024, help="Maximum size of a request; large ones delay others.", rich_help_panel=_LIMITS),
    ] = 2**20,
    row_seconds: Annotated[
        float, typer.Option(min=1, help="Maximum seconds per reply, waiting included.", rich_help_panel=_LIMITS)
    ] = 600,
    shutdown_seconds: Annotated[
        float,
        typer.Option(
            min=0, help="Seconds for running replies to finish after Ctrl-C or SIGTERM.", rich_help_panel=_LIMITS
        ),
    ] = 30,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="TINYLLAMA_HF_API_KEY",
            help="Key that clients must send, as 'Authorization: Bearer KEY'.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Origin of a page that may use the server, such as http://localhost:3000; repeatable.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Host name that clients may use, in addition to addresses and localhost; repeatable.",
            rich_help_panel=_ACCESS,
        ),
    ] = None,
    compiled: COMPILE = False,
    verbose: VERBOSE = False,
) -> None:
    """Serve a model to many clients through OpenAI's API, and on a chat page with --page. Ctrl-C stops the server.

    Replies are generated together, each with its own settings. Sampling has the defaults of `generate`. By default,
    only this machine can connect; with another --host, set --api-key.

    Example: tinyllama-hf serve chat-v1.0 --page --quantization nf4

    Example: tinyllama-hf serve my-model --template llama2 --draft lookup --host 0.0.0.0 --api-key SECRET
    """
    from tinyllama_hf.errors import InputError, did_you_mean, require

    if engine not in ("tinyllama-hf", "vllm"):
        raise InputError(f"--engine {engine}: unknown{did_you_mean(engine, ['tinyllama-hf', 'vllm'])}")
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise InputError("--api-key: must be printable ASCII, without outer spaces, and not empty. Choose another key")
    check_model_options(model, dtype, device, quantization, draft, adapter, compiled)
    name = Path(model).resolve().name if Path(model).exists() else model
    if engine == "vllm":
        other: dict[str, object] = {"--page": page, "--draft": draft, "--adapter": adapter, "--compile": compiled}
        other |= {"--quantization": quantization != "none", "--max-messages": max_messages, "--max-tokens": max_tokens}
        _refuse_for_vllm(other)
        from tinyllama_hf.serving.vllm_server import start_vllm

        start_vllm(model, name, host, port, template, dtype, rows, api_key)
    if verbose or compiled:
        show_log()
    for package in ("fastapi", "uvicorn", "llguidance", "prometheus_client"):
        require(package, "serving", "serve")
    import_libraries()
    from tinyllama_hf.chat.templates import load_template, set_template
    from tinyllama_hf.serving.app import ServerOptions, build_app
    from tinyllama_hf.serving.run_server import bind, run_server

    if template is not None:
        load_template(template)  # an unknown one is refused before the model is loaded
    bound = bind(host, port)
    loaded, tokenizer, proposer = load_model(model, dtype, device, quantization, draft, adapter, compiled)
    if template is not None:
        set_template(tokenizer, template, model)
    names = [host, *(allow_host or ())]
    options = ServerOptions(
        rows, waiting, max_tokens, max_messages, max_body_bytes, row_seconds, api_key, page, allow_origin or (), names
    )
    described = {"dtype": str(loaded.dtype).removeprefix("torch."), "quantization": quantization, "draft": draft}
    app = build_app(name, loaded, tokenizer, proposer, options, described)
    bound.listen()  # from now on connections are queued
    shown = f"http://[{host}]" if ":" in host else f"http://{host}"
    shown += f":{bound.getsockname()[1]}"
    print(_greeting(name, f"{shown}/v1", bool(tokenizer.chat_template)), flush=True)
    if page:
        print(f"  page: {shown}/", flush=True)
    if api_key is None and host not in ("127.0.0.1", "::1", "localhost"):
        note("no --api-key: any client that can reach this machine can use the server")
    run_server(app, bound, shutdown_seconds)


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


def _refuse_for_vllm(options: dict[str, object]) -> None:
    from tinyllama_hf.errors import InputError

    if given := [name for name, value in options.items() if value]:
        raise InputError(f"{given[0]}: not supported with --engine vllm; leave it out, or see `vllm serve --help`")
