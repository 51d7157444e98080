"""The card of a model that this package trained: what it is, from its provenance and score files alone."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from ..evaluation.protocol import caveat
from ..portable import portable, portable_text
from ..pretrain.milestones import CONFIG_FILE
from .markdown import table, write_card
from .model_folder import ModelFolder, open_trained_folder
from .scores import Scores, average_of, bits_per_byte, commonsense, eval_results, replies, row_of


def model_card(
    repo: str,
    revision: str,
    model: ModelFolder,
    ladder: Sequence[ModelFolder],
    scores: Scores,
    license: str | None = None,
    pictures: Sequence[str] = (),
) -> str:
    """Writes the card of one revision. Equal inputs give equal text: nothing of the machine or the hour is in it.

    Args:
        repo (`str`): `USER/NAME`.
        revision (`str`): `"main"` or the name of a milestone.
        model (`ModelFolder`): what lies in this revision.
        ladder (`Sequence[ModelFolder]`): the milestones of the run in their order; none for a fine-tuned model.
        scores (`Scores`): of the run or the model.
        license (`str`, *optional*): an identifier that the Hub knows.
        pictures (`Sequence[str]`, *optional*): PNG files in this revision.

    Returns:
        Markdown with metadata, which `huggingface_hub.ModelCard` reads.
    """
    from huggingface_hub.repocard_data import eval_results_to_model_index

    title = repo.split("/")[1]
    results = eval_results(model.name, scores)
    metadata = {
        **metadata_of(model, license),
        **({"model-index": eval_results_to_model_index(title, results)} if results else {}),
    }
    parts = [
        f"# {title}",
        _what_it_is(revision, model),
        how_to_load(repo, revision, model),
        _ladder(ladder, scores),
        *(f"![{PurePosixPath(picture).stem}]({picture})" for picture in pictures),
        bits_per_byte(model.name, scores.bits_per_byte),
        commonsense(model.name, scores.commonsense),
        replies(model.record, scores.replies),
        _training(model),
        origin(model.record),
    ]
    return write_card(metadata, parts)


def milestone_card(folder: Path, name: str) -> str:
    """Writes the card that lies in a milestone's folder from the start. It stays there: publishing makes another, with
    scores and pictures.

    Args:
        folder (`Path`): holds the whole milestone already.
        name (`str`): that the folder is to have.
    """
    model = open_trained_folder(folder)._replace(given_name=name)
    loss = f"Loss on held-out text: {model.record['validation_loss']:.4f} nats a token, the mean over the sources by their share."
    load = how_to_load(f"milestones/{name}", "main", model, " Called from the run's folder:")
    parts = [f"# {name}", _what_it_is("main", model), loss, load, _training(model), origin(model.record)]
    return write_card(metadata_of(model), parts)


def metadata_of(model: ModelFolder, license: str | None = None) -> dict[str, Any]:
    """The metadata that every card has, in the order of the Hub's own."""
    return {
        "library_name": "transformers",
        **({"license": license} if license else {}),
        "pipeline_tag": "text-generation",
        "tags": ["llama", "tinyllama_hf"],
        **({"base_model": model.base.partition("@")[0]} if model.base else {}),
    }


def _what_it_is(revision: str, model: ModelFolder) -> str:
    config, record = model.config, model.record
    if "tokens" in record:
        planned = _settings(model)["training"]["total_tokens"]
        made = (
            f"{_pretrained_from(model)}; `{model.name}` has read {record['tokens']:,} tokens in {record['step']:,} steps, of "
            f"{planned:,} planned"
        )
    else:
        made = f"fine-tuned from {record['base_model']['path']} on {record['conversations']['train']:,} conversations"
    where = "" if revision == "main" or "tokens" not in record else " The newest milestone is on `main`."
    return f"A Llama of {model.num_parameters:,} parameters, {made}.{where}\n\n{shape_of(config)}"


def shape_of(config: dict[str, Any]) -> str:
    """The sizes of a Llama as a table."""
    shape = {
        "layers": config["num_hidden_layers"],
        "hidden size": config["hidden_size"],
        "attention heads": config["num_attention_heads"],
        "key/value heads": config["num_key_value_heads"],
        "feed-forward size": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "context": config["max_position_embeddings"],
    }
    return table(list(shape), [[f"{value:,}" for value in shape.values()]])


def _pretrained_from(model: ModelFolder) -> str:
    initial = _settings(model)["model"].get("init_from")
    return f"pretrained further from {portable_text(initial)}" if initial else "pretrained from scratch"


def how_to_load(repo: str, revision: str, model: ModelFolder, where: str = "") -> str:
    """The section with code that loads a folder of plain weights and generates, with stock transformers."""
    named = f'"{repo}"' if revision == "main" else f'"{repo}", revision="{revision}"'
    load = [
        f"model = AutoModelForCausalLM.from_pretrained({named})",
        f"tokenizer = AutoTokenizer.from_pretrained({named})",
    ]
    return (
        f"## How to load it\n\nPlain Llama weights; stock transformers suffices.{where}\n\n{python_code(model, load)}"
    )


def python_code(model: ModelFolder, load: Sequence[str], imports: Sequence[str] = ()) -> str:
    """Code that loads a model as the lines say, and generates: from a message if the folder has a chat template."""
    if any(file.name == "chat_template.jinja" for file in model.files):
        use = [
            'messages = [{"role": "user", "content": "What is a queue for?"}]',
            'inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", add_generation_prompt=True, return_dict=True)',
        ]
    else:
        use = ['inputs = tokenizer("Return a list of", return_tensors="pt")']
    lines = [
        *imports,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        *load,
        *use,
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))",
    ]
    return "\n".join(["```python", *lines, "```"])


def _ladder(ladder: Sequence[ModelFolder], scores: Scores) -> str:
    if not ladder:
        return ""
    rows = []
    for model in ladder:
        name, record = model.name, model.record
        row = {"revision": f"`{name}`", "step": f"{record['step']:,}", "tokens": f"{record['tokens']:,}"}
        row["validation loss"] = f"{record['validation_loss']:.3f}"
        if bits := row_of(name, scores.bits_per_byte):
            row["bits per byte"] = f"{bits['bits_per_byte']:.3f}"
        if answered := row_of(name, scores.commonsense):
            flag = " \\*" if caveat(scores.commonsense["protocol"], answered["results"]) else ""
            row["commonsense average"] = f"{average_of(answered)['average']:.2f}{flag}"
        rows.append(row)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    shown = table(heads, [[row.get(head, "") for head in heads] for row in rows])
    note = "\n\n\\* on a part of the items: no benchmark figure." if "\\*" in shown else ""
    return (
        f"## Revisions\n\n{shown}{note}\n\n`main` holds `{ladder[-1].name}`. The loss is in nats per token, bits per byte are on unseen text; lower is "
        "better in both."
    )


def _training(model: ModelFolder) -> str:
    settings = _settings(model)
    text = yaml.safe_dump(portable(settings), sort_keys=False, allow_unicode=True)
    summary = _recipe(settings) if "tokens" in model.record else ""
    return (
        f"## Training\n\n{summary}<details><summary>The whole configuration ({CONFIG_FILE})</summary>\n\n"
        f"```yaml\n{text}```\n\n</details>"
    )


def _settings(model: ModelFolder) -> dict[str, Any]:
    return yaml.safe_load((model.path / CONFIG_FILE).read_text(encoding="utf-8"))


def _recipe(settings: dict[str, Any]) -> str:
    """Data, mixture and schedule of pretraining, in words."""
    data, schedule, training, optimizer = (settings[key] for key in ("data", "schedule", "training", "optimizer"))
    changes = data.get("mixture_changes") or []
    heads = ["text", "share", *(f"from {change['from_tokens']:,} tokens on" for change in changes)]
    rows = [
        [
            portable_text(source["path"]),
            f"{source['weight']:.2%}",
            *(f"{change['weights'][number]:.2%}" for change in changes),
        ]
        for number, source in enumerate(data["sources"])
    ]
    rate = {
        "cosine": "falls as a cosine to {floor:g} at the last token",
        "wsd": "stays, and falls linearly to {floor:g} over the last {decay_tokens:,} tokens",
        "constant": "stays",
    }[schedule["name"]].format(**schedule)
    if branch := settings.get("branch"):
        rate += f"; a branch ({branch['schedule']}) of {portable_text(branch['from'])}"
    batches = [training["tokens_per_step"], *(c["tokens_per_step"] for c in training.get("batch_changes") or [])]
    return (
        f"{table(heads, rows)}\n\nThe learning rate rises to {schedule['peak']:g} over {schedule['warmup_tokens']:,} tokens, "
        f"then {rate}. AdamW with betas {optimizer['betas'][0]:g} and {optimizer['betas'][1]:g}, weight decay "
        f"{optimizer['weight_decay']:g}, gradients clipped at {optimizer['gradient_clip']:g}; steps of "
        f"{', then '.join(f'{batch:,}' for batch in batches)} tokens in sequences of {data['sequence_length']:,}; "
        f"{training['precision']}.\n\n"
    )


def origin(record: dict[str, Any], more: Sequence[Sequence[str]] = ()) -> str:
    """The section on code, libraries, machine and data, from a `provenance.json`; `more` rows come at the end."""
    code, machine = record["code"], record["machine"]
    commit = f", commit `{code['commit'][:12]}`" if code.get("commit") else ""
    changes = ", with local changes" if code.get("modified") else ""
    accelerators = ", ".join(machine.get("accelerators") or ()) or "no accelerator"
    lines = [
        ["made", record["created"]],
        ["code", f"tinyllama_hf {code['tinyllama_hf']}{commit}{changes}"],
        ["libraries", ", ".join(f"{n} {v}" for n, v in {"Python": record["python"], **record["libraries"]}.items())],
        ["machine", f"{machine['processor']}, {machine['cores']} cores, {accelerators}"],
    ]
    if "num_processes" in record:
        lines.append(["processes", str(record["num_processes"])])
    lines += [[f"data {path}", f"`{print_}`"] for path, print_ in record.get("data", {}).items()]
    for file, sha256 in record.get("base_model", {}).get("sha256", {}).items():
        lines.append([f"base {file}", f"SHA-256 `{sha256}`"])
    if "conversations" in record:
        counts = record["conversations"]
        text = f"{counts['source']}: {counts['train']:,} trained, {counts['held_out']:,} held out"
        lines.append(["conversations", text])
    return f"## Where it comes from\n\n{table(['what', 'which'], [*lines, *more])}"
