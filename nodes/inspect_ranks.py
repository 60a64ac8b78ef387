"""Inspect Ranks: which layers of a LoRA hold how much, as a picture, as text, and as data."""

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

CONNECTED = "(the connected LoRA)"
STORED, IN_USE = "rank", "rank in use"

LoraModel = io.Custom("LORA_MODEL")
Ranks = io.Custom("LORA2_RANKS")


class InspectRanks(io.ComfyNode):
    """Draws the ranks of any LoRA, and hands them on as text and data."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as the host shows it; called again whenever the list of files may have changed."""
        return io.Schema(
            node_id="LoRA2_InspectRanks",
            display_name="Inspect Ranks",
            category="LoRA²",
            description=(
                "Shows where in the network a LoRA keeps its rank, how large it is, and how large the same "
                "layers would be at one rank for all. Works on any LoRA file, and straight from training."
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
                    tooltip="The file to look at, or the first choice: the LoRA connected to the input.",
                ),
                io.Combo.Input(
                    "show",
                    options=[STORED, IN_USE],
                    default=STORED,
                    tooltip=(
                        "rank: what the file stores. rank in use: how many directions of each layer hold "
                        "99 % of its energy; tells what a LoRA with one rank for all could be cut to. Takes "
                        "some seconds for large files."
                    ),
                ),
                LoraModel.Input(
                    "lora",
                    optional=True,
                    tooltip="A LoRA from a training node. Shown when lora_name stands on its first choice.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The picture that the node shows."),
                io.String.Output(
                    display_name="markdown",
                    tooltip="The same as text: tables in Markdown, rank per block and projection.",
                ),
                Ranks.Output(display_name="ranks", tooltip="The ranks, for other nodes of this pack."),
                io.String.Output(
                    display_name="data",
                    tooltip="Everything as JSON: every layer with its rank, shape and parameters.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: Any, **_: Any) -> str | float:
        """A file that changed is read again, though its name is the same."""
        return "" if lora_name == CONNECTED else files.lora_fingerprint(lora_name)

    @classmethod
    @checked_inputs
    def execute(cls, lora_name: str, show: str = STORED, lora: Mapping[str, Tensor] | None = None) -> io.NodeOutput:
        """Read, measure, draw. Raises LoraError where there is no LoRA to show."""
        if show not in (STORED, IN_USE):
            raise LoraError(f"show = {escaped(show)} must be {STORED} or {IN_USE}.")
        document, title = _document(lora_name, lora)
        report = build_report(document, title, energy=show == IN_USE, between=stop_if_cancelled)
        image = rank_image(report, in_use=show == IN_USE)
        return io.NodeOutput(image, markdown(report), report, report.to_json(), ui=ui.PreviewImage(image, cls=cls))


def _document(lora_name: str, lora: Mapping[str, Tensor] | None) -> tuple[documents.LoraDocument, str]:
    """What to look at, and its name."""
    if lora_name != CONNECTED:
        return documents.read(files.lora_path(lora_name)), files.lora_title(lora_name)
    if lora is None:
        raise LoraError("There is no LoRA to inspect. Choose a file in lora_name, or connect a LoRA to the input lora.")
    document = documents.parse(lora)
    return document, document.metadata.get("ss_output_name") or document.metadata.get("modelspec.title") or "LoRA"


NODES = [InspectRanks]
