"""The bench: the same rows, batches and steps through llmtune and other tools."""

from llmtune.launch.quiet import quiet_libraries

quiet_libraries()
