"""Base and tuned model of a run in memory, each where and as its recipe computes, never as two copies of the base."""
