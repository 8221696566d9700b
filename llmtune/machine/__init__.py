"""This machine: its devices, its memory, and settings that keep memory small."""
