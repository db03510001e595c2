"""The model card of an exported folder: short, and only what the run folder knows."""

import json
import pathlib
from typing import Any

from tlm_jax import config_io, costs
from tlm_jax.config import RunConfig
from tlm_jax.interop import gguf_export, llama

_LOAD = {
    "llama": """
{padding}ny tool that reads {family} reads this folder.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```
""",
    "compact": """
The modeling code in this folder tells transformers how the layers differ.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("FOLDER", trust_remote_code=True)
```
""",
    "deci": """
Every layer has its own width, as vLLM's DeciLMForCausalLM reads it;
`configuration_tapered_deci.py` in this folder reads the config.

```
vllm serve FOLDER --trust-remote-code
```
""",
    "gguf": """
Every layer has its own width, for llama.cpp and what is built on it.

```
llama-cli -m FOLDER/model.gguf
```
""",
    "native": """
The tensors carry tlm-jax's own names: transformers has no such architecture.
""",
}


def text(
    out: pathlib.Path,
    folder: pathlib.Path,
    step: int,
    metadata: dict[str, Any],
    form: str,
    dtype: str,
) -> str:
    """The card as Markdown.

    Args:
      out: the export, complete but for its card.
      folder: the run folder, for its evaluations.
      step: the exported checkpoint.
      metadata: what was saved with it.
      form: format of the export.
      dtype: of the tensors.
    """
    config: RunConfig = config_io.from_dict(metadata["config"])
    family = llama.class_name(config.model) if form == "llama" else ""
    library = {"native": "tlm-jax", "deci": "vllm", "gguf": "llama.cpp"}.get(form, "transformers")
    source = f"FOLDER/{gguf_export.FILE}" if form == "gguf" else "FOLDER"
    parts = [
        f"---\nlibrary_name: {library}\npipeline_tag: text-generation\ntags:\n- tlm-jax\n---\n",
        f"# {config.name}\n",
        _model(config, metadata, dtype),
        "## Training\n",
        _training(config, step, metadata),
        "## Results\n",
        _results(folder, step),
        "## Loading\n",
        _LOAD[form].strip().format(padding=_padding(config.model.mlp_widths), family=family) + "\n",
        _tokenizer(config, metadata, form, out),
        f"With tlm-jax itself: `tlm import --model {source} --out runs/NAME`"
        + (
            ", bit for bit."
            if dtype == "float32"
            else f" (the parameters were rounded to {dtype})."
        ),
    ]
    return "\n".join(parts) + "\n"


def _padding(widths: tuple[int, ...]) -> str:
    if len(set(widths)) == 1:
        return "A"
    return (
        f"The MLPs are padded with zeros to the widest layer ({max(widths):,}), which changes no "
        "output: a"
    )


def _model(config: RunConfig, metadata: dict[str, Any], dtype: str) -> str:
    model = config.model
    widths = ", ".join(f"{w:,}" for w in model.mlp_widths)
    parameters = costs.model_costs(model, seq_len=1).parameters
    rows = {
        "parameters": f"{parameters:,}, {dtype}",
        "layers": f"{model.num_layers}, d_model {model.d_model}",
        "mixer": model.mixer.describe(model.d_model),
        "MLP": "SwiGLU, no biases"
        + (f", {len(model.mlp.periods)} levels" if len(model.mlp.periods) > 1 else ""),
        "MLP width of each layer": widths
        if len(set(model.mlp_widths)) > 1
        else f"{model.mlp_widths[0]:,} in all",
        "vocabulary": f"{model.vocab_size:,}, "
        + ("tied" if model.tie_embeddings else "head of its own"),
        "norm": f"RMSNorm, eps {model.norm_eps:g}",
    }
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _training(config: RunConfig, step: int, metadata: dict[str, Any]) -> str:
    if "source" in metadata:
        return (
            f"Imported from `{metadata['source']['file']}`; how it was trained is not known here.\n"
        )
    data = config.data
    where = f"`{pathlib.Path(data.path).name}`" if data.path else "the prose that tlm-jax carries"
    tokens = step * data.batch_size * data.seq_len
    return (
        f"{step:,} steps of {data.batch_size} x {data.seq_len} tokens ({tokens:,} in all) on "
        f"{where} (fingerprint {metadata['data_layout'].get('dataset')}); AdamW, peak learning "
        f"rate {config.optimizer.learning_rate:g}, seed {config.seed}; tlm-jax "
        f"{metadata['tlm_jax']}, jax {metadata['jax']}.\n"
    )


def _results(folder: pathlib.Path, step: int) -> str:
    """The metrics in eval.json and below eval/ that belong to this checkpoint."""
    lines = []
    for path in [folder / "eval.json", *sorted((folder / "eval").rglob("*.json"))]:
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(record, dict) or record.get("step") != step:
            continue
        for metric in _metrics(record):
            values = (metric.get(name) for name in ("value", "standard_error", "rows"))
            cells = ["" if value is None else f"{value:,.6g}" for value in values]
            name = f"{metric.get('task', '')} {metric.get('name', '')}".strip()
            lines.append(f"| {name} | {' | '.join(cells)} | `{path.relative_to(folder)}` |")
    if not lines:
        return "None: this checkpoint was not evaluated.\n"
    head = ["| metric | value | standard error | rows | file |", "|---|---|---|---|---|"]
    return "\n".join([*head, *lines]) + "\n"


def _metrics(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A list of metrics, or else the numbers of the record itself."""
    if isinstance(record.get("metrics"), list):
        return record["metrics"]
    return [
        {"name": name, "value": value}
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    ]


def _tokenizer(config: RunConfig, metadata: dict[str, Any], form: str, out: pathlib.Path) -> str:
    if config.data.tokenizer == "bytes" and form != "gguf":
        return (
            "The tokenizer is the bytes of UTF-8 (ids 0 to 255) and 256 for the end of a text; "
            "there is no file of it.\n"
        )
    native = "special_tokens" not in metadata  # trained here
    if native:
        begins = "A text begins with the end-of-text token, as in training"
    elif metadata["data_layout"].get("document_prefix"):
        begins = "The tokenizer puts its token for the beginning before a text"
    else:
        begins = "A text begins without a special token"
    if form == "gguf":
        return f"{begins}. The file holds the tokenizer.\n"
    if not (out / "tokenizer.json").is_file():
        return f"{begins}. `tokenizer.model` is for SentencePiece; transformers splits otherwise.\n"
    if native and form != "native":
        begins += "; `AutoTokenizer` puts it there"
    if "chat_template" in metadata:
        begins += ". Conversations are put into words by `tokenizer.apply_chat_template`"
    return f"{begins}.\n"
