"""The files of a base: where they lie, what they hold, and by which fingerprints a run knows them again."""
