"""The model card: what a published folder is, made from its provenance and score files alone."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import yaml

from ..evaluation.metrics import load_metric
from ..evaluation.protocol import caveat
from ..pretrain.milestones import CONFIG_FILE
from ..provenance import read_json
from ..released import released
from .folder import ModelFolder, open_model_folder


class Scores(NamedTuple):
    """The score files of a run or a model, `None` for each that is not there."""

    bits_per_byte: dict[str, Any] | None
    commonsense: dict[str, Any] | None
    replies: dict[str, Any] | None


def read_scores(folder: Path) -> Scores:
    """Reads what `tinyllama-hf eval` left in a run or beside a model."""
    files = (folder / name for name in ("scores.json", "commonsense.json", "replies.json"))
    return Scores(*(read_json(file) if file.is_file() else None for file in files))


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
    from huggingface_hub import ModelCard, ModelCardData

    name, results = model.name, _eval_results(model.name, scores)
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["llama", "tinyllama_hf"],
        license=license,
        base_model=_base_on_hub(model.record),
        model_name=repo.split("/")[1],
        eval_results=results or None,
    )
    if not results:
        data.model_name = None  # it belongs to the results and would stand alone in the metadata
    parts = [
        f"# {repo.split('/')[1]}",
        _what_it_is(revision, model),
        _how_to_load(repo, revision, model),
        _ladder(ladder, scores),
        *(f"![{PurePosixPath(picture).stem}]({picture})" for picture in pictures),
        _bits_per_byte(name, scores.bits_per_byte),
        _commonsense(name, scores.commonsense),
        _replies(model.record, scores.replies),
        _training(model),
        _origin(model.record),
    ]
    body = "\n\n".join(part for part in parts if part)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def milestone_card(folder: Path, name: str) -> str:
    """Writes the card that lies in a milestone's folder from the start. It stays there: publishing makes another, with
    scores and pictures.

    Args:
        folder (`Path`): holds the whole milestone already.
        name (`str`): that the folder is to have.
    """
    from huggingface_hub import ModelCard, ModelCardData

    model = open_model_folder(folder)._replace(given_name=name)
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["llama", "tinyllama_hf"])
    loss = f"Loss on held-out text: {model.record['validation_loss']:.4f} nats a token, the mean over the sources by their share."
    load = _how_to_load(f"milestones/{name}", "main", model, " Called from the run's folder:")
    parts = [f"# {name}", _what_it_is("main", model), loss, load, _training(model), _origin(model.record)]
    body = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _eval_results(name: str, scores: Scores) -> list[Any]:
    """The entries of `model-index`: figures on all of a held-out text or task, and no others."""
    from huggingface_hub import EvalResult

    results = []
    if row := _row(name, scores.bits_per_byte):
        for source in scores.bits_per_byte["data"]:
            label = PurePosixPath(source["path"]).name
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=label,
                    dataset_name=f"{label}, held-out documents",
                    dataset_config=source["fingerprint"],
                    metric_type="bits_per_byte",
                    metric_name="bits per byte",
                    metric_value=round(row["by_source"][source["path"]], 4),
                )
            )
    if (row := _row(name, scores.commonsense)) and not caveat(scores.commonsense["protocol"], row["results"]):
        for task, metric in scores.commonsense["protocol"]["metrics"].items():
            results.append(
                EvalResult(
                    task_type="text-generation",
                    dataset_type=task,
                    dataset_name=task,
                    dataset_args={"num_few_shot": scores.commonsense["protocol"]["num_fewshot"]},
                    metric_type=metric,
                    metric_value=round(row["results"][task]["score"], 2),
                )
            )
    return results


def _what_it_is(revision: str, model: ModelFolder) -> str:
    config, record = model.config, model.record
    if "tokens" in record:
        planned = _settings(model)["training"]["total_tokens"]
        made = (
            f"{_pretrained_from(model)}; `{model.name}` has read {record['tokens']:,} tokens in {record['step']:,} steps, of "
            f"{planned:,} planned"
        )
    else:
        made = f"fine-tuned from {_shown(record['base_model']['path'])} on {record['conversations']['train']:,} conversations"
    where = "" if revision == "main" or "tokens" not in record else " The newest milestone is on `main`."
    shape = {
        "layers": config["num_hidden_layers"],
        "hidden size": config["hidden_size"],
        "attention heads": config["num_attention_heads"],
        "key/value heads": config["num_key_value_heads"],
        "feed-forward size": config["intermediate_size"],
        "vocabulary": config["vocab_size"],
        "context": config["max_position_embeddings"],
    }
    cells = [f"{value:,}" for value in shape.values()]
    return f"A Llama of {model.num_parameters:,} parameters, {made}.{where}\n\n{_table(list(shape), [cells])}"


def _pretrained_from(model: ModelFolder) -> str:
    initial = _settings(model)["model"].get("init_from")
    return f"pretrained further from {_shown(initial)}" if initial else "pretrained from scratch"


def _how_to_load(repo: str, revision: str, model: ModelFolder, where: str = "") -> str:
    named = f'"{repo}"' if revision == "main" else f'"{repo}", revision="{revision}"'
    if any(file.name == "chat_template.jinja" for file in model.files):
        use = (
            'messages = [{"role": "user", "content": "What is a queue for?"}]\n'
            'inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", add_generation_prompt=True, return_dict=True)'
        )
    else:
        use = 'inputs = tokenizer("Return a list of", return_tensors="pt")'
    return (
        f"## How to load it\n\nPlain Llama weights; stock transformers suffices.{where}\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"model = AutoModelForCausalLM.from_pretrained({named})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({named})\n"
        f"{use}\n"
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n```"
    )


def _ladder(ladder: Sequence[ModelFolder], scores: Scores) -> str:
    if not ladder:
        return ""
    rows = []
    for model in ladder:
        name, record = model.name, model.record
        row = {"revision": f"`{name}`", "step": f"{record['step']:,}", "tokens": f"{record['tokens']:,}"}
        row["validation loss"] = f"{record['validation_loss']:.3f}"
        if bits := _row(name, scores.bits_per_byte):
            row["bits per byte"] = f"{bits['bits_per_byte']:.3f}"
        if commonsense := _row(name, scores.commonsense):
            flag = " \\*" if caveat(scores.commonsense["protocol"], commonsense["results"]) else ""
            row["commonsense average"] = f"{_average(commonsense)['average']:.2f}{flag}"
        rows.append(row)
    heads = list(dict.fromkeys(head for row in rows for head in row))
    table = _table(heads, [[row.get(head, "") for head in heads] for row in rows])
    note = "\n\n\\* on a sample or a part of the items: no benchmark figure." if "\\*" in table else ""
    return (
        f"## Revisions\n\n{table}{note}\n\n`main` holds `{ladder[-1].name}`. The loss is in nats per token, bits per byte are on unseen text; lower is "
        "better in both."
    )


def _bits_per_byte(name: str, scores: dict[str, Any] | None) -> str:
    if not (row := _row(name, scores)):
        return ""
    lines = [
        [_shown(data["path"]), f"{row['by_source'][data['path']]:.4f}", f"{data['documents']:,}", f"{data['bytes']:,}",
         f"`{data['fingerprint'][:12]}`"]
        for data in scores["data"]
    ]  # fmt: skip
    made_by = row.get("scored_with", scores["provenance"]["libraries"])  # rows of early runs do not say it themselves
    heads = ["held-out text", "bits per byte", "documents", "bytes", "fingerprint"]
    return (
        f"## Bits per byte on unseen text\n\n**{row['bits_per_byte']:.4f}** over all documents, of which no training block "
        f"came. Scored by stock transformers {made_by['transformers']}.\n\n{_table(heads, lines)}"
    )


def _commonsense(name: str, scores: dict[str, Any] | None) -> str:
    if not (row := _row(name, scores)):
        return ""
    protocol, average = scores["protocol"], _average(row)
    lines = [
        [task, metric, f"{row['results'][task]['score']:.2f} ± {row['results'][task]['standard_error']:.2f}",
         f"{row['results'][task]['items']:,}", str(protocol["task_versions"][task]), f"`{_rows(protocol['data'][task])}`"]
        for task, metric in protocol["metrics"].items()
    ]  # fmt: skip
    lines.append(["**average**", "", f"**{average['average']:.2f} ± {average['standard_error']:.2f}**", "", "", ""])
    made_on = caveat(protocol, row["results"])
    return (
        "## Commonsense\n\n"
        + (f"**Scored on {made_on}.**\n\n" if made_on else "")
        + f"{_table(['task', 'metric', 'percent ± standard error', 'items', 'version', 'rows'], lines)}\n\n"
        f"{protocol['harness']}, {protocol['dtype']}, {protocol['num_fewshot']} examples, "
        f"{'with' if protocol['add_bos_token'] else 'without'} begin-of-sequence, context {protocol['context_length']:,}; "
        "the average is the unweighted mean of the tasks."
    )


def _rows(data: str) -> str:
    """Where a task's rows came from: their place on the Hub, or the beginning of the file's SHA-256."""
    return data if data.startswith("hf://") else data[:12]


def _average(row: dict[str, Any]) -> dict[str, float]:
    """The mean of the tasks with its standard error, by the metric that the harness uses."""
    return load_metric("commonsense_average").compute(
        predictions=[result["score"] for result in row["results"].values()],
        references=list(row["results"]),
        standard_errors=[result["standard_error"] for result in row["results"].values()],
    )


def _replies(record: dict[str, Any], scores: dict[str, Any] | None) -> str:
    if "held_out_loss" not in record:
        return ""
    losses = record["held_out_loss"]
    text = (
        f"## Replies\n\nThe loss of {record['conversations']['held_out']:,} held-out conversations' replies went from "
        f"{losses['before']:.3f} to **{losses['after']:.3f}** nats per token."
    )
    if scores:
        row = scores["models"][0]
        text += (
            f" Of {row['replies']:,} unseen questions {row['stop_rate']:.1%} of the replies end in the stop token within "
            f"{row['max_new_tokens']} tokens; their median length is {row['median_length']:g} tokens."
        )
    return text


def _training(model: ModelFolder) -> str:
    settings = _portable(_settings(model))
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
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
        [source["path"], f"{source['weight']:.2%}", *(f"{change['weights'][number]:.2%}" for change in changes)]
        for number, source in enumerate(data["sources"])
    ]
    rate = {
        "cosine": "falls as a cosine to {floor:g} at the last token",
        "wsd": "stays, and falls linearly to {floor:g} over the last {decay_tokens:,} tokens",
        "constant": "stays",
    }[schedule["name"]].format(**schedule)
    if branch := settings.get("branch"):
        rate += f"; a branch ({branch['schedule']}) of {branch['from']}"
    batches = [training["tokens_per_step"], *(c["tokens_per_step"] for c in training.get("batch_changes") or [])]
    return (
        f"{_table(heads, rows)}\n\nThe learning rate rises to {schedule['peak']:g} over {schedule['warmup_tokens']:,} tokens, "
        f"then {rate}. AdamW with betas {optimizer['betas'][0]:g} and {optimizer['betas'][1]:g}, weight decay "
        f"{optimizer['weight_decay']:g}, gradients clipped at {optimizer['gradient_clip']:g}; steps of "
        f"{', then '.join(f'{batch:,}' for batch in batches)} tokens in sequences of {data['sequence_length']:,}; "
        f"{training['precision']}.\n\n"
    )


def _origin(record: dict[str, Any]) -> str:
    code, machine = record["code"], record["machine"]
    commit = f", commit `{code['commit'][:12]}`" if code.get("commit") else ""
    accelerators = ", ".join(machine.get("accelerators") or ()) or "no accelerator"
    lines = [
        ["made", record["created"]],
        [
            "code",
            f"tinyllama_hf {code['tinyllama_hf']}{commit}{', with local changes' if code.get('modified') else ''}",
        ],
        ["libraries", ", ".join(f"{n} {v}" for n, v in {"Python": record["python"], **record["libraries"]}.items())],
        ["machine", f"{machine['processor']}, {machine['cores']} cores, {accelerators}"],
    ]
    if "num_processes" in record:
        lines.append(["processes", str(record["num_processes"])])
    lines += [[f"data {_shown(path)}", f"`{print_}`"] for path, print_ in record.get("data", {}).items()]
    for file, sha256 in record.get("base_model", {}).get("sha256", {}).items():
        lines.append([f"base {file}", f"SHA-256 `{sha256}`"])
    if "conversations" in record:
        counts = record["conversations"]
        lines.append(
            [
                "conversations",
                f"{_shown(counts['source'])}: {counts['train']:,} trained, {counts['held_out']:,} held out",
            ]
        )
    return f"## Where it comes from\n\n{_table(['what', 'which'], lines)}"


def _row(name: str, scores: dict[str, Any] | None) -> dict[str, Any] | None:
    """The entry of a model in a score file."""
    return next((row for row in scores["models"] if row["name"] == name), None) if scores else None


def _base_on_hub(record: dict[str, Any]) -> str | None:
    """The Hub id of the model that was fine-tuned, `None` if it was a folder."""
    name = record.get("base_model", {}).get("path", "")
    known = {model.name: model.hub for model in released()}
    if name in known:
        return known[name]
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).parent.exists()
    return name.partition("@")[0] if is_id else None


def _shown(path: str) -> str:
    """A path as others may read it: of an absolute one the last part, since the rest tells of somebody's machine."""
    windows = PureWindowsPath(path)
    absolute = path.startswith(("/", "~")) or windows.is_absolute()
    return windows.name if absolute else path


def _portable(value: Any) -> Any:
    """A configuration with its absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: _portable(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_portable(entry) for entry in value]
    return _shown(value) if isinstance(value, str) else value


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
