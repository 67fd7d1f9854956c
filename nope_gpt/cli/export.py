"""`nope export`."""

from __future__ import annotations

from nope_gpt.cli.options import JSON, configured
from nope_gpt.cli.terminal import result, waiting
from nope_gpt.config import ExportConfig


@configured(ExportConfig, JSON)
def command(config: ExportConfig, json: bool) -> None:
    """Write a model as a directory that other programs read, adapters folded in.

    What was written is loaded again and compared with its source before it appears. This
    is also the only command that reads the .pt checkpoints of the old scripts.

    Examples:

    - `nope export --model runs/tune --output exports/my-model`

    - `nope export --model checkpoints/checkpoint.pt --format hub`
    """
    from nope_gpt.export.hub_layout import export

    with waiting(f"exporting {config.model}"):
        path = export(config)
    result(str(path), {"export": str(path), "format": config.format}, json)
