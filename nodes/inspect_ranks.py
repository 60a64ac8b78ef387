"""Inspect Ranks: the rank of every layer of a LoRA as a picture, as text and as data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ..lora2.files import document as documents
from ..lora2.report.markdown import markdown
from ..lora2.report.ranks import build_report
from ..lora2.util.errors import LoraError
from ..lora2.util.text import escaped
from .comfy import lora_paths as files
from .comfy.images import rank_image
from .comfy.input_checks import checked_inputs
from .comfy.progress import stop_if_cancelled
from .comfy.schema import LoraModel, Ranks

CONNECTED = "(the connected LoRA)"
STORED, IN_USE = "rank", "rank in use"


class InspectRanks(io.ComfyNode):
    """Draws the ranks of any LoRA and returns them as text and data."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Schema of the node. Called again whenever ComfyUI lists its nodes: LoRA files may have changed."""
        return io.Schema(
            node_id="LoRA2_InspectRanks",
            display_name="Inspect Ranks",
            category="LoRA²",
            description=(
                "Draws the rank of every layer of a LoRA, its size, and the size of the same layers at one fixed rank. Works on "
                "any LoRA file and on the output of a training node."
            ),
            search_aliases=[
                "adalora",
                "dynamic rank",
                "adaptive rank",
                "lora info",
                "lora rank",
                "lora dim",
                "lora size",
                "resize lora",
                "lora metadata",
                "view lora",
                "compare lora",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=[CONNECTED, *files.lora_names()],
                    default=CONNECTED,
                    tooltip="File to inspect. First choice: the LoRA connected to the input lora.",
                ),
                io.Combo.Input(
                    "show",
                    options=[STORED, IN_USE],
                    default=STORED,
                    tooltip=(
                        "rank: as stored in the file. rank in use: number of components that hold 99 % of a layer's energy, "
                        "the rank that it could be truncated to; takes some seconds for large files."
                    ),
                ),
                LoraModel.Input(
                    "lora",
                    optional=True,
                    tooltip="LoRA from a training node. Used when lora_name is on its first choice.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The image that the node displays."),
                io.String.Output(
                    display_name="markdown",
                    tooltip="Tables in Markdown: rank by block and projection.",
                ),
                Ranks.Output(display_name="ranks", tooltip="Ranks, for other nodes of this pack."),
                io.String.Output(
                    display_name="data",
                    tooltip="JSON: rank, shape and parameters of every layer.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any, **_: Any) -> str | float:
        """Fingerprint of the file, so that a changed file of the same name is read again."""
        return "" if lora_name == CONNECTED else files.lora_fingerprint(lora_name)

    @classmethod
    @checked_inputs
    def execute(cls, lora_name: str, show: str = STORED, lora: Mapping[str, Tensor] | None = None) -> io.NodeOutput:
        """Read, measure, draw. Raises LoraError if there is no LoRA to inspect."""
        if show not in (STORED, IN_USE):
            raise LoraError(f"show = {escaped(show)} must be {STORED} or {IN_USE}.")
        document, title = _document(lora_name, lora)
        report = build_report(document, title, energy=show == IN_USE, between=stop_if_cancelled)
        image = rank_image(report, in_use=show == IN_USE)
        return io.NodeOutput(image, markdown(report), report, report.to_json(), ui=ui.PreviewImage(image, cls=cls))


def _document(lora_name: str, lora: Mapping[str, Tensor] | None) -> tuple[documents.LoraDocument, str]:
    """The LoRA to inspect and its title."""
    if lora_name != CONNECTED:
        return documents.read(files.lora_path(lora_name)), files.lora_title(lora_name)
    if lora is None:
        raise LoraError("There is no LoRA to inspect. Choose a file in lora_name, or connect a LoRA to the input lora.")
    document = documents.parse(lora)
    return document, document.metadata.get("ss_output_name") or document.metadata.get("modelspec.title") or "LoRA"


NODES = [InspectRanks]
