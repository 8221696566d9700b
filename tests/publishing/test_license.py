"""The license of a base, in the form that the Hub takes: one, or another one that is named after several."""

from typing import Any

import pytest
from huggingface_hub import constants

from llmtune.publishing.license import license_fields

LINK = "https://huggingface.co/acme/tiny"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"license": "mit"}, {"license": "mit"}),
        ({"license": ["mit"]}, {"license": "mit"}),
        ({"license": ["mit", "mit"]}, {"license": "mit"}),
        (
            {"license": ["mit", "apache-2.0"]},
            {"license": "other", "license_name": "mit-and-apache-2.0", "license_link": LINK},
        ),
        (
            {"license": "other", "license_name": "tiny", "license_link": "LICENSE"},
            {"license": "other", "license_name": "tiny", "license_link": "LICENSE"},
        ),
        ({"license": None}, {}),
        ({"license": []}, {}),
        ({"license": {"name": "mit"}}, {}),
        ({"license": 4}, {}),
        ({"license": ""}, {}),
        ({"license_name": "tiny"}, {}),
        ({}, {}),
    ],
)
def test_gives_one_license_as_text(fields: dict[str, Any], expected: dict[str, str]) -> None:
    assert license_fields(fields, "acme/tiny") == expected


def test_links_to_no_card_of_a_base_that_is_not_on_the_hub() -> None:
    assert license_fields({"license": ["mit", "OFL 1.1"]}, None) == {
        "license": "other",
        "license_name": "mit-and-ofl-1.1",
    }


def test_links_to_the_base_on_the_hub_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example.org")
    fields = license_fields({"license": ["mit", "apache-2.0"]}, "acme/tiny")
    assert fields["license_link"] == "https://hub.example.org/acme/tiny"
