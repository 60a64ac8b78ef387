"""Options of a run against the training node: every one is an input, and a request refuses what no widget offers."""

from __future__ import annotations

import pytest

from dev.packs import pack


def test_every_option_is_an_input_of_the_node() -> None:
    """The node hands its inputs to a config or a request by name."""
    knobs_of, train = pack("lora2.util.knobs").knobs_of, pack("nodes.train")
    config, request = knobs_of(train.TrainingConfig), knobs_of(train.RunRequest)
    assert not set(config) & set(request)
    shown = {name for name, option in (config | request).items() if option.tooltip}
    sockets = {"model", "latents", "conditioning", "empty_caption"}
    assert set(train.INPUTS) == shown | sockets
    assert len(train.INPUTS) == len(set(train.INPUTS))


def test_a_request_refuses_what_no_widget_offers() -> None:
    request = pack("nodes.runs.request").RunRequest
    for name, option in pack("lora2.util.knobs").knobs_of(request).items():
        assert getattr(request(), name) == option.default
        assert all(getattr(request(**{name: choice}), name) == choice for choice in option.choices)
        wrong = [None, 0.5, True]
        wrong += (
            ["", "nonsense", 3] if option.choices else [3] if isinstance(option.default, str) else [option.low - 1, "1"]
        )
        for value in wrong:
            with pytest.raises(pack("lora2.util.errors").LoraError, match=rf"^{name} = .*\.$"):
                request(**{name: value})
