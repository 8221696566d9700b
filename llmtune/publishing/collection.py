"""The collection that a recipe names: looked up by its title among the owner's, created private where it is missing."""

from typing import Any

from huggingface_hub import Collection

from llmtune.errors import PublishError
from llmtune.publishing.hub import Target


def open_collection(target: Target, title: str) -> Collection:
    """Return the owner's collection of that title, created where there is none; raises PublishError."""
    owner = target.publish.repo.split("/")[0]

    def look() -> Collection | None:
        return next((one for one in target.api.list_collections(owner=owner) if one.title == title), None)

    def create() -> Collection:
        return target.api.create_collection(title, namespace=owner, private=True, exists_ok=True)

    doing = f"opening the collection {title!r} for"
    return target.ask(doing, look) or target.ask(doing, create)


def add_to_collection(target: Target, title: str) -> dict[str, Any]:
    """Put the published repository into the collection and return its title and address.

    Raises PublishError, which says that the upload itself stands.
    """
    try:
        collection = open_collection(target, title)
        add = target.api.add_collection_item
        repo = target.publish.repo
        target.ask(
            f"putting into the collection {title!r}",
            lambda: add(collection.slug, item_id=repo, item_type="model", exists_ok=True),
        )
    except PublishError as error:
        raise PublishError(f"the upload is complete, but {error}") from error
    return {"title": title, "url": collection.url}
