"""A base is asked once: its answers are kept, and a later evaluation under the same settings reads them."""
