"""Writes docs/checkpoints.md from the tables of fields: `python -m gte_deploy.models.field_tables`."""

from gte_deploy.core.activations import TORCH_CLASSES
from gte_deploy.models import families
from gte_deploy.models.fields import SHARED, Field, FileFields, spelled


def tables() -> tuple[FileFields, ...]:
    """Every table: those of each family's config.json, then `SHARED`."""
    own = {place: families.family_of_type(name).fields for name, place in families.FAMILIES.items()}
    return (*own.values(), *SHARED)


_INTRODUCTION = """# Checkpoints: files and fields that are supported

A dozen small files determine the behaviour of a checkpoint. `gte_deploy.models.description.describe` reads them once,
for models, exporters, runtime and Triton. The tables below are generated from the tables that the reader uses
(`python -m gte_deploy.models.field_tables`). A field that can change an answer either has the same effect as in the
checkpoint's own library, or is refused by name.

| | |
|---|---|
| **honoured** | it changes the answers as it does in transformers or sentence-transformers |
| **fixed** | only the listed values are supported; another value is an error that names file, field and value |
| without effect | it does not change an answer |

No remote code runs, nothing is unpickled, and a local folder is read without the network.

## Weights

The weights are in `model.safetensors`, or in shards with their index, in the original layout or in that of
transformers. Every tensor must belong to the model, and every parameter must get a tensor. If a folder has other
weights instead, the error names their kind and a command that helps: pickles (`*.bin`, `*.pt`), Git LFS pointers, GGUF,
ONNX, TensorFlow and Flax files, quantised weights, and adapters if `peft` is not installed.

## Limits

A checkpoint may come from anybody, so these are errors before anything is built or read:

| what | limit |
|---|---|
| layers and heads of config.json | 1,024 |
| hidden size and token types | 65,536 |
| intermediate size and labels | 1,048,576 |
| vocabulary | 16,777,216 |
| other integers | 2,147,483,647 |
| the limit of tokens of a text | at least the special tokens and one more |
| JSON files, tokenizer.json | 256 MiB; only files: no pipe, socket, device or circle of links |
| normalizer and decoder of tokenizer.json | at most 64 characters for one, all rules together; 256 rules, 32 deep |
| words of a WordPiece tokenizer (`max_input_chars_per_word`) | 256 characters |
| ids of tokens | twice the number of tokens, and 65,536 |

If the rules of a tokenizer fail on a text, as a pattern does that goes back and forth without end, the error is an
`InputError` for that call; it is a `CheckpointError` if they fail on the special tokens.
"""
_EFFECTS = {"honoured": "**honoured**", "fixed": "**fixed**", "without effect": "without effect"}
_UNKNOWN = {
    "ignored": "Other fields are ignored, as the library ignores them.",
    "refused": "Any other field is refused, because the library would use it as an argument.",
}


def document() -> str:
    """docs/checkpoints.md: every table in Markdown."""
    functions = ", ".join(f"`{name}`" for name in sorted(TORCH_CLASSES.values()))
    activations = f"""
## Functions of torch.nn

The activation of a reranker's logits, and that of a Dense module, must be one of these functions, under any of its
paths (`torch.nn.Sigmoid`, `torch.nn.modules.activation.Sigmoid`): {functions}.

The activation of a reranker is in config_sentence_transformers.json, else in config.json. The default is the sigmoid
for one label, and none for several. A path outside torch names other people's code: a reranker then has the default, as
in the library, and a Dense module is refused.
"""
    return "\n".join([_INTRODUCTION, *(_section(table) for table in tables())]) + activations


def _section(table: FileFields) -> str:
    rows = [f"| {_named(name)} | {_cell(field)} |" for name, field in table.fields.items()]
    head = "| field | |\n|---|---|\n"
    return f"## {table.name}\n\n{table.reads}\n\n{head}" + "\n".join(rows) + f"\n\n{_UNKNOWN[table.unknown]}\n"


def _named(name: str) -> str:
    return ", ".join(f"`{part}`" for part in name.split(", "))


def _cell(field: Field) -> str:
    values = " or ".join(f"`{value}`" for value in dict.fromkeys(map(spelled, field.allowed)))
    allowed = "" if field.effect != "fixed" else f" {values or '`null`'}:"
    return f"{_EFFECTS[field.effect]}{allowed or '.'} {field.note}"


if __name__ == "__main__":
    print(document(), end="")
