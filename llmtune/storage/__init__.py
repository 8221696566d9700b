"""A run's folder kept on a store that fsspec reaches."""
