"""The Hub that is used: the public one, or a private one that HF_ENDPOINT names."""

from urllib.parse import urlsplit

from huggingface_hub import constants

from llmtune.errors import PublishError

PUBLIC = "https://huggingface.co"


def page_of(repo: str) -> str:
    """The address of a repository's page."""
    return f"{constants.ENDPOINT}/{repo}"


def private_endpoint() -> str | None:
    """The address of a Hub that is not the public one; None for that."""
    return None if constants.ENDPOINT == PUBLIC else str(constants.ENDPOINT)


def hub_words() -> str:
    """The Hub as messages name it."""
    private = private_endpoint()
    return f"the Hub at {private}" if private else "the Hub"


def check_endpoint() -> None:
    """Raise PublishError where HF_ENDPOINT is no address."""
    parts = urlsplit(constants.ENDPOINT)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise PublishError(f"HF_ENDPOINT={constants.ENDPOINT} is no address; write it as https://hub.example.org")
    if parts.username or parts.password:
        raise PublishError("HF_ENDPOINT holds a user name or password; take it out, and log in with HF_TOKEN")
