"""Files and folders that are complete or absent, their fingerprints and locks, and folders that ship with llmtune."""

from llmtune.files.hashes import are_fingerprints, digest_of, digest_of_files, fingerprint
from llmtune.files.places import cache_folder, hold, home_folder, shipped_folder, user_path
from llmtune.files.room import remove_unused, used_at
from llmtune.files.writing import (
    ERROR_FILE,
    as_json,
    delete,
    finish,
    link,
    read_json,
    remove_at_once,
    remove_leftovers,
    write_file,
    write_folder,
    write_json,
    write_text,
)

__all__ = [
    "ERROR_FILE",
    "are_fingerprints",
    "as_json",
    "cache_folder",
    "delete",
    "digest_of",
    "digest_of_files",
    "fingerprint",
    "finish",
    "hold",
    "home_folder",
    "link",
    "read_json",
    "remove_at_once",
    "remove_leftovers",
    "remove_unused",
    "shipped_folder",
    "used_at",
    "user_path",
    "write_file",
    "write_folder",
    "write_json",
    "write_text",
]
