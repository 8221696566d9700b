"""A run's folder on a store that fsspec reaches: worked on in a folder here, and kept complete there."""

from llmtune.storage.session import fetch, keep_stored
from llmtune.storage.urls import run_folder, stored_at, url_of

__all__ = ["fetch", "keep_stored", "run_folder", "stored_at", "url_of"]
