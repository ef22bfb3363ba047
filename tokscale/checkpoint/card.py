"""The README of an export: what the weights are, where they come from, how to use them."""

import json
from collections.abc import Mapping
from typing import Any

_USE = """```python
import tokscale

model = tokscale.load("{folder}")
{line}
```
"""


def model_card(
    *,
    folder: str,
    model_config: Mapping[str, Any],
    task: str,
    example: str,
    about: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> str:
    """Markdown in the form that model hubs read: YAML front matter, then sections.

    Args:
        folder: Name of the export folder.
        model_config: As in `config.json`.
        task: What model hubs call the model's task.
        example: A line of Python that uses the loaded `model`.
        about: Where the weights come from: run, step, engine, weights, dtype.
        facts: What is known of data and training, by heading: plain values or mappings of them.
    """
    kind = model_config.get("kind", "model")
    parts = [
        f"---\nlibrary_name: tokscale\npipeline_tag: {task}\n---",
        f"# {kind}",
        _USE.format(folder=folder, line=example).strip(),
        _table("Weights", about),
        *(_table(heading, value) for heading, value in facts.items() if value not in (None, {}, "")),
        "## Configuration\n\n```json\n" + json.dumps(dict(model_config), indent=2) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _table(heading: str, values: Any) -> str:
    if not isinstance(values, Mapping):
        return f"## {heading}\n\n{values}"
    rows = "\n".join(f"| {key} | {_cell(value)} |" for key, value in values.items())
    return f"## {heading}\n\n| | |\n|---|---|\n{rows}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"`{json.dumps(value)}`" if isinstance(value, Mapping | list) else str(value)
