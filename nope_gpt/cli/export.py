"""`nope export`."""

from __future__ import annotations

from nope_gpt.cli.options import JSON, configured
from nope_gpt.cli.terminal import result, say
from nope_gpt.config import ExportConfig


@configured(ExportConfig, JSON)
def command(config: ExportConfig, json: bool) -> None:
    """Write a model as a directory that other programs read, adapters folded in.

    What was written is read again by the real library, where it is installed, and compared with
    its source before it appears: logits, a greedy continuation, and the tokens of texts of every
    script. This is also the only command that reads the .pt checkpoints of the old scripts.

    Examples:

    - `nope export --model runs/tune --output exports/my-model`

    - `nope export --model runs/tune --format transformers,llama,gguf --quantize q8_0,q4_k_m`

    - `nope export --model runs/tune --format transformers --push-to-hub me/my-model`

    - `nope export --model checkpoints/checkpoint.pt --format hub`
    """
    from nope_gpt.export.exporting import export
    from nope_gpt.files.pictures import can_draw
    from nope_gpt.hub.locating import HISTORY

    if config.model:
        say(f"loading {config.model}")
    made = export(config, say)
    if not can_draw() and any((item.path / HISTORY).is_file() for item in made):
        say("the card has no picture: pip install 'nope-gpt[plots]' draws the losses", style="dim")
    listing = [
        {
            "format": item.record.format,
            "path": str(item.path),
            "url": item.url,
            "parity": [report.as_dict() for report in item.record.reports],
        }
        for item in made
    ]
    result("\n".join(item.url or str(item.path) for item in made), {"exports": listing}, json)
