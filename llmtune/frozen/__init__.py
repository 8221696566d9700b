"""Blocks that do not train run once per row: their outputs are cached on disk, or the blocks are streamed."""
